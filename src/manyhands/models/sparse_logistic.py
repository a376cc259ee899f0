"""Logistic regression on sparse samples: one weight for each feature, and a step that concerns those of a sample only.

    z = Σ_k w[index_k] · value_k,   outputs (0, z): softmax gives class 1 the probability 1 / (1 + exp(−z))

With the cross entropy the loss is log(1 + exp(−y·z)) for labels y = ±1, convex, and one of the problems of HOGWILD!.
There is no bias: every sample would touch it, and all workers would meet there.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from manyhands.catalogue import Reference
from manyhands.errors import BadInput
from manyhands.models.sizes import sample_shape


class SparseLogistic(nn.Module):
    """``(indices, values)``, each ``(n, support)``, to ``(n, 2)``; weights ``(features, 1)`` that start at 0.

    Their gradient is sparse: where the strategy can make use of that, only touched weights are updated.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weights = nn.EmbeddingBag(features, 1, mode="sum", sparse=True)
        nn.init.zeros_(self.weights.weight)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """Logits of the classes 0 and 1; the former's is 0."""
        indices, values = inputs
        z: Tensor = self.weights(indices, per_sample_weights=values.to(self.weights.weight.dtype))
        return F.pad(z, (1, 0))


def sparse_logistic(inputs: tuple[int, ...], classes: int = 2) -> SparseLogistic:
    """``((n, support), (n, support)) → (n, 2)``; as many parameters as features, of which a sample touches its own."""
    shape = sample_shape("sparse_logistic", inputs)
    if len(shape) != 1 or classes != 2:
        raise BadInput(
            f"model sparse_logistic: inputs={shape} in {classes} classes does not fit; it takes sparse samples of two "
            "classes, such as data=sparse_logistic. Images suit logistic."
        )
    return SparseLogistic(shape[0])


vars(sparse_logistic)["data"] = "sparse_logistic"  # what samples it takes
vars(sparse_logistic)["paper"] = Reference(
    "F. Niu, B. Recht, C. Ré, S. J. Wright",
    "HOGWILD!: a lock-free approach to parallelizing stochastic gradient descent",
    2011,
    "NeurIPS 24, arXiv:1106.5730",
)
