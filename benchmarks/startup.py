"""How long `import manyhands` and `manyhands --help` take, next to a bare interpreter; and that neither loads torch.

python benchmarks/startup.py [--quick] [--json FILE] [--rounds N]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import _measure as measure
from _measure import Burst, Report, Spread, Target

LIMIT_S = 0.3
BARE, IMPORT, HELP = "python -c pass", "python -c 'import manyhands'", "manyhands --help"
SCRIPT = str(Path(sys.executable).with_name("manyhands"))
COMMANDS = {
    BARE: [sys.executable, "-c", "pass"],
    IMPORT: [sys.executable, "-c", "import manyhands"],
    HELP: [SCRIPT, "--help"],
}
#: Prints whether torch was loaded by what stands before it.
LOADED = "import sys; print('torch' in sys.modules)"
HELP_CODE = """
import contextlib, io
from manyhands.cli import main
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    main(["--help"])
"""


def started(command: list[str]) -> measure.Candidate:
    """A candidate whose step is one process from start to end."""

    def run(steps: int, warm: int) -> list[Burst]:
        return [measure.burst(lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True), steps, warm, 0.0)]

    return run


def loads_torch(code: str) -> bool:
    """Whether torch is there after ``code``."""
    done = subprocess.run([sys.executable, "-c", f"{code}\n{LOADED}"], capture_output=True, text=True, check=True)
    return done.stdout.strip().endswith("True")


def main() -> None:
    """The three commands in turn."""
    options = measure.arguments(__doc__ or "")
    report = Report("startup")
    commands = {}
    for name, command in COMMANDS.items():
        try:
            subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=True)
        except (OSError, subprocess.CalledProcessError) as e:
            report.note(f"{name} is left out: {e}")
        else:
            commands[name] = started(command)
    rounds = options.rounds or (3 if options.quick else 20)
    measured = measure.alternate(commands, lambda: None, rounds=rounds, burst_s=0.0, least=1)
    targets = []
    for name, code in ((IMPORT, "import manyhands"), (HELP, HELP_CODE)):
        if name in commands:
            taken = Spread(*(1e3 * s for s in measured.seconds(name)))
            targets.append(Target(name, taken, "≤", LIMIT_S * 1e3, "ms"))
            loads = float(loads_torch(code))
            targets.append(Target(f"{name}: loads torch (1 = yes)", Spread(loads, loads, loads), "≤", 0))
    report.row("start", measured, targets)
    report.finish(options.json)


if __name__ == "__main__":
    main()
