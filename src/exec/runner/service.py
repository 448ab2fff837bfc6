"""The service process: what exists once for each worker in Dask, on an event loop.

Gets whole comm messages from the daemon, for ops that the daemon itself does not answer, and gives back the
reply's frames. Runs no tasks.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from typing import Any, Final

import dask
import distributed.worker
from distributed.core import error_message
from distributed.protocol import dumps, loads
from tornado.ioloop import IOLoop

from . import channel
from .channel import Channel, Closed, Descriptors, clean
from .worker import Worker

TARGETS: Final = ("Worker", "Nanny")
# Ops of stock workers and nannies that are not supported yet. An op that nobody knows is answered with None,
# which callers of these would take for an answer.
NOT_YET: Final = frozenset(
    """plugin-add plugin-remove plugin_add plugin_remove upload_file profile profile_metadata
    actor_execute actor_attribute benchmark_disk benchmark_memory benchmark_network""".split()
)

logger = logging.getLogger("distributed.core")


class Service:
    """Answers the daemon's requests, several at a time."""

    def __init__(self, data: Channel) -> None:
        self.data = data
        self.worker: Worker
        self._requests: set[asyncio.Task[None]] = set()

    def serve(self) -> None:
        """Answers until the daemon closes the connection."""
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self.worker = Worker(self.data, IOLoop.current())
        self.worker.handlers.update(run=self._run, run_coroutine=self._run)
        self.worker.install()
        self.data.do_not_wait()
        loop = asyncio.get_running_loop()
        closed = loop.create_future()
        loop.add_reader(self.data.fileno(), self._receive, closed)
        await closed

    def _receive(self, closed: asyncio.Future[None]) -> None:
        try:
            while True:
                message, fds = self.data.receive()
                with Descriptors(fds) as descriptors:
                    self._handle(message, descriptors)
        except BlockingIOError:
            pass
        except Exception as error:
            # after anything but the regular end it is not known which descriptors belong to what follows
            asyncio.get_running_loop().remove_reader(self.data.fileno())
            if not closed.done():
                if isinstance(error, Closed):
                    closed.set_result(None)
                else:
                    closed.set_exception(error)

    def _handle(self, message: tuple[Any, ...], descriptors: Descriptors) -> None:
        tag = message[0]
        if tag == channel.CONFIGURE:
            self.worker.configure(message[1])
        elif tag == channel.REQUEST:
            _, request, target, frames = message
            opened = [f if type(f) is bytes else descriptors.view(*f) for f in frames]
            task = asyncio.get_running_loop().create_task(self._request(request, target, opened))
            self._requests.add(task)
            task.add_done_callback(self._requests.discard)
        elif tag == channel.DESCRIBE:
            _, request, objects = message
            described = [describe(obj, descriptors) for obj in objects]
            self.data.send((channel.DESCRIBED, request, described))

    async def _request(self, request: int, target: int, frames: list[Any]) -> None:
        try:
            serializers, result = await self._answer(target, frames)
            reply = dumps(result, serializers=serializers, context={"compression": None})
        except Exception as error:
            reply = dumps(error_message(error, status="uncaught-error"))
        self._reply(request, reply)

    def _reply(self, request: int, frames: list[Any]) -> None:
        (_, _, shared), fd = channel.share(b"", frames)
        fds = [] if fd is None else [fd]
        with Descriptors(fds):
            self.data.send((channel.REPLY, request, shared), fds)

    async def _answer(self, target: int, frames: list[Any]) -> tuple[Any, Any]:
        """Serializers and result, as `distributed.core.Server._handle_comm` finds them."""
        message = loads(frames)
        op = message.pop("op")
        serializers = message.pop("serializers", None)
        for field in ("close", "reply"):
            message.pop(field, None)
        name = TARGETS[target]
        if op in dask.config.get(f"distributed.{name.lower()}.blocked-handlers", []):
            raise ValueError(
                f"The '{op}' handler has been explicitly disallowed in {name}, "
                "possibly due to security concerns."
            )
        handler = self.worker.handlers.get(op)
        if handler is None and op in NOT_YET:
            raise NotImplementedError(f"this worker does not support {op!r} yet")
        if handler is None:
            # what any Dask server does: the caller gets None
            logger.warning("No handler %s found in %s", op, name)
            return serializers, None
        parameters = inspect.signature(handler).parameters
        if serializers is not None and "serializers" in parameters:
            message["serializers"] = serializers
        try:
            takes_comm = next(iter(parameters), None) == "comm"
            result = handler(None, **message) if takes_comm else handler(**message)
            if inspect.iscoroutine(result):
                result = await result
        except Exception as error:
            logger.exception("Exception while handling op %s", op)
            result = error_message(error, status="uncaught-error")
        return serializers, result

    def _run(self, comm: Any, function: bytes, args: Any = (), kwargs: Any = None, wait: bool = True) -> Any:
        return distributed.worker.run(
            self.worker, comm, function=function, args=args, kwargs=kwargs, wait=wait
        )


def describe(obj: tuple[Any, ...], descriptors: Descriptors) -> tuple[int, bytes, str] | str:
    """Size and type of an object, or why it cannot be opened."""
    try:
        return channel.describe(channel.load(*obj, descriptors))
    except Exception as error:
        return clean(repr(error))
