"""This product through its public Python API. Options: ``folder``, ``precision``, ``threads``."""

from __future__ import annotations

from typing import Any

from worker import Generate, serve

from nanogpt import LLM, SamplingParams, __version__


def load(options: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    # A model with random weights repeats itself: guesses would flatter this engine beside others that make none.
    llm = LLM(options["folder"], precision=options["precision"], threads=options["threads"], speculate="off")

    def generate(prompts: list[list[int]], new_tokens: int) -> list[int]:
        params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
        return [len(completion.token_ids) for completion in llm.generate(prompts, params)]

    return generate, {"versions": {"nano-gpt-api": __version__}}


if __name__ == "__main__":
    serve(load)
