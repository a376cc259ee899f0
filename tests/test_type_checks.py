"""Under pytest, and only there, the pure modules check the types that they declare (pyproject.toml names them)."""

import subprocess
import sys

import pytest
from jaxtyping import TypeCheckError

from manyhands.communication.collectives import even


def test_a_wrong_type_is_refused_under_pytest():
    with pytest.raises(TypeCheckError, match="numel"):
        even("five", 2)


def test_nothing_is_checked_in_production():
    code = "from manyhands.communication import collectives; import sys; assert 'beartype' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
