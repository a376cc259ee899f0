"""What the source may not contain: code that unpickles or evaluates what came from outside, stray prints, and what is
special about a strategy anywhere but in its own file (it declares it, see `contract.Strategy`).
"""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"
FILES = sorted(SOURCE.rglob("*.py"))

#: Reading what these wrote runs code of the writer's choice.
UNPICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
#: Methods that pickle what they move or store: torch.distributed's object collectives and torch's own file format.
PICKLING_CALLS = {
    "all_gather_object",
    "gather_object",
    "send_object_list",
    "recv_object_list",
    "broadcast_object_list",
    "scatter_object_list",
}


def offences(source: str, *, may_print: bool = False) -> list[str]:
    """Each forbidden construct of a file as ``line: what``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                modules = [alias.name for alias in node.names]
            case ast.ImportFrom():
                modules = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            case _:
                modules = []
        found += [f"{node.lineno}: imports {m}" for m in modules if UNPICKLERS & set(m.split("."))]
        if isinstance(node, ast.Compare) and "strategy.name" in ast.unparse(node):
            found.append(f"{node.lineno}: compares a strategy's name")
        if isinstance(node, ast.Call):
            found += [f"{node.lineno}: {what}" for what in _bad_call(node, may_print=may_print)]
    return found


def _bad_call(call: ast.Call, *, may_print: bool) -> list[str]:
    found = []
    name = ast.unparse(call.func)
    last = name.rpartition(".")[2]
    if name in ("eval", "exec", "compile", "builtins.eval", "builtins.exec"):
        found.append(f"calls {name}")
    if last in PICKLING_CALLS or last.endswith("_object_list"):
        found.append(f"calls {name}")
    if name in ("torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "yaml.full_load"):
        found.append(f"calls {name}")
    if any(k.arg == "weights_only" and ast.unparse(k.value) != "True" for k in call.keywords):
        found.append("weights_only is not True")
    if any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in call.keywords):
        found.append("allow_pickle is not False")
    if name in ("__import__", "importlib.import_module", "import_module") and call.args:
        argument = call.args[0]
        if isinstance(argument, ast.Constant) and str(argument.value).partition(".")[0] in UNPICKLERS:
            found.append(f"imports {argument.value}")
    if name == "print" and not may_print:
        found.append("prints")
    return found


def test_there_is_source_to_read():
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_source_file_is_safe(path):
    may_print = path.relative_to(SOURCE / "manyhands").parts[0] in ("cli", "cli.py")
    assert offences(path.read_text(encoding="utf-8"), may_print=may_print) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import torch.pickle as p",
        "from pickle import loads",
        "from torch.distributed import _pickle",
        "import cloudpickle, dill",
        "from marshal import load",
        "import shelve",
        "importlib.import_module('pickle')",
        "__import__('dill')",
        "dist.broadcast_object_list(x)",
        "all_gather_object(out, x)",
        "safe_open(f, weights_only=False)",
        "load(f, weights_only=flag)",
        "np.load(f, allow_pickle=True)",
        "torch.load(f)",
        "torch.save(x, f)",
        "eval(text)",
        "exec(text)",
        "yaml.load(text)",
        "def f():\n    print(1)",
        "plan.strategy.name == 'ssp'",
        "strategy.name in cut_strategies",
    ],
)
def test_each_forbidden_construct_is_found(text):
    assert len(offences(text)) >= 1


@pytest.mark.parametrize(
    "text",
    ["model.eval()", "ast.literal_eval(text)", "yaml.safe_load(text)", "re.compile(text)", "torch.compile(model)"],
)
def test_harmless_look_alikes_pass(text):
    assert offences(text) == []


def test_the_command_line_may_print():
    assert offences("print(1)", may_print=True) == []
