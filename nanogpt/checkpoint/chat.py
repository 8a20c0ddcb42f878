"""Chat templates of families that do not carry one. Jinja text, as in Hugging Face's ``tokenizer_config.json``."""

from __future__ import annotations

from typing import Final

# How the guide's project lays out Dolly: no preamble, no token in front, the context between instruction and response.
# A system message becomes the context of the user message behind it; an answer ends with the end-of-text token.
DOLLY: Final = (
    "{% set ns = namespace(context='') %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set ns.context = message['content'] %}"
    "{% elif message['role'] == 'user' %}"
    "{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{% if ns.context %}{{ '### Context:\n' + ns.context + '\n\n' }}{% set ns.context = '' %}{% endif %}"
    "{{ '### Response:\n' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
