"""P2P shuffles. Dask's own plugin runs in the service process and owns the runs: buffers, files, receiving.

Runners shard input partitions and build output partitions, in parallel; shards go to the service process, and
from there to peers, as with any worker. Output is read from files that the service process opens for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import re
import shutil
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from distributed.diagnostics.plugin import WorkerPlugin
from distributed.metrics import context_meter, thread_time
from distributed.shuffle import ShuffleWorkerPlugin, _core
from distributed.shuffle._exceptions import DataUnavailable
from distributed.shuffle._memory import MemoryShardsBuffer

from .calls import Calls, bundle
from .channel import Descriptors

Answer = tuple[bytes, list[int]]

NAME: Final = "shuffle"
RUN_DIRECTORY: Final = re.compile("shuffle-[0-9a-f]{32}-[0-9]+")
RUNS_MAX: Final = 32
"""Runs of which a runner knows the layout at once."""


class ServiceShuffle:
    """The service process's part: what runners ask of the plugin there."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._specs: dict[tuple[str, int], Any] = {}
        self.calls: dict[str, Callable[..., Awaitable[Answer]]] = {
            "shuffle_run": self._run,
            "shuffle_write": self._write,
            "shuffle_barrier": self._barrier,
            "shuffle_read": self._read,
        }

    @property
    def plugin(self) -> ShuffleWorkerPlugin:
        try:
            return self._worker.plugins[NAME]
        except KeyError:
            raise RuntimeError(
                f"The worker {self._worker.address} does not have a P2P shuffle plugin."
            ) from None

    @property
    def holds_runs(self) -> bool:
        """Whether there are shards that would be lost with this process."""
        plugin = self._worker.plugins.get(NAME)
        return isinstance(plugin, ShuffleWorkerPlugin) and bool(plugin.shuffle_runs._runs)

    def begin(self, plugin: ShuffleWorkerPlugin) -> None:
        """Called when the plugin was set up: keeps what the scheduler says about each run."""
        # Run ids begin anew with the scheduler: what an earlier process left must not be appended to.
        for entry in os.scandir(self._worker.local_directory):
            if RUN_DIRECTORY.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
        runs = plugin.shuffle_runs
        fetch = runs._fetch

        async def noted(*args: Any, **kwargs: Any) -> Any:
            spec = await fetch(*args, **kwargs)
            active = {(run.id, run.run_id) for run in runs._runs}
            self._specs = {key: known for key, known in self._specs.items() if key in active}
            self._specs[spec.id, spec.run_id] = spec
            return spec

        runs._fetch = noted  # type: ignore[method-assign]

    def _layout(self, run: Any, known: list[int]) -> Any:
        return None if run.run_id in known else self._specs[run.id, run.run_id]

    async def _run(self, shuffle_id: Any, key: Any, known: list[int]) -> Answer:
        run = await self.plugin.shuffle_runs.get_or_create(shuffle_id, key)
        run.rpc = self._peer
        return bundle((True, (run.run_id, self._layout(run, known))))

    def _peer(self, address: str) -> Any:
        peer = self._worker.rpc(address)
        return Here(self.plugin, peer) if address == self._worker.address else peer

    async def _write(self, shuffle_id: Any, run_id: int, shards: Any, digests: Any) -> Answer:
        self._digest(digests)
        run = await self.plugin.shuffle_runs.get_with_run_id(shuffle_id, run_id)
        run.raise_if_closed()
        if run.transferred:
            raise RuntimeError(f"Cannot add more partitions to {run}")
        await run._write_to_comm({address: (i, inlined(shard)) for address, (i, shard) in shards.items()})
        return bundle((True, None))

    async def _barrier(self, shuffle_id: Any, run_ids: Any) -> Answer:
        return bundle((True, await self.plugin._barrier(shuffle_id, run_ids)))

    async def _read(
        self, shuffle_id: Any, run_id: int, partition_id: Any, key: Any, known: list[int], digests: Any
    ) -> Answer:
        """An output partition: an open file, or the shards themselves; None where there is nothing."""
        self._digest(digests)
        run = await self.plugin.shuffle_runs.get_with_run_id(shuffle_id, run_id)
        run.raise_if_closed()
        await run._ensure_output_worker(partition_id, key)
        if not run.transferred:
            raise RuntimeError("`get_output_partition` called before barrier task")
        await run.flush_receive()
        layout = self._layout(run, known)
        buffer = run._disk_buffer
        if isinstance(buffer, MemoryShardsBuffer):
            # what there is to deserialize is the runner's work
            buffer._deserialize = lambda shard: shard
            shards = None
            with contextlib.suppress(DataUnavailable):
                shards = run._read_from_disk(as_index(partition_id))
            return bundle((True, (layout, False, shards and [outlined(shard) for shard in shards])))
        buffer._read = opened
        try:
            fd = run._read_from_disk(as_index(partition_id)).fd
        except DataUnavailable:
            return bundle((True, (layout, True, None)))
        return bundle((True, (layout, True, 0)), (fd,))

    def _digest(self, digests: list[tuple[Hashable, float]]) -> None:
        for name, value in digests:
            self._worker.digest_metric(name, value)


class Here:
    """This worker as one of a shuffle's peers: what is for itself needs no connection."""

    def __init__(self, plugin: ShuffleWorkerPlugin, remote: Any) -> None:
        self._plugin = plugin
        self._remote = remote

    async def shuffle_receive(self, data: Any, shuffle_id: Any, run_id: int) -> Any:
        run = self._plugin.shuffle_runs._active_runs.get(shuffle_id)
        if run is None or isinstance(run._disk_buffer, MemoryShardsBuffer):
            # shards that stay in memory would hold all that came with them
            return await self._remote.shuffle_receive(data=data, shuffle_id=shuffle_id, run_id=run_id)
        answer = await self._plugin.shuffle_receive(shuffle_id=shuffle_id, run_id=run_id, data=data.data)
        return {field: getattr(value, "data", value) for field, value in answer.items()}


def opened(path: Path) -> tuple[Any, int]:
    """In place of a run's `read`: the file, which stays readable when the run ends, and its size."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    return SimpleNamespace(fd=fd), os.fstat(fd).st_size


def as_index(partition_id: Any) -> tuple[int, ...]:
    return partition_id if isinstance(partition_id, tuple) else (partition_id,)


def outlined(shard: Any) -> Any:
    """Bytes as a buffer that is not copied into a pickle."""
    return pickle.PickleBuffer(shard) if type(shard) is bytes else shard


def inlined(shard: Any) -> Any:
    """The bytes again. Dask's buffers tell shards of dataframes by their type."""
    return bytes(shard) if type(shard) is memoryview else shard


class Shards:
    """In place of a run's buffers in a runner, where the service process has the real ones."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._local = threading.local()

    @contextlib.contextmanager
    def holding(self, shards: Any) -> Any:
        """Lets `read` return these, in this thread."""
        self._local.shards = shards
        try:
            yield
        finally:
            del self._local.shards

    def read(self, id: str) -> Any:
        if not self._local.shards:
            raise DataUnavailable(id)
        return self._local.shards


class RunnerShuffle(WorkerPlugin):
    """The plugin that tasks find in a runner, with the methods that Dask's tasks call."""

    def setup(self, worker: Any) -> None:
        self.worker = worker
        self._call: Calls = worker.call
        self._lock = threading.Lock()
        self._runs: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._digests: list[tuple[Hashable, float]] = []
        # what `create_run_on_worker` takes from worker and plugin
        self._host = SimpleNamespace(
            worker=SimpleNamespace(
                address=worker.address,
                local_directory=worker.local_directory,
                rpc=None,
                scheduler=None,
                loop=None,
                digest_metric=lambda name, value: self._digests.append((name, value)),
            ),
            _executor=None,
            memory_limiter_disk=None,
            memory_limiter_comms=None,
        )
        # runs are made by Dask, with buffers that begin tasks on an event loop as soon as they are made
        for name in ("CommShardsBuffer", "DiskShardsBuffer", "MemoryShardsBuffer"):
            setattr(_core, name, Shards)

    def add_partition(self, data: Any, partition_id: Any, id: Any, **kwargs: Any) -> int:
        run_id, layout = self._call("shuffle_run", id, self.worker.get_current_task(), self._known(id))
        run = self._local_run(id, run_id, layout)
        run.validate_data(data)
        with (
            run._capture_metrics("foreground"),
            context_meter.meter("p2p-shard-partition-noncpu"),
            context_meter.meter("p2p-shard-partition-cpu", func=thread_time),
        ):
            shards = run._shard_partition(data, partition_id, **kwargs)
        shards = {address: (i, outlined(shard)) for address, (i, shard) in shards.items()}
        self._call("shuffle_write", id, run_id, shards, self._take_digests())
        return run_id

    def barrier(self, shuffle_id: Any, run_ids: Any) -> int:
        return self._call("shuffle_barrier", shuffle_id, run_ids)

    def get_output_partition(self, shuffle_id: Any, run_id: int, partition_id: Any, meta: Any = None) -> Any:
        key = self.worker.get_current_task()

        def build(answer: Any, descriptors: Descriptors) -> Any:
            layout, on_disk, found = answer
            run = self._local_run(shuffle_id, run_id, layout)
            if found is None:
                shards = None
            elif on_disk:
                shards, _ = run.read(descriptors.path(found))
            else:
                shards = [run.deserialize(shard) for shard in found]
            with (
                run._disk_buffer.holding(shards),
                run._capture_metrics("foreground"),
                context_meter.meter("p2p-get-output-noncpu"),
                context_meter.meter("p2p-get-output-cpu", func=thread_time),
            ):
                return run._get_output_partition(partition_id, key, meta=meta)

        known = self._known(shuffle_id)
        arguments = shuffle_id, run_id, partition_id, key, known, self._take_digests()
        return self._call("shuffle_read", *arguments, use=build)

    def _known(self, shuffle_id: Any) -> list[int]:
        with self._lock:
            return [run_id for id, run_id in self._runs if id == shuffle_id]

    def _local_run(self, shuffle_id: Any, run_id: int, layout: Any) -> Any:
        """A run that shards and builds, and holds nothing."""
        with self._lock:
            if layout is not None:
                # Dask makes runs in a coroutine, and asks for its loop
                self._runs[shuffle_id, run_id] = asyncio.run(self._make(layout))
                while len(self._runs) > RUNS_MAX:
                    self._runs.popitem(last=False)
            self._runs.move_to_end((shuffle_id, run_id))
            return self._runs[shuffle_id, run_id]

    async def _make(self, layout: Any) -> Any:
        return layout.spec.create_run_on_worker(
            run_id=layout.run_id, span_id=layout.span_id, worker_for=layout.worker_for, plugin=self._host
        )

    def _take_digests(self) -> list[tuple[Hashable, float]]:
        taken, self._digests = self._digests, []
        return taken
