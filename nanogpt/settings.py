"""All settings in one frozen object: flag > environment > file > default. Unknown keys are refused.

``Settings.load(flags)`` is called once a process at its start; everything else is handed the object. Each field's
metadata is the single source for its environment variable, its command line flag, its limits and its line in
``docs/settings.md``. Importing this module imports neither NumPy nor Flask.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args, get_origin, get_type_hints

from nanogpt.errors import SettingsError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PREFIX = "NANOGPT_"
# Variables of the prefix that are not settings of the server.
_NOT_SETTINGS = frozenset({"NANOGPT_CACHE_DIR", "NANOGPT_CONFIG", "NANOGPT_ISA"})


def _setting(
    default: Any,
    help: str,
    *,
    env: str,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    secret: bool = False,
) -> Any:
    return dataclasses.field(
        default=default,
        repr=not secret,
        metadata={"help": help, "env": env, "low": low, "high": high, "choices": choices, "secret": secret},
    )


@dataclass(frozen=True)
class Settings:
    """Every setting of the server. Units are in the names: ``_s`` seconds, ``_bytes``, ``_tokens``, ``_chars``."""

    # -- what is served
    model_checkpoint: str = _setting(
        "", "Checkpoint to serve: a file, or a folder such as log/. Empty: the embedded model.", env="MODEL_CHECKPOINT"
    )
    compare_checkpoint: str = _setting(
        "",
        "A second checkpoint to compare the first one with: requests get it that name it as their model. It takes "
        "memory of its own. Empty: none.",
        env="COMPARE_CHECKPOINT",
    )
    tokenizer: str = _setting(
        "",
        "Tokenizer: gpt2, or a path to meta.pkl, tokenizer.json or llm.c's file. Empty: detected.",
        env="NANOGPT_TOKENIZER",
    )
    device: str = _setting("auto", "Where the model runs.", env="NANOGPT_DEVICE", choices=("auto", "cpu", "cuda"))
    precision: str = _setting(
        "auto",
        "Arithmetic of the weights. auto: the runner's own default.",
        env="NANOGPT_PRECISION",
        choices=("auto", "fp32", "bf16", "fp16", "int8", "int4"),
    )
    runner: str = _setting(
        "auto",
        "What computes: native (C++, CPU) or torch. auto: native on a CPU where it was built.",
        env="NANOGPT_RUNNER",
        choices=("auto", "native", "torch"),
    )
    threads: int = _setting(
        0,
        "Threads of the model's arithmetic on a CPU. 0: as many as the container may use.",
        env="NANOGPT_THREADS",
        low=0,
        high=1024,
    )

    # -- HTTP
    host: str = _setting("127.0.0.1", "Address to listen on.", env="HOST")
    port: int = _setting(5000, "Port to listen on.", env="PORT", low=0, high=65535)
    http_workers: int = _setting(
        1,
        "HTTP worker processes (gunicorn's -w wins). They share one engine.",
        env="NANOGPT_HTTP_WORKERS",
        low=1,
        high=256,
    )
    http_threads: int = _setting(
        544,
        "Requests a worker holds at once; one more is answered 503. 544 is what the engine admits by default.",
        env="NANOGPT_HTTP_THREADS",
        low=1,
        high=4096,
    )
    api_key: str = _setting(
        "", "Key that clients send as X-API-Key or Authorization: Bearer. Empty: open.", env="API_KEY", secret=True
    )
    admin_key: str = _setting(
        "",
        "Key of the routes under /admin, another than API_KEY. Empty: those routes do not exist.",
        env="ADMIN_KEY",
        secret=True,
    )
    keys_file: str = _setting(
        "",
        "File of further keys, each with a name and limits of its own, which nanogpt keys writes. Empty: none.",
        env="NANOGPT_KEYS_FILE",
    )
    rate_limit: str = _setting(
        "10 per minute",
        "Requests a client may send to the generating routes: 10 per minute, 100/hour, several with ; between; or off.",
        env="RATE_LIMIT",
    )
    trusted_proxies: int = _setting(
        0,
        "Reverse proxies in front of the server, whose headers tell the client's address. 0: no header is believed.",
        env="NANOGPT_TRUSTED_PROXIES",
        low=0,
        high=16,
    )
    max_body_bytes: int = _setting(
        1_048_576, "Largest request body.", env="NANOGPT_MAX_BODY_BYTES", low=1024, high=2**31
    )

    # -- requests
    max_prompt_chars: int = _setting(
        1000, "Longest prompt of /generate, in characters.", env="NANOGPT_MAX_PROMPT_CHARS", low=1, high=10_000_000
    )
    max_new_tokens: int = _setting(
        500, "Largest max_length of /generate, in tokens.", env="NANOGPT_MAX_NEW_TOKENS", low=1, high=10_000_000
    )
    max_sequences_per_request: int = _setting(
        128,
        "Texts that one request of /v1 may ask for: its prompts times n (or best_of).",
        env="NANOGPT_MAX_SEQUENCES_PER_REQUEST",
        low=1,
        high=4096,
    )
    max_tokens_per_request: int = _setting(
        131_072,
        "Prompt and new tokens that one request of /v1 may ask for, over all its texts; with logprobs those count too.",
        env="NANOGPT_MAX_TOKENS_PER_REQUEST",
        low=1,
        high=10_000_000,
    )
    request_timeout_s: float = _setting(
        300.0,
        "A request that is not finished after this long ends with what it has.",
        env="NANOGPT_REQUEST_TIMEOUT_S",
        low=0.1,
        high=86_400,
    )
    context_overflow: str = _setting(
        "stop",
        "At the end of the context: stop (finish_reason length), or crop the text from the left as nanoGPT does.",
        env="NANOGPT_CONTEXT_OVERFLOW",
        choices=("stop", "crop"),
    )
    stream_ping_s: float = _setting(
        10.0, "A silent stream sends a comment this often.", env="NANOGPT_STREAM_PING_S", low=0.05, high=3600
    )

    # -- response cache
    response_cache: bool = _setting(
        True,
        "Keep answers that must repeat (greedy, or with a seed) for identical requests.",
        env="NANOGPT_RESPONSE_CACHE",
    )
    cache_bytes: int = _setting(
        33_554_432,
        "Memory for such answers in each HTTP worker. 0: only requests that are open at the same time share one.",
        env="NANOGPT_CACHE_BYTES",
        low=0,
        high=2**40,
    )
    cache_entry_bytes: int = _setting(
        262_144,
        "Largest answer that is kept (a token takes 1 to 5).",
        env="NANOGPT_CACHE_ENTRY_BYTES",
        low=64,
        high=2**26,
    )
    cache_ttl_s: int = _setting(3600, "How long an answer is kept.", env="NANOGPT_CACHE_TTL_S", low=1, high=31_536_000)

    # -- shared state
    redis_url: str = _setting(
        "",
        "Redis that servers share, for example redis://:password@host:6379/0. Empty: each keeps its own.",
        env="REDIS_URL",
        secret=True,
    )

    # -- the engine
    max_batch_size: int = _setting(
        32, "Sequences that are computed together.", env="NANOGPT_MAX_BATCH_SIZE", low=1, high=4096
    )
    max_batch_tokens: int = _setting(
        512,
        "Token budget of one step: prompts longer than what is left are computed in chunks.",
        env="NANOGPT_MAX_BATCH_TOKENS",
        low=1,
        high=1_048_576,
    )
    max_mixed_tokens: int = _setting(
        0,
        "Token budget of a step in which texts are being written: the smaller, the more evenly their tokens come, and "
        "the later the first tokens of others. 0: twice NANOGPT_MAX_BATCH_SIZE on a CPU, the whole budget on a GPU.",
        env="NANOGPT_MAX_MIXED_TOKENS",
        low=0,
        high=1_048_576,
    )
    max_queue: int = _setting(
        512,
        "Requests that may wait; one more is answered 503 with Retry-After. "
        "A client with more than half of them cannot take the last eighth.",
        env="NANOGPT_MAX_QUEUE",
        low=0,
        high=1_000_000,
    )
    prefix_cache: bool = _setting(True, "Reuse K and V of a common prefix.", env="NANOGPT_PREFIX_CACHE")
    speculate: str = _setting(
        "auto",
        "Guess tokens from the text so far, and keep those that the model draws, too: the same text in fewer steps. "
        "auto: while it pays, on the native runner. A number: so many a text and step, wherever there are some.",
        env="NANOGPT_SPECULATE",
        choices=("auto", "off", "1", "2", "3", "4", "5", "6", "7", "8"),
    )
    engine_wait_s: float = _setting(
        10.0,
        "How long a request waits for an engine that is starting before it is answered 503.",
        env="NANOGPT_ENGINE_WAIT_S",
        low=0,
        high=3600,
    )
    drain_timeout_s: float = _setting(
        60.0, "How long running requests may go on after SIGTERM.", env="NANOGPT_DRAIN_TIMEOUT_S", low=0, high=86_400
    )
    standby: bool = _setting(
        True,
        "Keep the former model loaded, so that a rollback is a switch. false: one model less in memory.",
        env="NANOGPT_STANDBY",
    )
    reload_timeout_s: float = _setting(
        600.0,
        "A new model that is not loaded and tested after this long is given up.",
        env="NANOGPT_RELOAD_TIMEOUT_S",
        low=0.1,
        high=86_400,
    )
    follow: bool = _setting(
        False, "Serve each new checkpoint that appears in the folder that is served.", env="NANOGPT_FOLLOW"
    )
    follow_interval_s: float = _setting(
        5.0,
        "How often the folder is looked at; a checkpoint is loaded once it stayed the same for so long.",
        env="NANOGPT_FOLLOW_INTERVAL_S",
        low=0.05,
        high=86_400,
    )
    follow_loss_text: str = _setting(
        "",
        "Text file on which a followed checkpoint's loss must be at most follow_max_loss. Empty: no such gate.",
        env="NANOGPT_FOLLOW_LOSS_TEXT",
    )
    follow_max_loss: float = _setting(
        0.0,
        "Highest loss, in nats a token, with which a followed checkpoint is served. 0: no such gate.",
        env="NANOGPT_FOLLOW_MAX_LOSS",
        low=0,
        high=1000,
    )
    run_dir: str = _setting(
        "",
        "Folder of the engine's socket, entered by its user only. Empty: a fresh temporary one.",
        env="NANOGPT_RUN_DIR",
    )

    # -- logs
    log_format: str = _setting("text", "Format of the log.", env="NANOGPT_LOG_FORMAT", choices=("text", "json"))
    log_level: str = _setting(
        "info",
        "Least severe message that is logged.",
        env="NANOGPT_LOG_LEVEL",
        choices=("debug", "info", "warning", "error"),
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            _check(f.name, getattr(self, f.name), f.metadata, f.name)

    @classmethod
    def load(
        cls,
        flags: Mapping[str, Any] | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        config: str | None = None,
    ) -> Settings:
        """The settings of this process. ``flags`` are the command line's, None meaning not given.

        ``config`` is a TOML file with field names as keys (or the variable NANOGPT_CONFIG names one).

        Raises: SettingsError naming the flag, variable or key, its value and what is admitted.
        """
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        hints = get_type_hints(cls)
        by_env = {f.metadata["env"]: f for f in fields(cls)}
        for key, value in _read_file(config or environ.get("NANOGPT_CONFIG", "")).items():
            if key not in hints:
                raise SettingsError(f"Unknown key {key!r} in the settings file.", remedy=_nearest(key, list(hints)))
            values[key] = _convert(value, hints[key], f"{key} in the settings file")
        for name, text in environ.items():
            if name in by_env:
                f = by_env[name]
                if text:  # compose files and units pass `PORT=` for what nobody filled in
                    values[f.name] = _convert(text, hints[f.name], name)
                    _check(f.name, values[f.name], f.metadata, name)
            elif name.startswith(PREFIX) and name not in _NOT_SETTINGS:
                raise SettingsError(f"Unknown environment variable {name}.", remedy=_nearest(name, list(by_env)))
        for key, value in (flags or {}).items():
            if value is not None:
                if key not in hints:
                    raise SettingsError(f"Unknown setting {key!r}.", remedy=_nearest(key, list(hints)))
                values[key] = _convert(value, hints[key], "--" + key.replace("_", "-"))
        return cls(**values)

    def to_json(self) -> str:
        """For handing the settings to a child process (over a pipe, never a command line: it holds the key)."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        return cls(**json.loads(text))


def _read_file(path: str) -> dict[str, Any]:
    if not path:
        return {}
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise SettingsError(f"Cannot read the settings file {path}: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"The settings file {path} is not TOML: {error}.") from None


def _convert(value: Any, kind: Any, where: str) -> Any:
    """A value from a file, a variable or a flag, as the field's type."""
    if get_origin(kind) is not None:
        kind = get_args(kind)[0]
    try:
        if kind is bool:
            if isinstance(value, bool):
                return value
            return {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False,
                    "off": False}[str(value).strip().lower()]  # fmt: skip
        if kind is int and not isinstance(value, bool):
            return int(value)
        if kind is float and not isinstance(value, bool):
            return float(value)
        if kind is str and isinstance(value, (str, os.PathLike)):
            return os.fspath(value)
    except (ValueError, KeyError, TypeError):
        pass
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    raise SettingsError(f"{where} is {value!r}; it must be {names[kind]}.", field=where)


def _check(name: str, value: Any, limits: Mapping[str, Any], where: str) -> None:
    if limits["choices"] and value not in limits["choices"]:
        raise SettingsError(f"{where} is {value!r}; it must be one of {', '.join(limits['choices'])}.", field=name)
    low, high = limits["low"], limits["high"]
    if low is not None and not low <= value <= high:  # also refuses NaN
        raise SettingsError(f"{where} is {value!r}; it must be between {low:g} and {high:g}.", field=name)


def _nearest(name: str, known: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]}?" if close else "docs/settings.md lists what there is."
