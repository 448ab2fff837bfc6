"""The service process: what exists once for each worker in Dask, on an event loop.

Gets whole comm messages from the daemon, for ops that the daemon itself does not answer, and gives back the
reply's frames. Holds the plugins, with their ops and what they have for heartbeats; answers runners' calls.
Runs no tasks.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import pickle
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

import dask
import distributed.worker
from distributed.core import ConnectionPool, error_message
from distributed.diagnostics.plugin import _get_plugin_name
from distributed.protocol import dumps, loads
from tornado.ioloop import IOLoop

from . import calls, channel, plugins
from .channel import Channel, Closed, Descriptors, clean
from .nanny import Nanny
from .shuffle import NAME as SHUFFLE
from .shuffle import ServiceShuffle
from .worker import Worker

TARGETS: Final = ("Worker", "Nanny")
PLUGIN_MAX: Final = 200 * 2**20
"""Bytes of a plugin's pickle. Every runner gets it, in one message."""
# Ops of stock workers and nannies that are not supported yet. An op that nobody knows is answered with None,
# which callers of these would take for an answer.
NOT_YET: Final = frozenset(
    """profile profile_metadata
    benchmark_disk benchmark_memory benchmark_network""".split()
)

logger = logging.getLogger("distributed.core")


class Service:
    """Answers the daemon's requests, several at a time."""

    def __init__(self, data: Channel) -> None:
        self.data = data
        self.worker: Worker
        self.nanny: Nanny
        self.shuffle: ServiceShuffle
        self._requests: set[asyncio.Task[None]] = set()
        #: Sets up the plugins that were there before this process; whoever needs plugins waits for it.
        self._begun: asyncio.Task[None] | None = None
        self._held: tuple[bool, bool] | None = None
        self._closed: asyncio.Future[None]

    def serve(self) -> None:
        """Answers until the daemon closes the connection."""
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self.worker = Worker(self.data, IOLoop.current())
        self.worker.rpc = await ConnectionPool(timeout=dask.config.get("distributed.comm.timeouts.connect"))
        self.nanny = Nanny(self.worker)
        self.nanny.handlers.update(
            {
                "run": self._run_on_nanny,
                "plugin_add": self._nanny_plugin_add,
                "plugin_remove": self._nanny_plugin_remove,
            }
        )
        self.worker.handlers.update(
            {
                "run": self._run,
                "run_coroutine": self._run,
                "plugin-add": self._plugin_add,
                "plugin-remove": self._plugin_remove,
                "upload_file": self.worker.upload_file,
            }
        )
        self.shuffle = ServiceShuffle(self.worker)
        self.worker.install()
        self.data.do_not_wait()
        loop = asyncio.get_running_loop()
        self._closed = loop.create_future()
        loop.add_reader(self.data.fileno(), self._receive)
        await self._closed

    def _receive(self) -> None:
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
            if not self._closed.done():
                if isinstance(error, Closed):
                    self._closed.set_result(None)
                else:
                    self._closed.set_exception(error)

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._requests.add(task)  # type: ignore[arg-type]
        task.add_done_callback(self._requests.discard)

    def _handle(self, message: tuple[Any, ...], descriptors: Descriptors) -> None:
        tag = message[0]
        if tag == channel.CONFIGURE:
            self.worker.configure(message[1])
        elif tag == channel.REQUEST:
            _, request, target, frames = message
            self._spawn(self._request(request, target, open_frames(frames, descriptors)))
        elif tag == channel.CALL:
            _, request, body = message
            self._spawn(self._call(request, *calls.views(body, descriptors)))
        elif tag == channel.STREAM:
            self._spawn(self._stream(open_frames(message[1], descriptors)))
        elif tag == channel.TRANSITIONS:
            self._transitions(message[1])
        elif tag == channel.BEAT:
            self._spawn(self._beat(message[1]))
        elif tag == channel.PLUGINS:
            self._begun = asyncio.get_running_loop().create_task(self._begin(self._begun, *message[1:]))
        elif tag == channel.LEAVE:
            self._spawn(self._leave(nanny=message[1]))
        elif tag == channel.DESCRIBE:
            _, request, objects = message
            described = [describe(obj, descriptors) for obj in objects]
            self.data.send((channel.DESCRIBED, request, described))

    async def _request(self, request: int, target: int, frames: list[Any]) -> None:
        try:
            await self._plugged()
            serializers, result = await self._answer(target, frames)
            reply = dumps(result, serializers=serializers, context={"compression": None})
        except Exception as error:
            reply = dumps(error_message(error, status="uncaught-error"))
        self._tell_what_is_held()
        restart = None
        if TARGETS[target] == "Nanny":
            restart, self.nanny.restart_reason = self.nanny.restart_reason, None
        self._reply(request, reply, restart)

    def _reply(self, request: int, frames: list[Any], restart: str | None = None) -> None:
        (_, _, shared), fd = channel.share(b"", frames)
        fds = [] if fd is None else [fd]
        with Descriptors(fds):
            self.data.send((channel.REPLY, request, shared, restart), fds)

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
        handler = (self.worker, self.nanny)[target].handlers.get(op)
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

    def _run_on_nanny(self, comm: Any, **kwargs: Any) -> Any:
        return distributed.worker.run(self.nanny, comm, **kwargs)

    # plugins

    async def _plugged(self) -> None:
        if self._begun is not None:
            await self._begun

    async def _begin(
        self, before: asyncio.Task[None] | None, target: int, pickled: Iterable[tuple[str, bytes]]
    ) -> None:
        """Sets up plugins that others know already."""
        if before is not None:
            await before
        for name, plugin in pickled:
            try:
                if TARGETS[target] == "Nanny":
                    await self.nanny.plugin_add(plugin=plugin, name=name)
                    self._tell_what_changed()
                else:
                    await self._add_to_worker(plugin, name)
            except Exception:
                logger.exception("%s plugin %s cannot be set up", TARGETS[target], name)
        # a restart that they want was when they were new
        self.nanny.restart_reason = None
        self._tell_what_is_held()

    async def _add_to_worker(self, plugin: Any, name: str, catch_errors: bool = True) -> Any:
        answer = await self.worker.plugin_add(plugin=plugin, name=name, catch_errors=catch_errors)
        if name == SHUFFLE and answer["status"] == "OK":
            self.shuffle.begin(self.worker.plugins[name])
        return answer

    async def _plugin_add(self, plugin: bytes, name: str | None = None, catch_errors: bool = True) -> Any:
        name = checked(plugin, name)
        answer = await self._add_to_worker(plugin, name, catch_errors)
        if answer["status"] == "OK":
            self.data.send((channel.PLUGIN_ADDED, TARGETS.index("Worker"), name, plugin))
        self._tell_what_is_held()
        return answer

    async def _plugin_remove(self, name: str) -> Any:
        answer = await self.worker.plugin_remove(name=name)
        self.data.send((channel.PLUGIN_REMOVED, TARGETS.index("Worker"), name))
        self._tell_what_is_held()
        return answer

    async def _nanny_plugin_add(self, plugin: bytes, name: str | None = None) -> Any:
        name = checked(plugin, name)
        answer = await self.nanny.plugin_add(plugin=plugin, name=name)
        if answer["status"] == "OK":
            self.data.send((channel.PLUGIN_ADDED, TARGETS.index("Nanny"), name, plugin))
        self._tell_what_changed()
        return answer

    async def _nanny_plugin_remove(self, name: str) -> Any:
        answer = await self.nanny.plugin_remove(name=name)
        self.data.send((channel.PLUGIN_REMOVED, TARGETS.index("Nanny"), name))
        return answer

    def _tell_what_changed(self) -> None:
        changes = self.nanny.take_changes()
        if changes is not None:
            self.data.send((channel.ENVIRONMENT, *changes))
        self._tell_what_is_held()

    def _tell_what_is_held(self) -> None:
        watched = any(map(plugins.wants_transitions, self.worker.plugins.values()))
        held = watched, self.shuffle.holds_runs
        # without plugins there is nothing to tell
        if held != self._held and (self._held or self.worker.plugins):
            self._held = held
            self.data.send((channel.HOLDS, *held))

    def _transitions(self, transitions: Iterable[tuple[Any, str, str]]) -> None:
        watching = [item for item in self.worker.plugins.items() if plugins.wants_transitions(item[1])]
        for key, start, finish in transitions:
            for name, plugin in watching:
                try:
                    plugin.transition(key, start, finish)
                except Exception:
                    logger.info("Plugin '%s' failed with exception", name, exc_info=True)

    async def _stream(self, frames: list[Any]) -> None:
        """A message of a stream: it has no answer."""
        await self._plugged()
        op = None
        try:
            message = loads(frames)
            op = message.pop("op")
            result = self.worker.stream_handlers[op](**message)
            if inspect.isawaitable(result):
                await result
        except Exception:
            logger.exception("Exception while handling stream op %s", op)
        self._tell_what_is_held()

    async def _beat(self, request: int) -> None:
        extensions = {}
        for name, extension in self.worker.extensions.items():
            if hasattr(extension, "heartbeat"):
                try:
                    extensions[name] = extension.heartbeat()
                except Exception:
                    logger.exception("Extension %s failed at a heartbeat", name)
        digests = self.worker.digests_total_since_heartbeat
        told = [(name, float(value)) for name, value in digests.items()]
        digests.clear()
        try:
            frames = dumps({"extensions": extensions, "digests": told}, context={"compression": None})
        except Exception as error:
            logger.exception("What extensions have for the heartbeat cannot be sent")
            frames = dumps(error_message(error))
        self._reply(request, frames)
        self._tell_what_is_held()

    async def _call(self, request: int, header: bytes, buffers: list[Any]) -> None:
        await self._plugged()
        try:
            op, args = pickle.loads(header, buffers=buffers)
            body, fds = await self._calls[op](*args)
        except Exception as error:
            body, fds = calls.bundle(calls.failure(error))
        self._tell_what_is_held()
        with Descriptors(fds):
            self.data.send((channel.RETURN, request, body), fds)

    @property
    def _calls(self) -> dict[str, Callable[..., Awaitable[tuple[bytes, list[int]]]]]:
        return self.shuffle.calls

    async def _leave(self, *, nanny: bool) -> None:
        await self._plugged()
        for name in list(self.worker.plugins):
            await self.worker.plugin_remove(name)
        if nanny:
            for name in list(self.nanny.plugins):
                await self.nanny.plugin_remove(name)
        if not self._closed.done():
            self._closed.set_result(None)


def checked(plugin: bytes, name: str | None) -> str:
    """The name of a plugin that may be passed on to other processes."""
    if len(plugin) > PLUGIN_MAX:
        raise ValueError(f"a plugin of {len(plugin)} bytes is too large: at most {PLUGIN_MAX} are taken")
    return name or _get_plugin_name(pickle.loads(plugin))


def open_frames(frames: Iterable[Any], descriptors: Descriptors) -> list[Any]:
    return [f if type(f) is bytes else descriptors.view(*f) for f in frames]


def describe(obj: tuple[Any, ...], descriptors: Descriptors) -> tuple[int, bytes, str] | str:
    """Size and type of an object, or why it cannot be opened."""
    try:
        return channel.describe(channel.load(*obj, descriptors))
    except Exception as error:
        return clean(repr(error))
