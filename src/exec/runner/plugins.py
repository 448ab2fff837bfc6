"""Worker plugins in a runner: each one is set up in every runner, after it was set up in the service process.

What is worker-wide is done there once. Runs between tasks, on the runner's main thread.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import pickle
from collections.abc import Awaitable, Iterable
from typing import Any

from distributed.diagnostics.plugin import WorkerPlugin
from distributed.shuffle import ShuffleWorkerPlugin
from distributed.utils import import_file

from .shuffle import RunnerShuffle
from .worker import Worker

logger = logging.getLogger("distributed.worker")


def set_up(worker: Worker, plugins: Iterable[tuple[str, bytes]]) -> None:
    """Sets plugins up. That one fails is logged only: it did not where its failure is reported."""
    for name, pickled in plugins:
        if name in worker.plugins:
            tear_down(worker, name)
        try:
            plugin = pickle.loads(pickled)
            if isinstance(plugin, ShuffleWorkerPlugin):
                plugin = RunnerShuffle()
            worker.plugins[name] = plugin
            if type(plugin).__name__ == "_InstallWorkerPlugin":
                # the service process has installed it for all
                importlib.invalidate_caches()
            elif hasattr(plugin, "setup"):
                finish(worker, plugin.setup(worker=worker))
        except Exception:
            logger.exception("Worker plugin %s failed to setup", name)


def tear_down(worker: Worker, name: str) -> None:
    plugin = worker.plugins.pop(name, None)
    if hasattr(plugin, "teardown"):
        try:
            finish(worker, plugin.teardown(worker=worker))
        except Exception:
            logger.exception("Worker plugin %s failed to teardown", name)


def tear_down_all(worker: Worker) -> None:
    for name in list(worker.plugins):
        tear_down(worker, name)


def finish(worker: Worker, result: Any) -> None:
    if inspect.isawaitable(result):
        worker.run(_wait(result))


async def _wait(awaitable: Awaitable[Any]) -> None:
    await awaitable


async def upload_file(worker: Worker, filename: str, data: str | bytes, load: bool = True) -> dict[str, Any]:
    """`Worker.upload_file` in a runner: the file is there, written in the service process."""
    if load:
        import_file(os.path.join(worker.local_directory, filename))
    return {"status": "OK", "nbytes": len(data)}


def wants_transitions(plugin: Any) -> bool:
    """Whether a plugin does anything when a task changes its state."""
    hook = getattr(plugin, "transition", None)
    return hook is not None and getattr(hook, "__func__", None) is not WorkerPlugin.transition
