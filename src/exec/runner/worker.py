"""What user code gets as "the worker": `get_worker()` in tasks, `dask_worker` in functions of `Client.run`.

A view of the worker that the daemon is, with the attributes that programs use. It holds no tasks and no data.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import distributed.worker
from distributed.protocol import dumps
from distributed.utils import thread_state

from . import channel
from .channel import Channel


class Scheduler:
    """The scheduler, by address."""

    def __init__(self, address: str) -> None:
        self.address = address

    def __repr__(self) -> str:
        return f"<Scheduler: {self.address!r}>"


class BackgroundTasks:
    """Coroutines that run on after their request was answered."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def call_soon(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
        task = asyncio.get_running_loop().create_task(function(*args, **kwargs))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class Worker:
    """The worker as user code sees it."""

    def __init__(self, data: Channel) -> None:
        self._channel = data
        self._ongoing_background_tasks = BackgroundTasks()
        self.address = ""
        self.name: Any = None
        self.id = ""
        self.nthreads = 1
        self.local_directory = ""
        self.memory_limit: int | None = None
        self.scheduler = Scheduler("")
        self.plugins: dict[str, Any] = {}
        self.handlers: dict[str, Callable[..., Any]] = {}

    def configure(self, info: dict[str, Any]) -> None:
        """Takes over what the daemon says about itself."""
        for field in ("address", "name", "id", "nthreads", "local_directory", "memory_limit"):
            if field in info:
                setattr(self, field, info[field])
        self.scheduler.address = info.get("scheduler_address", self.scheduler.address)

    def install(self) -> None:
        """Makes `get_worker()` find this worker in the current thread."""
        distributed.worker._worker_cvar.set(self)  # type: ignore[arg-type]
        thread_state.execution_state = {"scheduler": self.scheduler.address, "worker": self}

    @property
    def worker_address(self) -> str:
        return self.address

    @property
    def ip(self) -> str:
        return self.address.rpartition("://")[2].rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def get_current_task(self) -> Any:
        """The key of the task that runs in this thread."""
        return thread_state.key

    def log_event(self, topic: Any, msg: Any) -> None:
        """Logs an event on the scheduler, as `distributed.Worker.log_event`."""
        self._send_to_scheduler({"op": "log-event", "topic": topic, "msg": msg})

    def _get_client(self, timeout: float | None = None) -> Any:
        raise NotImplementedError("this worker does not support clients inside tasks yet")

    def _send_to_scheduler(self, message: dict[str, Any]) -> None:
        frames = dumps(message, context={"compression": None})
        self._channel.send((channel.EVENT, [bytes(frame) for frame in frames]))

    def __repr__(self) -> str:
        return f"<Worker {self.address!r}, name: {self.name}, threads: {self.nthreads}>"
