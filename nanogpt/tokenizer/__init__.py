"""Text to token ids and back. Importing this loads neither tiktoken nor ``tokenizers``."""

from __future__ import annotations

from nanogpt.tokenizer.base import Tokenizer
from nanogpt.tokenizer.bpe import from_llmc, gpt2
from nanogpt.tokenizer.characters import characters, characters_from_meta, from_characters_json
from nanogpt.tokenizer.huggingface import from_tokenizer_json, from_vocab_merges
from nanogpt.tokenizer.load import load_tokenizer, tokenizer_from_spec
from nanogpt.tokenizer.text import TextStream

__all__ = [
    "TextStream",
    "Tokenizer",
    "characters",
    "characters_from_meta",
    "from_characters_json",
    "from_llmc",
    "from_tokenizer_json",
    "from_vocab_merges",
    "gpt2",
    "load_tokenizer",
    "tokenizer_from_spec",
]
