"""``nanogpt generate``: one prompt from the command line, its continuation written as it is computed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from nanogpt.cli._arguments import add_model_arguments, add_sampling_arguments, open_model, sampling_params
from nanogpt.errors import InvalidRequest

if TYPE_CHECKING:
    from nanogpt.llm import LLM
    from nanogpt.sampling_params import SamplingParams

HELP = "continue a text in the terminal"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "nanogpt generate [OPTIONS] [CHECKPOINT] PROMPT"
    parser.epilog = (
        "With one argument, that is the prompt; with two, the first is the checkpoint (a file or a folder).\n"
        "Without a checkpoint: MODEL_CHECKPOINT from the environment, or the embedded model.\n\n"
        'examples:\n  nanogpt generate "Once upon a time"\n  nanogpt generate log/model_40000.pt "Once upon a time"\n'
        "  cat poem.txt | nanogpt generate log/ - --max-tokens 50"
    )
    parser.add_argument("words", nargs="*", metavar="[CHECKPOINT] PROMPT", help="the prompt may be -: standard input")
    parser.add_argument("--prompt", metavar="TEXT", help="the prompt; an argument beside it is the checkpoint")
    parser.add_argument("--json", action="store_true", help="one JSON object at the end instead of a running text")
    parser.add_argument("--no-prompt", action="store_true", help="do not repeat the prompt before its continuation")
    add_sampling_arguments(parser)
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    args.checkpoint, prompt = _checkpoint_and_prompt(args)
    params = sampling_params(args)
    if not args.json and (params.logprobs is not None or params.prompt_logprobs is not None):
        raise InvalidRequest("Log probabilities are shown only in JSON.", remedy="Add --json.", field="logprobs")
    if prompt == "-":
        prompt = sys.stdin.read()
    llm = open_model(args)
    if args.json:
        print(json.dumps(_answer(llm, prompt, params), ensure_ascii=False))
        return 0
    if not args.no_prompt:
        print(prompt, end="", flush=True)
    try:
        for piece in llm.stream(prompt, params):
            print(piece, end="", flush=True)
    finally:
        print(flush=True)  # also when Ctrl-C ends it: what was written stays, and the shell begins a new line
    return 0


def _checkpoint_and_prompt(args: argparse.Namespace) -> tuple[str | None, str]:
    """Which of the arguments is what; refuses what could be meant in two ways."""
    words: list[str] = args.words
    if args.prompt is not None:
        if len(words) > 1:
            raise InvalidRequest(
                f"--prompt gives the prompt, so one argument (the checkpoint) may stand beside it, not {len(words)}.",
                field="prompt",
            )
        return (words[0] if words else None), args.prompt
    if len(words) == 2:
        return words[0], words[1]
    if len(words) == 1:
        if os.path.exists(words[0]):
            raise InvalidRequest(
                f"{words[0]} is a file or folder here, and there is no prompt beside it.",
                remedy='Write nanogpt generate CHECKPOINT "PROMPT", or --prompt for a prompt that reads like a path.',
                field="prompt",
            )
        return None, words[0]
    raise InvalidRequest(
        "Prompt is required." if not words else f"There are {len(words)} arguments; a prompt is one.",
        remedy='Write nanogpt generate "PROMPT", in quotation marks, or - to read standard input.',
        field="prompt",
    )


def _answer(llm: LLM, prompt: str, params: SamplingParams) -> dict[str, Any]:
    """The fields of POST /generate's answer that mean something without a server; log probabilities if asked for."""
    completion = llm.generate([prompt], params)[0]
    answer: dict[str, Any] = {
        "prompt": prompt,
        "generated_text": completion.full_text,
        "tokens_generated": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "model": llm.card["name"],
        "usage": {
            "prompt_tokens": completion.num_prompt_tokens,
            "completion_tokens": len(completion.token_ids),
            "total_tokens": completion.num_prompt_tokens + len(completion.token_ids),
        },
    }
    for name in ("logprobs", "prompt_logprobs"):
        values = getattr(completion, name)
        if values is not None:
            answer[name] = [value and dataclasses.asdict(value) for value in values]
    return answer
