"""What every transport promises, as functions that run on every rank: each gets the rank's communicator and asserts.

They stand apart from `test_contract`, which runs them, because worker processes import this file by name. A check
may return a tensor; the test then asserts that all ranks returned the same bits.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from manyhands.communication.communicator import DTYPES, Communicator, Counters, reference_B
from manyhands.communication.reduction import coefficients, reduce_into, slices
from manyhands.communication.topology import Mesh
from manyhands.errors import BadInput, CommunicationError, Vetoed

#: Transports that sum by `reduction`, in rank order: their results are those of `reduce_into`, bit for bit. The
#: others sum in an order of their own and agree to rounding.
SELF_REDUCING = frozenset({"single", "threads", "shared", "simulated"})

#: Empty, single, odd, one slice quantum, and lengths that no worker count divides.
NUMELS = (0, 1, 7, 64, 1000, 4099)

FLOATS = tuple(d for d in DTYPES if d.is_floating_point)


def sample(rank: int, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What rank ``rank`` contributes; every rank can compute every other's."""
    generator = torch.Generator().manual_seed(1000 * rank + numel)
    if not dtype.is_floating_point:
        return torch.randint(-(2**40), 2**40, (numel,), generator=generator, dtype=dtype)
    return torch.randn(numel, generator=generator, dtype=torch.float64).to(dtype)


def samples(comm: Communicator, numel: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Every rank's contribution, in rank order."""
    return [sample(r, numel, dtype) for r in range(comm.size)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal also in the sign of zeros and in NaNs."""
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def assert_reduced(
    comm: Communicator, got: Tensor, parts: Sequence[Tensor], weights: list[float] | None = None
) -> None:
    """``got`` is the sum, or weighted mean, of ``parts``: to rounding everywhere, exactly where the sum is ours."""
    factors = coefficients(weights) if weights is not None else None
    if comm.transport in SELF_REDUCING:
        expected = torch.empty_like(got)
        reduce_into(expected, parts, factors)
        assert torch.equal(got, expected)
    chosen = [(p.double(), f) for p, f in zip(parts, factors or [1.0] * len(parts), strict=True) if f]
    true = sum((p * f for p, f in chosen), torch.zeros(got.numel(), dtype=torch.float64))
    if not got.dtype.is_floating_point:
        assert torch.equal(got.double(), true)  # below 2**53: exact
        return
    # Each summand is rounded at most once when scaled and once per addition.
    magnitude = sum((p.abs() * f for p, f in chosen), torch.zeros(got.numel(), dtype=torch.float64))
    bound = (len(parts) + 2) * torch.finfo(got.dtype).eps * magnitude
    assert bool(((got.double() - true).abs() <= bound).all())


def weightings(size: int) -> Iterator[list[float]]:
    """Equal, uneven, one left out, only one counted, nobody counted."""
    yield [1.0] * size
    yield [float(r + 1) for r in range(size)]
    yield [0.0] + [2.5] * (size - 1)
    yield [0.0] * (size - 1) + [3.0]
    yield [0.0] * size


# -- collectives -------------------------------------------------------------------------------------------------------


def check_all_reduce_is_the_sum(comm: Communicator) -> Tensor:
    """Of every dtype and length."""
    results = []
    for dtype in DTYPES:
        for numel in NUMELS:
            x = sample(comm.rank, numel, dtype)
            comm.all_reduce(x).wait()
            assert_reduced(comm, x, samples(comm, numel, dtype))
            results.append(x.view(torch.uint8))
    return torch.cat(results)


def check_all_reduce_of_symmetric_memory(comm: Communicator) -> Tensor:
    """Whole and part of what `allocate` gave; what lies beside stays."""
    x = comm.allocate(1000)
    assert same_bits(x, torch.zeros(1000))
    x.copy_(sample(comm.rank, 1000))
    comm.all_reduce(x[64:901]).wait()
    assert_reduced(comm, x[64:901], [p[64:901] for p in samples(comm, 1000)])
    for lo, hi in ((0, 64), (901, 1000)):
        assert same_bits(x[lo:hi], sample(comm.rank, 1000)[lo:hi])
    x.copy_(sample(comm.rank, 1000))
    comm.all_reduce(x).wait()
    assert_reduced(comm, x, samples(comm, 1000))
    comm.barrier()
    return x.clone()


def check_reductions_of_common_memory(comm: Communicator) -> None:
    """Every rank counts, though all hand in the same copy; of any length, and again and again."""
    weights = [float(r + 1) for r in range(comm.size)]
    for numel in (1, 1000, 10_000):
        x = comm.allocate(numel, common=True)
        same = [sample(0, numel)] * comm.size
        for _ in range(10):
            for weighted in (None, weights):
                weight = None if weighted is None else weighted[comm.rank]
                for scatter in (False, True):
                    if comm.rank == 0 or not comm.is_common(x):
                        x.copy_(same[0])
                    comm.barrier()
                    lo, hi = 0, numel
                    if scatter:
                        lo, hi = comm.reduce_scatter(x, weight=weight)
                    else:
                        comm.all_reduce(x, weight=weight).wait()
                    assert_reduced(comm, x[lo:hi], [p[lo:hi] for p in same], weighted)
                    comm.barrier()


def check_reductions_of_common_memory_in_a_group(comm: Communicator) -> None:
    """What all ranks see as one copy, those of a group do, too."""
    x, ours = comm.allocate(1000, common=True), comm.allocate(1000)
    ours.fill_(float(comm.rank))
    group = comm.split(int(comm.rank == comm.size - 1 > 0))
    if group.size > 1:
        assert group.is_common(x) == comm.shares_memory
        assert not group.is_common(ours)
    if comm.rank < comm.size - 1:
        for _ in range(10):
            group.barrier()
            if group.rank == 0 or not comm.shares_memory:
                x.fill_(1.0)
            group.barrier()
            group.all_reduce(x).wait()
            assert x.tolist() == [group.size] * 1000
        group.all_reduce(ours).wait()
        assert ours.tolist() == [group.size * (group.size - 1) / 2] * 1000
    comm.barrier()
    if comm.rank == comm.size - 1 > 0:
        assert ours.tolist() == [comm.rank] * 1000


def check_weighted_mean(comm: Communicator) -> Tensor:
    """Whatever the weights; a rank of weight 0 may hold NaN."""
    results = []
    for dtype in FLOATS:
        for weights in weightings(comm.size):
            parts = samples(comm, 777, dtype)
            for part, w in zip(parts, weights, strict=True):
                if w == 0 and comm.size > 1:
                    part.fill_(torch.nan)
            for x in (parts[comm.rank].clone(), comm.allocate(777, dtype).copy_(parts[comm.rank])):
                comm.all_reduce(x, weight=weights[comm.rank]).wait()
                if comm.size > 1:
                    assert_reduced(comm, x, parts, weights)
                results.append(x.clone().view(torch.uint8))
            comm.barrier()
    return torch.cat(results)


def check_a_single_weight_leaves_its_rank_untouched(comm: Communicator) -> None:
    """Bit for bit: the mean over one is that one."""
    for dtype in FLOATS:
        for only in range(comm.size):
            x = sample(comm.rank, 65, dtype)
            comm.all_reduce(x, weight=7.0 if comm.rank == only else 0.0).wait()
            assert torch.equal(x, sample(only, 65, dtype))


def check_a_weight_that_is_not_finite_vetoes(comm: Communicator) -> None:
    """Every rank learns of it, and the group goes on."""
    for weight in (math.inf, -math.inf, math.nan):
        for only in (*range(comm.size), None):
            vetoes = only in (comm.rank, None)
            for reduce in (
                lambda x, w: comm.all_reduce(x, weight=w).wait(),
                lambda x, w: comm.reduce_scatter(x, weight=w),
            ):
                heard = None
                try:
                    reduce(sample(comm.rank, 5), weight if vetoes else 1.0)
                except Vetoed as veto:
                    heard = veto
                assert heard is not None
                assert heard.rank in (0 if only is None else only, None)
                comm.barrier()


def check_one_rank_is_untouched(comm: Communicator) -> None:
    """In a group of one, every collective leaves its tensor as it is, NaN and negative zero included."""
    alone = comm.split(comm.rank)
    assert (alone.size, alone.rank) == (1, 0)
    x = torch.tensor([-0.0, torch.nan, 1.5, torch.inf])
    before = x.clone()
    alone.all_reduce(x).wait()
    alone.all_reduce(x, weight=0.3).wait()
    assert alone.reduce_scatter(x) == (0, 4)
    alone.all_gather(x).wait()
    alone.broadcast(x).wait()
    alone.barrier()
    assert same_bits(x, before)
    assert same_bits(alone.all_to_all(x), before)


def check_reduce_scatter(comm: Communicator) -> None:
    """The bounds are those of `slices`, the slice is the sum."""
    for dtype in DTYPES:
        for numel in NUMELS:
            x = sample(comm.rank, numel, dtype)
            lo, hi = comm.reduce_scatter(x)
            assert (lo, hi) == (slices(numel, comm.size)[comm.rank] if comm.size > 1 else (0, numel))
            assert_reduced(comm, x[lo:hi], [p[lo:hi] for p in samples(comm, numel, dtype)])


def check_weighted_reduce_scatter(comm: Communicator) -> None:
    """As the weighted mean, slice by slice."""
    for weights in weightings(comm.size):
        for x in (torch.empty(1000), comm.allocate(1000)):
            x.copy_(sample(comm.rank, 1000))
            lo, hi = comm.reduce_scatter(x, weight=weights[comm.rank])
            if comm.size > 1:
                assert_reduced(comm, x[lo:hi], [p[lo:hi] for p in samples(comm, 1000)], weights)
        comm.barrier()


def check_reduce_scatter_then_all_gather_is_all_reduce(comm: Communicator) -> Tensor:
    """The round trip, on plain and symmetric memory."""
    results = []
    for numel in NUMELS:
        whole = sample(comm.rank, numel)
        comm.all_reduce(whole).wait()
        for x in (torch.empty(numel), comm.allocate(numel)):
            x.copy_(sample(comm.rank, numel))
            comm.reduce_scatter(x)
            comm.all_gather(x).wait()
            assert_reduced(comm, x, samples(comm, numel))
            if comm.transport in SELF_REDUCING:
                assert same_bits(x, whole)
            results.append(x.clone())
    comm.barrier()
    return torch.cat(results)


def check_all_gather_of_uneven_bounds(comm: Communicator) -> Tensor:
    """Rank p brings 3p elements (rank 0 nothing)."""
    ends = [0]
    for r in range(comm.size):
        ends.append(ends[-1] + 3 * r)
    bounds = list(itertools.pairwise(ends))
    results = []
    for dtype in DTYPES:
        for x in (torch.zeros(ends[-1], dtype=dtype), comm.allocate(ends[-1], dtype)):
            lo, hi = bounds[comm.rank]
            x[lo:hi] = sample(comm.rank, hi - lo, dtype)
            comm.all_gather(x, bounds).wait()
            for r, (lo, hi) in enumerate(bounds):
                assert same_bits(x[lo:hi], sample(r, hi - lo, dtype))
            comm.barrier()
            results.append(x.clone().view(torch.uint8))
    return torch.cat(results)


def check_all_to_all_transposes(comm: Communicator) -> None:
    """Chunk q of rank p becomes chunk p of rank q; the shape stays."""
    for dtype in DTYPES:
        for chunk in (0, 1, 5, 1000):
            x = sample(comm.rank, chunk * comm.size, dtype).view(comm.size, chunk)
            before = x.clone()
            y = comm.all_to_all(x)
            assert y.shape == x.shape
            for r in range(comm.size):
                theirs = sample(r, chunk * comm.size, dtype).view(comm.size, chunk)
                assert same_bits(y[r], theirs[comm.rank])
            assert same_bits(x, before)


def check_broadcast_from_each_root(comm: Communicator) -> None:
    """Everybody ends with the root's tensor; shapes may have many dims."""
    for root in range(comm.size):
        for dtype in DTYPES:
            for numel in NUMELS:
                x = sample(comm.rank, numel, dtype)
                comm.broadcast(x, root).wait()
                assert same_bits(x, sample(root, numel, dtype))
        cube = sample(comm.rank, 24).view(2, 3, 4)
        comm.broadcast(cube, root).wait()
        assert same_bits(cube.reshape(-1), sample(root, 24))


def check_many_small_collectives(comm: Communicator) -> Tensor:
    """Rounds that follow each other closely do not mix."""
    x = torch.zeros(3, dtype=torch.int64)
    for step in range(50):
        x[0] = step * (comm.rank + 1)
        x[1] = comm.rank
        comm.all_reduce(x[:2]).wait()
        assert x.tolist() == [step * comm.size * (comm.size + 1) // 2, comm.size * (comm.size - 1) // 2, 0]
        comm.broadcast(x, step % comm.size).wait()
    return x


def check_bad_arguments_are_refused(comm: Communicator) -> None:
    """Before anything is sent, with the rule."""
    calls = (
        lambda: comm.broadcast(torch.zeros(1), comm.size),
        lambda: comm.send(torch.zeros(1), -1),
        lambda: comm.recv(torch.zeros(1), comm.size),
        lambda: comm.all_reduce(torch.zeros(4, 4).t()),
        lambda: comm.allocate(-1),
        lambda: comm.all_reduce(torch.zeros(3, dtype=torch.complex64), weight=1.0),
        lambda: comm.reduce_scatter(torch.zeros(3, dtype=torch.int32)),
        lambda: comm.all_reduce(torch.zeros(3, dtype=torch.int64), weight=1.0),
        lambda: setattr(comm, "mesh", Mesh(data=comm.size + 1)),
    )
    if comm.size == 1:
        calls = (*calls[:3], *calls[4:])  # one rank's tensor is untouched, whatever its strides
    for i, call in enumerate(calls):
        try:
            call()
        except BadInput:
            continue
        raise AssertionError(f"call {i} was not refused")
    comm.barrier()


# -- memory ------------------------------------------------------------------------------------------------------------


def check_common_memory(comm: Communicator) -> Tensor:
    """One copy where memory is shared, equal copies elsewhere; `all_gather` completes it either way."""
    x = comm.allocate(1000, torch.float64, common=True)
    assert same_bits(x, torch.zeros(1000, dtype=torch.float64))
    if comm.size > 1:
        assert comm.is_common(x) == comm.shares_memory
        assert comm.is_common(x[10:20]) == comm.shares_memory
        assert not comm.is_common(torch.zeros(5))
        assert not comm.is_common(comm.allocate(5))
    comm.barrier()
    if comm.rank == comm.size - 1:
        x[0] = 7.0
    comm.barrier()
    assert float(x[0]) == (7.0 if comm.shares_memory or comm.rank == comm.size - 1 else 0.0)
    comm.barrier()
    lo, hi = slices(1000, comm.size)[comm.rank]
    x[lo:hi] = sample(0, 1000, torch.float64)[lo:hi]
    comm.all_gather(x).wait()
    assert same_bits(x, sample(0, 1000, torch.float64))
    comm.barrier()
    return x.clone()


def check_memory_is_given_back(comm: Communicator) -> None:
    """`release` ends what was made since the mark, but a tensor that is still held; everything works after it."""
    mark = comm.mark()
    held = comm.allocate(500)
    held.copy_(sample(comm.rank, 500))
    for _ in range(3):
        comm.mesh = Mesh(data=comm.size, tensor=1)
        group = comm.split(comm.rank % 2)
        for x in (comm.allocate(4099), group.allocate(100, common=True), torch.ones(10)):
            x.fill_(1.0)
            (group if x.numel() == 100 else comm).all_reduce(x).wait()
        del x, group
        comm.release(mark)
        assert str(comm.mesh) == str(Mesh(data=comm.size))
        x = comm.allocate(700)
        assert same_bits(x, torch.zeros(700))
        x.copy_(sample(comm.rank, 700))
        comm.all_reduce(x).wait()
        assert_reduced(comm, x, samples(comm, 700))
        assert same_bits(held, sample(comm.rank, 500))
    comm.all_reduce(held).wait()
    assert_reduced(comm, held, samples(comm, 500))
    comm.barrier()


# -- messages ----------------------------------------------------------------------------------------------------------


def check_ring_of_messages(comm: Communicator) -> None:
    """Each rank to the next, in every dtype and length; the sender is told."""
    before, after = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    for dtype in DTYPES:
        for numel in NUMELS:
            work = comm.send(sample(comm.rank, numel, dtype), after)
            like = torch.empty(numel, dtype=dtype)
            received = comm.recv(like, before)
            work.wait()
            assert received.source == before
            assert received.tensor.data_ptr() == like.data_ptr()
            assert same_bits(like, sample(before, numel, dtype))


def check_large_messages_cross(comm: Communicator) -> None:
    """Everybody sends 4 MB to everybody before anybody receives."""
    numel = 1_000_003
    mine = sample(comm.rank, numel)
    works = [comm.send(mine, r) for r in range(comm.size) if r != comm.rank]
    for r in range(comm.size):
        if r != comm.rank:
            like = torch.empty(numel)
            comm.recv(like, r)
            assert same_bits(like, sample(r, numel))
    for work in works:
        work.wait()


def check_tags_out_of_order(comm: Communicator) -> None:
    """A receiver takes tags as it likes; within a tag messages keep their order."""
    before, after = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    works = [
        comm.send(torch.tensor([10.0 * tag + n]), after, tag) for n in range(3) for tag in (5, 1, 9)
    ]  # tags interleaved
    for tag in (9, 5, 1):
        for n in range(3):
            assert comm.recv(torch.empty(1), before, tag).tensor.item() == 10.0 * tag + n
    for work in works:
        work.wait()


def check_receive_from_anyone(comm: Communicator) -> None:
    """Every message comes once, with its sender's name, in each sender's order."""
    if comm.rank == 0:
        seen: dict[int, list[float]] = {r: [] for r in range(1, comm.size)}
        for _ in range(3 * (comm.size - 1)):
            received = comm.recv(torch.empty(2), None, tag=4)
            assert received.tensor[0].item() == received.source
            seen[received.source].append(received.tensor[1].item())
            comm.send(received.tensor * 2, received.source, tag=2).wait()
        assert all(order == [0.0, 1.0, 2.0] for order in seen.values())
    else:
        for n in range(3):
            comm.send(torch.tensor([float(comm.rank), float(n)]), 0, tag=4).wait()
            assert comm.recv(torch.empty(2), 0, tag=2).tensor.tolist() == [2.0 * comm.rank, 2.0 * n]


def check_message_to_oneself(comm: Communicator) -> None:
    """Works like any other, and is a copy."""
    x = torch.arange(4.0)
    work = comm.send(x, comm.rank)
    received = comm.recv(torch.empty(4), comm.rank)
    work.wait()
    x.zero_()
    assert received.source == comm.rank
    assert received.tensor.tolist() == [0.0, 1.0, 2.0, 3.0]


def check_collectives_between_messages(comm: Communicator) -> None:
    """A message on its way does not disturb a collective, nor the other way round."""
    before, after = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    work = comm.send(sample(comm.rank, 9), after, tag=1)
    x = sample(comm.rank, 9)
    comm.all_reduce(x).wait()
    assert_reduced(comm, x, samples(comm, 9))
    assert same_bits(comm.recv(torch.empty(9), before, tag=1).tensor, sample(before, 9))
    work.wait()


def check_a_message_of_another_length_is_an_error(comm: Communicator) -> None:
    """Told by whoever receives it, longer or shorter; the next message is none the worse."""
    before, after = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    if comm.transport == "gloo" and comm.size > 1:
        return  # it cannot tell: see its docstring
    for sent in (2, 6, 0):
        works = [comm.send(torch.ones(sent), after, tag=3), comm.send(torch.full((4,), 2.0), after, tag=3)]
        heard = None
        try:
            comm.recv(torch.zeros(4), before, tag=3)
        except CommunicationError as e:
            heard = e
        assert type(heard) is CommunicationError
        assert comm.recv(torch.zeros(4), before, tag=3).tensor.tolist() == [2.0] * 4
        for work in works:
            work.wait()


# -- groups ------------------------------------------------------------------------------------------------------------


def check_split(comm: Communicator) -> None:
    """Even and odd ranks are groups of their own; so are groups of groups; the whole group goes on working."""
    half = comm.split(comm.rank % 2)
    members = list(range(comm.rank % 2, comm.size, 2))
    assert (half.size, half.rank) == (len(members), members.index(comm.rank))
    x = sample(comm.rank, 100)
    half.all_reduce(x).wait()
    assert_reduced(half, x, [sample(r, 100) for r in members])

    quarter = half.split(half.rank % 2)
    inner = members[half.rank % 2 :: 2]
    assert (quarter.size, quarter.rank) == (len(inner), inner.index(comm.rank))
    x = sample(comm.rank, 100)
    quarter.all_reduce(x, weight=float(quarter.rank + 1)).wait()
    if quarter.size > 1:
        assert_reduced(quarter, x, [sample(r, 100) for r in inner], [float(i + 1) for i in range(len(inner))])
    quarter.broadcast(x, quarter.size - 1).wait()

    y = sample(quarter.rank, quarter.size * 2)
    assert same_bits(quarter.all_to_all(y)[:2], sample(0, quarter.size * 2)[2 * quarter.rank : 2 * quarter.rank + 2])
    work = half.send(torch.tensor([float(comm.rank)]), (half.rank + 1) % half.size)
    received = half.recv(torch.empty(1), None)
    work.wait()
    assert received.source == (half.rank - 1) % half.size  # ranks of the group, not of the world
    assert received.tensor.item() == members[received.source]
    memory = half.allocate(10, common=True)
    assert half.size == 1 or half.is_common(memory) == half.shares_memory

    z = sample(comm.rank, 100)
    comm.all_reduce(z).wait()
    assert_reduced(comm, z, samples(comm, 100))


def check_over_axes_of_a_mesh(comm: Communicator) -> None:
    """`over` is the group of the ranks that differ only along the axes named; a group knows its own mesh."""
    outer = next(d for d in (2, 3, 1) if comm.size % d == 0)
    before, comm.mesh = comm.mesh, (mesh := Mesh(data=outer, tensor=comm.size // outer))
    everyone = comm.over(frozenset({"data", "tensor"}))
    assert everyone is comm
    for axis in mesh:
        axes = frozenset({axis})
        group = comm.over(axes)
        members = next(g for g in mesh.groups(axes) if comm.rank in g)
        assert group.size == mesh[axis] == len(members)
        assert group.rank == members.index(comm.rank)
        assert group is comm.over(axes)
        x = sample(comm.rank, 33)
        group.all_reduce(x).wait()
        assert_reduced(group, x, [sample(r, 33) for r in members])
    comm.mesh = before


def check_groups_of_a_mesh_in_any_order(comm: Communicator) -> None:
    """Ranks may ask for different groups, in different orders; a new mesh has groups of its own."""
    pipeline = 2 if comm.size % 2 == 0 else 1
    data = 2 if comm.size % 4 == 0 else 1
    mesh = Mesh(pipeline=pipeline, data=data, tensor=comm.size // pipeline // data)
    for _ in range(2):
        comm.mesh = mesh
        stage = mesh.coordinates(comm.rank)["pipeline"]
        wanted = [frozenset({"data"}), frozenset({"tensor"}), frozenset({"data", "tensor"})]
        if stage:
            wanted = [frozenset(), frozenset(mesh), wanted[2], wanted[0]]
        turn = comm.rank % len(wanted)
        groups = {axes: comm.over(axes) for axes in (*wanted[turn:], *wanted[:turn])}
        for axes in wanted:
            if axes != frozenset(mesh):
                members = next(g for g in mesh.groups(axes) if comm.rank in g)
                x = torch.zeros(comm.size)
                x[comm.rank] = 1.0
                groups[axes].all_reduce(x).wait()
                assert x.nonzero().flatten().tolist() == members
                assert groups[axes].rank == members.index(comm.rank)
        # A group's groups are those of the whole: nothing is left to be made.
        plane = groups[wanted[2]]
        assert plane.over(frozenset({"data"})).size == data
        assert plane.over(frozenset({"data", "tensor"})) is plane
    comm.mesh = Mesh(data=comm.size)
    if comm.rank == 0:  # one axis: there is nothing to make, so nobody need take part
        assert comm.over(frozenset({"data"})) is comm
        assert comm.over(frozenset()).size == 1
        comm.over(frozenset()).barrier()
    comm.barrier()


# -- counting ----------------------------------------------------------------------------------------------------------


def check_bytes_counted_are_those_of_the_reference(comm: Communicator) -> None:
    """Every operation, on whole and split groups, under the purpose it was done for."""
    P, rank = comm.size, comm.rank
    comm.context.counters = Counters()
    x = torch.ones(96, dtype=torch.float64)  # 768 bytes: a multiple of every size up to 8 but 5 and 7
    n_B = 768
    with comm.counting("consensus"):
        comm.all_reduce(x).wait()
    assert comm.counters.sent_B("step") == 0
    assert comm.counters.sent_B("consensus") == reference_B("all_reduce", n_B, P) == 2 * (P - 1) * n_B // P
    comm.reduce_scatter(x)
    comm.all_gather(x).wait()
    if 96 % P == 0:
        comm.all_to_all(x)
    for root in range(P):
        comm.broadcast(x, root).wait()
    if P > 1:
        work = comm.send(x, (rank + 1) % P)
        comm.recv(x, (rank - 1) % P)
        work.wait()
    comm.barrier()
    share = (P - 1) * n_B // P
    expected = {
        "reduce_scatter": share,
        "all_gather": share,
        "all_to_all": share if 96 % P == 0 else 0,
        "broadcast": (P - 1) * n_B,  # from P roots a rank is the last of the chain once
        "send": n_B if P > 1 else 0,
        "barrier": 0,
    }
    tallies = comm.counters.tallies["step"]
    assert {name: tallies[name].sent_B for name in expected} == expected
    assert tallies["broadcast"].calls == P
    assert tallies["barrier"].calls == 1
    half = comm.split(rank % 2)
    before = comm.counters.sent_B()
    half.all_reduce(x).wait()
    assert comm.counters.sent_B() - before == reference_B("all_reduce", n_B, half.size)
    assert min(comm.counters.wait_s, comm.counters.communicate_s, comm.counters.moved_B) >= 0


CHECKS = [value for name, value in sorted(globals().items()) if name.startswith("check_")]
