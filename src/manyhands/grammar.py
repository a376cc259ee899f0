"""The one text grammar: ``name``, ``name(key=value, …)`` or ``my_pkg.module:name(key=value, …)``.

A value is a Python literal, ``inf``, ``nan`` or again a ``name(…)``; positional values are allowed where the class
takes them. Text is read with `ast` and never evaluated. What `format_call` prints, `parse_call` reads back to an equal
`Call`.
It stands below everything else because descriptions at every level (strategies, compressors, models, meshes) print
themselves with it.
"""

from __future__ import annotations

import ast
import dataclasses
import threading
from dataclasses import dataclass, field
from typing import Any

from manyhands.errors import BadInput

#: Held while a thread reads Python's grammar. CPython 3.11.4 to 3.11.7 and 3.12.0 to 3.12.1 count the depth of a syntax
#: tree in one place for all threads and raise SystemError where two are built at once (gh-106905).
PARSING = threading.RLock()


@dataclass(frozen=True)
class Call:
    """A parsed ``name(args, key=value)``: data only, nothing is looked up yet."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return format_call(self.name, *self.args, **self.kwargs)


def parse_call(text: str, *, kind: str = "value") -> Call:
    """Read ``text``; raises `BadInput` with the rule when it does not fit the grammar."""
    module, colon, rest = text.strip().partition(":")
    source, prefix = (rest, module + ":") if colon and "(" not in module else (text.strip(), "")
    try:
        with PARSING:
            node = ast.parse(source, mode="eval").body
            call = _value(node)
    except (SyntaxError, ValueError) as e:
        reason = e.msg if isinstance(e, SyntaxError) else str(e)
        raise BadInput(
            f"{kind} {text!r} cannot be read ({reason}). The form is name or name(key=value, …), values being numbers, "
            "strings, True/False/None, lists or again name(…)."
        ) from None
    if not isinstance(call, Call):
        raise BadInput(f"{kind} {text!r} is a bare value; the form is name or name(key=value, …).")
    return dataclasses.replace(call, name=prefix + call.name) if prefix else call


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call):
        if any(k.arg is None for k in node.keywords) or any(isinstance(a, ast.Starred) for a in node.args):
            raise ValueError("no * or **")
        names = [k.arg for k in node.keywords]
        if repeated := [n for n in names if names.count(n) > 1]:
            raise ValueError(f"{repeated[0]} is given twice")
        return Call(
            _dotted(node.func),
            tuple(_value(a) for a in node.args),
            {k.arg: _value(k.value) for k in node.keywords if k.arg is not None},
        )
    if isinstance(node, ast.Name) and node.id in ("inf", "nan"):  # as Python prints them; they have no literals
        return float(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Name):
        return -float(node.operand.id) if node.operand.id in ("inf", "nan") else ast.literal_eval(node)
    if isinstance(node, ast.Name | ast.Attribute):
        return Call(_dotted(node))
    if isinstance(node, ast.Tuple | ast.List):
        items = [_value(x) for x in node.elts]
        return tuple(items) if isinstance(node, ast.Tuple) else items
    return ast.literal_eval(node)


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    raise ValueError("a name is expected before the bracket")


def format_call(name: str, *args: Any, **kwargs: Any) -> str:
    """The text of a call; bare ``name`` when it has no arguments."""
    parts = [format_value(a) for a in args] + [f"{k}={format_value(v)}" for k, v in kwargs.items()]
    return f"{name}({', '.join(parts)})" if parts else name


def format_value(value: Any) -> str:
    """A value as the grammar reads it back."""
    if isinstance(value, tuple):
        inner = ", ".join(format_value(v) for v in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, list):
        return f"[{', '.join(format_value(v) for v in value)}]"
    if isinstance(value, str | bool | int | float | None):
        return repr(value)
    return str(value)


def format_description(name: str, obj: Any) -> str:
    """A frozen dataclass as text: its name and the fields that differ from their defaults, in its signature's order."""
    changed = {}
    for f in sorted(dataclasses.fields(obj), key=lambda f: f.kw_only is True):
        value = getattr(obj, f.name)
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if not f.init or value == default:
            continue
        changed[f.name] = value
    return format_call(name, **changed)
