"""Flags that commands share: those of the model, and one for every field of SamplingParams."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nanogpt.errors import InvalidRequest
from nanogpt.sampling_params import SamplingParams
from nanogpt.settings import Settings

if TYPE_CHECKING:
    from nanogpt.llm import LLM

_HELP = {
    "max_tokens": "new tokens at most",
    "logit_bias": "add BIAS to the logit of a token id; may be repeated",
    "repetition_penalty": "above 1: ids seen in prompt or output become less likely",
    "presence_penalty": "subtracted once from the logits of ids in the output",
    "frequency_penalty": "subtracted for every occurrence of an id in the output",
    "temperature": "randomness; 0 always takes the most likely token",
    "top_k": "sample among this many most likely tokens; 0 is off",
    "top_p": "sample among the smallest set of tokens with this probability",
    "min_p": "drop tokens less likely than this times the most likely one",
    "seed": "the same seed gives the same text",
    "stop": "a text that ends the output; may be repeated",
    "stop_token_ids": "a token id that ends the output; may be repeated",
    "ignore_eos": "go on after the end-of-text token",
    "logprobs": "report the log probability of each token beside this many alternatives",
    "prompt_logprobs": "the same for the prompt's tokens",
}
_INTEGERS = ("max_tokens", "top_k", "seed", "logprobs", "prompt_logprobs")
_MODEL_SETTINGS = ("tokenizer", "device", "precision", "runner", "threads", "context_overflow", "speculate")


def add_sampling_arguments(parser: argparse.ArgumentParser, *, leave_out: tuple[str, ...] = ()) -> None:
    """One flag for every field of SamplingParams but those left out; what is not given keeps its default."""
    group = parser.add_argument_group("sampling")
    for field in dataclasses.fields(SamplingParams):
        if field.name in leave_out or field.name == "grammar":  # a program writes one, not a person
            continue
        flag, help = "--" + field.name.replace("_", "-"), _HELP[field.name]
        if field.name == "ignore_eos":
            group.add_argument(flag, action="store_true", default=None, help=help)
        elif field.name == "logit_bias":
            group.add_argument(flag, action="append", type=_bias, metavar="ID=BIAS", help=help)
        elif field.name in ("stop", "stop_token_ids"):
            texts = field.name == "stop"
            group.add_argument(
                flag, action="append", type=str if texts else int, metavar="TEXT" if texts else "ID", help=help
            )
        else:
            integer = field.name in _INTEGERS
            if field.default is not None:
                help += f" (default {field.default:g})"
            group.add_argument(flag, type=int if integer else float, metavar="N" if integer else "X", help=help)


def sampling_params(args: argparse.Namespace, **defaults: Any) -> SamplingParams:
    """The parameters that the flags ask for."""
    values = dict(defaults)
    for field in dataclasses.fields(SamplingParams):
        value = getattr(args, field.name, None)
        if value is not None:
            values[field.name] = dict(value) if field.name == "logit_bias" else value
    return SamplingParams(**values)


def parse_field(name: str, text: str) -> Any:
    """The value of one plain field of SamplingParams from text, as ``chat`` takes it from a line."""
    if name == "seed" and text in ("off", "none"):
        return None
    kind = int if name in _INTEGERS else float
    try:
        return kind(text)
    except ValueError:
        what = "an integer" if kind is int else "a number"
        raise InvalidRequest(f"{name} must be {what}, not {text!r}.", field=name) from None


def _bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    return int(token_id), float(bias)


_bias.__name__ = "ID=BIAS pair"  # argparse: "invalid ID=BIAS pair value: 'x'"


def add_setting(group: argparse._ArgumentGroup, name: str) -> None:
    """The flag of one field of Settings. Not given it is None, and the environment, the file or the default counts."""
    field = Settings.__dataclass_fields__[name]
    is_switch = isinstance(field.default, bool)
    choices = field.metadata["choices"] or (("true", "false") if is_switch else None)
    default = str(field.default).lower() or "empty"
    group.add_argument(
        "--" + name.replace("_", "-"),
        choices=choices,
        nargs="?" if is_switch else None,  # the flag alone means true
        const="true" if is_switch else None,
        metavar=None if choices else name.rsplit("_", 1)[-1].upper(),
        help=f"{field.metadata['help']} (default {default})".replace("%", "%%"),
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which arithmetic runs the model; what is not given comes from the environment, as for the server."""
    group = parser.add_argument_group("model")
    for name in _MODEL_SETTINGS:
        add_setting(group, name)


def open_model(args: argparse.Namespace) -> LLM:
    """Load the model that the flags and the environment name; says so on a terminal while it takes time."""
    flags = {name: getattr(args, name) for name in _MODEL_SETTINGS}
    settings = Settings.load({"model_checkpoint": args.checkpoint, **flags})
    with _progress(f"Loading {settings.model_checkpoint or 'the embedded model'}"):
        from nanogpt.llm import LLM

        return LLM(
            settings.model_checkpoint,
            max_batch_size=1,  # there is one text: more would be memory for nobody
            **{name: getattr(settings, name) for name in _MODEL_SETTINGS},
        )


@contextmanager
def _progress(what: str) -> Iterator[None]:
    """A line on standard error while the block runs, taken back at its end; nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    start = time.monotonic()
    print(f"{what} …", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        took = time.monotonic() - start
        print(f"\r\x1b[K{what}: {took:.1f} s" if took > 1 else "\r\x1b[K", end="\n" if took > 1 else "",
              file=sys.stderr, flush=True)  # fmt: skip
