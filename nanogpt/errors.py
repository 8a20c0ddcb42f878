"""The one tree of errors. Every error knows its HTTP status, its exit code and what the user can do about it.

Messages are written for the person who made the request or started the process: they name the field or
file, the value, the limit and the remedy. Raising anything else out of a public function is a defect.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType


class NanoGPTError(Exception):
    """Base of every error that this product raises on purpose.

    ``message`` is shown as it is (HTTP ``error`` field, command line). ``remedy`` is one sentence that says
    what to do; ``field`` names the request field or setting at fault; ``retry_after_s`` becomes ``Retry-After``.
    """

    status = 500
    code = "internal_error"
    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        remedy: str | None = None,
        field: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.field = field
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}" if self.remedy else self.message


class SettingsError(NanoGPTError):
    """A flag, an environment variable or a line of the settings file is wrong."""

    code = "invalid_settings"
    exit_code = 2


class MissingDependency(NanoGPTError):
    """An optional package is needed for what was asked; the remedy names the extra to install."""

    code = "missing_dependency"
    exit_code = 2


# -- checkpoints and tokenizers -------------------------------------------------------------------------------


class CheckpointError(NanoGPTError):
    """A checkpoint cannot be served. ``exit_code`` 2 everywhere on the command line."""

    status = 400
    code = "checkpoint_error"
    exit_code = 2


class CheckpointNotFound(CheckpointError):
    """There is no file at the path, or no checkpoint in the folder."""

    status = 404
    code = "checkpoint_not_found"


class UnsupportedCheckpoint(CheckpointError):
    """The file was understood well enough to know that this version cannot run it (nanochat, unknown tensors)."""

    code = "unsupported_checkpoint"


class CorruptCheckpoint(CheckpointError):
    """The file is damaged: truncated, wrong magic, sizes that do not fit, NaN weights."""

    code = "corrupt_checkpoint"


class UnsafeCheckpoint(CheckpointError):
    """The file asks for code to be executed (a pickled global that is not admitted). Nothing was executed."""

    code = "unsafe_checkpoint"


class TokenizerError(NanoGPTError):
    """The tokenizer's files are missing, damaged or do not fit the model."""

    status = 400
    code = "tokenizer_error"
    exit_code = 2


# -- requests -------------------------------------------------------------------------------------------------


class InvalidRequest(NanoGPTError):
    """A request that can never succeed as it was sent."""

    status = 400
    code = "invalid_request"
    exit_code = 2


class UnknownCharacter(InvalidRequest):
    """A character model was given a character that is not in its vocabulary."""

    code = "unknown_character"


class ContextLengthExceeded(InvalidRequest):
    """The prompt or the conversation is longer than the model's context."""

    code = "context_length_exceeded"


class Unauthorized(NanoGPTError):
    status = 401
    code = "invalid_api_key"


class NotFound(NanoGPTError):
    status = 404
    code = "not_found"


class ModelNotFound(NotFound):
    """A request names another model than the one that is served."""

    code = "model_not_found"


class MethodNotAllowed(NanoGPTError):
    status = 405
    code = "method_not_allowed"


class PayloadTooLarge(NanoGPTError):
    status = 413
    code = "payload_too_large"


class UnsupportedMediaType(NanoGPTError):
    status = 415
    code = "unsupported_media_type"


class TooManyRequests(NanoGPTError):
    """This client is over its own limit. ``headers`` tell it how its limits stand."""

    status = 429
    code = "rate_limited"
    headers: Mapping[str, str] = MappingProxyType({})


class TokensLimited(TooManyRequests):
    """This key's tokens a minute are used up."""

    code = "tokens_limited"


class ConcurrencyLimit(TooManyRequests):
    """This client has as many requests under way as it may have at once."""

    code = "concurrency_limit"


# -- the engine -----------------------------------------------------------------------------------------------


class ServiceUnavailable(NanoGPTError):
    """The server cannot take the request now; the same request can succeed after ``retry_after_s``."""

    status = 503
    code = "unavailable"

    def __init__(self, message: str, *, retry_after_s: float = 1.0, remedy: str | None = None) -> None:
        super().__init__(message, remedy=remedy, retry_after_s=retry_after_s)


class QueueFull(ServiceUnavailable):
    code = "queue_full"


class EngineLoading(ServiceUnavailable):
    code = "loading"


class EngineDraining(ServiceUnavailable):
    code = "draining"


class EngineUnhealthy(ServiceUnavailable):
    """The engine does not come up; the message says why. It is tried again with growing pauses."""

    code = "unhealthy"


class EngineDied(ServiceUnavailable):
    """The engine process ended while the request was in it; it is being started again."""

    code = "engine_died"


class ModelChanged(ServiceUnavailable):
    """The model was changed between the request's tokenizing and its hand-over, and the new one has other tokens."""

    code = "model_changed"


class RequestTimeout(ServiceUnavailable):
    """The request's deadline passed before it finished."""

    status = 504
    code = "timeout"


# -- changes of the model -------------------------------------------------------------------------------------


class ReloadConflict(NanoGPTError):
    """The model cannot be changed now: another change is under way, or there is no model to go back to."""

    status = 409
    code = "reload_conflict"


class ReloadFailed(NanoGPTError):
    """The new model was not taken into service; the one before serves on. The message says why."""

    status = 422
    code = "reload_failed"
