"""``nanogpt doctor`` on this machine: each check finds what it is there for, and is silent where all is well.

Readings of the machine are put in the place of the real ones; files, sockets and settings are real.
"""

from __future__ import annotations

import dataclasses
import pickle
import socket
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import write_huggingface, write_meta
from doctor_support import HEALTHY, found, here, statuses, the_one

import nanogpt
from nanogpt.doctor import checkpoint, configuration, machine
from nanogpt.doctor.readings import Gpu, Machine, free_memory, read_machine

# -- the machine ------------------------------------------------------------------------------------------------


def test_the_readings_of_this_machine_are_plausible() -> None:
    read = read_machine("cpu")
    assert read.cpus >= 1
    assert read.free_bytes > 10_000_000
    assert read.max_open_files > 16


def test_a_containers_limit_counts_and_not_its_hosts_memory(tmp_path: Path) -> None:
    """The engine would be killed at the limit, however much the host has."""
    (tmp_path / "meminfo").write_text("MemTotal: 64000000 kB\nMemAvailable:   50000000 kB\n")
    own = tmp_path / "own"
    own.write_text("0::/pod/app\n")
    groups = tmp_path / "cgroup"
    (groups / "pod/app").mkdir(parents=True)
    for folder, limit, used in (("pod", "2000000000", "900000000"), ("pod/app", "max", "1000")):
        (groups / folder / "memory.max").write_text(limit + "\n")
        (groups / folder / "memory.current").write_text(used + "\n")
    (groups / "pod/memory.stat").write_text("anon 500\ninactive_file 100000000\n")
    assert free_memory(tmp_path / "meminfo", groups, own) == 1_200_000_000
    assert free_memory(tmp_path / "meminfo", tmp_path / "none", own) == 50_000_000 * 1024


def test_a_model_that_does_not_fit_into_memory_fails(model: str) -> None:
    little = dataclasses.replace(HEALTHY, free_bytes=100_000_000)
    assert statuses(machine.memory, here(model)) == ["ok"]
    finding = the_one(machine.memory, here(model, little))
    assert (finding.status, finding.see) == ("fail", "docs/troubleshooting.md#out-of-memory")
    assert "100 MB are free" in finding.says
    assert "NANOGPT_MAX_BATCH_SIZE" in finding.remedy


def test_what_the_model_needs_grows_with_its_slots_and_not_with_workers(model: str) -> None:
    small, large = here(model, max_batch_size=4), here(model, max_batch_size=400)
    assert small.checkpoint is not None
    assert large.need(small.checkpoint).kv > 50 * small.need(small.checkpoint).kv
    assert here(model, http_workers=8).need(small.checkpoint).model == here(model).need(small.checkpoint).model


def test_memory_for_one_model_may_be_too_little_to_change_it(model: str) -> None:
    settings = {"max_batch_size": 4096, "max_batch_tokens": 4096}
    loaded = here(model, **settings)
    assert loaded.checkpoint is not None
    need = loaded.need(loaded.checkpoint)
    room = dataclasses.replace(HEALTHY, free_bytes=int((loaded.other_bytes() + need.engine + 2.5 * need.model) / 0.9))
    assert statuses(machine.memory, here(model, room, **settings)) == ["ok"]
    changed = the_one(machine.memory, here(model, room, admin_key="k", **settings))
    assert (changed.status, "3 in memory" in changed.says) == ("warn", True)
    assert "NANOGPT_STANDBY" in changed.remedy
    assert statuses(machine.memory, here(model, room, admin_key="k", standby=False, **settings)) == ["ok"]


def test_the_model_to_compare_with_takes_memory_too(model: str) -> None:
    """The room for one model and a half is enough for one, and not for two."""
    settings = {"max_batch_size": 4096, "max_batch_tokens": 4096}
    both = here(model, compare_checkpoint=model, **settings)
    assert both.checkpoint is not None
    need = both.need(both.checkpoint)

    def room(models: float) -> Machine:
        processes = both.other_bytes() + 2 * need.engine
        return dataclasses.replace(HEALTHY, free_bytes=int((processes + models * need.model) / 0.9))

    assert statuses(machine.memory, here(model, room(1.5), **settings)) == ["ok"]
    finding = the_one(machine.memory, dataclasses.replace(both, machine=room(1.5)))
    assert (finding.status, "two models" in finding.says) == ("fail", True)
    assert "COMPARE_CHECKPOINT" in finding.remedy
    assert statuses(machine.memory, dataclasses.replace(both, machine=room(2.5))) == ["ok"]
    changed = {"compare_checkpoint": model, "admin_key": "k", **settings}
    assert "4 in memory" in the_one(machine.memory, here(model, room(3.5), **changed)).says
    assert statuses(machine.memory, here(model, room(3.5), standby=False, **changed)) == ["ok"]


def test_a_larger_model_to_compare_with_is_what_a_change_may_need_once_more(model: str) -> None:
    """Only --follow changes the first one alone; whoever has the admin key may change either."""
    both = {"compare_checkpoint": "", "standby": False, "http_workers": 1}
    small, large = here(model, **both), here("", **both)  # a toy, and the embedded model
    assert small.checkpoint is not None
    assert large.checkpoint is not None
    first, second = small.need(small.checkpoint), large.need(large.checkpoint)
    assert second.model > 10 * first.model
    needed = small.other_bytes() + 2 * first.engine + 2 * first.model + second.model
    room = dataclasses.replace(HEALTHY, free_bytes=int(needed / 0.9) + 1000)
    embedded = str(Path(nanogpt.__file__).parent / "assets" / "default")
    both["compare_checkpoint"] = embedded
    assert statuses(machine.memory, here(model, room, follow=True, **both)) == ["ok"]
    assert statuses(machine.memory, here(model, room, admin_key="k", **both)) == ["ok", "warn"]


@pytest.mark.parametrize(
    ("gpu", "device", "status", "says"),
    [
        (HEALTHY.gpu, "auto", "ok", "no NVIDIA driver"),
        (HEALTHY.gpu, "cuda", "fail", "no NVIDIA driver"),
        (Gpu(problem="PyTorch is not installed.", remedy="pip", has_driver=True), "auto", "warn", "not installed"),
        (Gpu("H100", 80_000_000_000, has_driver=True), "cpu", "warn", "H100 is there"),
    ],
)
def test_a_gpu_that_is_not_used_is_named(model: str, gpu: Gpu, device: str, status: str, says: str) -> None:
    finding = the_one(machine.gpu, here(model, dataclasses.replace(HEALTHY, gpu=gpu), device=device))
    assert finding.status == status
    assert says in finding.says


def test_hardware_tells_what_computes_and_how_fast(model: str) -> None:
    says = the_one(machine.hardware, here(model, threads=1)).says
    assert "on cpu (2 CPUs)" in says
    assert "tokens/s alone" in says
    assert "warn" in statuses(machine.hardware, here(model, threads=3))


@pytest.mark.parametrize(
    ("limit", "status"), [(256, "fail"), (1024, "warn"), (65_536, "ok")], ids=["too few", "Debian's default", "enough"]
)
def test_open_files_that_do_not_suffice_are_told_before_connections_are_refused(limit: int, status: str) -> None:
    assert statuses(machine.file_descriptors, here("", dataclasses.replace(HEALTHY, max_open_files=limit))) == [status]


@pytest.mark.parametrize(("synchronized", "now", "status"), [
    (True, 1.8e9, "ok"), (None, 1.8e9, "ok"), (False, 1.8e9, "warn"), (True, 1.0, "fail"),
])  # fmt: skip
def test_a_clock_that_is_not_set_is_told(synchronized: bool | None, now: float, status: str) -> None:
    readings = dataclasses.replace(HEALTHY, clock_is_synchronized=synchronized, now=now)
    assert statuses(machine.clock, here("", readings)) == [status]


def test_a_port_that_somebody_else_has_fails_and_a_free_one_is_left_free(stranger: str) -> None:
    finding = the_one(machine.port, here(port=int(stranger.rpartition(":")[2])))
    assert (finding.status, "Address already in use" in finding.says) == ("fail", True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert statuses(machine.port, here(port=port)) == ["ok"]
    socket.create_server(("127.0.0.1", port)).close()
    assert statuses(machine.port, here(port=0)) == ["ok"]
    assert statuses(machine.port, here(host="no.such.host.invalid")) == ["fail"]


# -- the checkpoint ---------------------------------------------------------------------------------------------


def test_a_good_checkpoint_loads_writes_and_speaks_its_own_characters(model: str) -> None:
    subject = here(model)
    assert "loads and writes" in found(checkpoint.checkpoint, subject)[0].says
    assert statuses(checkpoint.tokenizer, subject) == ["ok"]


@pytest.mark.parametrize("cut", [10, 3000], ids=["the beginning", "half"])
def test_a_broken_checkpoint_fails_in_its_loaders_words_and_the_rest_is_not_looked_at(
    model: str, tmp_path: Path, cut: int
) -> None:
    (tmp_path / "ckpt.pt").write_bytes((Path(model) / "ckpt.pt").read_bytes()[:cut])
    write_meta(tmp_path)
    subject = here(str(tmp_path))
    finding = the_one(checkpoint.checkpoint, subject)
    assert finding.status == "fail"
    assert str(tmp_path) in finding.says
    assert statuses(checkpoint.tokenizer, subject) == statuses(machine.memory, subject) == ["warn"]
    assert statuses(configuration.timeouts, subject) == ["warn"]


def test_a_checkpoint_that_is_not_there_fails_and_the_embedded_one_is_a_warning() -> None:
    assert the_one(checkpoint.checkpoint, here("/no/such/file")).status == "fail"
    finding = the_one(checkpoint.checkpoint, here(""))
    assert (finding.status, "MODEL_CHECKPOINT" in finding.remedy) == ("warn", True)


def test_a_tokenizer_that_does_not_fit_is_told_as_the_tokenizers_fault(model: str, tmp_path: Path) -> None:
    characters = {character: i for i, character in enumerate("\n abcdefg")}
    meta = {"stoi": characters, "itos": {i: character for character, i in characters.items()}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    subject = here(model, tokenizer=str(tmp_path / "meta.pkl"))
    assert the_one(checkpoint.tokenizer, subject).status == "fail"
    assert the_one(checkpoint.checkpoint, subject).status == "warn"


def test_a_tokenizer_of_hugging_faces_goes_there_and_back(tmp_path: Path) -> None:
    write_huggingface(tmp_path)
    assert statuses(checkpoint.tokenizer, here(str(tmp_path))) == ["ok"]


def test_a_way_back_needs_a_key_and_another_checkpoint(model: str, tmp_path: Path) -> None:
    assert statuses(checkpoint.rollback, here(model)) == ["warn", "warn"]
    for name in ("model_10.pt", "model_20.pt"):
        (tmp_path / name).write_bytes((Path(model) / "ckpt.pt").read_bytes())
    write_meta(tmp_path)
    subject = here(str(tmp_path), admin_key="a long enough key")
    assert subject.checkpoint is not None, subject.refusal
    assert statuses(checkpoint.rollback, subject) == ["ok", "ok"]
    (tmp_path / "model_10.pt").write_bytes(b"half")
    assert statuses(checkpoint.rollback, subject) == ["ok", "warn"]


# -- the settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("looked_at", "settings", "status", "says"),
    [
        ("settings", {}, "ok", "would take"),
        ("settings", {"admin_key": "same", "api_key": "same"}, "fail", "ADMIN_KEY is the same as API_KEY"),
        ("settings", {"follow": True}, "fail", "follow needs a folder"),
        ("settings", {"keys_file": "/no/such/keys.json"}, "fail", "keys.json"),
        ("settings", {"rate_limit": "many"}, "fail", "RATE_LIMIT"),
        ("settings", {"redis_url": "http://elsewhere"}, "fail", "REDIS_URL"),
        ("keys", {"host": "0.0.0.0"}, "fail", "Everybody who reaches 0.0.0.0"),
        ("keys", {"host": "127.0.0.1"}, "warn", "No key is set"),
        ("keys", {"api_key": "k" * 32}, "ok", "API_KEY"),
        ("keys", {"api_key": "secret"}, "warn", "API_KEY has 6 characters"),
        ("keys", {"api_key": "k" * 32, "admin_key": "admin"}, "warn", "ADMIN_KEY has 5 characters"),
        ("limits", {}, "ok", "10 per minute"),
        ("limits", {"rate_limit": "off"}, "ok", "this machine only"),
        ("limits", {"rate_limit": "off", "host": "0.0.0.0"}, "warn", "RATE_LIMIT is off"),
        ("limits", {"trusted_proxies": 1, "host": "0.0.0.0"}, "warn", "past them"),
        ("limits", {"trusted_proxies": 1}, "ok", "10 per minute"),
        ("logs", {}, "ok", "Two lines"),
        ("logs", {"log_level": "error"}, "warn", "no line"),
        ("logs", {"log_level": "debug"}, "warn", "fill the log"),
        ("redis", {}, "ok", "not set"),
    ],
)
def test_settings_that_are_taken_and_regretted(
    looked_at: str, settings: dict[str, Any], status: str, says: str
) -> None:
    finding = the_one(getattr(configuration, looked_at), here(**settings))
    assert finding.status == status
    assert says in finding.says


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        ({}, "ok"),
        ({"request_timeout_s": 1.0}, "fail"),
        ({"request_timeout_s": 86_400, "drain_timeout_s": 1.0}, "warn"),
    ],
    ids=["short", "never finished", "cut by a stop"],
)
def test_an_answer_that_takes_longer_than_it_may_is_foreseen(model: str, settings: dict[str, Any], status: str) -> None:
    """The smallest model writes some thousand tokens a second: ten million take half an hour and more."""
    long = {"context_overflow": "crop", "max_new_tokens": 10_000_000} if settings else {}
    subject = here(model, **settings, **long)
    assert the_one(configuration.timeouts, subject).status == status


def test_traces_without_their_package_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert statuses(configuration.metrics, here()) == ["ok"]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
    monkeypatch.setattr(configuration.importlib.util, "find_spec", lambda name: None)
    assert statuses(configuration.metrics, here()) == ["ok", "warn"]
