"""The admin routes at their border: whose they are, whether they exist, what they take. The rest needs real engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from web_support import ALPHABET, EchoClient, EchoGeneration, make_app

from nanogpt.engine.client import Reply
from nanogpt.engine.messages import GenerateRequest
from nanogpt.errors import ModelChanged, SettingsError
from nanogpt.settings import Settings
from nanogpt.tokenizer import characters
from nanogpt.web.app import check_settings

ADMIN = {"X-API-Key": "admin-schlüssel".encode().decode("latin-1")}
ROUTES = (("POST", "/admin/reload"), ("POST", "/admin/rollback"), ("GET", "/admin/models"))


class CommandedClient(EchoClient):
    """Answers every command at once, and keeps what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.commands: list[dict[str, Any]] = []

    def command(self, name: str, **fields: Any) -> Reply:
        self.commands.append({"command": name, **fields})
        reply = Reply()
        reply.put({"model": {"digest": self.status.digest}, "card": {}, "previous": None, "models": [1, 2]})
        return reply


def app(client: EchoClient | None = None, **settings: Any) -> Any:
    return make_app(client or CommandedClient(), **{"admin_key": "admin-schlüssel", **settings}).test_client()


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_without_an_admin_key_there_are_no_admin_routes(method: str, path: str) -> None:
    assert app(admin_key="").open(path, method=method, json={}).status_code == 404
    keyed = app(admin_key="", api_key="k")
    assert keyed.open(path, method=method, json={}, headers={"X-API-Key": "k"}).status_code == 404


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("api_key", ["", "k"])
def test_only_the_admin_key_opens_them(method: str, path: str, api_key: str) -> None:
    """Also where generating is open to everybody."""
    client = CommandedClient()
    http = app(client, api_key=api_key)
    for headers in ({}, {"X-API-Key": "k"}, {"X-API-Key": ""}, {"Authorization": "Bearer k"}, {"X-API-Key": "admin"}):
        refused = http.open(path, method=method, json={"checkpoint": "x"}, headers=headers)
        assert (refused.status_code, refused.json["code"]) == (401, "invalid_api_key")
    assert not client.commands
    body = {"checkpoint": "x"} if path.endswith("reload") else {}
    bearer = {"Authorization": f"Bearer {ADMIN['X-API-Key']}"}
    for headers in (ADMIN, bearer):
        assert http.open(path, method=method, json=body, headers=headers).status_code == 200


def test_the_admin_key_opens_nothing_else() -> None:
    assert app(api_key="k").post("/generate", json={"prompt": "a"}, headers=ADMIN).status_code == 401


def test_what_was_asked_reaches_the_supervisor() -> None:
    client = CommandedClient()
    http = app(client)
    gate = {"text": "val.txt", "max_loss": 1.6}
    http.post("/admin/reload", json={"checkpoint": "log/", "loss_gate": gate}, headers=ADMIN)
    http.post("/admin/reload", json={"checkpoint": "log/"}, headers=ADMIN)
    http.post("/admin/rollback", headers=ADMIN)
    assert client.commands == [
        {"command": "reload", "checkpoint": "log/", "loss_gate": gate, "who": "admin"},
        {"command": "reload", "checkpoint": "log/", "loss_gate": None, "who": "admin"},
        {"command": "rollback"},
    ]
    assert http.get("/admin/models", headers=ADMIN).json == {"models": [2, 1]}, "newest first"


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        ({}, "checkpoint", "checkpoint is required."),
        ({"checkpoint": ""}, "checkpoint", "at least 1 character"),
        ({"checkpoint": 5}, "checkpoint", "be a valid string"),
        ({"checkpoint": "x" * 5000}, "checkpoint", "at most 4096 characters"),
        ({"checkpoint": "x", "chekpoint": 1}, "chekpoint", "Unknown field 'chekpoint'."),
        ({"checkpoint": "x", "loss_gate": {"text": "t"}}, "loss_gate.max_loss", "is required"),
        ({"checkpoint": "x", "loss_gate": {"text": "t", "max_loss": "2"}}, "loss_gate.max_loss", "a valid number"),
        ({"checkpoint": "x", "loss_gate": {"text": "t", "max_loss": 0}}, "loss_gate.max_loss", "greater than 0"),
        ({"checkpoint": "x", "loss_gate": {"text": "", "max_loss": 1}}, "loss_gate.text", "at least 1 character"),
        ({"checkpoint": "x", "loss_gate": {"text": "t", "max_loss": 1, "x": 1}}, "loss_gate.x", "Unknown field"),
        ({"checkpoint": "x", "loss_gate": []}, "loss_gate", "must be"),
    ],
)
def test_bodies_are_strict(body: dict[str, Any], field: str, says: str) -> None:
    client = CommandedClient()
    answer = app(client).post("/admin/reload", json=body, headers=ADMIN)
    assert (answer.status_code, answer.json["field"]) == (400, field)
    assert says in answer.json["error"]
    assert not client.commands


def test_a_rollback_takes_nothing() -> None:
    client = CommandedClient()
    answer = app(client).post("/admin/rollback", json={"to": "yesterday"}, headers=ADMIN)
    assert (answer.status_code, answer.json["error"]) == (400, "Unknown field 'to'.")
    assert not client.commands


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"api_key": "k", "admin_key": "k"}, "the same as API_KEY"),
        ({"follow_loss_text": "val.txt"}, "one gate"),
        ({"follow_max_loss": 1.5}, "one gate"),
        ({"follow": True}, "needs a folder"),
        ({"follow": True, "model_checkpoint": __file__}, "needs a folder"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says) as refused:
        check_settings(Settings(**settings))
    assert refused.value.remedy


def test_a_folder_can_be_followed(tmp_path: Path) -> None:
    check_settings(Settings(follow=True, model_checkpoint=str(tmp_path)))


class ChangingClient(EchoClient):
    """Another engine is published between a request's tokenizing and its hand-over; the first takes nothing more."""

    def __init__(self, alphabet: str) -> None:
        super().__init__()
        self.status = replace(self.status, link=1, digest="old")
        self.next = replace(self.status, link=2, digest="new", tokenizer=characters(list(alphabet)).to_spec())
        self.engines: list[int | None] = []

    def submit(self, request: GenerateRequest, *, engine: int | None = None) -> EchoGeneration:
        self.engines.append(engine)
        self.status = self.next
        if engine == 1:
            raise ModelChanged("The model was changed at this moment.", remedy="Send the request again.")
        return super().submit(request, engine=engine)


def test_a_request_that_meets_a_change_goes_to_the_next_engine_if_its_tokens_mean_the_same() -> None:
    client = ChangingClient(ALPHABET)
    answer = app(client).post("/generate", json={"prompt": "ab", "max_length": 2})
    assert (answer.status_code, answer.json["generated_text"]) == (200, "abab")
    assert client.engines == [1, 2]


def test_tokens_of_one_tokenizer_never_reach_a_model_with_another() -> None:
    client = ChangingClient(ALPHABET[::-1])
    http = app(client)
    answer = http.post("/generate", json={"prompt": "ab", "max_length": 2})
    assert (answer.status_code, answer.json["code"]) == (503, "model_changed")
    assert answer.headers["Retry-After"] == "1"
    assert http.post("/generate", json={"prompt": "ab", "max_length": 2}).json["generated_text"] == "abab"
    assert client.engines == [1, 2]
