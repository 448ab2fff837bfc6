"""What user code gets as "the worker": `get_worker()` in tasks, `dask_worker` in functions of `Client.run`.

A view of the worker that the daemon is, with the attributes that programs, and Dask's own client, use. It
holds no tasks and no data.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections import defaultdict
from collections.abc import Callable, Coroutine, Hashable
from typing import Any

import dask
import distributed.worker
from dask.utils import parse_timedelta
from distributed import threadpoolexecutor
from distributed.core import Status, rpc
from distributed.protocol import dumps
from distributed.utils import in_async_call, thread_state
from distributed.worker_state_machine import SecedeEvent
from tornado.ioloop import IOLoop

from . import channel
from .channel import Channel


class Scheduler:
    """The scheduler: its address, and its ops as methods to be awaited."""

    def __init__(self) -> None:
        self.address = ""
        self._rpc: Any = None

    def __getattr__(self, op: str) -> Any:
        if op.startswith("_"):
            raise AttributeError(op)
        if self._rpc is None or self._rpc.address != self.address:
            self._rpc = rpc(self.address)
        return getattr(self._rpc, op)

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


class Slot:
    """What `distributed.secede` and `rejoin` need of the thread pool that a task runs in."""

    def __init__(self) -> None:
        self._threads = self.threads = {threading.current_thread()}
        self._rejoin_list: list[tuple[threading.Thread, threading.Event]] = []
        self._rejoin_lock = threading.Lock()

    def enter(self) -> None:
        """A task begins: it has not seceded."""
        self._threads.add(threading.current_thread())

    def _adjust_thread_count(self) -> None:
        """The daemon finds another runner for the slot."""

    def submit(self, _: Callable[[], None]) -> None:
        while self._rejoin_list:
            _, event = self._rejoin_list.pop()
            event.set()


class State:
    """The part of `distributed.Worker.state` that programs read in tasks."""

    def __init__(self) -> None:
        self.nthreads = 1
        #: In the runner of an actor: the actor.
        self.actors: dict[Any, Any] = {}


_FIELDS = (
    "address",
    "name",
    "id",
    "nthreads",
    "local_directory",
    "memory_limit",
    "nanny_address",
    "nanny_id",
)


class Worker:
    """The worker as user code sees it."""

    def __init__(self, data: Channel, loop: IOLoop | None = None) -> None:
        self._channel = data
        self._loop = loop
        self._lock = threading.Lock()
        self._client: Any = None
        self._ongoing_background_tasks = BackgroundTasks()
        self.on_secede: Callable[[Any, float], None] = lambda key, duration: None
        self.slot = Slot()
        self.address = ""
        self.name: Any = None
        self.id = ""
        self.nthreads = 1
        self.state = State()
        self.local_directory = ""
        self.memory_limit: int | None = None
        self.scheduler = Scheduler()
        # results live in the daemon: nothing is found here, and Dask's client then asks the daemon
        self.data: dict[Any, Any] = {}
        self.status = Status.running
        self.nanny_address = ""
        self.nanny_id = ""
        self.plugins: dict[str, Any] = {}
        # what plugins put here counts in the service process, which has the worker's address
        self.handlers: dict[str, Callable[..., Any]] = {}
        self.stream_handlers: dict[str, Callable[..., Any]] = {}
        self.extensions: dict[str, Any] = {}
        self.digests_total_since_heartbeat: defaultdict[Hashable, float] = defaultdict(float)
        #: Other servers by address, with their ops as methods to be awaited on the loop.
        self.rpc: Callable[[str], Any] = functools.cache(rpc)
        #: In a runner: calls of the service process.
        self.call: Any = None

    def configure(self, info: dict[str, Any]) -> None:
        """Takes over what the daemon says about itself."""
        for field in _FIELDS:
            if field in info:
                setattr(self, field, info[field])
        self.state.nthreads = self.nthreads
        self.scheduler.address = info.get("scheduler_address", self.scheduler.address)

    @property
    def __class__(self) -> type:  # type: ignore[override]
        """For libraries that ask isinstance(get_worker(), distributed.Worker)."""
        return distributed.Worker

    def install(self) -> None:
        """Makes `get_worker()` find this worker in the current thread."""
        distributed.worker._worker_cvar.set(self)  # type: ignore[arg-type]
        thread_state.execution_state = {"scheduler": self.scheduler.address, "worker": self}
        # secede() and rejoin() keep a thread's pool here
        threadpoolexecutor.thread_state.executor = self.slot
        threadpoolexecutor.thread_state.proceed = True

    @property
    def loop(self) -> IOLoop:
        """The event loop for coroutines and clients; a runner's has a thread, from its first use on."""
        with self._lock:
            if self._loop is None:
                ready = threading.Event()
                threading.Thread(target=self._run_loop, args=(ready,), name="iqoqo-loop", daemon=True).start()
                ready.wait()
            assert self._loop is not None
            return self._loop

    io_loop = loop

    def _run_loop(self, ready: threading.Event) -> None:
        async def run() -> None:
            self._loop = IOLoop.current()
            ready.set()
            await asyncio.Event().wait()

        asyncio.run(run())

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Runs a coroutine on the loop, and waits for it."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop.asyncio_loop)  # type: ignore[attr-defined]
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    @property
    def client(self) -> Any:
        """The client of `get_client()`."""
        return self._client or self._get_client()

    def _get_client(self, timeout: float | None = None) -> Any:
        """As `distributed.Worker._get_client`: one client of the scheduler, made when first needed."""
        from distributed.client import Client, default_client

        timeout = parse_timedelta(timeout or dask.config.get("distributed.comm.timeouts.connect"), "s")
        try:
            client = default_client()
        except ValueError:
            pass
        else:
            if client.scheduler and client.scheduler.address == self.scheduler.address:
                self._client = client
        if not self._client:
            self._client = Client(
                self.scheduler.address,
                loop=self.loop,
                set_as_default=True,
                asynchronous=in_async_call(self.loop),
                direct_to_workers=True,
                name="worker",
                timeout=timeout,
            )
        self.log_event("worker-get-client", {"client": self._client.id, "timeout": timeout})
        return self._client

    def handle_stimulus(self, *events: Any) -> None:
        """The one event of the worker's state machine that user code sends."""
        for event in events:
            if isinstance(event, SecedeEvent):
                self.on_secede(event.key, event.compute_duration)

    def update_data(self, data: dict[Any, Any]) -> dict[str, Any]:
        """Stores data on this worker: what `Client.scatter` does in a task."""
        described = {key: channel.describe(value) for key, value in data.items()}
        for key, value in data.items():
            shared, fd = channel.share(*channel.dump(value))
            with channel.Descriptors([] if fd is None else [fd]):
                fds = () if fd is None else (fd,)
                self._channel.send((channel.SCATTERED, key, shared, *described[key]), fds)
        return {"nbytes": {key: nbytes for key, (nbytes, *_) in described.items()}, "status": "OK"}

    @property
    def worker_address(self) -> str:
        return self.address

    @property
    def ip(self) -> str:
        return self.address.rpartition("://")[2].rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    contact_address = worker_address
    address_safe = worker_address

    @property
    def nanny(self) -> str | None:
        """The nanny's address."""
        return self.nanny_address or None

    def get_current_task(self) -> Any:
        """The key of the task that runs in this thread."""
        return thread_state.key

    # what plugins and their users call, as it is in Dask

    async def plugin_add(self, plugin: Any, name: str | None = None, catch_errors: bool = True) -> Any:
        return await distributed.Worker.plugin_add(  # type: ignore[arg-type]
            self, plugin=plugin, name=name, catch_errors=catch_errors
        )

    async def plugin_remove(self, name: str) -> Any:
        return await distributed.Worker.plugin_remove(self, name=name)  # type: ignore[arg-type]

    async def upload_file(self, filename: str, data: str | bytes, load: bool = True) -> dict[str, Any]:
        return await distributed.Worker.upload_file(  # type: ignore[arg-type]
            self, filename=filename, data=data, load=load
        )

    def digest_metric(self, name: Hashable, value: float) -> None:
        """Adds to what the next heartbeat tells."""
        self.digests_total_since_heartbeat[name] += value

    def log_event(self, topic: Any, msg: Any) -> None:
        """Logs an event on the scheduler, as `distributed.Worker.log_event`."""
        self._send_to_scheduler({"op": "log-event", "topic": topic, "msg": msg})

    def _send_to_scheduler(self, message: dict[str, Any]) -> None:
        frames = dumps(message, context={"compression": None})
        self._channel.send((channel.EVENT, [bytes(frame) for frame in frames]))

    def __repr__(self) -> str:
        return f"<Worker {self.address!r}, name: {self.name}, threads: {self.nthreads}>"
