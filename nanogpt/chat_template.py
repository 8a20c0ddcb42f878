"""A conversation as the text that a model continues: Jinja templates, as tokenizer files carry them, in a sandbox.

Pure functions. A template comes with a checkpoint and is somebody else's: it runs where it can read nothing but the
messages, and what it does wrong is our error. Knows nothing of models; fitting the text into a context is the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NoReturn

from nanogpt.errors import InvalidRequest

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, str]

# For models that were never taught a format: a transcript, which any model of running text goes on with.
PLAIN = """\
{%- for message in messages -%}
{%- if message.role == "system" -%}{{ message.content }}{{ "\n\n" }}
{%- elif message.role == "user" -%}{{ "User: " + message.content + "\n" }}
{%- else -%}{{ "Assistant: " + message.content + "\n" }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}Assistant:{%- endif -%}
"""
# What begins the next turn of somebody else; an answer ends there.
PLAIN_STOPS = ("\nUser:",)


def render(template: str, messages: Sequence[Message], *, end_of_text: str = "<|endoftext|>") -> str:
    """The text after which the assistant's next answer begins. ``end_of_text`` is the model's token of that name.

    Raises: InvalidRequest when the template refuses the messages or is broken.
    """
    import jinja2

    try:
        return _compiled(template).render(
            messages=messages, add_generation_prompt=True, eos_token=end_of_text, bos_token=end_of_text
        )
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise InvalidRequest(f"The model's chat template cannot write this conversation: {error}.") from None


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template)


def _refuse(message: str) -> NoReturn:
    """What templates call for messages that they do not take (two turns of one role, for example)."""
    import jinja2

    raise jinja2.TemplateError(message)
