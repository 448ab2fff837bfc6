"""Calls from runners to the service process, and what travels with them: Python values, large buffers shared.

The daemon passes them on unopened. Knows no op.
"""

from __future__ import annotations

import itertools
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import msgpack
from distributed.core import clean_exception, error_message
from distributed.protocol import pickle as dask_pickle

from . import channel
from .channel import Channel, Descriptors

Use = Callable[[Any, Descriptors], Any]


def bundle(value: Any, fds: tuple[int, ...] = ()) -> tuple[bytes, list[int]]:
    """A value as bytes and descriptors; `fds` come first among them. The caller closes all."""
    buffers: list[Any] = []
    pickled = dask_pickle.dumps(value, buffer_callback=buffers.append)
    (_, header, placed), fd = channel.share(pickled, [buffer.raw() for buffer in buffers])
    if fd is None:
        return msgpack.packb((header, placed)), list(fds)
    placed = [f if type(f) is bytes else (len(fds), *f[1:]) for f in placed]
    return msgpack.packb((header, placed)), [*fds, fd]


def views(body: bytes, descriptors: Descriptors) -> tuple[bytes, list[Any]]:
    """A pickle and its buffers, which outlive the descriptors."""
    header, placed = channel.unpack(body)
    return header, [f if type(f) is bytes else descriptors.view(*f) for f in placed]


def unbundle(body: bytes, descriptors: Descriptors) -> Any:
    header, buffers = views(body, descriptors)
    return pickle.loads(header, buffers=buffers)


def failure(error: BaseException) -> tuple[bool, Any, Any]:
    """What a call that raised is answered with."""
    message = error_message(error)
    traceback = message["traceback"]
    return False, message["exception"].data, traceback and traceback.data


class Calls:
    """The calls of one runner; its threads wait for their answers."""

    def __init__(self, control: Channel) -> None:
        self._control = control
        self._numbers = itertools.count(1)
        self._waiting: dict[int, Future[tuple[Any, list[int]]]] = {}
        self._lock = threading.Lock()

    def __call__(self, op: str, *args: Any, use: Use | None = None) -> Any:
        """Has the service process do `op`. Raises what it raised there.

        `use` gets result and descriptors as long as these are open; then its result counts.
        """
        body, fds = bundle((op, args))
        future: Future[tuple[Any, list[int]]] = Future()
        with self._lock:
            number = next(self._numbers)
            self._waiting[number] = future
        with Descriptors(fds):
            self._control.send((channel.CALL, number, body), fds)
        try:
            answer, fds = future.result()
        except BaseException:
            with self._lock:
                self._waiting.pop(number, None)
            raise
        with Descriptors(fds) as descriptors:
            if isinstance(answer, str):
                raise RuntimeError(answer)
            done, result, *rest = unbundle(answer, descriptors)
            if done:
                return use(result, descriptors) if use else result
        _, error, traceback = clean_exception(exception=result, traceback=rest[0])
        assert error is not None
        raise error.with_traceback(traceback)

    def answered(self, number: int, answer: Any, fds: list[int]) -> None:
        """Takes the daemon's word on a call: what the service answered, or a text why it could not."""
        with self._lock:
            future = self._waiting.pop(number, None)
        if future is None:
            # the task was interrupted
            for fd in fds:
                os.close(fd)
        else:
            future.set_result((answer, fds))
