"""Protects what a model is trained on: every token, in order, once; damage is found; answers alone count."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support import require_service

from nanogpt.errors import InvalidRequest
from nanogpt.tokenizer import gpt2
from nanogpt.train import prepare, prepare_hf
from nanogpt.train.batches import IGNORED, InstructionBatches, TextBatches
from nanogpt.train.dataset import open_dataset
from nanogpt.train.instructions import prepare_instructions
from nanogpt.train.shards import Shard, open_shard, write_shard

STORY = "Once upon a time there was a fox.\n\nIt jumped over a dog — every day — and nobody knew why.\n" * 40


def prepared(folder: Path, text: str = STORY, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "story.txt").write_text(text, "utf-8")
    options = {"tokenizer": "gpt2", "vocab_size": 0, "val_fraction": 0.1, "shard_tokens": 400, **changes}
    prepare.prepare_text([folder / "story.txt"], folder / "out", **options)  # type: ignore[arg-type]
    return folder / "out"


def all_tokens(folder: Path, split: str) -> list[int]:
    return [int(token) for shard in open_dataset(folder).open(split) for token in shard.tokens]


# -- shards ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_a_shard_comes_back(tmp_path: Path, dtype: type) -> None:
    tokens = np.arange(1000, dtype=dtype)
    write_shard(tmp_path / "a.bin", tokens)
    shard = open_shard(tmp_path / "a.bin")
    assert shard.tokens.dtype == dtype
    assert np.array_equal(shard.tokens, tokens)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("change", ["a bit", "truncated", "longer", "magic", "empty"])
def test_damage_is_found(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a.bin"
    write_shard(path, np.arange(1000, dtype=np.uint16))
    data = bytearray(path.read_bytes())
    if change == "a bit":
        data[700] ^= 1
    path.write_bytes(
        {"truncated": data[:-1], "longer": data + b"\0", "magic": b"X" + data[1:], "empty": b""}.get(change, data)
    )
    with pytest.raises(InvalidRequest, match=str(path)):
        open_shard(path)


def test_a_shard_of_another_preparation_is_refused(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    write_shard(folder / "train_000000.bin", np.zeros(400, np.uint16))
    with pytest.raises(InvalidRequest, match="is not the shard"):
        open_dataset(folder).open("train")


# -- text -----------------------------------------------------------------------------------------------------


def test_all_of_the_text_is_there_once_and_in_order(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    assert len(list(folder.glob("train_*.bin"))) > 1
    train, val = (gpt2().decode(all_tokens(folder, split)) for split in ("train", "val"))
    assert train.removeprefix("<|endoftext|>") + val.removeprefix("<|endoftext|>") == STORY
    assert len(val) / len(train) == pytest.approx(0.11, abs=0.02)


def test_the_split_of_characters_is_nanogpts(shared: Path, tmp_path: Path) -> None:
    """The figures of its prepare.py: with them losses can be compared."""
    folder = tmp_path / "shakespeare"
    prepare.prepare_text(
        [shared / "data" / "tinyshakespeare.txt"], folder, tokenizer="characters", vocab_size=0, val_fraction=0.1,
        shard_tokens=10**8,
    )  # fmt: skip
    dataset = open_dataset(folder)
    assert dataset.num_tokens == {"train": 1_003_854, "val": 111_540}
    assert dataset.tokenizer.num_tokens == 65


def test_a_bpe_is_trained_on_the_spot_and_the_same_twice(tmp_path: Path) -> None:
    folders = [prepared(tmp_path / name, tokenizer="bpe", vocab_size=300) for name in ("a", "b")]
    datasets = [open_dataset(folder) for folder in folders]
    assert datasets[0].tokenizer.num_tokens == 300
    assert datasets[0].files == datasets[1].files
    text = datasets[0].tokenizer.decode(all_tokens(folders[0], "train"))
    assert text.removeprefix("<|endoftext|>") == STORY[: int(len(STORY) * 0.9)]


def test_a_long_text_is_tokenized_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "_PIECE_CHARS", 300)
    parts = list(prepare.pieces(STORY))
    assert len(parts) > 5
    assert "".join(parts) == STORY
    assert [token for part in parts for token in gpt2().encode(part)] == gpt2().encode(STORY)


def test_prepared_data_is_never_overwritten(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    before = all_tokens(folder, "train")
    with pytest.raises(InvalidRequest, match="holds prepared data"):
        prepared(tmp_path, "Something else entirely.\n" * 50)
    assert all_tokens(folder, "train") == before


def test_a_preparation_that_did_not_end_is_no_data(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    (folder / "dataset.json").unlink()
    with pytest.raises(InvalidRequest, match="run the same command again"):
        open_dataset(folder)


# -- the hub --------------------------------------------------------------------------------------------------


@pytest.fixture
def parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local data set, as the hub's files are."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        require_service("datasets", False, "pip install datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "hub"
    folder.mkdir()
    for part in range(2):
        texts = [f"Document {part * 50 + i} says something short." for i in range(50)]
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / f"part-{part}.parquet")
    return folder


def from_hub(source: Path, folder: Path) -> list[str]:
    prepare_hf.prepare_hf(
        str(source), folder, name=None, split="train", column="text", tokenizer="gpt2", shard_tokens=200
    )
    dataset = open_dataset(folder)
    texts = gpt2().decode([*all_tokens(folder, "val"), *all_tokens(folder, "train")]).split("<|endoftext|>")
    assert all(len(shard.tokens) < 220 for split in ("train", "val") for shard in dataset.open(split))
    return texts[1:]


@pytest.mark.filterwarnings("default")  # of a library's own start
def test_a_stream_that_broke_off_is_taken_up_again(
    parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = from_hub(parquet, tmp_path / "whole")
    assert whole == [f"Document {i} says something short." for i in range(100)]

    real, skipped = prepare_hf._documents, []

    def breaking(*args: object, skip: int) -> Iterator[str]:
        skipped.append(skip)
        for i, text in enumerate(real(*args, skip=skip)):  # type: ignore[arg-type]
            if len(skipped) == 1 and i == 70:
                raise ConnectionError("the line is dead")
            yield text

    monkeypatch.setattr(prepare_hf, "_documents", breaking)
    with pytest.raises(ConnectionError):
        from_hub(parquet, tmp_path / "broken")
    assert from_hub(parquet, tmp_path / "broken") == whole
    assert skipped[1] > 25, "it began again from the start"
    assert open_dataset(tmp_path / "broken").files == open_dataset(tmp_path / "whole").files


# -- batches --------------------------------------------------------------------------------------------------


def shards_of(*sizes: int) -> list[Shard]:
    ends = np.cumsum([0, *sizes])
    return [
        Shard(Path(str(i)), 0, "", np.arange(start, end, dtype=np.uint32))
        for i, (start, end) in enumerate(itertools.pairwise(ends))
    ]


@pytest.mark.parametrize("order", ["random", "sequential"])
def test_two_processes_read_what_one_reads(order: str) -> None:
    batches = TextBatches(shards_of(100, 50), block_size=8, batch_size=3, accumulation=4, order=order, seed=5)
    alone = list(batches.step(7, 0, 1))
    shared = sorted([*batches.step(7, 0, 2), *batches.step(7, 1, 2)], key=lambda batch: batch.index)
    assert [batch.inputs.tolist() for batch in alone] == [batch.inputs.tolist() for batch in shared]
    assert sum(batch.weight for batch in shared) == 1


def test_targets_are_the_next_tokens_and_no_window_crosses_a_shard() -> None:
    for order in ("random", "sequential"):
        batches = TextBatches(shards_of(20, 11, 9), block_size=8, batch_size=16, order=order)
        for batch in batches.step(0, 0, 1):
            assert np.array_equal(batch.targets, batch.inputs + 1)
            assert all((row[0] < 20) == (row[-1] < 20) for row in batch.targets)


def test_random_windows_reach_both_ends() -> None:
    batches = TextBatches(shards_of(12), block_size=8, batch_size=64, order="random")
    (batch,) = batches.step(0, 0, 1)
    assert (batch.inputs.min(), batch.targets.max()) == (0, 11)


def test_validation_reads_each_window_once() -> None:
    batches = TextBatches(shards_of(100, 50), block_size=8, batch_size=4, order="sequential")
    found = [batch.inputs[:, 0].tolist() for rank in (0, 1) for batch in batches.in_order(0, rank, 2)]
    assert sorted(first for firsts in found for first in firsts) == [*range(0, 89, 8), *range(100, 141, 8)]


def test_only_answers_count(tmp_path: Path) -> None:
    lines = [
        {"instruction": "Say yes.", "context": "", "response": "Yes."},
        {"instruction": "And now?", "input": "A context.", "output": "No, never."},
    ]
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    prepare_instructions([path], tmp_path / "out", tokenizer="gpt2", val_fraction=0)
    batches = InstructionBatches(open_dataset(tmp_path / "out").open("train"), block_size=64, batch_size=2)
    (batch,) = batches.in_order(0, 0, 1)
    texts = [gpt2().decode(row[row != IGNORED].tolist()) for row in batch.targets]
    assert texts == ["Yes.<|endoftext|>", "No, never.<|endoftext|>"]
    assert batch.weight == np.count_nonzero(batch.targets != IGNORED)
    prompt = gpt2().decode(batch.inputs[1].tolist())
    assert prompt.startswith("### Instruction:\nAnd now?\n\n### Context:\nA context.\n\n### Response:\nNo, never.")


def test_an_epoch_takes_every_example_once(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(json.dumps({"instruction": f"{i}?", "response": f"{i}!"}) for i in range(12)), "utf-8")
    prepare_instructions([path], tmp_path / "out", tokenizer="gpt2", val_fraction=0)
    batches = InstructionBatches(
        open_dataset(tmp_path / "out").open("train"), block_size=64, batch_size=2, accumulation=3
    )
    seen = [tuple(row) for step in (0, 1) for batch in batches.step(step, 0, 1) for row in batch.inputs.tolist()]
    assert len(set(seen)) == 12


@pytest.mark.parametrize("line", ["{", "[1]", '{"instruction": "x"}', '{"response": "x"}', "3"])
def test_a_wrong_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"instruction": "a", "response": "b"}\n' + line + "\n", "utf-8")
    with pytest.raises(InvalidRequest, match="Line 2"):
        prepare_instructions([path], tmp_path / "out", tokenizer="gpt2", val_fraction=0)
