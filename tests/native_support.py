"""Native runners for tests: kept between examples, for each precision, count of threads and instruction set."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
from tiny_model import tiny_checkpoint

from nanogpt import _kernels
from nanogpt.runner.native import NativeRunner, matrix_names

ISAS = tuple(_kernels.usable_isas())
PRECISIONS = ("int8", "int4", "mixed", "fp32")
"""mixed: int4, and every second matrix in int8."""

# Shapes on the kernels' seams: heads no multiple of 4 or 16, widths none of 16 or 64, one head, contexts past a
# K/V leaf of 64 tokens, both GELUs, no bias, an untied head, an MLP of another width.
SHAPES: dict[str, dict[str, Any]] = {
    "small": {},
    "odd": {"n_head": 3, "n_embd": 51, "block_size": 70, "n_inner": 77, "activation": "gelu_erf"},
    "untied": {"n_head": 1, "n_embd": 20, "tied": False, "bias": False, "block_size": 130},
    "wide": {"n_head": 2, "n_embd": 128, "block_size": 200, "n_layer": 3, "vocab_size": 300, "num_tokens": 289},
}


def native_runner(
    shape: str = "small",
    precision: str = "int8",
    threads: int = 1,
    isa: str = "",
    num_slots: int = 8,
    **changes: Any,
) -> NativeRunner:
    """A runner on random weights, which leaves nothing in the user's cache. ``changes``: of the shape."""
    checkpoint = tiny_checkpoint(**{**SHAPES[shape], **changes})
    with mock.patch.dict(os.environ, {"NANOGPT_ISA": isa, "NANOGPT_CACHE_DIR": "off"}):
        return NativeRunner(
            checkpoint,  # type: ignore[arg-type]
            precision="int4" if precision == "mixed" else precision,
            num_slots=num_slots,
            threads=threads,
            int8_matrices=matrix_names(checkpoint.config)[1::2] if precision == "mixed" else (),
        )


_runners: dict[tuple[Any, ...], NativeRunner] = {}


def kept_runner(*key: Any) -> NativeRunner:
    """The same for all examples, so that slots are never clean."""
    if key not in _runners:
        _runners[key] = native_runner(*key)
    return _runners[key]


def bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    return np.ascontiguousarray(values).view(np.uint32)
