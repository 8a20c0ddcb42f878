"""Prompts and lengths, repeated exactly by a seed; and what has to be asked of a server to make them.

Prompts are token ids where the server tells its vocabulary (``GET /tokenizer_info``: this product, vLLM): their
lengths are exact, whatever the tokenizer. Elsewhere, and in chats, they are words, counted by what the server's usage
says of two probes; then lengths are near what was asked for, and the report tells what they were.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

from nanogpt.bench.http import Answer, Pool
from nanogpt.bench.stream import read_answer, words_of
from nanogpt.errors import InvalidRequest, NanoGPTError

MAX_TOKENS = 10_000_000
_PROBE_WORDS = (4, 16)
_COMMON_WORDS = """
the of and to in that was he his it with is for as had you not be her on at by which have or from this him but
all she they were my are me one their so an said them we who would been will no when there if more out up into do
any your what has man could other than our some very time upon about may its only now like little then can made
"""
_WORDS = _COMMON_WORDS.split()


@dataclass(frozen=True)
class Lengths:
    """A number of tokens, or a range of which each request draws one."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str, name: str) -> Lengths:
        """``64``, or ``32-128``. Raises: InvalidRequest."""
        first, dash, second = text.partition("-")
        try:
            low, high = int(first), int(second if dash else first)
        except ValueError:
            low = high = 0
        if not 1 <= low <= high <= MAX_TOKENS:
            raise InvalidRequest(
                f"--{name.replace('_', '-')} is {text!r}; it must be a number of tokens such as 64, or a range such as"
                f" 32-128, from 1 to {MAX_TOKENS:,}.",
                field=name,
            )
        return cls(low, high)

    def draw(self, draw: random.Random) -> int:
        return draw.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True)
class Workload:
    """What each request asks for. ``shared_prefix`` tokens of a prompt are one of ``prefixes`` beginnings."""

    prompt_tokens: Lengths = Lengths(64, 64)
    output_tokens: Lengths = Lengths(64, 64)
    shared_prefix: int = 0
    prefixes: int = 1
    chat: bool = False
    text: bool = False
    seed: int = 1
    model: str = ""
    temperature: float | None = None
    more: dict[str, Any] = field(default_factory=dict)
    """Further fields of the request's body, as they are."""

    def __post_init__(self) -> None:
        if self.shared_prefix and self.shared_prefix >= self.prompt_tokens.low:
            raise InvalidRequest(
                f"--shared-prefix is {self.shared_prefix}; it must be shorter than every prompt"
                f" (--prompt-tokens {self.prompt_tokens}).",
                field="shared_prefix",
            )

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"


@dataclass(frozen=True)
class Server:
    """What a server says of itself, as far as it does."""

    model: str
    vocabulary: int = 0
    context: int = 0
    avoided: frozenset[int] = frozenset()
    ours: bool = False
    ignores_eos: bool = True
    """Whether it takes ``ignore_eos``, without which texts may end before their length."""
    tokens_a_word: float = 1.3
    tokens_around: float = 0.0


def _drawn(seed: object) -> random.Random:
    return random.Random(str(seed))  # noqa: S311 (it has to repeat)


async def discover(pool: Pool, workload: Workload) -> Server:
    """Ask the server what requests need to know, and try one. Raises: NanoGPTError with the server's words."""
    models = await pool.ask("GET", "/v1/models")
    entries = _json(_require(models, "GET /v1/models")).get("data") or [{}]
    server = Server(workload.model or str(entries[0].get("id", "")), ours=entries[0].get("owned_by") == "nano-gpt-api")
    context = entries[0].get("max_model_len")
    info = await pool.ask("GET", "/tokenizer_info")
    known = _json(info) if info.status == 200 and not info.failure else {}
    if isinstance(known.get("vocab_size"), int) and known["vocab_size"] > 1:
        special = {known.get(f"{name}_token_id") for name in ("eos", "bos", "pad")} - {None}
        context = known.get("max_model_len") or context
        server = _with(server, vocabulary=known["vocab_size"], avoided=frozenset(special))
    server = _with(server, context=int(context or 0))
    if server.ours and server.context:
        _require_room(workload, server.context)
    return await _try(pool, workload, server)


async def _try(pool: Pool, workload: Workload, server: Server) -> Server:
    """Requests as the run will send them; two short ones before, where lengths have to be learnt."""
    server = await _learn_eos(pool, workload, server)
    maker = Prompts(workload, server)
    if not maker.as_ids:
        counts = []
        for words in _PROBE_WORDS:
            answer = await pool.ask("POST", workload.path, maker.body(maker.words(words, _drawn(words)), 1))
            counts.append(read_answer(_require(answer, f"POST {workload.path}"), began=0.0, planned=0.0).prompt_tokens)
        if all(counts):  # without usage prompts are as long as English is with GPT-2's tokenizer
            slope = (counts[1] - counts[0]) / (_PROBE_WORDS[1] - _PROBE_WORDS[0])
            server = _with(server, tokens_a_word=max(slope, 0.1), tokens_around=counts[0] - slope * _PROBE_WORDS[0])
            maker = Prompts(workload, server)
    _require(await pool.ask("POST", workload.path, maker.body(maker.prompt(0), 2)), f"POST {workload.path}")
    return server


async def _learn_eos(pool: Pool, workload: Workload, server: Server) -> Server:
    """Whether the server takes ``ignore_eos``: OpenAI's own refuses what it does not know."""
    maker = Prompts(workload, server)
    prompt = [0] if maker.as_ids else "the"
    answer = await pool.ask("POST", workload.path, maker.body(prompt, 1))
    refused = answer.status in (400, 422) and "ignore_eos" in words_of(answer)
    return _with(server, ignores_eos=not refused)


class Prompts:
    """The bodies of a run. Request i's is the same for the same seed, whichever request it follows."""

    def __init__(self, workload: Workload, server: Server) -> None:
        self._workload = workload
        self._server = server
        self.path = workload.path
        self.as_ids = bool(server.vocabulary) and not workload.chat and not workload.text
        self._heads = [
            self._piece(workload.shared_prefix, _drawn(f"prefix {i} {workload.seed}"))
            for i in range(workload.prefixes if workload.shared_prefix else 0)
        ]

    def request(self, index: int) -> bytes:
        draw = _drawn(f"lengths {index} {self._workload.seed}")
        return self.body(self.prompt(index), self._workload.output_tokens.draw(draw))

    def prompt(self, index: int) -> Any:
        draw = _drawn(f"prompt {index} {self._workload.seed}")
        length = self._workload.prompt_tokens.draw(draw)
        if not self._heads:
            return self._piece(length, draw, self._server.tokens_around)
        head = draw.choice(self._heads)
        rest = self._piece(length - self._workload.shared_prefix, draw, self._server.tokens_around)
        return head + rest if self.as_ids else f"{head} {rest}"

    def body(self, prompt: Any, output_tokens: int) -> bytes:
        workload = self._workload
        fields: dict[str, Any] = {"model": self._server.model}
        if workload.chat:
            fields["messages"] = [{"role": "user", "content": prompt}]
        else:
            fields["prompt"] = prompt
        fields |= {"max_tokens": output_tokens, "stream": True, "stream_options": {"include_usage": True}}
        if self._server.ignores_eos:
            fields["ignore_eos"] = True
        if workload.temperature is not None:
            fields["temperature"] = workload.temperature
        if self._server.ours and "cache" not in workload.more:
            fields["cache"] = False  # an answer from the response cache is no load
        return json.dumps({**fields, **workload.more}, separators=(",", ":")).encode()

    def words(self, count: int, draw: random.Random) -> str:
        return " ".join(draw.choice(_WORDS) for _ in range(count))

    def _piece(self, tokens: int, draw: random.Random, around: float = 0.0) -> Any:
        server = self._server
        if not self.as_ids:
            return self.words(max(1, round((tokens - around) / server.tokens_a_word)), draw)
        ids: list[int] = []
        while len(ids) < tokens:
            token_id = draw.randrange(server.vocabulary)
            if token_id not in server.avoided or server.vocabulary <= len(server.avoided):
                ids.append(token_id)
        return ids


def _require_room(workload: Workload, context: int) -> None:
    longest = workload.prompt_tokens.high + workload.output_tokens.high
    if longest > context:
        raise InvalidRequest(
            f"--prompt-tokens {workload.prompt_tokens} and --output-tokens {workload.output_tokens} make up to"
            f" {longest:,} tokens; the model's context is {context:,}.",
            remedy="Ask for shorter ones.",
            field="prompt_tokens",
        )


def _require(answer: Answer, what: str) -> Answer:
    if answer.failure:
        why = {"connect": "nothing listens there", "timeout": "it did not answer in time"}.get(answer.failure, "")
        raise NanoGPTError(
            f"{what}: {why or f'the exchange failed ({answer.failure})'}.", remedy="Is the URL right, and is it up?"
        )
    if answer.status != 200:
        remedy = {
            401: "Set API_KEY (or OPENAI_API_KEY) to a key of the server.",
            403: "Set API_KEY (or OPENAI_API_KEY) to a key of the server.",
            404: "The server needs OpenAI's routes under /v1.",
            429: "Give this key room: RATE_LIMIT=off on the server, or a key with limits of its own (nanogpt keys).",
        }.get(answer.status)
        raise NanoGPTError(f"{what} was answered {answer.status}: {words_of(answer)}", remedy=remedy)
    return answer


def _json(answer: Answer) -> dict[str, Any]:
    try:
        said = json.loads(bytes(answer.body))
    except ValueError:
        said = None
    return said if isinstance(said, dict) else {}


def _with(server: Server, **changes: Any) -> Server:
    return Server(**{**{name: getattr(server, name) for name in server.__dataclass_fields__}, **changes})
