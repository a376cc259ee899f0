"""How vectors of several workers become one though some of them may hold anything (survey §VI-A).

A mean obeys whoever sends the largest number. The rules here bear up to f *arbitrary* (Byzantine) vectors among n,
whether a broken memory, bad data or malice made them; each says how many, and what it needs for that.
`aggregations` is the table of contents; a rule is an option of a strategy: ``synchronous(aggregate=krum(f=1))``, whose
payload the files name, or ``backup_workers(aggregate=krum(f=1))``, whose server has all vectors anyway: 2n.
"""

from manyhands.catalogue import Catalogue

aggregations = Catalogue(
    "aggregation",
    {
        "mean": "manyhands.consistency.robust.mean:Mean",
        "median": "manyhands.consistency.robust.median:Median",
        "trimmed_mean": "manyhands.consistency.robust.trimmed_mean:TrimmedMean",
        "krum": "manyhands.consistency.robust.krum:Krum",
        "multi_krum": "manyhands.consistency.robust.krum:MultiKrum",
    },
)
