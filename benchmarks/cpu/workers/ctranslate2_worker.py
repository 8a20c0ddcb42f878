"""CTranslate2. Options: ``folder``, ``compute_type``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ctranslate2
from worker import Generate, serve


def load(options: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    folder = Path(options["folder"])
    generator = ctranslate2.Generator(
        str(folder),
        device="cpu",
        intra_threads=options["threads"],
        inter_threads=1,
        compute_type=options["compute_type"],
    )
    vocabulary = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))

    def generate(prompts: list[list[int]], new_tokens: int) -> list[int]:
        results = generator.generate_batch(
            [[vocabulary[token] for token in prompt] for prompt in prompts],
            max_length=new_tokens,
            min_length=new_tokens,
            end_token=[],
            sampling_topk=1,
            beam_size=1,
            include_prompt_in_result=False,
            max_batch_size=0,
        )
        return [len(result.sequences_ids[0]) for result in results]

    return generate, {"versions": {"ctranslate2": ctranslate2.__version__}, "compute_type": generator.compute_type}


if __name__ == "__main__":
    serve(load)
