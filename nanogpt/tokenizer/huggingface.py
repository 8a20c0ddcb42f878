"""Hugging Face tokenizer files by the ``tokenizers`` library: ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``.

Whatever the file says, a prompt's tokens are those of its text alone: nothing is put before or after it, nothing cut
off, nothing drawn by chance.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt.errors import InvalidRequest, TokenizerError, UnknownCharacter
from nanogpt.tokenizer.base import Tokenizer, check_text, decode_bytes, describe_character, describe_position
from nanogpt.tokenizer.bpe import gpt2
from nanogpt.tokenizer.files import pack, parse_object, read_text, unpack
from nanogpt.tokenizer.pieces import byte_symbols, token_table

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

# Names that the special token at the end of a text has where no tokenizer_config.json tells it.
_EOS_NAMES = ("<|endoftext|>", "</s>", "<eos>", "[EOS]")
# Of GPT-2's tokens in id order and its merges in their order, see _fingerprint.
_GPT2_SHA256 = "9e52e2d09323136cf31fca11e3a80463fe013e9ccfa1c04ac36c8bb825af904d"
# A larger id is damage: it would make tables of gigabytes. The largest vocabularies have 300,000 tokens.
_MAX_ID = 2**22


class HuggingFaceTokenizer:
    """``text`` is a tokenizer.json, ``data`` what it holds, ``eos_token`` the special token that ends a text or None.

    Special tokens are text for one backend and special for the other; a switch on one that threads share would leak
    from one request into another.
    """

    def __init__(self, text: str, data: dict[str, Any], *, name: str, eos_token: str | None, source: str) -> None:
        self._json = json.dumps(data, ensure_ascii=False) if _make_plain(data) else text
        self._plain = _backend(self._json, source)
        self._plain.encode_special_tokens = True
        self._special: Backend | None = None
        self._lock = threading.Lock()
        vocabulary = self._plain.get_vocab(with_added_tokens=True)
        try:
            _check_ids(data, vocabulary, source)
            self._table = token_table(data, vocabulary, source)
            self._encodable = _test_of_characters(data, vocabulary)
        except (KeyError, TypeError, AttributeError) as error:
            raise TokenizerError(f"{source} is damaged: {type(error).__name__} at {error}.") from None
        special = {token["content"] for token in data.get("added_tokens") or () if token.get("special")}
        # The unknown token is what a text becomes; the others are never made out of text.
        unknown = data["model"].get("unk_token")
        self._reserved = {vocabulary[token]: token for token in special if token in vocabulary and token != unknown}
        self._has_special = bool(special)
        self._eos_token = eos_token or next((token for token in _EOS_NAMES if token in special), None)
        self.name = name
        self.num_tokens = len(self._table)
        self.eos_token_id: int | None = vocabulary.get(self._eos_token) if self._eos_token else None

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        check_text(text)
        backend = self._with_special() if allow_special and self._has_special else self._plain
        if self._encodable is not None:
            _check_characters(text, self._encodable)
        try:
            ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        except BaseException as error:
            _raise_unless_backends(error)
            raise InvalidRequest(f"The tokenizer cannot encode the text: {error}.") from None
        if not allow_special and not self._reserved.keys().isdisjoint(ids):
            token = self._reserved[next(i for i in ids if i in self._reserved)]
            raise InvalidRequest(f"The text has {token!r}, which this tokenizer knows as a special token only.")
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        return self._table[token_id] if 0 <= token_id < self.num_tokens else b""

    def decode(self, token_ids: Sequence[int]) -> str:
        return decode_bytes(self.token_bytes, token_ids)

    def to_spec(self) -> dict[str, Any]:
        return {
            "kind": "huggingface",
            "name": self.name,
            "eos_token": self._eos_token,
            "file": pack(self._json.encode("utf-8")),
        }

    def _with_special(self) -> Backend:
        with self._lock:
            if self._special is None:
                self._special = _backend(self._json, self.name)
            return self._special


def from_tokenizer_json(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a ``tokenizer.json``; the end of text is told by the ``tokenizer_config.json`` beside it.

    A file that holds GPT-2's tokenizer gives ``gpt2()``, which needs half the memory and a tenth of the time.

    Raises: TokenizerError naming what is wrong with the file, or the decoder that cannot be streamed.
    """
    path = Path(path)
    text = read_text(path)
    return from_tokenizer_object(text, parse_object(text, path), path)


def from_tokenizer_object(text: str, data: dict[str, Any], path: Path) -> Tokenizer:
    """The same for a file that has been read already."""
    eos_token = _eos_token(path.parent)
    if is_gpt2(data, eos_token):
        return gpt2()
    return HuggingFaceTokenizer(text, data, name="tokenizer.json", eos_token=eos_token, source=str(path))


def from_vocab_merges(vocab_path: str | os.PathLike[str], merges_path: str | os.PathLike[str]) -> Tokenizer:
    """GPT-2's kind of byte-level tokenizer from its two older files.

    Raises: TokenizerError naming what is wrong with which file.
    """
    vocabulary = parse_object(read_text(vocab_path), vocab_path)
    wrong = next((token for token, i in vocabulary.items() if type(i) is not int or not 0 <= i <= _MAX_ID), None)
    if wrong is not None:
        raise TokenizerError(f"{os.fspath(vocab_path)} is damaged: the id of {wrong!r} is {vocabulary[wrong]!r}.")
    special = [
        {"id": vocabulary[token], "content": token, "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for token in _EOS_NAMES if token in vocabulary
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    data = {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": _merges(merges_path, vocabulary)},
    }
    eos_token = _eos_token(Path(vocab_path).parent)
    if is_gpt2(data, eos_token):
        return gpt2()
    text = json.dumps(data, ensure_ascii=False)
    return HuggingFaceTokenizer(text, data, name="vocab.json", eos_token=eos_token, source=os.fspath(vocab_path))


def from_huggingface_spec(spec: Mapping[str, Any]) -> HuggingFaceTokenizer:
    source = "the tokenizer's description"
    text = unpack(spec.get("file")).decode("utf-8")
    data, name, eos_token = parse_object(text, source), str(spec.get("name")), spec.get("eos_token")
    return HuggingFaceTokenizer(text, data, name=name, eos_token=eos_token, source=source)


def is_gpt2(data: Mapping[str, Any], eos_token: str | None) -> bool:
    """Whether a tokenizer.json is GPT-2's to the last merge, with nothing added: then tiktoken gives the same ids."""
    try:
        model, added = data["model"], data["added_tokens"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        return (
            eos_token in (None, "<|endoftext|>")
            and data["normalizer"] is None
            and data["decoder"]["type"] == data["pre_tokenizer"]["type"] == "ByteLevel"
            and data["pre_tokenizer"]["add_prefix_space"] is False
            and data["pre_tokenizer"].get("use_regex", True) is True
            and model.get("type", "BPE") == "BPE"
            and not any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"))
            and [(token["id"], token["content"], token["special"]) for token in added]
            == [(50256, "<|endoftext|>", True)]
            and not any(added[0].get(key) for key in ("single_word", "lstrip", "rstrip"))
            and _fingerprint(model["vocab"], merges) == _GPT2_SHA256
        )
    except (KeyError, TypeError, AttributeError, IndexError):
        return False


def _fingerprint(vocabulary: Mapping[str, int], merges: Sequence[str]) -> str:
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    if [*map(vocabulary.__getitem__, tokens)] != [*range(len(tokens))]:
        return ""
    # Neither a symbol of the byte alphabet nor a merge has a line break in it.
    return hashlib.sha256("\n".join((*tokens, *merges)).encode("utf-8", errors="replace")).hexdigest()


def _make_plain(data: dict[str, Any]) -> bool:
    """Take out of a tokenizer.json what was for training: cutting off, padding, dropout, frames of special tokens.

    Returns: whether there was any of it.
    """
    changed = False
    model = data.get("model")
    for part, key in ((data, "truncation"), (data, "padding"), (data, "post_processor"), (model, "dropout")):
        if isinstance(part, dict) and part.get(key) is not None:
            part[key] = None
            changed = True
    return changed


def _backend(text: str, source: str) -> Backend:
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError:
        raise TokenizerError(f"{source} needs the package tokenizers.", remedy="pip install tokenizers") from None
    try:
        return Backend.from_str(text)
    except BaseException as error:
        _raise_unless_backends(error)
        raise TokenizerError(f"{source} is not a tokenizer.json that can be read: {error}.") from None


def _check_ids(data: Mapping[str, Any], vocabulary: Mapping[str, int], source: str) -> None:
    if not vocabulary or max(vocabulary.values()) > _MAX_ID:
        raise TokenizerError(f"{source} is damaged: its largest id is {max(vocabulary.values(), default=None)}.")
    if len(set(vocabulary.values())) < len(vocabulary):
        raise TokenizerError(f"{source} is damaged: it gives one id to two tokens.")
    for token in data.get("added_tokens") or ():
        # The backend numbers added tokens itself and does not mind when the file says otherwise.
        if token["id"] != vocabulary[token["content"]]:
            raise TokenizerError(
                f"{source} is damaged: the added token {token['content']!r} has the id {token['id']}, "
                f"where {vocabulary[token['content']]} comes next."
            )


def _raise_unless_backends(error: BaseException) -> None:
    """Let pass what is not the library's: its panics are no Exception, and one must not end a worker's thread."""
    if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
        raise error


def _merges(path: str | os.PathLike[str], vocabulary: Mapping[str, int]) -> list[str]:
    """The lines with a merge, two pieces with a space between."""
    lines = [line.removesuffix("\r") for line in read_text(path).split("\n")]
    if lines[0].startswith("#version"):
        lines[0] = ""
    merges = [line for line in lines if line]
    # All at once, and one by one only to say which is wrong: the good ones are 50,000.
    pieces = {*" ".join(merges).split(" "), *(merge.replace(" ", "") for merge in merges)} if merges else set()
    if any(merge.count(" ") != 1 for merge in merges) or "" in pieces or not vocabulary.keys() >= pieces:
        _raise_for_merges(path, lines, vocabulary)
    return merges


def _raise_for_merges(path: str | os.PathLike[str], lines: list[str], vocabulary: Mapping[str, int]) -> None:
    for number, line in enumerate(lines, 1):
        pair = line.split(" ")
        if line and (len(pair) != 2 or not all(pair)):
            raise TokenizerError(f"{os.fspath(path)} is damaged: line {number} is {line[:60]!r}, not two pieces.")
        unknown = next((piece for piece in (*pair, "".join(pair)) if line and piece not in vocabulary), None)
        if unknown is not None:
            raise TokenizerError(f"{os.fspath(path)} does not fit the vocabulary: line {number} has {unknown!r}.")


def _eos_token(folder: Path) -> str | None:
    """``eos_token`` of the tokenizer_config.json in the folder, where there is one."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    token = parse_object(read_text(path), path).get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _test_of_characters(data: Mapping[str, Any], vocabulary: Mapping[str, int]) -> Callable[[str], bool] | None:
    """Whether a character can be encoded, where the backend would leave out others without a word; else None."""
    model = data["model"]
    if model.get("type") != "BPE" or model.get("unk_token") or model.get("byte_fallback") or data.get("normalizer"):
        return None
    single = frozenset(token for token in vocabulary if len(token) == 1)
    pre_tokenizer = data.get("pre_tokenizer") or {}
    kinds = {part["type"] for part in (pre_tokenizer, *pre_tokenizer.get("pretokenizers", ())) if "type" in part}
    if "ByteLevel" not in kinds:
        # White space may have gone into other symbols, or been taken out on purpose.
        return lambda character: character in single or character.isspace()
    if single >= byte_symbols().keys():
        return None
    known = {byte for symbol, byte in byte_symbols().items() if symbol in single}
    return lambda character: known.issuperset(character.encode("utf-8"))


def _check_characters(text: str, encodable: Callable[[str], bool]) -> None:
    for index, character in enumerate(text):
        if not encodable(character):
            raise UnknownCharacter(
                f"The character {describe_character(character)} {describe_position(text, index)} is not in this "
                f"tokenizer's alphabet.",
                remedy="Leave out what the model was not trained on.",
            )
