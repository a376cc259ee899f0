"""The pictures of docs/partitioning.md: one small network cut in each way, each drawn from its plan.

python docs/partitioning.py     draws docs/partitioning/*.svg and writes the table of the page
"""

from __future__ import annotations

import math
from pathlib import Path

import manyhands as mh
from manyhands import verbs
from manyhands.studies.cut_picture import draw
from manyhands.studies.table import in_bytes

HERE = Path(__file__).parent
PAGE, PICTURES = HERE / "partitioning.md", HERE / "partitioning"
BEGIN, END = "<!-- drawn and counted: python docs/partitioning.py -->", "<!-- end of what was drawn -->"

HEAD = "| cut | plan | parameters here | strategy sends | cut sends | bubble |"
PERCEPTRON, IMAGES = "perceptron(hidden=(24, 16))", "cnn"
#: What a picture is called, its model, and its plan.
CUTS = (
    ("data", PERCEPTRON, {"mesh": "data=2"}),
    ("sharded", PERCEPTRON, {"mesh": "data=2", "shard": 3}),
    ("tensor", PERCEPTRON, {"mesh": "tensor=2"}),
    ("pipeline", PERCEPTRON, {"mesh": "pipeline=2", "pipeline": "one_f_one_b(cut='hidden2')", "micro_batches": 4}),
    (
        "zero_bubble",
        PERCEPTRON,
        {"mesh": "pipeline=3", "pipeline": "zero_bubble(cut='hidden2, output')", "micro_batches": 6},
    ),
    (
        "pipedream",
        PERCEPTRON,
        {
            "mesh": "pipeline=3",
            "strategy": "pipedream",
            "pipeline": "pipedream(cut='hidden2, output')",
            "micro_batches": 6,
        },
    ),
    ("ampnet", PERCEPTRON, {"mesh": "pipeline=2", "strategy": "ampnet(samples=12)"}),
    (
        "mesh",
        PERCEPTRON,
        {
            "mesh": "data=2,tensor=2,pipeline=2",
            "pipeline": "one_f_one_b(cut='hidden2')",
            "micro_batches": 4,
        },
    ),
    ("rotate", PERCEPTRON, {"mesh": "tensor=3", "tensor": "rotate"}),
    ("redundant", PERCEPTRON, {"mesh": "tensor=4", "tensor": "redundant(copies=halo)"}),
    ("cannon", PERCEPTRON, {"mesh": "tensor=4", "tensor": "cannon"}),
    ("spatial", IMAGES, {"mesh": "tensor=2", "tensor": "spatial"}),
    ("one_weird_trick", IMAGES, {"mesh": "data=2", "tensor": "one_weird_trick(scheme=a, dense=flatten)"}),
)


def main() -> None:
    """See the file's head."""
    PICTURES.mkdir(exist_ok=True)
    lines = [HEAD, "|---|---|---:|---:|---:|---:|"]
    for name, model, plan in CUTS:
        task = mh.Task(model=model, data="digits", batch_size=48)
        found = verbs.outlined(task, mh.Plan(transport="threads", threads=1, **plan))
        (PICTURES / f"{name}.svg").write_text(draw(found), encoding="utf-8")
        most = max(found.parts, key=lambda part: part.parameters)
        whole = sum(math.prod(shape) for shape in found.whole.values())
        cells = [
            f"[{name}](#{name})",
            " ".join(f"`{value}`" for value in plan.values() if isinstance(value, str))
            + (f" `shard={plan['shard']}`" if "shard" in plan else ""),
            f"{most.parameters / whole:.2f}",
            in_bytes(most.sent_B),
            in_bytes(max(part.cut_B for part in found.parts)),
            "" if found.bubble is None else f"{found.bubble:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
