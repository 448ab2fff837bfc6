"""What user code gets as "the nanny": what `NannyPlugin`s get, and `dask_worker` where nannies are asked.

The nanny is the daemon; this view of it lives in the service process, and ends with its worker.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import dask
import distributed.nanny
from tornado.ioloop import IOLoop

from .worker import Worker

Changes = tuple[list[tuple[str, str | None]], list[str]]


class Nanny:
    """The nanny as plugins see it."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.plugins: dict[str, Any] = {}
        self.handlers: dict[str, Callable[..., Any]] = {}
        configured = dask.config.get("distributed.nanny.environ", {})
        self.env = {name: str(value) for name, value in configured.items()}
        self._changes: Changes | None = None
        #: Why the worker is to be restarted, if it is.
        self.restart_reason: str | None = None

    @property
    def __class__(self) -> type:  # type: ignore[override]
        """For libraries that ask isinstance(nanny, distributed.Nanny)."""
        return distributed.nanny.Nanny

    @property
    def address(self) -> str:
        return self._worker.nanny_address

    @property
    def id(self) -> str:
        return self._worker.nanny_id

    @property
    def name(self) -> Any:
        return self._worker.name

    @property
    def worker_address(self) -> str:
        return self._worker.address

    @property
    def local_directory(self) -> str:
        """The folder of the workers' directories, which workers import from."""
        return os.path.dirname(self._worker.local_directory)

    @property
    def scheduler(self) -> Any:
        return self._worker.scheduler

    @property
    def scheduler_addr(self) -> str:
        return self._worker.scheduler.address

    @property
    def loop(self) -> IOLoop:
        return self._worker.loop

    io_loop = loop

    async def plugin_add(self, plugin: Any, name: str | None = None) -> Any:
        # what worker plugins do to this process is not for those to come
        environment, path = self._environment(), list(sys.path)
        answer = await distributed.nanny.Nanny.plugin_add(self, plugin=plugin, name=name)  # type: ignore[arg-type]
        now = self._environment()
        variables = [(name, now.get(name)) for name in {**environment, **now}]
        changed = [(name, value) for name, value in variables if environment.get(name) != value]
        added = [entry for entry in sys.path if entry not in path]
        if changed or added:
            self._changes = changed, added
        return answer

    async def plugin_remove(self, name: str) -> Any:
        return await distributed.nanny.Nanny.plugin_remove(self, name=name)  # type: ignore[arg-type]

    async def restart(self, timeout: float = 30, reason: str = "nanny-restart") -> str:
        """Has the daemon restart the worker once this request is answered: this process ends with it."""
        self.restart_reason = reason
        return "OK"

    def log_event(self, topic: Any, msg: Any) -> None:
        self._worker.log_event(topic, msg)

    def take_changes(self) -> Changes | None:
        """What the last plugin has made of environment and `sys.path`, for processes to come."""
        changes, self._changes = self._changes, None
        return changes

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **self.env}

    def __repr__(self) -> str:
        return f"<Nanny: {self.address!r}>"
