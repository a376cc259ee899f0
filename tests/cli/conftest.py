import sys
import textwrap

import pytest

from manyhands import cli


@pytest.fixture
def run(capsys):
    """``run("train", …)`` in this process: exit status, standard output, standard error."""

    def run(*arguments):
        capsys.readouterr()
        status = cli.main([str(a) for a in arguments])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture
def module(tmp_path, monkeypatch):
    """``module(text)`` writes a module of the user's beside which the test then stands; returns its name."""
    names = []

    def write(text):
        name = f"users_{tmp_path.name}_{len(names)}".replace("-", "_")
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        names.append(name)
        return name

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield write
    for name in names:
        sys.modules.pop(name, None)
