"""What may disturb a simulated run, by name; whoever lists the names loads nothing of it."""

from manyhands.catalogue import Catalogue

stragglers = Catalogue(
    "stragglers",
    {
        name: f"manyhands.simulation.stragglers:{cls}"
        for name, cls in (
            ("lognormal", "Lognormal"),
            ("exponential", "Exponential"),
            ("pareto", "Pareto"),
            ("slow", "Slow"),
        )
    },
)

failures = Catalogue("failures", {"failures": "manyhands.simulation.failures:Failures"})
