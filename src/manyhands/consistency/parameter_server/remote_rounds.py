"""The worker's end of rounds on a server that is a rank: gradients go there, parameters come back (survey §VI-A).

    BRING   weight, the optimizer's numbers, g    → who has come;  once the round has ended: lateness, θ
    ASIDE   nobody waits for this worker

All shards lie on one server. Payload is counted as `common_rounds` counts it, as ``push`` and ``pull``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from manyhands.consistency.parameter_server.requests import ANSWER, Ask, finish, header
from manyhands.consistency.parameter_server.rounds import Outcome, Rounds, late_for_a_round
from manyhands.consistency.robust.aggregation import Aggregation
from manyhands.errors import DeadlineExceeded

if TYPE_CHECKING:
    from manyhands.consistency.parameter_server.remote_store import RemoteStore


class RemoteRounds(Rounds):
    """Rounds of ``store``; see the file's head."""

    def __init__(self, store: RemoteStore, needed: int, rule: Aggregation) -> None:
        self._store = store
        ((self._server, self._held),) = store.held.items()
        if store.comm.rank == 0:
            said = {"needed": needed, "workers": store.comm.size, "rule": str(rule)}
            payload = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
            with store.comm.counting("service"):
                works = store.ask(self._server, header(Ask.ROUNDS, count=len(payload)), payload)
                store.answer(self._server)
                finish(works)
        store.comm.barrier()

    def bring(self, vectors: Sequence[Tensor], weight: float, *, votes: bool) -> tuple[int, Outcome]:
        """See `Rounds.bring`."""
        store = self._store
        assert store.optimizer is not None
        in_use = store.share_what_is_in_use()
        mine, number = [piece.flat for piece in store.replica.pieces], store.read[0]
        brought = [store.slice(s, vectors) for s in self._held] if weight else []
        for x in brought:
            store.comm.access("push", x)
        for s in self._held:
            store.comm.access("pull", store.slice(s, mine))
        with store.comm.counting("service"):
            groups = [store.optimizer.param_groups[store.group_of(store.shards[s].piece)] for s in self._held]
            headers = [header(Ask.BRING, group=group) for group in groups]
            about = torch.cat([torch.tensor([weight], dtype=torch.float64), *headers])
            asked = header(Ask.BRING, read=number, count=votes, in_use=in_use)
            works = store.ask(self._server, asked, about, *brought)
            came = store.world.recv(torch.zeros(store.comm.size, dtype=torch.int64), self._server, ANSWER).tensor
            late = self._end(number, came.tolist())
            finish(works)
        return max(late, 0), Outcome(max(-late, 0))

    def _end(self, number: int, came: Sequence[int]) -> int:
        """Take what all shards are after round ``number``, to which ``came`` says who had come; what is said of it."""
        store, late = self._store, 0
        try:
            for s in self._held:
                store.read[s], late, values = store.answer_of(s, values=True)
                store.slice(s, [piece.flat for piece in store.replica.pieces]).copy_(values)
        except DeadlineExceeded as e:
            raise late_for_a_round(e, number, came) from e
        return late

    def aside(self, by: int) -> None:
        """See `Rounds.aside`."""
        store = self._store
        with store.comm.counting("service"):
            works = store.ask(self._server, header(Ask.ASIDE, read=by))
            store.answer(self._server)
            finish(works)
