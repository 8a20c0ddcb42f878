"""Which models can be asked for: the one that everybody gets and, where the operator wants to compare, a second one.

The first has no name that has to be known (``default``). Who wants the second says so, by the name that it is listed
with or as ``compare``. Owned by the process, shared by its threads; knows no route.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from nanogpt.engine.client import EngineStatus
from nanogpt.errors import ModelNotFound, ServiceUnavailable
from nanogpt.web.engine import EngineHandle, ServedModel

DEFAULT = "default"
COMPARE = "compare"
# What the field ``model`` may say for the first one; OpenAI's clients insist on saying something.
_FIRST = frozenset({"", DEFAULT})
_DIGITS = 8


class Models:
    """``main`` and ``compare`` are ways to their engines; ``compare`` is None on a server that compares nothing."""

    def __init__(self, main: EngineHandle, compare: EngineHandle | None = None) -> None:
        self.main = main
        self.compare = compare

    def get(self, name: str = "") -> ServedModel:
        """The model of this name, as soon as its engine has it.

        Raises: ModelNotFound; ServiceUnavailable when the model, or the one that may have this name, does not come.
        """
        if name in _FIRST:
            return self.main.model()
        if self.compare is not None and name in self._compare_names(self.compare):
            return self._compared(self.compare)
        served = self.served()
        for model in served:
            if model.name == name:
                return model
        known = " and ".join(repr(model.name) for model in served)
        raise ModelNotFound(
            f"The model {name[:80]!r} does not exist.",
            field="model",
            remedy=f"This server serves {known}; leave the field out, or send default.",
        )

    def served(self) -> list[ServedModel]:
        """All that can be asked for now, the default first. One that is loading is waited for; without a first one
        there is no list. Raises: ServiceUnavailable."""
        models = [self.main.model()]
        if self.compare is not None:
            with suppress(ServiceUnavailable):
                models.append(self._compared(self.compare))
        return models

    def states(self) -> list[EngineStatus]:
        """How the engines are, without waiting, the default's first; each with the name that its model is listed
        with."""
        states = [self.main.state()]
        if self.compare is not None:
            status = self.compare.state()
            states.append(replace(status, model=status.model and self._listed(status.model, status.digest or "")))
        return states

    def _compared(self, handle: EngineHandle) -> ServedModel:
        model = handle.model()
        name = self._listed(model.name, model.digest)
        return model if name == model.name else replace(model, name=name)

    def _compare_names(self, handle: EngineHandle) -> set[str]:
        status = handle.state()
        names = {COMPARE}
        if status.model is not None:
            names.add(self._listed(status.model, status.digest or ""))
        return names - {self.main.state().model or ""}

    def _listed(self, name: str, digest: str) -> str:
        """The second model's name; with a part of its digest where the first one has, or owns, the same name.

        Two checkpoints of one run often have one: nanoGPT calls each of them ckpt.pt.
        """
        if name in _FIRST or name == self.main.state().model:
            return f"{name}@{digest[:_DIGITS]}"
        return name
