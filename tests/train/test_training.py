"""Protects a run: it learns, goes on bit for bit where it stopped, survives its death, says when it diverges."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import ROOT

from nanogpt.checkpoint import load_checkpoint
from nanogpt.errors import CheckpointError, NanoGPTError, SettingsError
from nanogpt.model.gpt import GPT
from nanogpt.train import trainer
from nanogpt.train.config import TrainConfig
from nanogpt.train.optimizer import learning_rate
from nanogpt.train.pretrain import pretrain

Configure = Callable[..., TrainConfig]


def losses(folder: Path, kind: str = "train") -> dict[int, float]:
    """log.txt in build-nanogpt's form: step, kind, value."""
    lines = [line.split() for line in (folder / "log.txt").read_text().splitlines()]
    return {int(step): float(value) for step, what, value in lines if what == kind}


def test_it_learns(configure: Configure) -> None:
    config = configure(max_steps=300, checkpoint_interval=300, eval_interval=300, eval_batches=0, beta2=0.99)
    result = pretrain(config)
    assert result.val_loss is not None
    assert result.val_loss < 1.0, "the text's rhythm is simple"
    assert losses(Path(config.out_dir), "val")[0] == pytest.approx(math.log(37), abs=0.3), "the first guess is even"


def test_the_arithmetic_of_whoever_called_is_left_as_it_was(configure: Configure) -> None:
    """Training flushed tiny numbers to zero, in the whole process and for good: 5e-324 was 0 to everybody after it."""
    pretrain(configure())
    assert sys.float_info.min / 2 > 0


def test_a_checkpoint_is_read_by_torch_and_by_the_loader(configure: Configure) -> None:
    result = pretrain(configure())
    assert result.path is not None
    value = torch.load(result.path, weights_only=True)
    assert {"model", "config", "step", "val_loss", "optimizer"} <= value.keys()
    assert isinstance(value["config"], dict)

    checkpoint = load_checkpoint(result.path.parent)
    assert (checkpoint.step, checkpoint.recorded_loss, checkpoint.name) == (20, result.val_loss, "model_00020")
    assert checkpoint.tokenizer.decode(checkpoint.tokenizer.encode("the fox")) == "the fox"
    ours = GPT(checkpoint.config)
    ours.load_state_dict(value["model"])
    ids = torch.tensor([checkpoint.tokenizer.encode("the quick brown")])
    with torch.no_grad():
        assert torch.equal(ours.eval()(ids)[0], GPT.from_checkpoint(checkpoint).eval()(ids)[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.2, "accumulation": 2},
        {"order": "sequential", "schedule": "wsd"},
        {"optimizer": "muon"},
    ],
)
def test_resuming_is_bitwise(configure: Configure, tmp_path: Path, changes: dict[str, Any]) -> None:
    """20 steps at once, and 10 and 10: the files at the end are the same, to the last bit."""
    straight = configure(out_dir=str(tmp_path / "straight"), **changes)
    pretrain(straight)
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "model_00010.pt").write_bytes((tmp_path / "straight" / "model_00010.pt").read_bytes())
    # The run had gone on for some steps behind its last checkpoint, and died in the middle of a line.
    (parts / "log.txt").write_text("5 train 3.0\n12 train 1.0\n13 tra")
    torch.rand(7)  # whatever else the process has drawn
    result = pretrain(configure(out_dir=str(parts), **changes), resume=True)
    assert result.step == 20
    first, second = (
        torch.load(folder / "model_00020.pt", weights_only=True) for folder in (tmp_path / "straight", parts)
    )
    assert first["training"].pop("out_dir") != second["training"].pop("out_dir")
    assert_same(first, second)
    later = {step: loss for step, loss in losses(tmp_path / "straight").items() if step > 10}
    assert losses(parts) == {5: 3.0, **later}


def assert_same(a: Any, b: Any, where: str = "the checkpoint") -> None:
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def test_an_occupied_folder_is_refused(configure: Configure) -> None:
    pretrain(configure(max_steps=5, checkpoint_interval=5))
    with pytest.raises(CheckpointError, match="--resume auto"):
        pretrain(configure())


@pytest.mark.parametrize("change", ["n_embd", "data", "optimizer"])
def test_another_model_or_text_is_not_resumed(configure: Configure, tmp_path: Path, change: str) -> None:
    pretrain(configure(max_steps=5, checkpoint_interval=5))
    changes: dict[str, Any] = {"n_embd": 32} if change == "n_embd" else {"optimizer": "muon"}
    if change == "data":
        from nanogpt.train.prepare import prepare_text

        (tmp_path / "b.txt").write_text("another text\n" * 50)
        prepare_text([tmp_path / "b.txt"], tmp_path / "b", tokenizer="characters", vocab_size=0, val_fraction=0.1,
                     shard_tokens=5000)  # fmt: skip
        changes = {"data": str(tmp_path / "b")}
    with pytest.raises(SettingsError, match="other data" if change == "data" else change):
        pretrain(configure(**changes), resume=True)


def test_old_checkpoints_go_and_the_best_stays(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([9.0, 5.0, 1.0, 6.0, 7.0, 8.0])

    def validate(run: Any) -> bool:
        run.val_loss = next(measured)
        best = run.val_loss < run.best
        run.best = min(run.best, run.val_loss)
        return best and run.step > 0

    monkeypatch.setattr(trainer._Run, "_validate", validate)
    config = configure(max_steps=25, eval_interval=5, checkpoint_interval=5, keep_last=2, keep_best=True)
    pretrain(config)
    folder = Path(config.out_dir)
    assert sorted(path.name for path in folder.glob("model_*")) == [
        "model_00010.pt",
        "model_00020.pt",
        "model_00025.pt",
    ]
    assert os.readlink(folder / "best_checkpoint.pt") == "model_00010.pt"
    assert os.readlink(folder / "latest_checkpoint.pt") == "model_00025.pt"
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("bad_step", [12, 14])
def test_a_loss_that_is_not_finite_ends_the_run(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, bad_step: int
) -> None:
    """With 14, step 15's weights are ruined and its loss is not: they must not become a checkpoint either."""
    monkeypatch.setattr(trainer, "learning_rate", lambda config, step: math.inf if step == bad_step else 1e-3)
    config = configure(checkpoint_interval=5, keep_last=1)
    with pytest.raises(NanoGPTError, match="model_00010.pt" if bad_step == 12 else "not saved"):
        pretrain(config)
    checkpoint = load_checkpoint(config.out_dir)  # refuses NaN
    assert checkpoint.step == 10


def test_sigterm_saves_first(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    real, signals = trainer.learning_rate, [signal.SIGTERM]

    def kill_at_seven(config: TrainConfig, step: int) -> float:
        if step == 6 and signals:
            os.kill(os.getpid(), signals.pop())
        return real(config, step)

    monkeypatch.setattr(trainer, "learning_rate", kill_at_seven)
    result = pretrain(configure())
    assert (result.step, result.ended_by) == (7, signal.SIGTERM)
    assert load_checkpoint(configure().out_dir).step == 7
    monkeypatch.undo()
    assert pretrain(configure(), resume=True).step == 20


def test_a_death_in_mid_save_leaves_the_newest_checkpoint_whole(configure: Configure, tmp_path: Path) -> None:
    """SIGKILL while the second checkpoint is written, before it has its name, before it is the latest, and while the
    first is removed: each time there is a whole newest one, and the run goes on from it to the same end."""
    config = configure(keep_last=1)
    script = Path(__file__).with_name("die_in_mid_save.py")
    result = subprocess.run(
        [sys.executable, script, json.dumps(config.as_dict()), tmp_path],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    survived = json.loads(result.stdout.splitlines()[-1])
    assert survived == {"writing": 10, "naming": 10, "linking": 10, "removing": 20}
    for where, step in survived.items():
        folder = tmp_path / where
        checkpoint = load_checkpoint(folder)
        assert checkpoint.step == step, where
        if where == "writing":
            assert [path.name for path in folder.glob(".*.tmp")], "it died with a file half written"
        resumed = pretrain(configure(keep_last=1, out_dir=str(folder)), resume=True)
        assert resumed.step == 20
        assert not list(folder.glob(".*")), "nothing half written is left"
    ends = [load_checkpoint(tmp_path / where).tensors for where in survived]
    for other in ends[1:]:
        assert all(np.array_equal(ends[0][name].float32(), other[name].float32()) for name in ends[0])


def test_two_processes_compute_what_one_does(configure: Configure, tmp_path: Path, data: Path) -> None:
    """torchrun with two processes on gloo, against one process: the same step of two micro batches."""
    alone = configure(accumulation=2, dropout=0.1, log_interval=1)
    pretrain(alone)
    settings = [
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in alone.as_dict().items()
    ]
    settings.append(f"out_dir={tmp_path / 'two'}")
    (tmp_path / "empty.toml").write_text("")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "nanogpt",
               "train", tmp_path / "empty.toml", *(f"--set={setting}" for setting in settings)]  # fmt: skip
    result = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True, timeout=100
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    one, two = losses(Path(alone.out_dir)), losses(tmp_path / "two")
    assert one.keys() == two.keys()
    assert max(abs(one[step] - two[step]) for step in one) < 1e-4
    assert losses(tmp_path / "two", "val")[20] == pytest.approx(losses(Path(alone.out_dir), "val")[20], abs=1e-3)
    assert result.stdout.count("saved") == 2, "only one of the processes writes"


def test_bfloat16_trains_float32_weights(configure: Configure) -> None:
    result = pretrain(configure(precision="bf16", max_steps=10))
    assert result.path is not None
    value = torch.load(result.path, weights_only=True)
    assert {tensor.dtype for tensor in value["model"].values()} == {torch.float32}
    assert result.val_loss is not None
    assert result.val_loss < 3.7


def test_machines_read_json_lines(configure: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(configure(), json_lines=True)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events].count("checkpoint") == 2
    last = [event for event in events if event["event"] == "train"][-1]
    assert {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "seconds_left"} <= last.keys()
    written = (Path(configure().out_dir) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == events


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", {0: 1 / 11, 9: 10 / 11, 10: 1.0, 55: 0.55, 99: 0.1003}),
        ("wsd", {0: 1 / 11, 10: 1.0, 80: 1.0, 90: 0.55, 99: 0.145}),
        ("constant", {0: 1 / 11, 10: 1.0, 99: 1.0}),
    ],
)
def test_schedules(configure: Configure, schedule: str, expected: dict[int, float]) -> None:
    config = configure(
        schedule=schedule, max_steps=100, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1, decay_steps=20
    )
    assert {step: learning_rate(config, step) for step in expected} == pytest.approx(expected, abs=1e-3)


def test_biases_and_norms_do_not_decay(configure: Configure) -> None:
    from nanogpt.train.optimizer import create_optimizers
    from nanogpt.train.pretrain import model_config

    model = GPT(model_config(configure(bias=True), 37))
    optimizer = create_optimizers(model, configure())["optimizer"]
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decays[id(parameter)] == (0.1 if parameter.dim() == 2 else 0.0), name


def test_bfloat16_on_a_cpu_keeps_attention_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's backward of attention in bfloat16 there took more time than bfloat16 saved everywhere else."""
    from nanogpt.model.config import GPTConfig

    seen: list[torch.dtype] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def attention(q: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        seen.append(q.dtype)
        return real(q, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=37, num_tokens=37))
    ids = torch.randint(37, (2, 16))
    gradients = []
    for bf16 in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            _, loss = model(ids, ids)
        assert loss is not None
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        model.zero_grad(set_to_none=True)
    assert set(seen) == {torch.float32}
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.999
