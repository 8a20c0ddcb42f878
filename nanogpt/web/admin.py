"""The admin routes: another model, the one before, and what was served when. They exist only where ADMIN_KEY is set.

What they ask for is done by the supervisor; a route waits for its answer. Whoever leaves meanwhile stops nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from flask import Blueprint, Response, request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nanogpt.engine.client import Reply
from nanogpt.errors import EngineDraining, InvalidRequest, ReloadConflict, RequestTimeout
from nanogpt.settings import Settings
from nanogpt.web import process
from nanogpt.web.answers import json_response
from nanogpt.web.body import read_json_object
from nanogpt.web.engine import EngineHandle
from nanogpt.web.models import Models

# A literal text goes to the new engine through a pipe.
MAX_TEXT_CHARS = 10_000
_LOOK_UP_S = 0.25
# The supervisor keeps the deadline of a reload; past this much more it is stuck.
_GRACE_S = 30.0
# How long the answer waits for this worker to have connected to the engine that it tells of.
_SWITCH_S = 5.0

_Body = TypeVar("_Body", bound=BaseModel)


class LossGateBody(BaseModel):
    """Serve the new model only if its loss on a text is low enough."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)

    text: Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARS)] = Field(
        description="A text file on the server; or a text itself, which then has a line break."
    )
    max_loss: float = Field(gt=0, le=1000, description="Highest mean loss, in nats a token.")


class ReloadBody(BaseModel):
    """The body of POST /admin/reload."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, defer_build=True)

    checkpoint: Annotated[str, Field(min_length=1, max_length=4096)] = Field(
        description="A file or folder on the server."
    )
    loss_gate: LossGateBody | None = Field(None, description="A condition for the change.")
    compare: bool = Field(False, description="Change the second model, and leave what everybody gets.")


class EmptyBody(BaseModel):
    """The body of POST /admin/rollback, which may also be left away."""

    model_config = ConfigDict(extra="forbid", defer_build=True)


def make_admin_routes(settings: Settings, models: Models) -> Blueprint:
    """The routes; whoever registers them checks the key."""
    routes = Blueprint("admin", __name__, url_prefix="/admin")

    @routes.post("/reload")
    def reload() -> Response:
        body = _parse(ReloadBody, read_json_object(request, settings.max_body_bytes))
        gate = body.loss_gate.model_dump() if body.loss_gate is not None else None
        engine = models.compare if body.compare else models.main
        if engine is None:
            raise ReloadConflict(
                "This server has no second model.",
                field="compare",
                remedy="Start it with COMPARE_CHECKPOINT, or leave compare out.",
            )
        command = engine.client.command("reload", checkpoint=body.checkpoint, loss_gate=gate, who="admin")
        return changed(command, engine)

    @routes.post("/rollback")
    def rollback() -> Response:
        if request.content_length or "Transfer-Encoding" in request.headers:
            _parse(EmptyBody, read_json_object(request, settings.max_body_bytes))
        return changed(models.main.client.command("rollback"), models.main)

    @routes.get("/models")
    def history() -> Response:
        answer = _wait(models.main.client.command("models"), _GRACE_S)
        return json_response({"models": list(reversed(answer["models"]))})

    def changed(reply: Reply, engine: EngineHandle) -> Response:
        answer = _wait(reply, settings.reload_timeout_s + _GRACE_S)
        # Whoever asks this worker next gets the new model; the other workers switch in the same moment.
        until = time.monotonic() + _SWITCH_S
        while engine.state().digest != answer["model"]["digest"] and time.monotonic() < until:
            time.sleep(0.01)
        return json_response({name: answer[name] for name in ("model", "card", "previous")})

    return routes


def _wait(reply: Reply, timeout_s: float) -> dict[str, Any]:
    """The supervisor's answer. Raises: NanoGPTError."""
    until = time.monotonic() + timeout_s
    while True:
        answer = reply.get(_LOOK_UP_S)
        if answer is not None:
            return answer
        if process.is_draining() or (process.stop_at is not None and time.monotonic() >= process.stop_at):
            raise EngineDraining("The server is stopping.", remedy="GET /admin/models tells what is served.")
        if time.monotonic() >= until:
            raise RequestTimeout("The engine's supervisor does not answer.")


def _parse(model: type[_Body], fields: Mapping[str, Any]) -> _Body:
    """Raises: InvalidRequest, naming the first field at fault."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, detail["loc"]))[:80]
        if detail["type"] == "missing":
            message = f"{field} is required."
        elif detail["type"] == "extra_forbidden":
            message = f"Unknown field {field!r}."
        else:
            expected = detail["msg"].replace("Input should be ", "be ").replace("String should ", "")
            message = f"{field} must {expected}."
        known = ", ".join(model.model_fields)
        remedy = f"The fields are {known}." if known else "Send no fields."
        raise InvalidRequest(message, field=field, remedy=remedy) from None
