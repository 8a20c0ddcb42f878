"""What OpenAI's API has and this server has not, by name, and what to do instead. Data alone."""

from __future__ import annotations

_TOOLS = "No tools are called here: leave it out, and ask for JSON with response_format."
_TEXT_ALONE = "This model reads and writes text alone: leave it out."
_NO_EFFECT = "Leave it out: this model has no such control."

UNSUPPORTED = {
    "tools": _TOOLS,
    "tool_choice": _TOOLS,
    "parallel_tool_calls": _TOOLS,
    "functions": _TOOLS,
    "function_call": _TOOLS,
    "audio": _TEXT_ALONE,
    "modalities": _TEXT_ALONE,
    "prediction": _NO_EFFECT,
    "reasoning_effort": _NO_EFFECT,
    "verbosity": _NO_EFFECT,
    "web_search_options": "Nothing is searched here: leave it out.",
    "moderation": "Nothing is moderated here: leave it out.",
    "prompt_cache_options": "Leave it out: common prefixes are always reused.",
    "prompt_cache_retention": "Leave it out: common prefixes are always reused.",
    "suffix": "A GPT continues a text and cannot write towards what follows it: leave it out.",
}

NOT_IN_MESSAGES = {
    "name": "Write the name into the content.",
    "tool_calls": _TOOLS,
    "tool_call_id": _TOOLS,
    "function_call": _TOOLS,
    "refusal": "Send the refusal as content.",
    "audio": _TEXT_ALONE,
    "annotations": "Leave it out.",
}

# What other servers call our fields; difflib alone would not find them.
ELSEWHERE = {
    "max_length": "max_tokens",
    "max_new_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "guided_json": "response_format",
    "guided_regex": "regex",
    "structured_outputs": "response_format",
    "stop_sequences": "stop",
    "repeat_penalty": "repetition_penalty",
    "text": "prompt",
    "input": "prompt",
}
