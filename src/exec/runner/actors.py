"""An actor in the runner that made it: its methods run here, in a thread of their own, while no task does.

Calls come by the control connection, whoever makes them: other runners are no nearer than other hosts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from time import time
from typing import Any

import distributed.worker
from dask.utils import key_split
from distributed.actor import Actor
from distributed.protocol import dumps, loads, to_serialize
from distributed.utils import iscoroutinefunction, set_thread_state

from . import channel
from .channel import Channel, Descriptors
from .worker import Worker


class Handle:
    """Pickles as the handle of an actor. Dask's own asks for a client as soon as it is made."""

    def __init__(self, kind: type, address: str, key: Any) -> None:
        self._arguments = kind, address, key

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return Actor, self._arguments


class Actors:
    """The actors of a runner: one, unless it was made again."""

    def __init__(self, worker: Worker, control: Channel) -> None:
        self._worker = worker
        self._control = control
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="Dask-Actor-Threads")

    def keep(self, key: Any, value: object) -> tuple[bytes, list[Any]]:
        """Keeps an actor; what others get instead of it."""
        dumped = channel.dump(Handle(type(value), self._worker.address, key))
        self._worker.state.actors[key] = value
        return dumped

    def asked(self, request: int, frames: Iterable[Any], descriptors: Descriptors) -> None:
        """A request of the daemon's, in the control thread."""
        opened = [f if type(f) is bytes else descriptors.view(*f) for f in frames]
        loop = self._worker.loop.asyncio_loop  # type: ignore[attr-defined]
        asyncio.run_coroutine_threadsafe(self._answer(request, opened), loop)

    async def _answer(self, request: int, frames: list[Any]) -> None:
        try:
            message = loads(frames)
            op = message.pop("op")
            for field in ("close", "reply", "serializers"):
                message.pop(field, None)
            if op == "actor_execute":
                result = await self._execute(**message)
            else:
                result = getattr(self._worker.state.actors[message["actor"]], message["attribute"])
            reply = dumps({"status": "OK", "result": to_serialize(result)}, context={"compression": None})
        except Exception as error:
            reply = dumps({"status": "error", "exception": to_serialize(error)})
        (_, _, shared), fd = channel.share(b"", reply)
        fds = [] if fd is None else [fd]
        with Descriptors(fds):
            self._control.send((channel.REPLY, request, shared, None), fds)

    async def _execute(
        self, actor: Any, function: str, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """As `distributed.Worker.actor_execute`."""
        kwargs = dict(kwargs or {})
        separate_thread = kwargs.pop("separate_thread", True)
        method = getattr(self._worker.state.actors[actor], function)
        if separate_thread and not iscoroutinefunction(method):
            name = f"{key_split(actor)}.{function}"
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._executor, self._run, name, method, args, kwargs)
        token = distributed.worker._worker_cvar.set(self._worker)  # type: ignore[arg-type]
        try:
            result = method(*args, **kwargs)
            return await result if iscoroutinefunction(method) else result
        finally:
            distributed.worker._worker_cvar.reset(token)

    def _run(self, name: str, method: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """A method, in the actors' thread."""
        # not as an actor: other actors of this worker are in other runners
        state = {"scheduler": self._worker.scheduler.address, "worker": self._worker}
        with set_thread_state(start_time=time(), execution_state=state, key=name):
            token = distributed.worker._worker_cvar.set(self._worker)  # type: ignore[arg-type]
            try:
                return method(*args, **kwargs)
            finally:
                distributed.worker._worker_cvar.reset(token)
