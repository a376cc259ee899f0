"""The catalogues are the registry: what they list exists, is described and bears its name, and nothing is left out."""

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import manyhands
from manyhands.catalogue import Catalogue
from manyhands.communication.communicator import Communicator
from manyhands.consistency import strategies
from manyhands.contract import Strategy
from manyhands.partition import cut_strategies

#: Which package keeps its table of contents under which name.
CATALOGUES = {
    "manyhands.communication.transports": "transports",
    "manyhands.cluster": "clusters",
    "manyhands.communication.compression": "compressors",
    "manyhands.models": "models",
    "manyhands.data": "datasets",
    "manyhands.consistency": "strategies",
    "manyhands.consistency.robust": "aggregations",
    "manyhands.partition": "partitions",
    "manyhands.modelling.published": "formulas",
}
MODULES = [m.name for m in pkgutil.walk_packages(manyhands.__path__, "manyhands.")]
PACKAGES = [m.name for m in pkgutil.walk_packages(manyhands.__path__, "manyhands.") if m.ispkg]


def catalogues_of(package: str) -> dict[str, Catalogue]:
    """The catalogues that a package's ``__init__`` defines."""
    return {n: v for n, v in vars(importlib.import_module(package)).items() if isinstance(v, Catalogue)}


#: Each catalogue once, though a package above may offer it too.
FOUND = {id(c): (package, attribute, c) for package in PACKAGES for attribute, c in catalogues_of(package).items()}
ENTRIES = [(package, attribute, name) for package, attribute, catalogue in FOUND.values() for name in catalogue]


def load(package: str, attribute: str, name: str):
    return catalogues_of(package)[attribute].load(name)


@pytest.mark.parametrize("package", [p for p in CATALOGUES if p in PACKAGES])
def test_each_package_keeps_its_catalogue_under_the_agreed_name(package):
    assert CATALOGUES[package] in catalogues_of(package)


@pytest.mark.parametrize(("package", "attribute", "name"), ENTRIES)
def test_an_entry_exists_and_is_described(package, attribute, name):
    entry = load(package, attribute, name)
    assert callable(entry)
    own = vars(entry).get("__doc__") if inspect.isclass(entry) else entry.__doc__
    assert own, f"{entry} has no docstring of its own"
    assert not own.startswith(f"{entry.__name__}("), f"{entry} has only the signature that dataclass wrote"


@pytest.mark.parametrize(("package", "attribute", "name"), ENTRIES)
def test_a_class_bears_the_name_it_is_listed_under(package, attribute, name):
    entry = load(package, attribute, name)
    if inspect.isclass(entry) and issubclass(entry, Strategy):
        assert entry.name == name
        assert entry.paper.year
    elif inspect.isclass(entry) and issubclass(entry, Communicator):
        assert entry.transport == name
    else:
        assert getattr(entry, "name", name) == name


@pytest.mark.parametrize(("base", "title"), [(Strategy, "name"), (Communicator, "transport")])
def test_every_class_with_a_name_is_listed(base, title):
    """A new file without its line in the table of contents is found."""
    for name in MODULES:
        if not name.endswith("__main__"):
            importlib.import_module(name)
    listed = {load(*entry) for entry in ENTRIES}
    named = [c for c in _subclasses(base) if c.__module__.startswith("manyhands.") and title in vars(c)]
    assert [f"{c.__module__}:{c.__name__}" for c in named if c not in listed] == []


def test_strategies_of_partition_and_only_they_update_within_the_cut():
    every = Catalogue("strategy", {**strategies, **cut_strategies})
    within = [name for name in every if every.load(name).updates_within]
    assert within == list(cut_strategies)


def _subclasses(cls: type) -> list[type]:
    return [c for sub in cls.__subclasses__() for c in (sub, *_subclasses(sub))]


@pytest.mark.parametrize("package", ["manyhands", *PACKAGES])
def test_all_names_what_can_be_imported(package):
    module = importlib.import_module(package)
    names = getattr(module, "__all__", [])
    assert len(set(names)) == len(names)
    for name in names:
        assert getattr(module, name) is not None


def test_every_package_and_module_says_what_it_is():
    for name in ("manyhands", *MODULES):
        if not name.endswith("__main__"):
            assert importlib.import_module(name).__doc__, name


def imports_torch(*modules: str) -> bool:
    """Whether a fresh interpreter has torch after importing ``modules``."""
    code = f"import sys, {', '.join(modules)}; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip() == "True"


def test_import_manyhands_does_not_import_torch():
    assert not imports_torch("manyhands")


def test_the_tables_of_contents_do_not_import_torch():
    """So that ``manyhands --help`` and ``manyhands list`` answer at once."""
    assert not imports_torch(*(p for p in CATALOGUES if p in PACKAGES))
