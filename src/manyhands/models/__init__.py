"""What is learned with: models, losses, optimizers and learning-rate schedules by name.

The models are those of the survey's source systems and a transformer, with sizes small enough to study parallel
training on one machine. Each table below goes from a name to ``module:attribute``; a new entry is one file and one line
here. A name in a plan is text, ``cnn`` or ``perceptron(hidden=100)``; your own is ``my_pkg.module:factory``. Nothing
here imports torch until a name is built.
"""

from typing import TYPE_CHECKING, Any

from manyhands.catalogue import Catalogue

if TYPE_CHECKING:
    from manyhands.models.factory import build as build

models = Catalogue(
    "model",
    {
        "logistic": "manyhands.models.logistic:logistic",
        "sparse_logistic": "manyhands.models.sparse_logistic:sparse_logistic",
        "factorisation": "manyhands.models.factorisation:factorisation",
        "perceptron": "manyhands.models.perceptron:perceptron",
        "cnn": "manyhands.models.cnn:cnn",
        "alexnet": "manyhands.models.alexnet:alexnet",
        "gpt": "manyhands.models.gpt:gpt",
        "list_rnn": "manyhands.partition.ampnet.list_reduction:list_rnn",
        "tree_rnn": "manyhands.partition.ampnet.tree:tree_rnn",
    },
)

loss_functions = Catalogue(
    "loss",
    {
        "cross_entropy": "manyhands.models.losses:CrossEntropy",
        "squared_error": "manyhands.models.losses:SquaredError",
    },
)

optimizer_classes = Catalogue(
    "optimizer",
    {
        "sgd": "torch.optim:SGD",
        "adam": "torch.optim:Adam",
        "adamw": "torch.optim:AdamW",
        "adagrad": "torch.optim:Adagrad",
        "rmsprop": "torch.optim:RMSprop",
        "adadelta": "torch.optim:Adadelta",
        "adamax": "torch.optim:Adamax",
        "nadam": "torch.optim:NAdam",
        "radam": "torch.optim:RAdam",
        "rprop": "torch.optim:Rprop",
        "asgd": "torch.optim:ASGD",
        "adafactor": "torch.optim:Adafactor",
        "muon": "torch.optim:Muon",
        "sparse_adam": "torch.optim:SparseAdam",
        "lbfgs": "torch.optim:LBFGS",
    },
)

schedule_classes = Catalogue(
    "schedule",
    {
        "constant": "torch.optim.lr_scheduler:ConstantLR",
        "step": "torch.optim.lr_scheduler:StepLR",
        "multistep": "torch.optim.lr_scheduler:MultiStepLR",
        "linear": "torch.optim.lr_scheduler:LinearLR",
        "exponential": "torch.optim.lr_scheduler:ExponentialLR",
        "polynomial": "torch.optim.lr_scheduler:PolynomialLR",
        "cosine": "torch.optim.lr_scheduler:CosineAnnealingLR",
        "cosine_restarts": "torch.optim.lr_scheduler:CosineAnnealingWarmRestarts",
        "cyclic": "torch.optim.lr_scheduler:CyclicLR",
        "onecycle": "torch.optim.lr_scheduler:OneCycleLR",
    },
)

__all__ = ["build", "loss_functions", "models", "optimizer_classes", "schedule_classes"]


def __getattr__(name: str) -> Any:
    if name == "build":
        from manyhands.models.factory import build

        return build
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
