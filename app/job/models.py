"""The models that a worker serves: which there are, and each as soon as it is loaded.

Filled by whoever boots, read by jobs; a job waits only for the model that it needs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from app.errors import SeedpodError, UnavailableError, UsageError
from app.job.autoencode_request import AutoencodeRequest, weights_of

if TYPE_CHECKING:
    from app.chain import Loaded
    from app.job.payload import Payload

POLL = 0.2  # seconds between two looks of a job that waits


def choose(tasks: Mapping[str, str], task: str, name: str | None) -> str:
    """Of the models that are served, with what each does, the one named, or the only one of the task.

    Raises:
        UsageError: `model_not_served`.
    """
    able = [known for known, does in tasks.items() if does == task]
    if name is None and len(able) == 1:
        return able[0]
    if name is None or name not in able:
        asked = "no model was named" if name is None else f"model is {name[:80]!r}"
        served = f"serves {', '.join(able)} for {task}: name one of them"
        if not able:
            others = ", ".join(dict.fromkeys(tasks.values()))
            served = f"serves no model that does {task}, but {others}: ask another worker"
        raise UsageError("model_not_served", f"{asked}; this worker {served}.")
    return name


def check_served(tasks: Mapping[str, str], payload: Payload) -> None:
    """Refuse a job that needs a model which is not among those that are served.

    Raises:
        UsageError: `model_not_served`.
    """
    choose(tasks, payload.task, payload.model)
    if isinstance(payload, AutoencodeRequest):
        for name in weights_of(payload):
            choose(tasks, payload.task, name)


class Models:
    """Models by name, of which some may still be loading; `tasks` says what each will do."""

    def __init__(self, tasks: Mapping[str, str]) -> None:
        self.tasks = tasks
        self._loaded: dict[str, Loaded] = {}
        self._error: SeedpodError | None = None
        self._changed = threading.Condition()

    @classmethod
    def of(cls, *loaded: Loaded) -> Models:
        """Models that are all loaded."""
        models = cls({model.name: model.task for model in loaded})
        for model in loaded:
            models.add(model)
        return models

    def add(self, loaded: Loaded) -> None:
        """One more is ready."""
        with self._changed:
            self._loaded[loaded.name] = loaded
            self._changed.notify_all()

    def fail(self, error: SeedpodError) -> None:
        """No more will come, and why."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def choose(self, task: str, name: str | None) -> str:
        """As the function of this name."""
        return choose(self.tasks, task, name)

    def wait(self, name: str, check: Callable[[], None] = lambda: None) -> Loaded:
        """The model, once it is loaded; `check` is called meanwhile and may raise.

        Raises:
            UnavailableError: `boot_failed`.
        """
        while True:
            with self._changed:
                if name not in self._loaded and self._error is None:
                    self._changed.wait(POLL)
                if name in self._loaded:
                    return self._loaded[name]
                if self._error is not None:
                    raise UnavailableError("boot_failed", self._error.message)
            check()
