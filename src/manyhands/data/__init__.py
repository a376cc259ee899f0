"""What is learned from: data sets by name, and the one form in which everything above sees them.

`datasets` goes from a name to ``module:attribute``; a new data set is one file and one line here. Your own is
``my_pkg.module:factory``. ``auto`` takes MNIST when its files are at hand and else the digits that come with the
package. Nothing here imports torch until data is loaded.
"""

from typing import TYPE_CHECKING, Any

from manyhands.catalogue import Catalogue

if TYPE_CHECKING:
    from manyhands.data.dataset import Arrays as Arrays
    from manyhands.data.dataset import Dataset as Dataset
    from manyhands.data.dataset import Splits as Splits
    from manyhands.data.loading import load as load

datasets = Catalogue(
    "data set",
    {
        "digits": "manyhands.data.digits:digits",
        "mnist": "manyhands.data.mnist:mnist",
        "synthetic": "manyhands.data.synthetic:synthetic",
        "tinyshakespeare": "manyhands.data.tinyshakespeare:tinyshakespeare",
        "markov": "manyhands.data.markov:markov",
        "list_reduction": "manyhands.data.list_reduction:list_reduction",
        "boolean_trees": "manyhands.data.boolean_trees:boolean_trees",
        "sparse_logistic": "manyhands.data.sparse:sparse_logistic",
        "ratings": "manyhands.data.sparse:ratings",
    },
)

__all__ = ["Arrays", "Dataset", "Splits", "datasets", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from manyhands.data.loading import load

        return load
    if name in __all__:
        from manyhands.data import dataset

        return getattr(dataset, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
