"""The playground: the page that a browser gets at ``/``, its files, and ``/model_info``, which its model card shows.

The page and its files are open, as they have to be there before a key is typed; they hold nothing of this server. All
that they show comes from the API, with the key that the visitor typed. Owned by the process, read once.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from flask import Blueprint, Request, Response, request

from nanogpt._version import __version__
from nanogpt.errors import NotFound
from nanogpt.web.answers import json_response
from nanogpt.web.engine import ServedModel
from nanogpt.web.models import DEFAULT
from nanogpt.web.service import GenerationService

# The folder's name holds a digest of all files, so that they may be kept for ever and never mix with those of another
# version.
FILES_ROUTE = "/playground/<build>/<name>"

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_KEEP = "public, max-age=31536000, immutable"
_PAGE = "index.html"


@dataclass(frozen=True)
class Files:
    """``page``: index.html, which names the folder of the others."""

    build: str
    page: bytes
    others: dict[str, bytes]


@cache
def files() -> Files:
    """All files of the playground, as they lie in the package."""
    folder = Path(__file__).parent / "playground"
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in {*_TYPES, ".html"}}
    digest = hashlib.sha256()
    for name, data in found.items():
        digest.update(b"%b %d\n" % (name.encode(), len(data)) + data)
    build = digest.hexdigest()[:12]
    page = found.pop(_PAGE).replace(b"{build}", build.encode()).replace(b"{version}", __version__.encode())
    return Files(build, page, found)


def wants_page(request: Request) -> bool:
    """Whether a browser asks. Who takes anything (curl, most programs) gets JSON, as does who asks for it."""
    return request.accept_mimetypes.best_match(["application/json", "text/html"]) == "text/html"


def page() -> Response:
    """The page. It is asked for again each time, and costs 304 where it is the same."""
    response = _secured(Response(files().page, mimetype="text/html"))
    response.headers["Cache-Control"] = "no-cache"
    response.headers["Vary"] = "Accept"
    response.set_etag(files().build)
    return response.make_conditional(request)  # type: ignore[return-value]


def make_playground_routes(service: GenerationService) -> Blueprint:
    routes = Blueprint("playground", __name__)

    @routes.get(FILES_ROUTE)
    def playground_file(build: str, name: str) -> Response:
        """A page of another version, while servers are being replaced, gets this version's file, which is not kept."""
        data = files().others.get(name)
        if data is None:
            raise NotFound("Not found", remedy="GET / is the playground.")
        response = _secured(Response(data, mimetype=_TYPES[Path(name).suffix]))
        response.headers["Cache-Control"] = _KEEP if build == files().build else "no-store"
        return response

    @routes.get("/model_info")
    def model_info() -> Response:
        with service.place():  # a model that is loading is waited for
            model = service.model(request.args.get("model", DEFAULT))
        return json_response(describe_model(model))

    return routes


def describe_model(model: ServedModel) -> dict[str, Any]:
    """The part of the model's card that is no path of this host, and how the engine runs it."""
    now, card = model.handle.state(), model.card
    return {
        "name": model.name,
        "family": card.get("family"),
        "parameters": card.get("parameters"),
        "context": card.get("block_size") or now.block_size,
        "layers": card.get("n_layer"),
        "heads": card.get("n_head"),
        "width": card.get("n_embd"),
        "vocabulary": card.get("num_tokens"),
        "tokenizer": card.get("tokenizer"),
        "has_chat_template": bool(card.get("chat_template")),
        "step": card.get("step"),
        "recorded_loss": card.get("recorded_loss"),
        "device": now.device,
        "precision": now.precision,
        "int8_matrices": card.get("int8_matrices"),
        "runner": now.runner,
        "digest": model.digest or None,
    }


def _secured(response: Response) -> Response:
    response.headers["Content-Security-Policy"] = POLICY
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "no-referrer"
    response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
    return response
