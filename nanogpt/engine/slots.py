"""Who owns which slot, and what K and V it holds: the book-keeping behind the prefix cache.

Owned by the engine's loop. Knows token ids and numbers of slots; the K and V themselves lie in the runner.

Every slot is in exactly one of three sets: *free* (holds nothing of use), *cached* (a finished sequence's K and V, kept
until the place is needed, least recently used first) or *running* (owned by one sequence). Positions
``[0, num_held)`` of a slot hold K and V of the token ids ``held[slot, 0:num_held]``; nothing is known of the rest.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nanogpt.runner.base import Int32

_MAX_GROWN = 64


@dataclass(slots=True)
class Grant:
    """A slot for a new sequence. Its first ``num_cached`` positions are valid once ``copy_from`` was copied."""

    slot: int
    num_cached: int = 0
    copy_from: int | None = None


class Slots:
    """Free, cached and running slots of one runner."""

    def __init__(self, num_slots: int, block_size: int, *, prefix_cache: bool = True, min_copy_tokens: int = 8) -> None:
        # A copy costs one runner call: below so many tokens computing them again is cheaper.
        self._min_copy_tokens = min_copy_tokens
        self.prefix_cache = prefix_cache
        self.num_slots = num_slots
        self.held = np.zeros((num_slots, block_size), np.int32)
        self.num_held: npt.NDArray[np.int64] = np.zeros(num_slots, np.int64)
        # Used as a stack: the slot touched last is taken first, so that no more memory is touched than needed.
        self._free = list(range(num_slots - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._running: set[int] = set()
        # Steps of ``record_one_each`` that were not written down yet: nobody asks between most steps.
        self._grown: list[tuple[Int32, Int32, Int32]] = []

    def acquire(self, token_ids: Int32, max_reuse: int) -> Grant:
        """A slot for a sequence with this context, reusing at most ``max_reuse`` tokens of what any slot holds.

        A finished slot is taken over as it is when all it holds is wanted, or when there is no other; otherwise the
        common prefix is copied, so that the next request can have it too. There must be a slot that is not running.
        """
        source, length = self._longest_prefix(token_ids, max_reuse)
        if length and source in self._cached:
            if length == self.num_held[source] or not (self._free or len(self._cached) > 1):
                del self._cached[source]
                self._running.add(source)
                self.num_held[source] = length
                return Grant(source, length)
            self._cached.move_to_end(source)
        target = self._free.pop() if self._free else self._cached.popitem(last=False)[0]
        self._running.add(target)
        if length < max(1, self._min_copy_tokens):
            self.num_held[target] = 0
            return Grant(target)
        self.held[target, :length] = token_ids[:length]
        self.num_held[target] = length
        return Grant(target, length, source)

    def num_reusable(self, token_ids: Int32, max_reuse: int) -> int:
        """How many tokens ``acquire`` would reuse."""
        length = self._longest_prefix(token_ids, max_reuse)[1]
        return length if length >= self._min_copy_tokens else 0

    def release(self, slot: int, *, keep: bool) -> None:
        """The sequence has ended: its K and V become a prefix for others, or (not ``keep``) are forgotten."""
        self._settle()
        self._running.remove(slot)
        if keep and self.prefix_cache and self.num_held[slot]:
            self._cached[slot] = None
        else:
            self.num_held[slot] = 0
            self._free.append(slot)

    def record(self, slot: int, start: int, token_ids: Int32 | list[int]) -> None:
        """The runner has written K and V of these tokens at ``start``, where what is held ends."""
        self._settle()
        end = start + len(token_ids)
        self.held[slot, start:end] = token_ids
        self.num_held[slot] = end

    def record_one_each(self, slots: Int32, starts: Int32, token_ids: Int32) -> None:
        """``record`` for many slots that grew by one token each. Keeps the arrays."""
        self._grown.append((slots, starts, token_ids))
        if len(self._grown) >= _MAX_GROWN:
            self._settle()

    def clear(self, slot: int) -> None:
        """The running slot's K and V are of no use any more (its positions have moved)."""
        self._settle()
        self.num_held[slot] = 0

    @property
    def num_positions_held(self) -> int:
        """Of all slots together."""
        self._settle()
        return int(self.num_held.sum())

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def check(self, running: set[int]) -> None:
        """Integrity: free + cached + running = all, each slot once, and the running ones are exactly ``running``.

        Raises: AssertionError. Called by tests after every action.
        """
        every = [*self._free, *self._cached, *self._running]
        if sorted(every) != list(range(self.num_slots)):
            raise AssertionError(f"a slot was lost or is owned twice: {self._free=} {self._cached=} {self._running=}")
        if self._running != running:
            raise AssertionError(f"running slots are {self._running}, the sequences own {running}")
        if any(not self._running.issuperset(slots.tolist()) for slots, _, _ in self._grown):
            raise AssertionError("a slot that is not running has grown")
        if any(self.num_held[slot] for slot in self._free):
            raise AssertionError("a free slot claims to hold something")
        if not all(self.num_held[slot] for slot in self._cached):
            raise AssertionError("a cached slot holds nothing")

    def _settle(self) -> None:
        if self._grown:
            slots, starts, token_ids = (np.concatenate(arrays) for arrays in zip(*self._grown, strict=True))
            self._grown.clear()
            self.held[slots, starts] = token_ids
            self.num_held[slots] = starts + 1  # of a slot that grew several times the last one stays

    def _longest_prefix(self, token_ids: Int32, limit: int) -> tuple[int, int]:
        """The slot that shares the most leading tokens, and how many; (-1, 0) when none does.

        Among equals the one that holds nothing else wins: it can be taken over without a copy.
        """
        limit = min(limit, len(token_ids))
        if not self.prefix_cache or limit <= 0:
            return -1, 0
        self._settle()
        candidates = np.flatnonzero((self.held[:, 0] == token_ids[0]) & (self.num_held > 0))
        if not len(candidates):
            return -1, 0
        num_held = self.num_held[candidates]
        limit = min(limit, int(num_held.max()))
        same: npt.NDArray[Any] = self.held[candidates, :limit] == token_ids[:limit]
        lengths = np.minimum(np.where(same.all(axis=1), limit, same.argmin(axis=1)), num_held)
        # One integer orders both criteria.
        best = int((lengths * 2 + (lengths == num_held)).argmax())
        return int(candidates[best]), int(lengths[best])


def num_common(a: Int32, b: Int32) -> int:
    """How many leading tokens two texts share."""
    n = min(len(a), len(b))
    same = a[:n] == b[:n]
    return n if same.all() else int(same.argmin())
