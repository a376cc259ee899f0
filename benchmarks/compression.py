"""What it takes to encode and decode 1,000,000 floats by each scheme on one core, and how slow a link must be for it.

A step is what one worker does with its own vector, error feedback left out: encode, then decode into a new vector. Time
is the processor's (of this one thread), so that being interrupted by others does not count. The gradient is normal with
a standard deviation of 1e-3, and thresholds are set so that 1 % of it is beyond them.

    copies    the same time in copies of the vector (4 MB from one place to another): the distance to memory bandwidth
    pays      two workers exchange payloads of c bytes instead of 4 MB, each sending one; below this link speed the
              bytes saved take longer than encoding and decoding (a worker decodes two payloads)

    python benchmarks/compression.py [--quick] [--json FILE] [--rounds N]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import _measure as measure
import torch
from _measure import Burst, Candidate, Report, Spread, Target

from manyhands.communication.compression.compressor import Compressor, compressor_from
from manyhands.communication.compression.layout import Layout
from manyhands.communication.compression.one_shot import OneShot
from manyhands.communication.compression.powersgd import PowerSGD, orthogonalised
from manyhands.communication.compression.random_k import RandomK
from manyhands.training.allocator import tune

N = 1_000_000
LAYOUT = Layout(((784, 1000), (1000,), (215, 1000)))
#: Of a normal distribution 1 % lies beyond so many standard deviations.
ONE_PERCENT = 2.576
SIGMA = 1e-3
TAU = f"threshold={ONE_PERCENT * SIGMA:g}"

#: Target in milliseconds; a scheme's default options unless they say otherwise.
CASES = {
    f"strom({TAU})": 3,
    f"strom_adaptive({TAU})": 3,
    "top_k(ratio=0.01)": 3,
    "random_k(ratio=0.01)": 10,
    "dgc(ratio=0.001)": 3,
    "one_bit": 10,
    "sign_sgd": 10,
    "terngrad": 10,
    "qsgd": 10,
    f"two_bit({TAU})": 10,
    "int8": 10,
    "float16": 10,
    "bfloat16": 1,
    "flexpoint": 10,
    "powersgd(rank=4)": 10,
    "qsgd(coding='elias')": 100,
    f"entropy(of='strom({TAU})')": 100,
    "entropy(of='top_k')": 100,
    "entropy(of='int8')": 100,
    "entropy(of='none')": 100,
}


def parts(compressor: Compressor, x: torch.Tensor) -> tuple[Callable[[], object], Callable[[], object], int]:
    """Encode, decode and bytes of a payload."""
    state = compressor.start(LAYOUT, 0, 2)
    if isinstance(compressor, OneShot):
        payload = compressor.encode(x, state)
        return lambda: compressor.encode(x, state), lambda: compressor.decode(payload, state), payload.numel()
    if isinstance(compressor, RandomK):
        indices = compressor.indices(state)
        values = compressor.encode(x, indices)
        return (
            lambda: compressor.encode(x, compressor.indices(state)),
            lambda: compressor.decode(values, indices, N),
            values.nbytes,
        )
    assert isinstance(compressor, PowerSGD)
    low, _ = compressor.matrices(LAYOUT)
    given = [x[m.at : m.at + m.rows * m.columns].view(m.rows, m.columns) for m in low]
    qs = [torch.randn(m.columns, m.rank) for m in low]

    def factors() -> list[tuple[torch.Tensor, torch.Tensor]]:
        ps = [orthogonalised(m @ q) for m, q in zip(given, qs, strict=True)]
        return [(p, m.t() @ p) for m, p in zip(given, ps, strict=True)]

    found = factors()
    return factors, lambda: [p @ q.t() for p, q in found], compressor.payload_B(LAYOUT)


def alone(step: Callable[[], object]) -> Candidate:
    """A candidate in this process."""

    def candidate(steps: int, warm: int) -> list[Burst]:
        for _ in range(warm):
            step()
        each = []
        for _ in range(steps):
            began = time.thread_time()
            step()
            each.append(time.thread_time() - began)
        return [Burst(statistics.median(each), statistics.fmean(each))]

    return candidate


def main() -> None:
    """All schemes in turn."""
    said = measure.arguments(__doc__ or "")
    tune()
    torch.set_num_threads(1)
    report = Report("compression")
    x = torch.randn(N, generator=torch.Generator().manual_seed(1)) * SIGMA
    there = torch.empty_like(x)
    candidates = {"copy": alone(lambda: there.copy_(x))}
    sizes = {}
    for text in CASES:
        encode, decode, sizes[text] = parts(compressor_from(text), x)
        candidates |= {f"{text}: encode": alone(encode), f"{text}: decode": alone(decode)}
    rounds = measure.alternate(
        candidates,
        lambda: None,
        rounds=2 if said.quick else int(said.rounds or 15),
        burst_s=0.005 if said.quick else 0.03,
    )
    targets = []
    report.heading("encode + decode of 1,000,000 floats, one core")
    print(f"  {'':<44}{'payload':>10} {'ratio':>7} {'encode':>9} {'decode':>9} {'copies':>7}  pays below")
    for text, limit_ms in CASES.items():
        e, d = f"{text}: encode", f"{text}: decode"
        both = rounds.of(lambda s, e=e, d=d: (s[e] + s[d]) * 1e3)  # type: ignore[misc]
        copies = rounds.of(lambda s, e=e, d=d: (s[e] + s[d]) / s["copy"]).median  # type: ignore[misc]
        spent_s = rounds.of(lambda s, e=e, d=d: s[e] + 2 * s[d]).median  # type: ignore[misc]
        pays_Mbps = (4 * N - sizes[text]) * 8 / spent_s / 1e6
        took = [rounds.seconds(name).median * 1e3 for name in (e, d)]
        print(
            f"  {text:<44}{sizes[text]:>10,} {4 * N / sizes[text]:>6.1f}× {took[0]:>6.2f} ms {took[1]:>6.2f} ms "
            f"{copies:>7.1f}  {pays_Mbps:,.0f} Mbit/s"
        )
        report.rows.append({"row": text, "payload_B": sizes[text], "copies": copies, "pays_below_Mbps": pays_Mbps})
        targets.append(Target(text, Spread(*both), "≤", limit_ms, "ms"))
    report.ask("encode + decode", targets)
    report.finish(said.json)


if __name__ == "__main__":
    main()
