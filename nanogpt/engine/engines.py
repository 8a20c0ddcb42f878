"""The engine processes of one role: the one that serves, and those that come and go when the model changes.

A supervisor has one such object for the model that everybody gets and, where there is a second one to compare it with,
another for that. Neither knows of the other.

- ``current`` serves. When it dies it is started again with its own checkpoint: at once the first time, then with a
  growing pause of up to 30 s.
- A *candidate* is loaded beside it by a reload. Only when it has passed its tests and says that it is ready does it
  become the current one; whatever goes wrong before ends the candidate alone.
- The one before stands by, warm, so that a rollback is a switch (setting ``standby``; without it, or when it has died,
  a rollback loads its checkpoint again).
- Whoever is replaced twice is drained: it finishes what it has and ends.

Belongs to the supervisor's one thread, which calls ``tick`` whenever something may have happened, at the latest at
``next_at``. Knows nothing of those who ask; their answers go to the function that they hand over.
"""

from __future__ import annotations

import logging
import selectors
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nanogpt.engine.child import EngineChild
from nanogpt.engine.history import Entry, History, Role
from nanogpt.engine.messages import EngineState
from nanogpt.engine.wire import error_to_wire, read_error
from nanogpt.errors import EngineDraining, NanoGPTError, ReloadConflict, ReloadFailed

logger = logging.getLogger("nanogpt.engine")

Done = Callable[[dict[str, Any]], None]
"""Told once how a reload or rollback ended: ``{"model", "card", "previous"}`` or ``{"error"}``."""

MAX_PAUSE_S = 30.0
# An engine that was ready for so long starts with a clean slate when it dies.
STABLE_S = 60.0
# More deaths than this in a row, and the state is unhealthy rather than loading.
_TOLERATED_DEATHS = 2
# What an engine may need beyond its own drain timeout before it is killed.
_GRACE_S = 5.0
# A replaced engine takes requests for so long yet: those that were on their way to it when it was replaced.
_LINGER_S = 2.0
# It then has as long as any request may take (the limit of request_timeout_s): every one has a deadline of its own.
_LONGEST_REQUEST_S = 86_400.0


class Engines:
    """Starts, watches, switches and ends engine processes. ``changed`` is called when there is something to tell."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        run_dir: Path,
        settings: dict[str, Any],
        engine_argv: list[str],
        changed: Callable[[], None],
        role: Role = "main",
    ) -> None:
        self._selector = selector
        self._run_dir = run_dir
        self._settings = settings
        self._engine_argv = engine_argv
        self._changed = changed
        # Where memory runs out, a model that is only compared with goes before the one that everybody gets.
        self._expendable = role == "compare"
        self._socket_name = "engine" if role == "main" else role
        self.state: EngineState = "loading"
        self.reason = ""
        self.num_restarts = 0
        self.history = History(role)
        self.current: Entry = self.history.add(settings["model_checkpoint"], "start")
        self.previous: Entry | None = None
        self._engine: EngineChild | None = None
        self._standby: EngineChild | None = None
        self._candidate: EngineChild | None = None
        self._wanted_digest = ""
        self._done: Done | None = None
        self._ending: list[EngineChild] = []
        self._num_started = 0
        self._num_deaths = 0
        self._start_at: float | None = None
        self._ready_since: float | None = None

    # -- for the supervisor ----------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """The state as clients are told it."""
        engine = self._engine
        return {
            "state": self.state,
            "reason": self.reason,
            "restarts": self.num_restarts,
            # While draining, those who have requests in the engine keep their connections.
            "engine": str(engine.socket_path) if engine is not None and engine.ready else None,
            "engine_pid": engine.pid if engine is not None else None,
        }

    def start(self) -> None:
        """Start the current model's engine: the first time, and again after a death."""
        if self._start_at is not None:
            self.num_restarts += 1
        self._start_at = None
        settings = {**self._settings, "model_checkpoint": self.current.source}
        try:
            self._engine = self._spawn(self.current, settings, None)
            self._engine.set_expendable(self._expendable)
        except OSError as error:
            self._start_again(f"The engine process cannot be started: {error.strerror}.", was_ready=False)
            return
        self._publish(self.state, self.reason)

    def next_at(self) -> float | None:
        """When ``tick`` has something to do even if nothing happens before (monotonic)."""
        times = [self._start_at, *(at for child in self._children() for at in (child.retire_at, child.kill_at))]
        return min((at for at in times if at is not None), default=None)

    def tick(self) -> None:
        """See who has ended, and do what is due."""
        for child in list(self._children()):
            if child.poll() is not None:
                self._on_death(child)
        now = time.monotonic()
        if self._start_at is not None and now >= self._start_at:
            self.start()
        for child in self._children():
            if child.retire_at is not None and now >= child.retire_at:
                child.retire_at = None
                child.kill_at = now + _LONGEST_REQUEST_S
                child.retire()
            elif child.kill_at is not None and now >= child.kill_at:
                child.kill_at = None
                if child is self._candidate:
                    child.kill(f"The model was not ready within {self._settings['reload_timeout_s']:g} s.")
                else:
                    logger.warning("The engine of %s did not drain in time and is killed.", child.entry.what)
                    child.kill()

    def on_readable(self, fd: int) -> None:
        """The engine behind this status pipe has reported, or hung up."""
        for child in list(self._children()):
            if child.status_fd == fd:
                self._read_status(child)

    def drain(self) -> None:
        """Let all engines finish what they have, then end."""
        if self.state == "draining":
            return
        self._start_at = None
        self._publish("draining", "The server is shutting down.")
        for child in self._children():
            if child is self._candidate:
                child.kill()
            else:
                child.retire_at = None
                child.kill_at = time.monotonic() + float(self._settings["drain_timeout_s"]) + _GRACE_S
                child.terminate()

    @property
    def is_busy(self) -> bool:
        """Whether a reload would be refused now."""
        return self._busy() is not None

    @property
    def all_ended(self) -> bool:
        return not any(self._children())

    def close(self) -> None:
        """End whatever still lives, at once."""
        for child in list(self._children()):
            child.kill()
            self._let_go(child)

    # -- changes of the model --------------------------------------------------------------------------------------

    def reload(self, checkpoint: str, who: str, loss_gate: dict[str, Any] | None, done: Done) -> None:
        """Load a checkpoint beside the one that is served, and serve it once it has passed its tests."""
        error = self._busy()
        if error is not None:
            done({"error": error_to_wire(error)})
            return
        self._load(self.history.add(checkpoint, who), checkpoint, loss_gate, done)

    def rollback(self, done: Done) -> None:
        """Serve the model before this one: at once when it stands by, else as soon as it is loaded again."""
        error = self._busy()
        if error is None and self.previous is None:
            error = ReloadConflict("There is no model to go back to: this one is the first.")
        if error is not None:
            done({"error": error_to_wire(error)})
            return
        former, standby = self.previous, self._standby
        assert former is not None
        if standby is None:
            self._wanted_digest = former.digest
            self._load(self.history.add(former.checkpoint, "rollback", former.model), former.source, None, done)
            return
        standby.entry = self.history.add(former.checkpoint, "rollback", former.model)
        former.set("retired")
        self._serve(standby)
        self._answer(done)

    def _busy(self) -> NanoGPTError | None:
        """Why the model cannot be changed now."""
        if self.state == "draining":
            return EngineDraining("The server is shutting down.")
        if self._candidate is not None:
            return ReloadConflict(
                f"Another model is being loaded: {self._candidate.entry.what}.",
                remedy="Wait until it is served or refused; GET /admin/models tells.",
            )
        return None

    def _load(self, entry: Entry, source: str, loss_gate: dict[str, Any] | None, done: Done) -> None:
        logger.info("%s is loaded beside the model that is served (%s).", source or "The embedded model", entry.who)
        self._done = done
        try:
            child = self._spawn(entry, {**self._settings, "model_checkpoint": source}, loss_gate)
        except OSError as error:
            self._fail(entry, ReloadFailed(f"The engine process cannot be started: {error.strerror}."))
            return
        child.set_expendable(True)
        child.kill_at = time.monotonic() + float(self._settings["reload_timeout_s"])
        self._candidate = child

    def _fail(self, entry: Entry, error: NanoGPTError) -> None:
        """The candidate was refused: whoever asked for it learns why, and nothing else happens."""
        entry.set("failed", str(error))
        level = logging.INFO if self.state == "draining" else logging.ERROR
        logger.log(level, "%s is not served; %s serves on. %s", entry.checkpoint, self.current.what, error)
        done, self._done = self._done, None
        self._candidate, self._wanted_digest = None, ""
        if done is not None:
            done({"error": error_to_wire(error)})

    def _on_candidate_ready(self, child: EngineChild) -> None:
        wanted = self._wanted_digest
        if wanted and child.entry.digest != wanted:
            child.error = error_to_wire(
                ReloadFailed(f"{child.entry.source} holds other weights by now than those that were served before.")
            )
            child.kill()
            return
        done, self._done = self._done, None
        self._candidate, self._wanted_digest = None, ""
        child.kill_at = None
        self._serve(child)
        if done is not None:
            self._answer(done)

    def _serve(self, child: EngineChild) -> None:
        """New requests go to this engine. The one before stands by, or ends, as does the one that stood by so far."""
        former, standby = self._engine, self._standby
        self._start_at, self._num_deaths, self._ready_since = None, 0, time.monotonic()
        if standby is not None and standby is not child:
            self._retire(standby)
        self._standby = None
        if self.current.digest:  # a model that never came up is none to go back to
            if self.previous is not None:
                self.previous.set("retired")
            self.previous = self.current
            self.previous.set("retired")
        else:
            self.current.set("failed", self.reason)
        self._engine, self.current = child, child.entry
        if former is not None:
            if former.ready and self._settings["standby"]:
                former.set_expendable(True)
                former.entry.set("standby")
                self._standby = former
            else:
                self._retire(former)
        child.set_expendable(self._expendable)
        child.entry.set("serving")
        logger.info("%s (weights %.12s) serves new requests now.", child.entry.what, child.entry.digest)
        self._publish("ready", "")

    def _retire(self, child: EngineChild) -> None:
        if child.ready:  # one that never came up has failed, and its entry says why
            child.entry.set("retired")
        child.retire_at = time.monotonic() + (_LINGER_S if child.ready else 0.0)
        self._ending.append(child)

    def _answer(self, done: Done) -> None:
        previous = self.previous.to_dict() if self.previous is not None else None
        done({"model": self.current.to_dict(), "card": self.current.model.get("card"), "previous": previous})

    # -- processes -------------------------------------------------------------------------------------------------

    def _children(self) -> Iterator[EngineChild]:
        for child in (self._engine, self._standby, self._candidate, *self._ending):
            if child is not None:
                yield child

    def _spawn(self, entry: Entry, settings: dict[str, Any], loss_gate: dict[str, Any] | None) -> EngineChild:
        """Raises: OSError."""
        self._num_started += 1
        # A socket of its own for each, so that two can live side by side.
        path = self._run_dir / f"{self._socket_name}-{self._num_started}.sock"
        child = EngineChild(self._engine_argv, settings, path, entry, loss_gate=loss_gate)
        self._selector.register(child.status_fd, selectors.EVENT_READ, self)
        logger.debug("The engine starts as process %d.", child.pid)
        return child

    def _read_status(self, child: EngineChild) -> None:
        had_hung_up = child.has_hung_up
        reports = child.read_status()
        if child.has_hung_up and not had_hung_up:
            self._selector.unregister(child.status_fd)
        for report in reports:
            if report["state"] == "ready":
                self._on_ready(child, report.get("model") or {})
            elif report["state"] == "loading" and child is self._engine and self.state == "loading":
                self._publish("loading", report["reason"])

    def _on_ready(self, child: EngineChild, model: dict[str, Any]) -> None:
        entry = child.entry
        if child is self._engine and entry.digest not in ("", model.get("digest", "")):
            logger.warning("%s has changed on the disk: the engine that was started again serves that.", entry.source)
        entry.model = model
        child.ready = True
        if self.state == "draining":
            return
        if child is self._candidate:
            self._on_candidate_ready(child)
        elif child is self._engine:
            self._ready_since = time.monotonic()
            entry.set("serving")
            self._publish("ready", "")

    def _on_death(self, child: EngineChild) -> None:
        self._read_status(child)
        self._let_go(child)
        if child is self._candidate:
            error = read_error(child.error) if child.error is not None else ReloadFailed(child.reason)
            if self.state == "draining":
                error = EngineDraining("The server is shutting down.")
            elif not 400 <= error.status < 500:  # what is a defect at a start is here a refusal
                error = ReloadFailed(str(error))
            self._fail(child.entry, error)
        elif child is self._engine:
            self._engine = None
            if self.state != "draining":
                self._start_again(child.reason, was_ready=child.ready)
        elif child is self._standby:
            self._standby = None
            child.entry.set("retired", child.reason)
            if self.state != "draining":
                logger.warning("The engine that stood by has ended: a rollback has to load its model. %s", child.reason)
        else:
            self._ending.remove(child)

    def _start_again(self, reason: str, *, was_ready: bool) -> None:
        """The current engine has ended: say so, and set the time of the next start."""
        now = time.monotonic()
        if self._ready_since is not None and now - self._ready_since >= STABLE_S:
            self._num_deaths = 0
        self._ready_since = None
        self._num_deaths += 1
        pause = pause_s(self._num_deaths, was_ready)
        self._start_at = now + pause
        self.current.set("loading", reason)
        logger.error("%s It is started again%s.", reason, f" in {pause:g} s" if pause else "")
        healthy = was_ready and self._num_deaths <= _TOLERATED_DEATHS
        self._publish("loading" if healthy else "unhealthy", reason)

    def _let_go(self, child: EngineChild) -> None:
        if not child.has_hung_up:
            self._selector.unregister(child.status_fd)
        child.has_hung_up = True
        child.close()

    def _publish(self, state: EngineState, reason: str) -> None:
        self.state, self.reason = state, reason
        self._changed()


def pause_s(num_deaths: int, was_ready: bool) -> float:
    """How long to wait before the next start, after so many deaths in a row: 0 1 2 4 … seconds.

    One that was never ready is not started at once: the same would happen again.
    """
    if num_deaths == 1 and was_ready:
        return 0.0
    return min(MAX_PAUSE_S, 2.0 ** (min(num_deaths, 10) - (2 if was_ready else 1)))
