"""``serve run nanogpt.deploy.ray:app``: replicas of engine and web app behind Ray Serve's proxies.

    Ray's proxy (one a node) → Front (light; sends again what a dead replica had not begun) → Replica (engine + web app)

Arguments (of ``serve run``, or ``args`` in a config file) are the server's settings by their names, such as
``model_checkpoint=log/``, and the fields of ``Scale``. What is not given comes from the environment of each node.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from nanogpt import logs
from nanogpt.deploy.front import Front
from nanogpt.deploy.prefix_router import MAX_AHEAD, PrefixRouter
from nanogpt.deploy.replica import Replica, replica_settings
from nanogpt.errors import SettingsError
from nanogpt.settings import Settings

# The texts' own deadline comes first, so that the last of them still get their error event before Ray kills.
_KILL_AFTER_DRAIN_S = 5.0
_HEALTH_CHECK_PERIOD_S = 5.0
# Requests that one front passes on at once, before there is another front where ``max_fronts`` admits it.
_REQUESTS_A_FRONT = 200


class Scale(BaseModel):
    """How much of it there is: arguments of ``app`` beside the settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_replicas: int = Field(1, ge=0, le=1000, description="Replicas that there are at least. 0: none while idle.")
    max_replicas: int = Field(1, ge=1, le=1000, description="Replicas that autoscaling may start.")
    target_ongoing_requests: float = Field(
        0, ge=0, description="Requests a replica that autoscaling aims at. 0: max_batch_size."
    )
    cpus: float = Field(1, gt=0, le=1024, description="CPUs of a replica: reserved, and the engine's threads.")
    gpus: float = Field(0, ge=0, le=64, description="GPUs of a replica.")
    memory_bytes: int = Field(0, ge=0, description="Memory that Ray reserves for a replica (and does not enforce).")
    max_fronts: int = Field(2, ge=1, le=1000, description="Fronts that autoscaling may start; there is one at least.")
    max_ahead: int = Field(
        MAX_AHEAD, ge=0, description="Requests by which a prompt's own replica may be busier than the idlest one."
    )


class ReplicaActor(Replica):
    """Ray's side of a replica."""

    def __init__(self, given: Mapping[str, Any], cpus: float) -> None:
        settings = replica_settings(given, math.ceil(cpus))
        logs.configure(settings.log_format, settings.log_level)
        super().__init__(settings, serve.get_replica_context().replica_id.unique_id)


class FrontActor(Front):
    """Ray's side of a front."""

    def __init__(self, replicas: DeploymentHandle[Any], given: Mapping[str, Any]) -> None:
        settings = Settings.load(dict(given))
        logs.configure(settings.log_format, settings.log_level)
        super().__init__(replicas, settings)


def app(args: Mapping[str, Any]) -> Application:
    """The application. Raises: SettingsError."""
    scale, given = _split(args)
    settings = Settings.load(given)
    grace_s = settings.drain_timeout_s + _KILL_AFTER_DRAIN_S
    replica_resources: dict[str, Any] = {"num_cpus": scale.cpus, "num_gpus": scale.gpus}
    if scale.memory_bytes:
        replica_resources["memory"] = scale.memory_bytes
    replicas = serve.deployment(
        ReplicaActor,
        name="Replica",
        ray_actor_options=replica_resources,
        max_ongoing_requests=settings.http_threads,
        max_queued_requests=settings.max_queue or -1,
        autoscaling_config=AutoscalingConfig(
            min_replicas=scale.min_replicas,
            max_replicas=scale.max_replicas,
            target_ongoing_requests=scale.target_ongoing_requests or settings.max_batch_size,
        ),
        request_router_config=RequestRouterConfig(
            request_router_class=f"{PrefixRouter.__module__}.{PrefixRouter.__qualname__}",
            request_router_kwargs={"max_ahead": scale.max_ahead},
        ),
        graceful_shutdown_timeout_s=grace_s,
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
    )
    fronts = serve.deployment(
        FrontActor,
        name="Front",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=max(1000, settings.http_threads * scale.max_replicas),
        autoscaling_config=AutoscalingConfig(
            min_replicas=1, max_replicas=scale.max_fronts, target_ongoing_requests=_REQUESTS_A_FRONT
        ),
        graceful_shutdown_timeout_s=grace_s,
    )
    return fronts.bind(replicas.bind(given, scale.cpus), given)


def _split(args: Mapping[str, Any]) -> tuple[Scale, dict[str, Any]]:
    """The arguments, as ``Scale`` and settings. Raises: SettingsError."""
    try:
        scale = Scale.model_validate({name: value for name, value in args.items() if name in Scale.model_fields})
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        field = str(detail["loc"][0])
        raise SettingsError(f"{field} is {detail['input']!r}: {detail['msg']}.", field=field) from None
    if scale.min_replicas > scale.max_replicas:
        raise SettingsError(
            f"min_replicas ({scale.min_replicas}) is above max_replicas ({scale.max_replicas}).",
            field="max_replicas",
            remedy="Give both, the second one not smaller.",
        )
    return scale, {name: value for name, value in args.items() if name not in Scale.model_fields}
