"""Protects the figures: they are the upstream's own, on every runner, and padded ids never count."""

from __future__ import annotations

import bz2
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import require_service

from nanogpt import cli
from nanogpt.cli.eval import table
from nanogpt.errors import InvalidRequest
from nanogpt.eval import tasks
from nanogpt.eval.scoring import continuation_logprobs, estimate, following_logprobs
from nanogpt.llm import LLM
from nanogpt.model.config import GPTConfig
from nanogpt.tokenizer import characters


class Fixed:
    """Stands for an LLM: its logits are the same at every position, with a padded row that is the likeliest."""

    tokenizer = characters("ab cd")

    def __init__(self, block_size: int = 4) -> None:
        self.config = GPTConfig(n_layer=1, n_head=1, n_embd=2, block_size=block_size, vocab_size=6, num_tokens=5)
        self.longest = 0

    def logits(self, token_ids: list[int]) -> np.ndarray[Any, Any]:
        self.longest = max(self.longest, len(token_ids))
        return np.tile(np.log(np.array([8, 4, 2, 1, 1, 1000], np.float32)), (len(token_ids), 1))


@pytest.mark.parametrize(("runner", "precision"), [("torch", "fp32"), ("native", "fp32"), ("native", "int8")])
def test_the_loss_is_the_upstreams(shared: Path, tmp_path: Path, runner: str, precision: str) -> None:
    """The golden figure: 4,096 predictions from the start of the last tenth, computed by nanoGPT's own code."""
    folder = shared / "checkpoints" / "01b_nanogpt_char_tiny"
    golden = json.loads((folder / "golden.json").read_text())["cross_entropy"]["mean_nats"]
    text = (shared / "data" / "tinyshakespeare.txt").read_text()
    path = tmp_path / "val.txt"
    path.write_text(text[int(0.9 * len(text)) :])
    with LLM(folder, runner=runner, precision=precision, threads=1) as llm:
        found = tasks.evaluate_loss(llm, path, limit=4096)
    assert found["tokens"] == 4096
    assert found["loss"] == pytest.approx(golden, abs=2e-4 if precision == "fp32" else 2e-2)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2)), "a character is a byte here"
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert 0.01 < found["loss_margin"] < 0.2


def test_padded_ids_do_not_count() -> None:
    logprobs, greedy = following_logprobs(Fixed(), [3, 0, 1, 3])  # type: ignore[arg-type]
    assert np.exp(logprobs) == pytest.approx([8 / 16, 4 / 16, 1 / 16])
    assert greedy.tolist() == [True, False, False]


def test_a_continuation_keeps_its_whole_context_and_no_more() -> None:
    llm = Fixed(block_size=4)
    logprobs, _ = continuation_logprobs(llm, [1] * 9, [0, 3])  # type: ignore[arg-type]
    assert np.exp(logprobs) == pytest.approx([8 / 16, 1 / 16])
    assert llm.longest == 4


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        found = estimate(rng.exponential(2.0, 100))
        held += abs(found.mean - 2.0) <= found.margin
    assert 0.90 < held / 400 < 0.98


def test_one_window_tells_no_interval(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("ab cd")
    found = tasks.evaluate_loss(Fixed(16), path)  # type: ignore[arg-type]
    assert tasks.without_infinities(found)["loss_margin"] is None
    assert "unknown" in "".join(table({"name": "x", "runner": "x", "arithmetic": "x", "device": "x"}, [found]))


def test_hellaswag_is_length_normalised(tmp_path: Path) -> None:
    # " aaaa" has the highest mean, " a" the highest sum: each is a right answer of one item.
    items = [("a", 0, ["aaaa", "d", "a", "dd"]), ("a", 2, ["aaaa", "d", "a", "dd"])]
    path = tmp_path / "hellaswag.txt.bz2"
    text = "".join(
        f"{context}\n{label}\n" + "".join(f"{ending}\n" for ending in endings) for context, label, endings in items
    )
    path.write_bytes(bz2.compress(text.encode()))
    progress: list[tuple[str, int, int]] = []
    found = tasks.evaluate_hellaswag(Fixed(16), path, progress=lambda *of: progress.append(of))  # type: ignore[arg-type]
    assert (found["items"], found["accuracy_norm"], found["accuracy"]) == (2, 0.5, 0.5)
    assert progress == [("hellaswag", 1, 2), ("hellaswag", 2, 2)]
    lines = [json.dumps({"ctx": c, "label": label, "endings": endings}) for c, label, endings in items]
    (tmp_path / "hellaswag.jsonl").write_text("\n".join(lines))
    assert tasks.read_hellaswag(tmp_path / "hellaswag.jsonl") == tasks.read_hellaswag(path)


def test_the_real_files_are_read(shared: Path) -> None:
    items = tasks.read_hellaswag(shared / "data" / "hellaswag-val.txt.bz2")
    assert len(items) == 10_042
    assert all(len(item.endings) == 4 and all(item.endings) for item in items)
    assert len(tasks.read_lambada(shared / "data" / "lambada_test.jsonl")) == 5_153


def test_lambada_asks_for_every_token_of_the_last_word(tmp_path: Path) -> None:
    path = tmp_path / "lambada.jsonl"
    path.write_text('{"text": "ab cd a"}\n{"text": "cd ab"}\n')

    class Spaces(Fixed):
        def logits(self, token_ids: list[int]) -> np.ndarray[Any, Any]:
            """After a space an a; after an a (and anything else) a space."""
            likely = [0 if token == 2 else 2 for token in token_ids]
            return np.eye(6, dtype=np.float32)[likely] * 20

    found = tasks.evaluate_lambada(Spaces(16), path)  # type: ignore[arg-type]
    assert (found["passages"], found["accuracy"]) == (2, 0.5), "' a' is right, of ' ab' only the beginning"


@pytest.mark.parametrize(
    ("reader", "text"),
    [
        (tasks.read_hellaswag, "one\n2\nthree\n"),
        (tasks.read_hellaswag, "context\n7\na\nb\nc\nd\n"),
        (tasks.read_hellaswag, '{"ctx": "a", "endings": ["b"], "label": 4}\n'),
        (tasks.read_lambada, '{"text": 3}\n'),
        (tasks.read_lambada, "{\n"),
        (tasks.read_lambada, ""),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, reader: Any, text: str) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=str(path)):
        reader(path)


def test_the_command_prints_a_table_and_json(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(shared / "checkpoints" / "01b_nanogpt_char_tiny")
    path = tmp_path / "text.txt"
    path.write_text("To be, or not to be: that is the question.\n" * 20)
    arguments = ["eval", folder, "--loss", str(path), "--threads", "1", "--precision", "fp32"]
    assert cli.main(arguments) == 0
    assert "bits a byte" in capsys.readouterr().out
    assert cli.main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["model"]["precision"] == "fp32"
    assert printed["results"][0]["task"] == "loss"
    assert cli.main(["eval", folder]) == 2


@pytest.mark.filterwarnings("default")  # of the harness and what it imports
def test_lm_eval_measures_our_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        require_service("lm-eval", False, "pip install lm-eval")
    from nanogpt.eval.harness import HarnessModel

    folder = Path(__file__).with_name("lm_eval_tasks")
    task = (folder / "plays.yaml").read_text().replace("TASKS_FOLDER", str(folder))
    (tmp_path / "plays.yaml").write_text(task)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    with LLM("", threads=1) as llm:
        model = HarnessModel(llm)
        results = lm_eval.simple_evaluate(model=model, tasks=["plays"], task_manager=manager, bootstrap_iters=0)
        assert results["results"]["plays"]["acc,none"] == 1.0
        (total,) = model.loglikelihood_rolling([_Request("To be, or not to be")])
        whole, _ = following_logprobs(llm, llm.tokenizer.encode("To be, or not to be"))
        assert total == pytest.approx(float(whole.sum()))
        (text,) = model.generate_until([_Request("ROMEO:", {"until": ["\n\n"], "max_gen_toks": 20})])
        assert text
        assert "\n\n" not in text


class _Request:
    """What the harness hands over, as far as a model looks at it."""

    def __init__(self, *args: Any) -> None:
        self.args = args
