"""OpenVINO GenAI. Options: ``folder``, ``backend`` (PA: paged attention, SDPA: stateful), ``properties``."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np
import openvino
import openvino_genai
from worker import Generate, serve


def load(options: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    properties = {"INFERENCE_NUM_THREADS": options["threads"], "PERFORMANCE_HINT": "LATENCY", **options["properties"]}
    if options["backend"] == "PA":
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = 2048
        scheduler.max_num_seqs = 32
        scheduler.num_kv_blocks = 256
        scheduler.enable_prefix_caching = False
        properties["scheduler_config"] = scheduler
    pipeline = openvino_genai.LLMPipeline(options["folder"], "CPU", ATTENTION_BACKEND=options["backend"], **properties)

    def generate(prompts: list[list[int]], new_tokens: int) -> list[int]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new_tokens
        config.ignore_eos = True
        config.do_sample = False
        config.apply_chat_template = False
        ids = np.array(prompts, dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        return [len(tokens) for tokens in pipeline.generate(inputs, config).tokens]

    return generate, {"versions": {"openvino-genai": version("openvino-genai"), "openvino": version("openvino")}}


if __name__ == "__main__":
    serve(load)
