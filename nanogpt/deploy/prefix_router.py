"""Which replica a request goes to: the one that its key names, unless that one is much busier than another.

Ray Serve's own prefix-aware router (``ray.serve.llm``) is for vLLM and SGLang and cannot be imported without one of
them; its router for sessions follows the session however busy the replica is. This one ranks the replicas by a hash of
key and replica (so a replica that comes or goes moves its own share of the keys only) and takes the first that has at
most ``max_ahead`` requests more than the idlest. A beginning that everybody shares thereby spreads over as many
replicas as it needs. Requests without a key go to the less busy of two.

Runs in the fronts' processes. The key is the handle's ``session_id`` (see ``affinity``).
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

# A quarter of a batch by default: so many more in one replica hardly slow it down, and a prompt computed twice does.
MAX_AHEAD = 8


class PrefixRouter(RequestRouter):
    """Ray Serve's request router, as documented under "custom request router"."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Called by Ray with ``request_router_kwargs``."""
        self._max_ahead = int(kwargs.get("max_ahead", MAX_AHEAD))

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks: Ray takes the least busy of the first one that has room."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # when all are full, ask again after a pause
        if len(candidate_replicas) < 2:
            return [list(candidate_replicas)]
        key = pending_request.metadata.session_id if pending_request is not None else ""
        if not key:
            return [random.sample(candidate_replicas, 2), list(candidate_replicas)]
        queued = [self.replica_queue_len_cache.get(replica.replica_id) or 0 for replica in candidate_replicas]
        order = rank(key, [replica.replica_id.unique_id for replica in candidate_replicas], queued, self._max_ahead)
        return [[candidate_replicas[i]] for i in order]


def rank(key: str, names: list[str], queued: list[int], max_ahead: int) -> list[int]:
    """The replicas' indices, best first: in the key's own order, those that are too far ahead at the end."""
    most = min(queued) + max_ahead

    def place(i: int) -> tuple[bool, Any]:
        return queued[i] > most, hashlib.blake2b(f"{key} {names[i]}".encode(), digest_size=8).digest()

    return sorted(range(len(names)), key=place)
