"""Protects a conversation in the terminal: what the model is told, what is remembered, what an interruption leaves."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from nanogpt import cli
from nanogpt.chat_template import PLAIN, PLAIN_STOPS, render
from nanogpt.cli import chat
from nanogpt.errors import InvalidRequest
from nanogpt.sampling_params import SamplingParams

Capture = pytest.CaptureFixture[str]

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Codepoints:
    """A tokenizer whose ids are code points; a text ends with the control character for that."""

    eos_token_id = 3

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        if "\x00" in text:
            raise InvalidRequest("The character '\\x00' at position 0 is not in the vocabulary.")
        return [ord(character) for character in text]


class FakeLLM:
    """Answers from a list, word by word; keeps the prompts it was given, as text."""

    def __init__(self, *answers: str, chat_template: str | None = None, block_size: int = 1000) -> None:
        self.answers = list(answers)
        self.chat_template = chat_template
        self.tokenizer = Codepoints()
        self.config = SimpleNamespace(block_size=block_size)
        self.prompts: list[str] = []
        self.params: list[SamplingParams] = []
        self.closed = 0

    def stream(self, prompt: list[int], params: SamplingParams) -> Iterator[str]:
        self.prompts.append("".join(map(chr, prompt)))
        self.params.append(params)
        try:
            yield from self.answers.pop(0).split("|")
        finally:
            self.closed += 1


def conversation(llm: FakeLLM, system: str = "", **params: Any) -> chat.Conversation:
    return chat.Conversation(llm, SamplingParams(**{"max_tokens": 10, **params}), system)  # type: ignore[arg-type]


def test_a_plain_transcript_for_a_model_that_was_taught_no_format() -> None:
    llm = FakeLLM(" Hello|, friend.", "Fine.")
    talk = conversation(llm, "A play.", stop=["###"])
    assert "".join(talk.answer("Hi")) == "Hello, friend."
    assert "".join(talk.answer("How are you?")) == "Fine."
    assert llm.prompts == [
        "A play.\n\nUser: Hi\nAssistant:",
        "A play.\n\nUser: Hi\nAssistant: Hello, friend.\nUser: How are you?\nAssistant:",
    ]
    assert llm.params[0].stop == ("###", *PLAIN_STOPS), "the model must not speak for the user"


def test_the_checkpoints_own_format_is_used() -> None:
    llm = FakeLLM("Hello", chat_template=CHATML)
    list(conversation(llm).answer("Hi"))
    assert llm.prompts == ["<|user|>Hi\x03<|assistant|>"]
    assert llm.params[0].stop == ()


def test_the_oldest_turns_are_forgotten_when_the_context_is_full() -> None:
    llm = FakeLLM("a" * 20, "b" * 20, "c" * 20, block_size=90)
    talk = conversation(llm, "System.")
    for text in ("first", "second", "third"):
        list(talk.answer(text))
    assert "first" not in llm.prompts[2]
    assert llm.prompts[2].startswith("System.\n\nUser: second")
    assert all(len(prompt) <= 90 - 10 for prompt in llm.prompts), "room for an answer is left"


def test_an_interrupted_answer_is_remembered_as_far_as_it_came() -> None:
    llm = FakeLLM("one |two |three", "done")
    talk = conversation(llm)
    pieces = talk.answer("Count")
    assert next(pieces) == "one "
    pieces.close()
    assert llm.closed == 1, "the model stops as well"
    list(talk.answer("Go on"))
    assert llm.prompts[1] == "User: Count\nAssistant: one\nUser: Go on\nAssistant:"


def test_a_message_that_cannot_be_encoded_is_not_remembered() -> None:
    talk = conversation(FakeLLM("Hello"))
    with pytest.raises(InvalidRequest, match="position 0"):
        list(talk.answer("\x00"))
    assert talk.messages == []


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("/temperature 0", "temperature", 0.0),
        ("/seed 42", "seed", 42),
        ("/seed off", "seed", None),
        ("/top_k 5", "top_k", 5),
        ("/max_tokens 7", "max_tokens", 7),
    ],
)
def test_a_parameter_is_set_from_a_line(line: str, field: str, value: Any) -> None:
    talk = conversation(FakeLLM(), seed=1)
    assert chat.command(talk, line) == f"{field} {value}"
    assert getattr(talk.params, field) == value


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/temperature hot", "temperature must be a number, not 'hot'"),
        ("/temperature -1", "temperature must be between 0 and 100"),
        ("/top_k 1.5", "top_k must be an integer"),
        ("/fly", "There is no command /fly. /help lists them."),
        ("/", "There is no command /."),
    ],
)
def test_a_wrong_line_changes_nothing(line: str, words: str) -> None:
    talk = conversation(FakeLLM())
    before = talk.params
    with pytest.raises(InvalidRequest) as caught:
        chat.command(talk, line)
    assert words in str(caught.value)
    assert talk.params == before


def test_reset_system_and_show() -> None:
    llm = FakeLLM("Hello", "Hello")
    talk = conversation(llm)
    list(talk.answer("Hi"))
    chat.command(talk, "/system Be brief.")
    chat.command(talk, "/reset")
    list(talk.answer("Hi"))
    assert llm.prompts[1] == "Be brief.\n\nUser: Hi\nAssistant:"
    shown = chat.command(talk, "/show")
    assert shown is not None
    assert "temperature 0.8" in shown
    assert "of 1000 tokens" in shown
    assert chat.command(talk, "/exit") is None


def test_help_names_every_command_that_there_is() -> None:
    talk = conversation(FakeLLM())
    text = chat.command(talk, "/help")
    assert text is not None
    for name in ("help", "reset", "system", "show", "exit", *chat._PLAIN_FIELDS):
        assert name in text
        chat.command(talk, f"/{name}")  # none of them is unknown


def lines(*texts: str) -> Callable[[str], str]:
    left = list(texts)

    def read(prompt: str) -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    return read


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["Hello"], "Hello"),
        (["Hello \\", "world"], "Hello \nworld"),
        (['"""', "one", "", "two", '"""'], "one\n\ntwo"),
        (['"""one', 'two"""'], "one\ntwo"),
        (['"""one line"""'], "one line"),
        (['"""', '"""'], ""),
    ],
)
def test_messages_of_several_lines(typed: list[str], message: str) -> None:
    assert chat.read_message(lines(*typed)) == message


def test_the_end_of_the_input_inside_a_message_ends_it() -> None:
    with pytest.raises(EOFError):
        chat.read_message(lines('"""', "never ended"))


def test_a_conversation_through_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    llm = FakeLLM("Hello.", "Bye.")
    monkeypatch.setattr(chat, "open_model", lambda args: llm)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n\n/temperature 0\n/nonsense\nBye\n"))
    assert cli.main(["chat", "--system", "Be brief.", "--max-tokens", "5"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "Hello.\ntemperature 0.0\nBye.\n"
    assert captured.err == "error: There is no command /nonsense. /help lists them.\n"
    assert llm.params[0].max_tokens == 5
    assert llm.params[1].temperature == 0.0


def test_ctrl_c_stops_an_answer_and_not_the_conversation(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    class Interrupted(FakeLLM):
        def stream(self, prompt: list[int], params: SamplingParams) -> Iterator[str]:
            for piece in super().stream(prompt, params):
                if piece == "^C":
                    raise KeyboardInterrupt
                yield piece

    llm = Interrupted("One |^C|two", "Done.")
    monkeypatch.setattr(chat, "open_model", lambda args: llm)
    monkeypatch.setattr("sys.stdin", io.StringIO("Count\nGo on\n"))
    assert cli.main(["chat"]) == 0
    assert capsys.readouterr().out == "One \nDone.\n"


# -- templates ------------------------------------------------------------------------------------------------


def test_a_template_is_data_and_reaches_nothing() -> None:
    """A template comes with somebody's checkpoint: Jinja outside its sandbox would run what it says."""
    for attack in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% for i in range(10**9) %}x{% endfor %}",
    ):
        with pytest.raises(InvalidRequest, match="chat template cannot write this conversation"):
            render(attack, [{"role": "user", "content": "Hi"}], end_of_text="")


@pytest.mark.parametrize(
    "template", ["{% for %}", "{{ messages[0].missing.deeper }}", "{{ raise_exception('Roles must alternate') }}"]
)
def test_a_broken_template_is_our_error(template: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template cannot write this conversation"):
        render(template, [{"role": "user", "content": "Hi"}], end_of_text="")


def test_text_is_not_escaped_nor_read_as_a_template() -> None:
    text = render(PLAIN, [{"role": "user", "content": "<b> & {{ 7 * 7 }} 你好"}], end_of_text="")
    assert text == "User: <b> & {{ 7 * 7 }} 你好\nAssistant:"
