"""A graph that does not hold together is refused; states have a way back; what has gone forward comes back."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from manyhands.data.boolean_trees import boolean_trees
from manyhands.data.boolean_trees import value as truth
from manyhands.data.list_reduction import list_reduction, reduced
from manyhands.errors import BadInput, UnknownName
from manyhands.partition.ampnet import (
    Add,
    Begin,
    Broadcast,
    Concat,
    Cond,
    Drop,
    Flatmap,
    Graph,
    Group,
    Isu,
    Loss,
    Message,
    Phi,
    Source,
    Split,
    State,
    Transform,
    Ungroup,
)
from manyhands.partition.ampnet.chain import graph_of, whole_input
from manyhands.partition.ampnet.graph import check_norms
from manyhands.partition.ampnet.learning import Learning
from manyhands.partition.ampnet.nodes import Store
from manyhands.partition.ampnet.place import _balanced, placed
from tests.partition import ampnets

NAMES = st.sampled_from(["t", "n", "at", "depth"])
STATES = st.builds(
    lambda key, counters: State.of(key, **counters), st.integers(0, 9), st.dictionaries(NAMES, st.integers(-5, 5))
)


def nodes(**changes):
    made = {
        "x": Source(whole_input),
        "a": Transform(nn.Linear(4, 3)),
        "b": Transform(nn.Linear(3, 2)),
        "loss": Loss(),
    }
    return made | changes


EDGES = ["x -> a", "a -> b", "b -> loss"]


# -- states ------------------------------------------------------------------------------------------------------------


@given(STATES, NAMES, st.integers(-3, 3))
def test_a_change_of_state_and_its_inverse_cancel(state, name, by):
    if name in state:
        assert Add(name, by).inverse(Add(name, by)(state)) == state
        with pytest.raises(BadInput, match="begins"):
            Begin(name)(state)
    else:
        assert Begin(name, by).inverse(Begin(name, by)(state)) == state
    assert name not in Drop(name)(state)


@given(STATES, st.dictionaries(NAMES, st.integers(-5, 5)))
def test_a_state_is_its_key_and_counters_in_whatever_order(state, counters):
    forth, back = State(state.key), State(state.key)
    for name, value in counters.items():
        forth = forth.put(**{name: value})
    for name, value in reversed(counters.items()):
        back = back.put(**{name: value})
    assert forth == back
    assert hash(forth) == hash(back)
    assert all(forth[name] == value for name, value in counters.items())


def test_an_inverse_that_is_none_is_found_out():
    wrong = Isu(Add("t"), inverse=Add("t"))
    with pytest.raises(BadInput, match="inverse"):
        wrong.forward(0, Message((), State.of(0, t=0)), Store())


def tensors(n, width, *, wants=True):
    return tuple(torch.randn(2, width, dtype=torch.float64).requires_grad_(wants) for _ in range(n))


#: Nodes with what comes to each of their in ports.
STRUCTURAL = {
    "cond": (Cond(lambda s: s["t"] % 3, 3), [tensors(1, 4)]),
    "phi": (Phi(2), [tensors(1, 4), tensors(2, 3)]),
    "isu": (Isu(Add("t", 2)), [tensors(1, 4)]),
    "isu that remembers": (Isu(Drop("t")), [tensors(1, 4)]),
    "concat": (Concat(2, dim=-1), [tensors(1, 4), tensors(1, 3)]),
    "concat side by side": (Concat(2), [tensors(1, 4), tensors(2, 3)]),
    "split": (Split((1, 3), dim=-1), [tensors(1, 4)]),
    "split of tensors": (Split((1, 2)), [tensors(3, 4)]),
    "broadcast": (Broadcast(3), [tensors(2, 4)]),
    "ungroup": (Ungroup(lambda s, p: [s.put(i=i) for i in range(2)]), [tensors(2, 4)]),
    "flatmap": (Flatmap(lambda s, p: [s.put(i=i) for i in range(3)]), [tensors(1, 4)]),
    "transform": (Transform(nn.Linear(4, 3).double()), [tensors(1, 4)]),
}


@pytest.mark.parametrize("name", STRUCTURAL)
def test_what_has_gone_forward_comes_back_with_autograds_gradient(name):
    """Same ports and states, nothing is left in the store, and the gradient is that of the node as torch sees it."""
    node, come = STRUCTURAL[name]
    states = [State.of(3, t=4 + (i if name == "phi" else 0)) for i in range(len(come))]
    weight = lambda x: torch.arange(1.0, 1 + x.numel(), dtype=torch.float64).view(x.shape)  # noqa: E731
    with torch.no_grad():
        store = Store()
        leaving = [
            sent
            for port, payload in enumerate(come)
            for sent in node.forward(port, Message(payload, states[port]), store)
        ]
        back = [
            sent
            for way, message in reversed(leaving)
            for sent in node.backward(way, Message(tuple(map(weight, message.payload)), message.state), store)
        ]
    assert store.empty
    assert sorted((port, str(m.state)) for port, m in back) == [(i, str(s)) for i, s in enumerate(states)]
    plain = Store(learning=False)
    seen = [s for i, p in enumerate(come) for s in node.forward(i, Message(p, states[i]), plain)]
    total = sum((x * weight(x)).sum() for _, message in seen for x in message.payload)
    theirs = torch.autograd.grad(total, [x for payload in come for x in payload])
    ours = [g for _, m in sorted(back, key=lambda sent: sent[0]) for g in m.payload]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_group_gives_each_message_its_part_back():
    group = Group(lambda s: s.put(at=s["at"] // 2), lambda s: s["at"] % 2, lambda s: 2)
    store, parts = Store(), [torch.ones(1, 3), 2 * torch.ones(2, 3)]
    assert group.forward(0, Message((parts[1],), State.of(0, at=7)), store) == []
    ((_, joined),) = group.forward(0, Message((parts[0],), State.of(0, at=6)), store)
    assert torch.equal(joined.payload[0], torch.cat(parts))
    assert joined.state == State.of(0, at=3)
    back = group.backward(0, joined, store)
    assert [m.state["at"] for _, m in back] == [6, 7]
    assert all(torch.equal(m.payload[0], part) for (_, m), part in zip(back, parts, strict=True))
    assert store.empty


def test_no_gradient_stays_none():
    store = Store()
    with torch.no_grad():
        Broadcast(2).forward(0, Message(tensors(1, 2), State(0)), store)
        Broadcast(2).backward(0, Message((None,), State(0)), store)
        ((_, back),) = Broadcast(2).backward(1, Message((None,), State(0)), store)
    assert back.payload == (None,)


# -- graphs ------------------------------------------------------------------------------------------------------------

BAD = {
    "no such node": (nodes(), [*EDGES, "a -> c"], "no node named 'c'"),
    "no arrow": (nodes(), ["x a"], "the form is 'a -> b'"),
    "no such port": (nodes(), [*EDGES, "a.1 -> b.1"], "a has no out port 1; b has no in port 1"),
    "a port is a number": (nodes(), ["x.y -> a"], "a port is a number"),
    "dangling": (nodes(), EDGES[:2], "nothing is at out port 0 of b; nothing is at in port 0 of loss"),
    "twice": (nodes(), [*EDGES, "x -> b"], "2 edges are at out port 0 of x"),
    "no source": (nodes(x=Transform(nn.Identity())), EDGES, "it has no source"),
    "two losses": (
        nodes(both=Broadcast(2), other=Loss()),
        ["x -> a", "a -> b", "b -> both", "both.0 -> loss", "both.1 -> other"],
        "it has 2 losses instead of one",
    ),
    "a loop that never changes": (
        nodes(join=Phi(2), more=Cond(lambda s: 0), b=Transform(nn.Linear(3, 3))),
        ["x -> a", "a -> join.0", "join -> b", "b -> more", "more.1 -> join.1", "more.0 -> loss"],
        "a cycle among .*join.* leads through no node that changes the state",
    ),
    "features": (nodes(b=Transform(nn.Linear(4, 2))), EDGES, "b takes 4 features and is sent 3"),
    "features of branches": (
        nodes(way=Cond(lambda s: 0), c=Transform(nn.Linear(4, 5)), join=Phi(2)),
        ["x -> way", "way.0 -> a", "way.1 -> c", "a -> join.0", "c -> join.1", "join -> b", "b -> loss"],
        "joins branches of 3 and 5 features",
    ),
    "a name": (nodes() | {"a.b": Broadcast(1)}, EDGES, "names are Python identifiers"),
    "a name of the module's own": (nodes() | {"forward": Transform(nn.Identity())}, EDGES, "none of a module's own"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_graph_that_does_not_hold_together_is_refused(case):
    made, edges, message = BAD[case]
    with pytest.raises(BadInput, match=message):
        Graph(made, edges)


def test_two_nodes_do_not_share_a_parameter():
    shared = nn.Linear(4, 4)
    with pytest.raises(BadInput, match="a and b share a parameter"):
        Graph(nodes(a=Transform(shared), b=Transform(shared)), EDGES)


def test_an_island_is_found():
    island = {"join": Phi(1), "count": Isu(Add("t"))}
    with pytest.raises(BadInput, match="no source leads to join; no source leads to count"):
        Graph(nodes(**island), [*EDGES, "join -> count", "count -> join"])


@given(st.permutations(range(len(EDGES))), st.sets(st.integers(0, len(EDGES) - 1)))
def test_a_graph_is_whole_whatever_the_order_of_its_edges_and_not_without_one(order, missing):
    edges = [EDGES[i] for i in order if i not in missing]
    if not missing:
        assert [str(e) for e in Graph(nodes(), edges).edges] == edges
        return
    with pytest.raises(BadInput, match="nothing is at"):
        Graph(nodes(), edges)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 3))
def test_features_fit_along_a_chain_or_are_refused(widths, gives):
    """Each layer takes what the one before gives, but perhaps for one."""
    sizes = [(a, b) for a, b in itertools.pairwise([2, *widths, 3])]
    at = min(gives, len(sizes) - 1)
    broken = [(a + (i == at and i > 0), b) for i, (a, b) in enumerate(sizes)]
    for layers, fits in ((sizes, True), (broken, at == 0)):
        made = nn.Sequential(*(nn.Linear(a, b) for a, b in layers))
        if fits:
            assert len(graph_of(made).learners) == len(layers)
        else:
            with pytest.raises(BadInput, match="features and is sent"):
                graph_of(made)


def test_a_printed_graph_names_nodes_and_edges():
    made = str(Graph(nodes(), EDGES))
    assert "a: Transform(Linear, 15 parameters)" in made
    assert all(edge in made for edge in EDGES)


def test_an_unknown_node_is_answered_with_the_nearest():
    with pytest.raises(UnknownName, match="Did you mean 'loss'"):
        Graph(nodes(), ["x -> los"])


def test_what_is_no_chain_and_no_graph_is_refused():
    with pytest.raises(BadInput, match="neither an ampnet Graph nor a plain"):
        graph_of(nn.Linear(2, 2))


def test_a_module_that_comes_again_in_a_chain_is_there_again():
    act, tied, x = nn.Tanh(), nn.Linear(4, 4), torch.randn(3, 4)
    model = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act, nn.Linear(4, 2))
    graph = graph_of(model)
    assert torch.equal(graph(x), model(x))
    assert graph.learners == ["part0", "part1", "part2"]
    with pytest.raises(BadInput, match="part0 and part1 share a parameter"):
        graph_of(nn.Sequential(tied, act, tied, nn.Linear(4, 2)))


def test_batch_norm_wants_two_samples_in_every_instance():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    check_norms(graph_of(model), 8, {24, 6})
    check_norms(graph_of(nn.Sequential(nn.Linear(4, 2))), 1, {24})
    with pytest.raises(BadInput, match=r"smallest is of 1 sample.*Use samples=2"):
        check_norms(graph_of(model), 1, {24})
    with pytest.raises(BadInput, match=r"batches of 9 and 24.*Use samples=5"):
        check_norms(graph_of(model), 4, {24, 9})
    with pytest.raises(BadInput, match="another batch size"):
        check_norms(graph_of(model), 4, {24, 1})


# -- placement and learning --------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=6), st.integers(1, 6))
def test_runs_are_the_best_there_are(costs_and_messages, ranks):
    """Whatever messages go between neighbours, and between the first and the last."""
    n = len(costs_and_messages)
    if ranks > n:
        return
    costs = [cost for cost, _ in costs_and_messages]
    between = [[0] * n for _ in range(n)]
    for i, (_, messages) in enumerate(costs_and_messages):
        between[i][(i + 1) % n] = between[(i + 1) % n][i] = messages

    def dearest(blocks):
        at = [k for k, (lo, hi) in enumerate(blocks) for _ in range(lo, hi)]
        spent = [0] * len(blocks)
        for i in range(n):
            spent[at[i]] += costs[i] + sum(between[i][j] for j in range(n) if at[j] != at[i])
        return max(spent)

    found = _balanced(costs, between, [True] * n, ranks)
    assert [i for lo, hi in found for i in range(lo, hi)] == list(range(n))
    cuts = itertools.combinations(range(1, n), ranks - 1)
    assert dearest(found) == min(dearest(list(itertools.pairwise((0, *c, n)))) for c in cuts)


@pytest.mark.parametrize("name", ampnets.MODELS)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_rank_owns_something_that_learns(name, ranks):
    graph = graph_of(ampnets.build(name))
    place = placed(graph, ranks, ampnets.batch(name, 1)[0])
    assert set(place) == set(graph.nodes)
    assert {place[n] for n in graph.learners} == set(range(ranks))
    assert all(place[n] == 0 for n in graph.sources)
    with pytest.raises(BadInput, match="every rank owns at least one"):
        placed(graph, 9, ampnets.batch(name, 1)[0])


@given(st.integers(1, 4), st.integers(1, 4), st.randoms(use_true_random=False))
def test_no_visit_is_staler_than_allowed_whatever_the_order(keys, frequency, random):
    """Visits of instances that begin, loop and come back in any order, some of them very late."""
    node = Learning("a", keys, frequency)
    ahead = [State.of(key, t=t) for key in range(8) for t in range(random.randint(1, 3))]
    out, updates, back = [], [], 0
    while ahead or out:
        if ahead and (not out or random.random() < 0.5):
            out.append(ahead.pop(0))
            node.went(out[-1])
        else:
            update = node.came_back(out.pop(random.randrange(len(out))), gradient=True)
            back += 1
            updates += [update] if update else []
    assert all(u.staleness <= keys and u.gathered >= frequency for u in updates)
    assert not node.visits
    assert not node.of_instance
    assert not node.wanted
    assert node.gathered < frequency  # nothing was put off that could be done at the end
    assert [u.number for u in updates] == list(range(1, len(updates) + 1))


# -- data --------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 3), st.lists(st.integers(0, 9), min_size=1, max_size=9))
def test_a_list_is_reduced_to_a_digit(operator, digits):
    assert 0 <= reduced(operator, digits) <= 9


def test_lists_are_what_their_generator_says():
    made = list_reduction(samples=50, test=5, longest=6, seed=3)
    inputs, target = made.train.rows(torch.arange(50))
    for token, length, digit in zip(inputs["token"].tolist(), inputs["length"].tolist(), target.tolist(), strict=True):
        assert 2 <= length <= 6
        assert not any(token[length:])
        assert reduced(token[0] - 10, token[1:length]) == digit
    assert torch.equal(list_reduction(samples=50, test=5, longest=6, seed=3).train.rows(torch.arange(50))[1], target)
    assert [reduced(op, [7, 2, 3]) for op in range(4)] == [4, 5, 8, 3]


def test_trees_are_what_their_generator_says():
    inputs, target = boolean_trees(samples=50, test=5, leaves=6, seed=3).train.rows(torch.arange(50))
    for token, place, answer in zip(inputs["token"].tolist(), inputs["place"].tolist(), target.tolist(), strict=True):
        tokens = {p: t for t, p in zip(token, place, strict=True) if p}
        assert all((t >= 2) == (2 * p in tokens) == (2 * p + 1 in tokens) for p, t in tokens.items())
        assert all(p == 1 or p // 2 in tokens for p in tokens)
        assert truth(tokens) == answer
    assert 0 < int(target.sum()) < 50
    with pytest.raises(BadInput, match="At most 62"):
        boolean_trees(leaves=63)
