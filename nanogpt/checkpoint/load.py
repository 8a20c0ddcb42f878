"""``load_checkpoint``: a path of any family in, one form out. The only way by which weights enter the product.

Runs in the engine process, and in command line tools. Looks at a file's first bytes, hands it to the family's reader,
finds the tokenizer, and checks everything before it returns. Copies no tensor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from nanogpt.checkpoint import canonical, hugging_face, llmc_file, safetensors_file, torch_families
from nanogpt.checkpoint.find_tokenizer import for_family
from nanogpt.checkpoint.locate import locate
from nanogpt.checkpoint.mapped import MappedFile
from nanogpt.checkpoint.source import Sizes, Source
from nanogpt.checkpoint.stored_zip import is_zip
from nanogpt.checkpoint.torch_file import TorchArchive
from nanogpt.checkpoint.types import Checkpoint
from nanogpt.errors import CheckpointNotFound, CorruptCheckpoint, TokenizerError, UnsupportedCheckpoint
from nanogpt.model.config import Activation, GPTConfig
from nanogpt.tokenizer.base import Tokenizer

# A tokenizer, and notes on how it was found.
Found = tuple[Tokenizer, tuple[str, ...]]

# First bytes of what people name by mistake: what it is, and what to do.
_STRANGERS: Final = (
    (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19", "was saved by PyTorch before version 1.6, in its old format",
     "Load it with torch.load and save it again with a current torch.save."),
    (b"\x80", "is a bare pickle, not a checkpoint", "Name the file that torch.save wrote."),
    (b"GGUF", "is a GGUF file", "Name the checkpoint that it was converted from."),
    (b"\x89HDF", "is an HDF5 (Keras or TensorFlow) file", "Convert it to PyTorch or safetensors first."),
    (b"\x1f\x8b", "is compressed with gzip", "Decompress it first."),
    (b"version https://git-lfs", "is a Git LFS pointer: the file itself was not downloaded", "Run git lfs pull."),
)  # fmt: skip


def load_checkpoint(
    path: str | os.PathLike[str] = "",
    *,
    tokenizer: str = "",
    activation: Activation | None = None,
    read_tokenizer: Callable[[Callable[[], Found]], Found] = lambda find: find(),
) -> Checkpoint:
    """The model at a path: a file or a folder of any nano-GPT family. Empty: the model that lies in the package.

    ``tokenizer`` (``gpt2``, or a path) and ``activation`` override what the family says. ``read_tokenizer`` says where
    the tokenizer is read: it is called with what reads it.

    Raises: CheckpointNotFound, CorruptCheckpoint, UnsafeCheckpoint, UnsupportedCheckpoint, TokenizerError.
    """
    found = locate(Path(path) if os.fspath(path) else "")
    try:
        source = hugging_face.read(found) if found.config is not None else _read_file(found.path)
        if activation is not None:
            source = replace(source, activation=activation).noting(f"GELU: set to {activation}.")
        return _assemble(source, found.path, read_tokenizer(lambda: _tokenizer(source, found.path, tokenizer)))
    except MemoryError:
        raise CorruptCheckpoint(f"{found.path} asks for more memory than there is.") from None
    except OSError as error:  # a file beside it, or a name in it that the system does not take
        raise CheckpointNotFound(f"Cannot read {found.path}: {error.strerror or error}.") from None


def _read_file(path: Path) -> Source:
    file = MappedFile(path)
    if is_zip(file):
        return torch_families.read(TorchArchive(file).read(), path)
    if llmc_file.looks_like(file):
        return _llmc(file)
    if safetensors_file.looks_like(file):
        safetensors_file.read(file)
        raise UnsupportedCheckpoint(
            f"{path} is a safetensors file without a config.json beside it.",
            remedy="Put Hugging Face's config.json into its folder, and call it model.safetensors.",
        )
    if llmc_file.is_tokenizer(file):
        raise UnsupportedCheckpoint(f"{path} is llm.c's tokenizer file.", remedy="Name the model's file.")
    head = bytes(file.data[:64])
    for magic, what, remedy in _STRANGERS:
        if head.startswith(magic):
            raise UnsupportedCheckpoint(f"{path} {what}.", remedy=remedy)
    if head.isascii() and head.replace(b"\n", b"").replace(b"\t", b"").decode().isprintable():
        raise CorruptCheckpoint(f"{path} is a text file, not a checkpoint.", remedy="Copy the checkpoint again.")
    raise CorruptCheckpoint(
        f"{path} begins like no checkpoint that is known ({head[:8].hex(' ')}).",
        remedy="torch.save files, safetensors and llm.c's .bin are read.",
    )


def _llmc(file: MappedFile) -> Source:
    header, tensors = llmc_file.read(file)
    return Source(
        family="llm.c",
        tensors=tensors,
        sizes=Sizes(header.n_layer, header.n_head, header.n_embd, header.block_size, header.vocab_size),
        bias=True,
        activation="gelu_tanh",
        notes=("GELU: tanh, as llm.c computes it.",),
    )


def _assemble(source: Source, path: Path, found: Found) -> Checkpoint:
    tied = canonical.is_tied(source.tensors)
    if source.tied is False and canonical.HEAD not in source.tensors:
        tied = False  # select() then says that the head is missing
    elif source.tied and not tied:
        raise UnsupportedCheckpoint(
            f"{path}: config.json ties the head to the embedding, but the file holds a different {canonical.HEAD}.",
            remedy="Set tie_word_embeddings to false if the head was trained by itself.",
        )
    tokenizer, notes = found
    config = _config(source, path, tokenizer.num_tokens, tied)
    source = source.noting(*notes)
    if config.num_tokens < config.vocab_size:
        source = source.noting(
            f"Vocabulary: padded from {config.num_tokens:,} to {config.vocab_size:,}; the padding is never sampled."
        )
    return Checkpoint(
        path=path,
        family=source.family,
        config=config,
        tensors=canonical.select(source.tensors, config, str(path)),
        tokenizer=tokenizer,
        step=source.step,
        recorded_loss=source.recorded_loss,
        chat_template=source.chat_template,
        notes=source.notes,
    )


def _tokenizer(source: Source, path: Path, setting: str) -> Found:
    if source.tokenizer is not None and not setting:
        return _described_tokenizer(source.tokenizer, path), ()
    vocab_size = source.sizes.vocab_size
    tokenizer, notes = for_family(source.family, path, vocab_size, source.dataset, setting)
    # A converted model and its characters came into their folder together, and its vocabulary may be padded.
    found_apart = bool(setting) or source.family != "huggingface"
    if found_apart and tokenizer.name == "characters" and tokenizer.num_tokens != vocab_size:
        raise TokenizerError(
            f"{path} has {vocab_size:,} entries in its vocabulary, and the tokenizer knows {tokenizer.num_tokens:,}"
            " characters: they do not belong together.",
            remedy="Set NANOGPT_TOKENIZER to gpt2 or to the right meta.pkl.",
        )
    return tokenizer, notes


def _described_tokenizer(spec: Mapping[str, Any], path: Path) -> Tokenizer:
    """The tokenizer whose description lies in the checkpoint: a stranger may have written anything into it."""
    from nanogpt.tokenizer import tokenizer_from_spec

    try:
        return tokenizer_from_spec(spec)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error.message}", remedy=error.remedy) from None
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError):
        raise CorruptCheckpoint(f"{path} is damaged: the description of its tokenizer cannot be read.") from None


def _config(source: Source, path: Path, num_tokens: int, tied: bool) -> GPTConfig:
    try:
        return GPTConfig(
            n_layer=source.sizes.n_layer,
            n_head=source.sizes.n_head,
            n_embd=source.sizes.n_embd,
            block_size=source.sizes.block_size,
            vocab_size=source.sizes.vocab_size,
            num_tokens=num_tokens,
            bias=source.bias,
            activation=source.activation,
            tied=tied,
            n_inner=source.n_inner,
            layer_norm_eps=source.layer_norm_eps,
        )
    except UnsupportedCheckpoint as error:
        raise UnsupportedCheckpoint(f"{path}: {error.message}") from None
