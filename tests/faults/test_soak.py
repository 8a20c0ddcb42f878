"""Protects what an operator is promised: whatever is killed, every accepted request ends once, and nothing is left.

The soak itself is ``benchmarks/soak`` (ten minutes); here is one turn of every fault.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support import require_service

from benchmarks.soak.run import FAULTS, soak


@pytest.mark.services
@pytest.mark.timeout(240)
def test_one_turn_of_every_fault_under_load(tmp_path: Path, shared_checkpoints: Path) -> None:
    require_service(
        "redis-server", shutil.which("redis-server") is not None, "the response cache is stopped under load"
    )
    other = str(shared_checkpoints / "01b_nanogpt_char_tiny")
    result = soak(tmp_path, seconds=20.0, workers=4, clients=8, fault_every_s=1.7, checkpoint="", other=other)
    assert result["violations"] == []
    assert set(result["faults"]) == set(FAULTS)
    ended = result["ends"]
    for kind in (
        "plain: done",
        "stream: done",
        "openai: done",
        "abort: left",
        "wrong_key: refused 401 invalid_api_key",
    ):
        assert ended.get(kind), f"the load had none of {kind!r}: {ended}"
