"""The engine's protocol: what goes in comes out, however the bytes are cut, and nothing else is let in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nanogpt import errors
from nanogpt.engine import wire
from nanogpt.engine.messages import Finished, GenerateRequest, Timings, Tokens
from nanogpt.sampling_params import SamplingParams, TokenLogprobs

ids = st.lists(st.integers(0, 2**31 - 1), max_size=5)
floats = st.floats(allow_nan=False, width=64)
logprobs = st.builds(
    TokenLogprobs, floats, st.integers(1, 60000), st.lists(st.tuples(st.integers(0, 60000), floats), max_size=3)
)


def cross(message: list[object]) -> list[object]:
    frames = wire.Frames()
    frames.feed(wire.pack(message))
    (read,) = frames
    return read


@given(
    st.lists(st.lists(st.integers() | st.text(max_size=3), min_size=1).map(lambda m: [0, *m]), max_size=6), st.data()
)
def test_messages_survive_any_cut(messages: list[list[object]], data: st.DataObject) -> None:
    messages = [[item % 2**63 if isinstance(item, int) else item for item in message] for message in messages]
    rest = b"".join(wire.pack(message) for message in messages)
    frames, read = wire.Frames(), []
    while rest:
        cut = data.draw(st.integers(1, len(rest)))
        frames.feed(rest[:cut])
        rest = rest[cut:]
        read += list(frames)
    assert read == messages


@given(st.binary(max_size=64))
def test_any_bytes_are_messages_a_wait_or_a_value_error(data: bytes) -> None:
    frames = wire.Frames()
    frames.feed(data)
    try:
        assert all(isinstance(message, list) for message in frames)
    except ValueError:
        pass


@given(ids, st.text(max_size=5), st.dictionaries(st.integers(0, 50000), floats, max_size=3) | st.none(), ids)
def test_a_request_crosses(prompt: list[int], name: str, bias: dict[int, float] | None, stop_ids: list[int]) -> None:
    params = SamplingParams(logit_bias=bias, stop_token_ids=stop_ids, seed=2**64 - 1, stop=["a"], logprobs=0)
    request = GenerateRequest(prompt, params, name, name, 12.5)
    kind, number, *fields = cross(wire.submit_message(7, request))
    assert (kind, number) == (wire.SUBMIT, 7)
    assert wire.read_request(fields) == request


@given(ids, st.none() | st.lists(logprobs, max_size=3))
def test_tokens_cross(token_ids: list[int], told: list[TokenLogprobs] | None) -> None:
    token_ids, read = cross([token_ids, wire.logprobs_to_wire(told)])  # type: ignore[assignment]
    assert wire.read_tokens(token_ids, read) == Tokens(token_ids, told)  # type: ignore[arg-type]


@given(st.none() | st.lists(st.none() | logprobs, max_size=3), st.none() | st.text(max_size=5))
def test_the_end_crosses(prompt_logprobs: list[TokenLogprobs | None] | None, error: str | None) -> None:
    finished = Finished("error", 3, 4, 2, Timings(0.1, 0.2, 0.3), error, prompt_logprobs)
    assert wire.read_finished(cross(wire.finished_to_wire(finished))) == finished


def test_every_error_crosses_as_itself() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.NanoGPTError)]
    assert len(kinds) > 15
    for kind in kinds:
        error = kind("It is so.", remedy="Do this.")
        error.field, error.retry_after_s = "prompt", 2.5
        read = wire.read_error(wire.error_to_wire(error))
        assert type(read) is kind
        assert vars(read) == vars(error)
