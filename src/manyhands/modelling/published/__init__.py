"""Published models of what training costs, one file a paper: pure functions in SI units, cross-checks and baselines.

Bytes, seconds, bytes per second and operations per second throughout. None of them knows this project's strategies;
what they say of one is compared with what is predicted, simulated and measured. Each file tells which of it is the
paper's and which is derived here from the paper's definitions. Nothing here imports torch.
"""

from manyhands.catalogue import Catalogue

formulas = Catalogue(
    "formula",
    {
        "thakur": "manyhands.modelling.published.thakur:all_reduce_s",
        "hierarchical": "manyhands.modelling.published.hierarchical:all_reduce_s",
        "parameter_server": "manyhands.modelling.published.parameter_server:exchange_s",
        "paleo": "manyhands.modelling.published.paleo:step_s",
        "roofline": "manyhands.modelling.published.roofline:seconds",
        "winograd": "manyhands.modelling.published.winograd:multiplications",
        "wait_free": "manyhands.modelling.published.wait_free:backward_s",
        "oyama": "manyhands.modelling.published.oyama:effective_batch",
        "yan": "manyhands.modelling.published.yan:epoch_s",
        "bunch_mode": "manyhands.modelling.published.bunch_mode:crossover",
        "null_step": "manyhands.modelling.published.null_step:step_s",
        "pipeline": "manyhands.modelling.published.pipeline:step_s",
        "megatron": "manyhands.modelling.published.megatron:flops_per_step",
        "checkpoint_interval": "manyhands.modelling.published.checkpoint_interval:daly_s",
    },
)

__all__ = ["formulas"]
