"""What can be said on the command line: every command with its options, and how a mistake is answered.

The standard library's argparse reads it. jsonargparse was tried: it makes options out of classes, which we do not want
(one text grammar instead of generated sub-flags), and costs 0.1 s of import, a third of what ``--help`` may take.
An option that is not given is absent from the result, so that a file can say it; defaults are those of `Task` and
`Plan`. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from manyhands.errors import BadInput, UnknownName

#: The kinds that ``manyhands list`` knows.
KINDS = (
    "strategies",
    "aggregations",
    "compressors",
    "transports",
    "models",
    "data",
    "losses",
    "optimizers",
    "schedules",
    "partitions",
    "schemes",
    "pipelines",
    "clusters",
    "formulas",
    "stragglers",
    "failures",
)
#: Of a task, what can be said to a study.
STUDY_TASK = (
    *("model", "data", "loss", "optimizer", "schedule", "clip", "batch_size", "batch_per_worker"),
    *("epochs", "steps", "seconds", "target_accuracy", "seed"),
)
#: The lists of a search.
SPACE = ("workers", "threads", "strategies", "meshes", "compressors", "micro_batches")

EPILOG = """\
Text such as perceptron(hidden=50) is a name with options; your own model, data, loss, optimizer or strategy is
my_pkg.module:name. Under torchrun, mpirun or srun the same command joins the ranks they started.
Exit status: 0 done, 1 the run failed, 2 bad input found before any work, 130 interrupted."""


class Parser(argparse.ArgumentParser):
    """Mistakes become `BadInput`, so that all of them end in the same way."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            allow_abbrev=False,  # an abbreviation means something else once another option exists
            argument_default=argparse.SUPPRESS,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30),
            **settings,
        )

    def error(self, message: str) -> NoReturn:
        """One plain message."""
        raise BadInput(f"{message.removeprefix('argument ')}. What there is: {self.prog} --help")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command and what was said to it; raises `BadInput`, with the nearest name where one is unknown."""
    parser, commands = declare()
    command = next((a for a in arguments if not a.startswith("-")), None)
    if command is not None and command not in commands:
        raise UnknownName("command", command, commands)
    said, extra = parser.parse_known_args(arguments)
    if command is None:
        if extra:
            raise UnknownName("option of manyhands", extra[0], ["--help", "--version"])
        parser.print_help(sys.stderr)
        raise BadInput("a command is missing: " + ", ".join(commands))
    unknown = next((a.partition("=")[0] for a in extra if a.startswith("-")), None)
    if unknown is not None:
        raise UnknownName(f"option of manyhands {command}", unknown, _names(commands[command]))
    if extra:
        raise BadInput(f"{command} does not take {extra[0]!r}. What there is: manyhands {command} --help")
    return said


def _names(parser: argparse.ArgumentParser) -> list[str]:
    return [name for name in parser._option_string_actions if name.startswith("--")]


def declare() -> tuple[Parser, dict[str, Parser]]:
    """The whole command line, and the parser of each command."""
    parser = Parser(
        prog="manyhands",
        description="Train a PyTorch model with many workers under every parallel-training scheme, and know the cost.",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and end")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser, title="commands")
    made = {}
    for name, declared, says in (
        ("train", _train, "one plan on real processes"),
        ("predict", _predict, "what one plan will cost, before it is run: step time in parts, bytes, an error bar"),
        ("search", _search, "which of many plans to take: the best by prediction, what ties, how many workers pay"),
        ("simulate", _simulate, "one plan in virtual time, on a cluster one need not have; starts no process"),
        ("calibrate", _calibrate, "measure this machine, in two minutes, for predictions: into the cache, or a file"),
        ("plan", _plan, "what a plan comes to: decided, and what each worker would hold and send; nothing is started"),
        ("study", _study, "a grid of plans side by side; without a name, the small default study of this machine"),
        ("report", _report, "(re)draw the report of a study's folder"),
        ("list", _list, "the catalogue: names; with a kind, also parameters, guarantees and papers"),
        ("verify", _verify, "whether training under every strategy equals one process, on this machine"),
        ("doctor", _doctor, "versions, cores, transports, data: what works, what is missing, how to get it"),
    ):
        made[name] = commands.add_parser(name, help=says, description=says[0].upper() + says[1:] + ".", epilog=EPILOG)
        declared(made[name])
        made[name].add_argument("--json", action="store_true", help="print one JSON document alone on standard output")
        made[name].add_argument("--verbose", action="store_true", help="log what is done, on standard error")
    return parser, made


class _Version(argparse.Action):
    def __call__(self, *_: Any) -> NoReturn:
        import importlib.metadata

        sys.stdout.write(f"manyhands {importlib.metadata.version('manyhands')}\n")
        raise SystemExit(0)


# -- each command ------------------------------------------------------------------------------------------------------


def _what_to_learn(task: argparse._ArgumentGroup, *, default: Callable[[str], str]) -> None:
    """What `train` and `study` may say of a task; ``default`` words what holds when it is not said."""
    task.add_argument("--model", metavar="MODEL", help="name or name(key=value, …)" + default("perceptron"))
    task.add_argument("--data", metavar="DATA", help="data set; auto: MNIST if at hand, else digits" + default("auto"))
    task.add_argument("--loss", metavar="LOSS", help="none: the model returns its own loss" + default("cross_entropy"))
    task.add_argument("--optimizer", metavar="OPT", help="e.g. adamw(lr=1e-3)" + default("sgd(lr=0.1)"))
    task.add_argument("--schedule", metavar="SCHED", help="learning rate by the step, e.g. cosine" + default("none"))
    task.add_argument("--clip", type=_number, metavar="NORM", help="limit of the gradient's norm" + default("none"))
    size = task.add_mutually_exclusive_group()
    size.add_argument("--batch-size", type=_whole, metavar="N", help="global: over all workers" + default("100"))
    size.add_argument("--batch-per-worker", type=_whole, metavar="N", help="the global batch is N × workers")
    length = task.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=_whole, metavar="N", help="passes over the data" + default("1"))
    length.add_argument("--steps", type=_whole, metavar="N", help="steps, instead of epochs")
    task.add_argument("--seconds", type=_number, metavar="S", help="end earlier: after so much training")
    task.add_argument("--target-accuracy", type=_number, metavar="A", help="end earlier: at an accuracy, 0 … 1")
    task.add_argument("--seed", type=_whole, metavar="N", help="of weights and order" + default("0"))


def _train(parser: Parser) -> None:
    _task_and_plan(parser)
    run = parser.add_argument_group("the run")
    run.add_argument("--out", type=Path, metavar="DIR", help="keep plan, metrics, summary and checkpoints there")
    run.add_argument("--resume", action="store_true", help="go on with the run in --out, as its plan.toml says")
    _file_and_data(run)
    run.add_argument(
        "--evaluate", type=_when, metavar="WHEN", help="epoch, end, never, or every so many steps (default: epoch)"
    )
    run.add_argument(
        "--checkpoint", type=_when, metavar="WHEN", help="epoch, end, or every so many steps (default: epoch)"
    )
    run.add_argument("--keep", type=_whole, metavar="N", help="newest checkpoints that stay (default: 3)")
    _tracing(run)
    _quiet(run)


def _simulate(parser: Parser) -> None:
    _task_and_plan(parser)
    cost = parser.add_argument_group("what takes how long")
    cost.add_argument(
        "--cluster", metavar="NAME|FILE", help="a ready one's name or a TOML file (default: ethernet_10g)"
    )
    cost.add_argument(
        "--compute-s", type=_number, metavar="S", help="a worker's forward and backward (default: measured here)"
    )
    cost.add_argument(
        "--update-s", type=_number, metavar="S", help="its optimizer, with --compute-s (default: 0; measured with it)"
    )
    cost.add_argument(
        "--stragglers",
        action="append",
        metavar="KIND",
        help='"lognormal(sigma=0.3)", exponential, "pareto(alpha=2.5)" or "slow(workers=1, factor=3)"; may be repeated',
    )
    cost.add_argument(
        "--failures",
        metavar="F",
        help='"failures(mtbf_s=2.6e6, checkpoint_s=30, restart_s=120)", of one worker; every_s: between checkpoints',
    )
    run = parser.add_argument_group("the run")
    run.add_argument("--sizes", action="store_true", help="no numbers: times and traffic only, of thousands of workers")
    _tracing(run)
    run.add_argument(
        "--evaluate", type=_when, metavar="WHEN", help="epoch, never, or every so many steps (default: epoch)"
    )
    _file_and_data(run)


def _predict(parser: Parser) -> None:
    _task_and_plan(parser)
    cost = parser.add_argument_group("what takes how long")
    _priced_by(cost)
    run = parser.add_argument_group("the run")
    _file_and_data(run)


def _search(parser: Parser) -> None:
    task = parser.add_argument_group("what to learn")
    _what_to_learn(task, default=lambda text: f" (default: {text})")
    task.add_argument("--lr", type=_number, metavar="RATE", help="learning rate, in place of the optimizer's")
    lists = parser.add_argument_group("which plans, as lists; each has a default")
    for option, name, says in (
        ("--workers", "workers", "e.g. 1,2,4 (default: powers of two up to the cores, or 8 nodes of a cluster)"),
        ("--threads", "threads", "per worker (default: 1, and cores / workers)"),
        ("--micro-batches", "micro_batches", "passes of a step (default: 1,2,4)"),
    ):
        lists.add_argument(option, dest=f"some_{name}", type=_wholes, metavar="N,…", help=says)
    for option, name, says in (
        ("--strategy", "strategies", "may be repeated (default: synchronous, local, ssp, gossip)"),
        (
            "--mesh",
            "meshes",
            "data, or e.g. tensor=2 with replicas of that; may be repeated (default: data, and some cuts)",
        ),
        ("--compress", "compressors", "may be repeated (default: none, bfloat16, top_k, powersgd)"),
    ):
        lists.add_argument(
            option, dest=f"some_{name}", action="append", metavar=option[2:].upper().replace("-", "_"), help=says
        )
    lists.add_argument(
        "--recompute", dest="some_recompute", action="store_true", help="pipelines that compute activations anew, too"
    )
    lists.add_argument("--limit", type=_whole, metavar="N", help="plans at most (default: 1000)")
    same = parser.add_argument_group("what all plans have in common")
    for option, says in (
        ("--precision", "float32, bfloat16 autocast or flexpoint, simulated (default: float32)"),
        ("--transport", "auto, shared, threads, gloo, mpi … (default: auto)"),
        ("--device", "auto, cpu or cuda (default: auto)"),
        ("--allocator", "tuned or plain: glibc's malloc (default: tuned)"),
    ):
        same.add_argument(option, metavar=option[2].upper(), help=says)
    cost = parser.add_argument_group("what takes how long")
    _priced_by(cost)
    cost.add_argument("--measure", type=_whole, metavar="N", help="run the best N for some seconds, and re-rank them")
    cost.add_argument(
        "--study", type=Path, metavar="DIR", help="rank by time to the target that this study's runs reached"
    )
    cost.add_argument(
        "--price", dest="price_per_worker_hour", type=_number, metavar="P", help="of a worker for an hour"
    )
    _file_and_data(parser.add_argument_group("the run"))


def _calibrate(parser: Parser) -> None:
    parser.add_argument("--out", type=Path, metavar="FILE.toml", help="a cluster file (default: the user's cache)")
    parser.add_argument("--quick", action="store_true", help="20 s: few sizes, two workers, no operators")
    parser.add_argument(
        "--transport",
        dest="transports",
        type=_names_of,
        metavar="T,…",
        help="one or several, with commas (default: those of shared,threads,gloo,mpi that work here)",
    )
    _quiet(parser)


def _plan(parser: Parser) -> None:
    _task_and_plan(parser)
    shown = parser.add_argument_group("the outline")
    _file_and_data(shown)
    shown.add_argument("--draw", type=Path, metavar="FILE.svg", help="draw who holds what, and a pipeline's schedule")


def _file_and_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--config", type=Path, metavar="FILE", help="TOML, [task] and [plan]; options here go before it")
    group.add_argument("--data-dir", type=Path, metavar="DIR", help="where data lies (default: $MANYHANDS_DATA)")


def _task_and_plan(parser: Parser) -> None:
    task = parser.add_argument_group("what to learn")
    _what_to_learn(task, default=lambda text: f" (default: {text})")
    task.add_argument("--lr", type=_number, metavar="RATE", help="learning rate, in place of the optimizer's")

    plan = parser.add_argument_group("how the work is split")
    plan.add_argument("--strategy", metavar="STRATEGY", help="how workers agree (default: synchronous)")
    plan.add_argument("--workers", type=_whole, metavar="N", help="(default: what the launcher started, or cores)")
    plan.add_argument("--mesh", metavar="AXES", help="named axes over the workers (default: data=WORKERS)")
    plan.add_argument(
        "--tensor",
        metavar="RULES",
        help="what is cut along it, e.g. 'up=column, down=row', or a scheme (default: auto)",
    )
    plan.add_argument(
        "--pipeline", metavar="SCHEDULE", help="and stages, e.g. \"gpipe(cut='b2')\" (default: one_f_one_b)"
    )
    plan.add_argument(
        "--recompute", action="store_true", help="of a pipeline: activations anew before a backward (default: False)"
    )
    plan.add_argument(
        "--compress",
        metavar="COMPRESSOR",
        help="what is sent instead of dense gradients: auto, or e.g. 'top_k(ratio=0.01)' (see: list compressors)",
    )
    plan.add_argument(
        "--micro-batches", type=_whole, metavar="N", help="passes of a step (default: 1, of a pipeline 4 a stage)"
    )
    plan.add_argument("--buffers", metavar="POLICY", help="average, rank0 or local: BatchNorm's (default: average)")
    plan.add_argument(
        "--precision", metavar="P", help="float32, bfloat16 autocast or flexpoint, simulated (default: float32)"
    )
    plan.add_argument(
        "--shard", type=_whole, metavar="STAGE", help="share out 1: optimizer state, 2: gradients, 3: parameters"
    )
    plan.add_argument("--transport", metavar="T", help="auto, single, threads, shared, gloo, nccl, mpi (default: auto)")
    plan.add_argument("--device", metavar="D", help="auto, cpu or cuda (default: auto)")
    plan.add_argument("--threads", type=_whole, metavar="N", help="per worker (default: 0, cores / workers)")
    plan.add_argument("--allocator", metavar="A", help="tuned or plain: glibc's malloc (default: tuned)")
    plan.add_argument(
        "--timeout", dest="timeout_s", type=_number, metavar="SECONDS", help="of any one wait (default: 60.0)"
    )


def _study(parser: Parser) -> None:
    parser.add_argument("name", nargs="?", default=None, metavar="NAME|FILE.toml", help="which study")
    parser.add_argument("--out", type=Path, metavar="DIR", help="rows and report; one that has rows goes on there")
    parser.add_argument(
        "--repeats", type=_whole, metavar="N", help="of plans whose grid says none (default: the study's)"
    )
    parser.add_argument("--workers", type=_whole, metavar="N", help="at most so many (default: as the study says)")
    parser.add_argument("--quick", action="store_true", help="the short form of a built-in study")
    parser.add_argument("--dry-run", action="store_true", help="only tell what would run, and how long that would take")
    parser.add_argument("--again", action="store_true", help="run what is done in --out anew, too")
    parser.add_argument("--no-predict", action="store_true", help="do not predict each plan's step before it is run")
    parser.add_argument(
        "--simulate", metavar="FIRST..LAST", help="go on with simulated workers, e.g. 2..1024: 2, 4, 8 … 1024"
    )
    parser.add_argument(
        "--cluster", metavar="NAME|FILE", help="of --simulate (default: nodes like this one over ethernet_10g)"
    )
    parser.add_argument("--trace", action="store_true", help="trace.json in each run's folder: who did what when")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where data lies (default: $MANYHANDS_DATA)")
    _quiet(parser)
    task = parser.add_argument_group("what to learn, in place of the study's own, also of what its grids vary")
    _what_to_learn(task, default=lambda _: "")


def _report(parser: Parser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of a study")
    parser.add_argument(
        "--export",
        dest="exports",
        type=Path,
        action="append",
        metavar="FILE",
        help="write the rows as .csv or .parquet, too; may be repeated",
    )


def _list(parser: Parser) -> None:
    parser.add_argument("kind", nargs="?", default=None, metavar="KIND", help=", ".join(KINDS))


def _verify(parser: Parser) -> None:
    parser.add_argument("--workers", type=_whole, metavar="N", help="(default: 3, so that nothing divides evenly)")
    parser.add_argument(
        "--transport",
        dest="transports",
        type=_names_of,
        metavar="T,…",
        help="one or several, with commas (default: single,threads,shared,gloo)",
    )
    parser.add_argument(
        "--strategy", dest="strategies", action="append", metavar="STRATEGY", help="only this one; may be repeated"
    )
    parser.add_argument("--optimizer", metavar="OPT", help="(default: sgd(lr=0.1))")


def _doctor(parser: Parser) -> None:
    parser.add_argument("--quick", action="store_true", help="do not start workers to try the transports")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where data lies")


def _priced_by(cost: argparse._ArgumentGroup) -> None:
    cost.add_argument(
        "--cluster",
        metavar="NAME|FILE",
        help="a ready one's name or a TOML file (default: this machine, as calibrated)",
    )
    cost.add_argument(
        "--compute",
        metavar="SOURCE",
        help="where computing is known from: measured, operators or roofline (default: the best there is)",
    )
    cost.add_argument("--fresh", action="store_true", help="measure anew what was measured within the last day")


def _tracing(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--trace", type=Path, metavar="FILE.json", help="who did what when, for Perfetto")


def _quiet(parser: Any) -> None:
    parser.add_argument("-q", "--no-progress", action="store_true", help="do not show how far it is")


# -- values ------------------------------------------------------------------------------------------------------------


def _when(text: str) -> str | int:
    return int(text) if text.isdecimal() else text


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _wholes(text: str) -> list[int]:
    return [_whole(each) for each in text.split(",")]


def _names_of(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value
