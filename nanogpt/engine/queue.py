"""Who is next: waiting sequences, chosen fairly among clients. Part of the scheduler; owned by the engine's loop.

Next is the first one of the client that has the fewest sequences running; among equals, of the one that was served
least recently. So a client gets a place as soon as one is free whatever the others have in the queue, and clients that
all have work share the places evenly. Within a client it is first come, first served.

A client that comes (again) counts as served just before the latest one: it goes before whoever was just served, and
behind everybody who has been waiting for longer, so that a stream of new clients cannot starve an old one. A client is
forgotten with its last sequence.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from nanogpt.engine.sequence import Sequence

_SPARE = 64


@dataclass(slots=True, eq=False)
class _Client:
    """``served`` is the time it was served last, in admissions; ``number`` tells clients of one time apart."""

    served: int
    number: int
    num_running: int = 0
    waiting: OrderedDict[int, Sequence] = field(default_factory=OrderedDict)

    @property
    def rank(self) -> tuple[int, int, int]:
        return self.num_running, self.served, self.number


class FairQueue:
    """Waiting sequences by handle, and how many each client has running.

    ``_heap`` holds the rank of every client with waiting sequences, and out-dated ranks among them: an entry counts
    only while it is its client's rank.
    """

    def __init__(self) -> None:
        self._clients: dict[str, _Client] = {}
        self._heap: list[tuple[tuple[int, int, int], str]] = []
        self._client_of: dict[int, str] = {}
        # Two ticks an admission: who comes afterwards stands between the last two.
        self._clock = 0
        self._num_seen = 0

    def __len__(self) -> int:
        return len(self._client_of)

    def __iter__(self) -> Iterator[Sequence]:
        for client in self._clients.values():
            yield from client.waiting.values()

    def get(self, handle: int) -> Sequence | None:
        name = self._client_of.get(handle)
        return None if name is None else self._clients[name].waiting[handle]

    def num_waiting(self, name: str) -> int:
        client = self._clients.get(name)
        return len(client.waiting) if client else 0

    def num_running(self, name: str) -> int:
        client = self._clients.get(name)
        return client.num_running if client else 0

    def add(self, sequence: Sequence) -> None:
        name = sequence.request.client
        client = self._clients.get(name)
        if client is None:
            self._num_seen += 1
            client = self._clients[name] = _Client(self._clock - 1, self._num_seen)
        client.waiting[sequence.handle] = sequence
        self._client_of[sequence.handle] = name
        if len(client.waiting) == 1:
            self._rank(name, client)

    def first(self) -> Sequence:
        """The next one to be served. There must be one."""
        while True:
            rank, name = self._heap[0]
            client = self._clients.get(name)
            if client is not None and client.waiting and client.rank == rank:
                return next(iter(client.waiting.values()))
            heapq.heappop(self._heap)

    def serve(self, sequence: Sequence) -> None:
        """It is waiting, and runs from now on."""
        client = self._take_out(sequence)
        self._clock += 2
        client.served = self._clock
        client.num_running += 1
        self._rank(sequence.request.client, client)

    def remove(self, sequence: Sequence) -> None:
        """It is waiting, and will not be served."""
        client = self._take_out(sequence)
        self._forget_idle(sequence.request.client, client)

    def ended(self, sequence: Sequence) -> None:
        """It ran, and does so no more."""
        name = sequence.request.client
        client = self._clients[name]
        client.num_running -= 1
        self._rank(name, client)
        self._forget_idle(name, client)

    def check(self, running: list[Sequence]) -> None:
        """Integrity: clients are those with sequences, counts are right, whoever waits can be found.

        Raises: AssertionError. Called by tests after every action.
        """
        names = [sequence.request.client for sequence in running]
        for name, client in self._clients.items():
            if client.num_running != names.count(name):
                raise AssertionError(f"{name!r} has {names.count(name)} running, not {client.num_running}")
            if client.waiting and (client.rank, name) not in self._heap:
                raise AssertionError(f"{name!r} waits and is not in line")
        if set(self._clients) != {*names, *self._client_of.values()}:
            raise AssertionError(f"clients are {set(self._clients)}")
        if len(self._heap) > 2 * len(self._clients) + _SPARE:
            raise AssertionError("out-dated ranks pile up")

    def _take_out(self, sequence: Sequence) -> _Client:
        del self._client_of[sequence.handle]
        client = self._clients[sequence.request.client]
        del client.waiting[sequence.handle]
        return client

    def _rank(self, name: str, client: _Client) -> None:
        """The client's rank is a new one, the one that it had is out of date."""
        if client.waiting:
            heapq.heappush(self._heap, (client.rank, name))
        self._tidy()

    def _forget_idle(self, name: str, client: _Client) -> None:
        if not client.waiting and not client.num_running:
            del self._clients[name]
            self._tidy()

    def _tidy(self) -> None:
        """Out-dated ranks are left where they are, but not for ever."""
        if len(self._heap) > 2 * len(self._clients) + _SPARE:
            self._heap = [(other.rank, key) for key, other in self._clients.items() if other.waiting]
            heapq.heapify(self._heap)
