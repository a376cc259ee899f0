"""The one text grammar: what prints parses back, what is not of the form is refused and never evaluated."""

import dataclasses
import keyword
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhands.errors import BadInput
from manyhands.grammar import Call, format_call, format_description, format_value, parse_call

names = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True).filter(str.isidentifier)
names = names.filter(lambda n: not keyword.iskeyword(n) and n not in ("inf", "nan"))
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)


def calls(values: st.SearchStrategy) -> st.SearchStrategy:
    return st.builds(Call, names, st.lists(values, max_size=2).map(tuple), st.dictionaries(names, values, max_size=3))


values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | calls(inner)
)


@given(calls(values))
def test_what_prints_parses_back_to_an_equal_call(call):
    assert parse_call(str(call)) == call


@given(names, names, calls(values))
def test_a_module_path_before_the_colon_is_part_of_the_name(package, module, call):
    named = dataclasses.replace(call, name=f"{package}.{module}:{call.name}")
    assert parse_call(str(named)) == named


@given(values)
def test_a_value_is_read_as_it_was_written(value):
    assert parse_call(f"x(v={format_value(value)})").kwargs["v"] == value


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e308, 5e-324, -0.0])
def test_every_float_but_nan_survives(value):
    again = parse_call(format_call("x", v=value)).kwargs["v"]
    assert isinstance(again, float)
    assert again == value
    assert math.copysign(1, again) == math.copysign(1, value)


def test_nan_survives_as_nan():
    again = parse_call(format_call("x", v=math.nan)).kwargs["v"]
    assert isinstance(again, float)
    assert math.isnan(again)


@pytest.mark.parametrize("value", [[math.inf], (math.nan, 1.0), Call("y", (math.inf,))])
def test_infinities_survive_inside_other_values(value):
    again = parse_call(format_call("x", v=value)).kwargs["v"]
    assert format_value(again) == format_value(value)
    assert type(again) is type(value)


def test_names_without_brackets_and_with_empty_ones_are_the_same_call():
    assert parse_call("cnn") == parse_call("cnn()") == parse_call("  cnn ") == Call("cnn")


def test_bare_words_inside_are_descriptions_too():
    assert parse_call("x(a=top_k, b=y(1))").kwargs == {"a": Call("top_k"), "b": Call("y", (1,))}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "3",
        "'x'",
        "x(",
        "x(1",
        "x)(",
        "x(a=)",
        "x(*[1])",
        "x(**{'a': 1})",
        "x(a=1)(b=2)",
        "x()()",
        "lambda: 0",
        "x(a=b+c)",
        "x(a={b for b in c})",
        "x(a=__import__('os').system)(1)",
        "x[0]",
        "x y",
        "x(a=f'{1}')",
        "x\x00",
        "pkg.module:",
        "x(a=1, a=2)",
    ],
)
def test_what_is_not_of_the_form_is_refused_with_the_form(text):
    with pytest.raises(BadInput, match=r"strategy") as e:
        parse_call(text, kind="strategy")
    assert "name(key=value" in str(e.value)


@given(st.text(max_size=30))
def test_no_text_at_all_does_anything_but_parse_or_be_refused(text):
    try:
        parsed = parse_call(text)
    except BadInput:
        return
    assert isinstance(parsed, Call)


@pytest.mark.parametrize("depth", [50, 100_000])
def test_deep_nesting_is_read_or_refused_but_breaks_nothing(depth):
    text = "x(" * depth + ")" * depth
    try:
        assert str(parse_call(text)).startswith("x(x(")
    except BadInput:
        assert depth > 50


def test_nothing_is_evaluated(tmp_path):
    marker = tmp_path / "evaluated"
    text = f"x(a=open({str(marker)!r}, 'w'))"
    parse_call(text)
    assert not marker.exists()


def test_a_description_prints_only_what_differs_from_its_defaults():
    @dataclasses.dataclass(frozen=True)
    class Thing:
        a: int = 1
        b: list = dataclasses.field(default_factory=list)
        c: float = 0.5
        d: int = dataclasses.field(default=0, init=False)

    assert format_description("thing", Thing()) == "thing"
    assert format_description("thing", Thing(a=2, c=math.inf)).startswith("thing(a=2, c=")
    again = parse_call(format_description("thing", Thing(a=2, b=[1], c=math.inf)))
    assert Thing(**again.kwargs) == Thing(a=2, b=[1], c=math.inf)
