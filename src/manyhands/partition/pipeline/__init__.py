"""Stages of a network on different workers, micro-batches passing through them (survey §V-C, layer pipelining).

`schedules` is the table of contents: a new schedule is one file with a pure function ``(ranks, micro_batches)`` that
returns a `schedule.Schedule`, and one line here. `cut` makes the stages (of a row of `parts`: a `chain`, or `traced`),
`runtime` runs any schedule on them; `strategy` and `stashing` are PipeDream's, whose stages update by themselves.
"""

from manyhands.catalogue import Catalogue

schedules = Catalogue(
    "pipeline schedule",
    {
        "gpipe": "manyhands.partition.pipeline.gpipe:gpipe",
        "one_f_one_b": "manyhands.partition.pipeline.one_f_one_b:one_f_one_b",
        "interleaved": "manyhands.partition.pipeline.interleaved:interleaved",
        "zero_bubble": "manyhands.partition.pipeline.zero_bubble:zero_bubble",
        "pipedream": "manyhands.partition.pipeline.pipedream:pipedream",
        "written": "manyhands.partition.pipeline.written:written",
    },
)
