"""Hugging Face transformers' own ``generate`` on PyTorch. Options: ``folder``, ``dtype``, ``compile``."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from worker import Generate, serve


def load(options: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    torch.set_num_threads(options["threads"])
    torch.set_grad_enabled(False)
    transformers.utils.logging.set_verbosity_error()
    model = transformers.GPT2LMHeadModel.from_pretrained(options["folder"], dtype=getattr(torch, options["dtype"]))
    model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(prompts: list[list[int]], new_tokens: int) -> list[int]:
        ids = torch.tensor(prompts)
        result: torch.Tensor = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            cache_implementation="static",
            disable_compile=True,
        )
        return [result.shape[1] - ids.shape[1]] * len(prompts)

    return generate, {"versions": {"transformers": transformers.__version__, "torch": torch.__version__}}


if __name__ == "__main__":
    serve(load)
