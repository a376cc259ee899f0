"""The experiments of 2018: parallel parameter update on MNIST (X. Ma, CSE 633, 3 May 2018), run again.

The slides train two networks with one process a node, MPI's Scatter and Allgather, and show four plots: time per
iteration against nodes and against the batch size, accuracy against the batch size and against nodes. They conclude:

    (a) a larger batch helps convergence
    (b) at a large batch more nodes bring little
    (c) at a small batch more nodes help, with more overhead
    (d) more nodes smooth the gradient

What is not on the slides had to be inferred: the algorithm (five readings, `VARIANTS`), the data (images of 28 × 28 in
ten classes: MNIST), and that an *iteration* is an epoch (a step of 50 images takes milliseconds, not 9 seconds).

`design` says which runs answer this, `reading` finds them again among the rows, `conclusions` judges the four
conclusions, `figures` draws.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Seconds per iteration on the slides, by batch size; the number of nodes is not stated. Good for its shape only.
PUBLISHED_S = {50: 9.1768, 100: 11.94646, 150: 12.99369, 200: 11.68846}
BATCHES = tuple(PUBLISHED_S)
#: λ of the slides' loss ½Σ(y − f)² + λ/2·‖w‖².
LAMBDA = 5.0


@dataclass(frozen=True)
class Variant:
    """One reading of what the slides' update was."""

    name: str
    strategy: str
    own_batch: bool  # a batch on each node (weak scaling), or one batch in all (strong)
    says: str


VARIANTS = (
    Variant("U1", "replica_average", True, "a batch a node, all-gather of whole gradients, local mean"),
    Variant("U1s", "replica_average", False, "the same with one batch divided over the nodes"),
    Variant("U2", "slice_update", False, "the whole batch on every node, a slice of the update each"),
    Variant("U2b", "slice_own_batch", True, "a batch a node, a slice of the update each, gradients stay at home"),
    Variant("sharded", "synchronous(update='sharded')", True, "a batch a node, reduce-scatter, update, all-gather"),
)


@dataclass(frozen=True)
class Setting:
    """A network with a loss and a learning rate at which all batch sizes are stable."""

    name: str
    model: str
    squared: bool  # the slides' loss, else cross-entropy
    lr: float

    def task(self, nodes: int, *, own_batch: bool) -> dict[str, str | float]:
        """Loss and optimizer for so many nodes.

        The slides' loss is a sum over a node's batch, and U1 takes the mean over nodes. Ours adds over nodes, so that
        mean is the same update with lr/P and Pλ.
        """
        times = nodes if self.squared and own_batch else 1
        loss = f"squared_error(l2={LAMBDA * times})" if self.squared else "cross_entropy"
        return {"model": self.model, "loss": loss, "optimizer": f"sgd(lr={self.lr / times:g})"}


ANN_10 = Setting("ANN 10, squared loss", "perceptron(hidden=10)", True, 3e-4)
ANN_50 = Setting("ANN 50, squared loss", "perceptron(hidden=50)", True, 3e-4)
ANN_50_CE = Setting("ANN 50, cross-entropy", "perceptron(hidden=50)", False, 0.1)
CNN = Setting("CNN, cross-entropy", "cnn", False, 0.05)
CNN_SQUARED = Setting("CNN, squared loss", "cnn", True, 3e-4)
SETTINGS = (ANN_10, ANN_50, ANN_50_CE, CNN, CNN_SQUARED)
