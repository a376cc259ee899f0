"""Call what a description names: its keywords checked first, what it did not say filled in.

A factory may be ours, torch's or the user's, so its signature is the only contract. A wrong keyword is found here,
before the call, and answered with the nearest right one; an exception inside the factory is the factory's own and
passes through.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from manyhands.catalogue import Catalogue
from manyhands.errors import BadInput, UnknownName
from manyhands.grammar import Call, parse_call

T = TypeVar("T")

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def call(
    kind: str,
    name: str,
    factory: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    offered: Mapping[str, Any] | None = None,
) -> Any:
    """``factory(*args, **kwargs)`` plus those of ``offered`` that its signature names and the user did not give.

    An offer of None is no offer. ``**kwargs`` in a signature does not ask for offers: what a factory only passes on,
    it may pass to something that does not know the word. A value that is a description itself arrives as its text.
    """
    args = [_plain(a) for a in args]
    given = {k: _plain(v) for k, v in (kwargs or {}).items()}
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # some classes written in C tell no signature
        return factory(*args, **given)
    taken = list(signature.parameters.values())[: len(args)]
    free = {p.name for p in signature.parameters.values() if p.kind in _NAMED and p not in taken}
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        for key in given:
            if key not in free:
                raise UnknownName(f"option of {kind} {name}", key, [p for p in signature.parameters if p in free])
    already = set(given) | _frozen_in(factory)
    filled = {k: v for k, v in (offered or {}).items() if v is not None and k in free and k not in already}
    try:
        signature.bind(*args, **given, **filled)
    except TypeError as e:
        missing = [p.name for p in signature.parameters.values() if p.name in free and p.default is p.empty]
        missing = [m for m in missing if m not in given and m not in filled]
        cure = f" Write {name}({', '.join(f'{m}=…' for m in missing)})." if missing else ""
        raise BadInput(f"{kind} {name}: {e}.{cure}") from None
    return factory(*args, **given, **filled)


def described(kind: str, value: object, among: Catalogue, base: type[T], example: str) -> T:
    """What a description stands for: an instance of ``base``, from its text ``name(option=…)`` or as it is.

    The name is looked up ``among`` the listed ones, or is the user's ``my_pkg.module:Name``. `str` of the result is
    expected to read back to an equal one. Raises `BadInput` and `UnknownName`; ``example`` is a text that is one.
    """
    if isinstance(value, base):
        return value
    own = base.__name__
    if not isinstance(value, str):
        article = "an" if own[0] in "AEIOU" else "a"
        raise BadInput(
            f"{kind} {value!r} is a {type(value).__name__}; it is text such as {example!r} or {article} {own}."
        )
    said = parse_call(value, kind=kind)
    cls = among.load(said.name)
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise BadInput(f"{kind} {said.name} is a {type(cls).__name__}; the rule is: a subclass of manyhands' {own}.")
    try:
        made = call(kind, said.name, cls, said.args, said.kwargs)
    except ValueError as e:
        raise BadInput(f"{kind} {value}: {e}.") from None
    assert isinstance(made, base)
    return made


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Call) else value


def _frozen_in(factory: Callable[..., Any]) -> set[str]:
    """Keywords that a `functools.partial` already carries: the user gave those."""
    return set(factory.keywords) | _frozen_in(factory.func) if isinstance(factory, functools.partial) else set()


def label(spec: Any) -> str:
    """How an error message names a description that is not text."""
    if isinstance(spec, str):
        return spec
    if isinstance(spec, functools.partial):
        return label(spec.func)
    module, name = getattr(spec, "__module__", None), getattr(spec, "__qualname__", None)
    return f"{module}:{name}" if module and name else repr(spec)
