"""Whatever form data comes in, it becomes numbered samples; what is no data is refused in words."""

from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import IterableDataset, Subset, TensorDataset

from manyhands.data import Arrays, Dataset, Splits, load
from manyhands.data.dataset import Collated, map_tensors
from manyhands.data.loading import as_dataset
from manyhands.errors import BadInput, UnknownName

HERE = "tests.data.test_loading"
Pair = namedtuple("Pair", "left right")
X, Y = torch.arange(24.0).view(12, 2), torch.arange(12) % 3


class Squares(torch.utils.data.Dataset[Any]):
    """A map-style data set as users write them."""

    classes = ("zero", "one", "two")

    def __init__(self, n: int = 12) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if i >= self.n:
            raise IndexError(i)
        return X[i], int(Y[i])


class Stream(IterableDataset[Any]):
    """Has no length and no numbers."""

    def __iter__(self):
        return iter([])


def splits() -> Splits:
    return Splits(Arrays(X, Y), None, (2,), 3, "mine", "mine: made up")


def pair():
    return Squares(), Squares(6)


def single():
    return Squares()


def arrays(n: int = 12):
    return X[:n], Y[:n]


def in_folder(folder: Path | None = None):
    assert folder is not None
    return arrays()


def not_data() -> str:
    return "no data"


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b)


@pytest.mark.parametrize("factory", [splits, pair, single, arrays, Squares])
@pytest.mark.parametrize("as_text", [True, False])
def test_every_form_a_factory_may_give_becomes_the_same_samples(factory: Any, as_text: bool):
    found = load(f"{HERE}:{factory.__name__}" if as_text else factory)
    assert isinstance(found.train, Dataset)
    inputs, target = found.train.rows(torch.tensor([3, 0, 3]))
    assert same(inputs, X[[3, 0, 3]])
    assert same(target, Y[[3, 0, 3]])
    assert (found.inputs, found.classes, len(found.train)) == ((2,), 3, 12)
    assert (found.test is None) == (factory is not pair)
    assert found.source


@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        (X.numpy(), Y.numpy()),
        (X.double().numpy(), Y.numpy()),
        ((X, Y), (X, Y)),
        (TensorDataset(X, Y), None),
        Squares(),
        [(x, y) for x, y in zip(X, Y, strict=True)],
        Arrays(X, Y),
        splits(),
    ],
)
def test_data_that_is_there_already_is_taken_as_it_is(data: Any):
    found = load(data)
    inputs, target = found.train.rows(torch.tensor([1, 5]))
    assert same(inputs, X[[1, 5]])
    assert same(target, Y[[1, 5]])


def test_tensors_in_memory_take_the_fast_way():
    assert isinstance(as_dataset(TensorDataset(X, Y)), Arrays)
    assert isinstance(as_dataset(Subset(TensorDataset(X, Y), [0, 1])), Collated)


def test_options_and_the_folder_reach_a_factory_that_names_them(tmp_path: Path):
    assert len(load(f"{HERE}:arrays(n=5)").train) == 5
    assert len(load(f"{HERE}:in_folder", folder=tmp_path).train) == 12
    assert len(load(f"{HERE}:in_folder(folder='{tmp_path}')").train) == 12


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), "is empty"),
        (torch.zeros(3, 4), torch.tensor([0, 1, -5]), "a target is -5"),
    ],
)
def test_samples_nobody_can_learn_from_are_refused(x, y, says):
    with pytest.raises(BadInput, match=says):
        load((x, y))


def test_a_target_to_be_ignored_is_no_class():
    assert load((torch.zeros(3, 4), torch.tensor([0, 1, -100]))).classes == 2


def test_inputs_that_are_no_single_tensor_have_no_shape_and_floats_no_classes():
    found = load(({"a": X, "b": (X, X)}, torch.rand(12, 3)))
    assert (found.inputs, found.classes) == (None, None)


TREES: list[tuple[Any, Any]] = [
    (X, Y),
    ({"a": X, "b": [X, Y]}, Y),
    (Pair(X, Y), (Y, X)),
    ((X, {"deep": (Y,)}), [Y]),
]


@pytest.mark.parametrize("tree", TREES, ids=["tensors", "dict", "namedtuple", "nested"])
@given(st.lists(st.integers(0, 11), max_size=9))
def test_rows_are_the_items_stacked_for_every_pytree(tree: tuple[Any, Any], numbers: list[int]):
    held = Arrays(*tree)
    rows = held.rows(torch.tensor(numbers, dtype=torch.int64))
    for part in (0, 1):
        stacked = map_tensors(lambda t: torch.stack([t[i] for i in numbers]) if numbers else t[:0], tree[part])
        assert str(rows[part]) == str(stacked)


@given(st.lists(st.integers(0, 11), max_size=9))
def test_a_users_data_set_and_arrays_give_the_same_rows(numbers: list[int]):
    indices = torch.tensor(numbers, dtype=torch.int64)
    for a, b in zip(Arrays(X, Y).rows(indices), Collated(Squares()).rows(indices), strict=True):
        assert same(a, b)
        assert a.dtype == b.dtype


def test_a_data_set_that_offers_whole_batches_is_asked_once():
    class Batched(Squares):
        asked = 0

        def __getitems__(self, numbers: list[int]) -> list[tuple[Tensor, int]]:
            self.asked += 1
            return [self[i] for i in numbers]

    items = Batched()
    Collated(items).rows(torch.tensor([1, 2, 3]))
    assert items.asked == 1


def test_rows_are_a_copy_and_iteration_ends():
    held = Arrays(X.clone(), Y.clone())
    held.rows(torch.arange(12))[0].zero_()
    assert same(held.inputs, X)
    assert len(list(held)) == 12  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("digit", "Did you mean 'digits'"),
        (f"{HERE}:not_data", "is a str, which is no data set"),
        (f"{HERE}:arrays(m=3)", "named 'm'. Known: n."),
        (f"{HERE}:array", "Did you mean 'arrays'"),
        (Stream(), "is a Stream"),
        ((Stream(), None), "is a Stream"),
        (TensorDataset(X), "an item is a tuple of 1"),
        ([1, 2, 3], "an item is a int"),
        ([], "is empty"),
        ((X, Y[:5]), "hold 12, 5 samples"),
        ((X, torch.tensor(1)), "one row for each sample"),
        ((X, ["a"]), "a sample holds a str"),
        (X, "without a target"),
        (5, "is a int"),
        ((X, Y, X), "an item is a tensor of shape (12, 2)"),
        (None, "is a NoneType"),
    ],
)
def test_what_is_no_data_is_refused_in_words(spec: Any, said: str):
    with pytest.raises(BadInput) as e:
        load(spec)
    assert said in str(e.value)


def test_an_unknown_name_lists_the_data_sets_and_auto():
    with pytest.raises(UnknownName) as e:
        load("imagenet")
    assert "auto" in str(e.value)


def test_numpy_doubles_become_torchs_default_type():
    found = load((np.zeros((4, 2)), np.arange(4)))
    assert found.train[0][0].dtype == torch.get_default_dtype()
