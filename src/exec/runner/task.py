"""A runner: takes a task, runs it, hands the result back; one at a time, on its main thread.

The binary compiles this file under a name that ends in distributed/worker.py, so that Dask cuts its frames
from users' tracebacks and profiles as it cuts those of its own worker.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import logging
import mmap
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from sys import getsizeof
from time import thread_time, time
from types import BuiltinFunctionType, FrameType, FunctionType
from typing import Any, Final

import dask
import distributed.profile
from dask._task_spec import Task
from dask.utils import typename
from distributed.core import error_message
from distributed.exceptions import Reschedule
from distributed.sizeof import safe_sizeof
from distributed.utils import thread_state

from . import channel, plugins
from .actors import Actors
from .calls import Calls
from .channel import Channel, Closed, Descriptors, clean
from .worker import Worker

RING: Final = 64
"""Words for revoked tasks in the mailbox, as in mailbox.rs."""
ROOM_OFFSET: Final = 4096
"""Where results are left in the mailbox, as in sys/words.rs."""
TYPES_MAX: Final = 1000
HELD_MAX: Final = 3
"""Reports that are kept for the next one."""

KEPT_MIN: Final = 1024 * 1024
"""Results from this size on, by sizeof, stay here until somebody else needs them."""

logger = logging.getLogger("distributed.worker")

_EXECUTORS = ("actor", "default", "offload")
# types for which Dask's sizeof is sys.getsizeof
_PLAIN_SIZE = frozenset({type(None), bool, int, float, complex, str})


class Interrupted(BaseException):
    """Raised in a task that was cancelled while it ran."""


class Runner:
    """The life of one runner process."""

    def __init__(self, data: Channel, control: Channel, mailbox: int) -> None:
        self.data = data
        self.control = control
        self.worker = Worker(data)
        self.worker.on_secede = self._on_secede
        self.worker.call = Calls(control)
        self.actors = Actors(self.worker, control)
        self.makes_actor = False
        self.worker.upload_file = functools.partial(plugins.upload_file, self.worker)  # type: ignore[method-assign]
        self.slot_threads = self.worker.slot.threads
        shared = memoryview(mmap.mmap(mailbox, ROOM_OFFSET + channel.ROOM))
        self.mailbox = shared[: 8 * (2 + RING)].cast("Q")
        self.room = channel.Room(shared[ROOM_OFFSET:], self.mailbox[1 + RING :])
        self.seq = 0
        self.key: Any = None
        self.in_task = False
        self.interrupted = 0
        self.held = 0
        self.types: dict[type, tuple[bytes, str]] = {}
        # results of tasks by their sequence numbers, with their sizes
        self.kept: dict[int, tuple[Any, int]] = {}
        self.kept_bytes = 0
        self.kept_bytes_max = 0
        self.main_thread = threading.get_ident()
        # unlike get_ident(), which forks of one process share, it tells runners apart
        self.thread = threading.get_native_id()
        self.control_thread = threading.Thread(target=self._control, name="iqoqo-control", daemon=True)

    def serve(self) -> None:
        """Runs tasks until the daemon closes the connection."""
        register_barrier()
        signal.signal(INTERRUPT_SIGNAL, self._on_interrupt)
        self.control_thread.start()
        self.worker.install()
        receive = self.data.receive
        while True:
            try:
                message, fds = receive()
                tag = message[0]
                if tag == channel.RUN:
                    self._run(message, fds)
                elif tag == channel.RUN_ACTOR:
                    self.makes_actor = True
                    self._run(message, fds)
                    self.makes_actor = False
                elif tag == channel.CONFIGURE:
                    self.worker.configure(message[1])
                elif tag == channel.PLUGINS:
                    plugins.set_up(self.worker, message[2])
                elif tag == channel.UNPLUG:
                    plugins.tear_down(self.worker, message[1])
                elif tag == channel.KEEP:
                    self.kept_bytes_max = message[1]
                elif tag == channel.EXIT:
                    for number in list(self.kept) if message[1] else ():
                        self._publish(number, self.data)
                        self._forget(number)
                    plugins.tear_down_all(self.worker)
                    return
                else:
                    raise RuntimeError(f"unknown message {tag!r} from the daemon")
            except Closed:
                return
            except BaseException:
                # the process ends: what it has done already is done
                self.data.hand_over()
                raise

    # one task

    def _run(self, message: tuple[Any, ...], fds: list[int]) -> None:
        _, seq, key, spec, buffers, inputs, annotations, brief = message
        mailbox = self.mailbox
        # first say that it starts, then look whether it was revoked: the daemon does it the other way round
        mailbox[0] = seq
        if mailbox[1 + seq % RING] == seq:
            for fd in fds:
                os.close(fd)
            self.data.send((channel.SKIPPED, seq))
            return
        self.seq = seq
        self.key = key
        if not self.slot_threads:
            self.worker.slot.enter()
        try:
            report = self._execute(key, spec, buffers, inputs, annotations, fds)
        except Interrupted:
            # it hit the few instructions around the task
            self.in_task = False
            self._forget(seq)
            report = channel.SKIPPED, []
        self.key = None
        flush()
        self._send(brief, seq, *report)

    def _send(self, brief: bool, seq: int, tag: int, objects: list[Any], *rest: Any) -> None:
        """Sends what became of a task; each object is (header, frames) or None."""
        fds: list[int] = []
        try:
            try:
                room = self.room if tag == channel.FINISHED else None
                shared = [o and self._share(o, fds, room) for o in objects]
            except BaseException as error:
                if tag == channel.FAILED:
                    raise
                for fd in fds:
                    os.close(fd)
                fds = []
                tag, objects, *rest = self._failure(error, None, None)
                shared = [o and self._share(o, fds, None) for o in objects]
            report = (tag, seq, *shared, *rest)
            if fds or not brief or self.held == HELD_MAX or not self.data.next_is_brief():
                self.data.send(report, fds)
                self.held = 0
            else:
                # the daemon wakes up once for several
                self.held = self.data.hold(report)
        finally:
            for fd in fds:
                os.close(fd)

    @staticmethod
    def _share(part: tuple[bytes, list[Any]], fds: list[int], room: channel.Room | None) -> channel.Object:
        header, frames = part
        if len(frames) == 1 and type(frames[0]) is bytes and len(frames[0]) < channel.SHARED_FRAME_MIN:
            return channel.SERIALIZED, header, frames
        shared, fd = channel.share(header, frames, room)
        if fd is None:
            return shared
        kind, header, frames = shared
        index = len(fds)
        fds.append(fd)
        return kind, header, [f if type(f) is bytes else (index, *f[1:]) for f in frames]

    def _execute(
        self, key: Any, spec: bytes, buffers: Any, inputs: Any, annotations: Any, fds: list[int]
    ) -> tuple[Any, ...]:
        """Everything between a task's message and its report."""
        span = None
        try:
            if fds or inputs or buffers:
                with Descriptors(fds) as descriptors:
                    out_of_band = [b if type(b) is bytes else descriptors.view(*b) for b in buffers]
                    task = pickle.loads(spec, buffers=out_of_band)
                    data = {
                        k: channel.load(*rest, descriptors) if rest[1:] else self.kept[rest[0]][0]
                        for k, *rest in inputs
                    }
            else:
                task = pickle.loads(spec)
                data = {}
            if annotations:
                span = self._annotate(annotations)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            logger.error("Exception during execution of task %r", key, exc_info=True)
            return self._failure(error, None, None)
        call = self._call_coroutine if is_coroutine(task) else self._call
        if span is None:
            return call(task, data)
        with span:
            return call(task, data)

    @staticmethod
    def _annotate(annotations: dict[str, Any]) -> contextlib.AbstractContextManager[Any] | None:
        executor = annotations.get("executor", "default")
        if executor not in _EXECUTORS:
            raise ValueError(f"Invalid executor {executor!r}; expected one of: {sorted(_EXECUTORS)}")
        if "span" in annotations:
            return dask.annotate(span=annotations["span"])
        return None

    def _call(self, task: Callable[[dict[Any, Any]], Any], data: dict[Any, Any]) -> tuple[Any, ...]:
        self.in_task = True
        cpu = thread_time()
        start = time()
        thread_state.start_time = start
        thread_state.key = self.key
        try:
            result = task(data)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self.in_task = False
            return self._failed(error, task, start)
        self.in_task = False
        stop = time()
        return self._success(result, start, stop, thread_time() - cpu)

    def _call_coroutine(self, task: Callable[[dict[Any, Any]], Any], data: dict[Any, Any]) -> tuple[Any, ...]:
        self.in_task = True
        report = self.worker.run(self._call_async(task, data))
        self.in_task = False
        if isinstance(report, BaseException):
            raise report
        return report

    async def _call_async(
        self, task: Callable[[dict[Any, Any]], Any], data: dict[Any, Any]
    ) -> tuple[Any, ...] | BaseException:
        cpu = thread_time()
        start = time()
        try:
            result = await task(data)
        except (SystemExit, KeyboardInterrupt) as error:
            # raised here it would end the loop, and the main thread would wait for ever
            return error
        except BaseException as error:
            return self._failed(error, task, start)
        stop = time()
        return self._success(result, start, stop, thread_time() - cpu)

    # reports: tag, objects, rest

    def _success(self, result: Any, start: float, stop: float, cpu: float) -> tuple[Any, ...]:
        kind = type(result)
        described = self.types.get(kind) or self._describe_type(kind)
        try:
            nbytes = getsizeof(result) if kind in _PLAIN_SIZE else max(0, int(safe_sizeof(result)))
            if self.makes_actor:
                dumped = self.actors.keep(self.key, result)
            elif nbytes >= KEPT_MIN and self.kept_bytes + nbytes <= self.kept_bytes_max:
                dumped = None
                self.kept[self.seq] = result, nbytes
                self.kept_bytes += nbytes
            else:
                dumped = channel.dump(result)
        except BaseException as error:
            if isinstance(error, (SystemExit, KeyboardInterrupt)):
                raise
            return self._failure(error, start, stop)
        return channel.FINISHED, [dumped], nbytes, *described, start, stop, self.thread, cpu

    def _describe_type(self, kind: type) -> tuple[bytes, str]:
        described = channel.describe_type(kind)
        if len(self.types) >= TYPES_MAX:
            self.types.clear()
        self.types[kind] = described
        return described

    def _failed(self, error: BaseException, task: Any, start: float) -> tuple[Any, ...]:
        stop = time()
        if isinstance(error, Reschedule):
            return channel.RESCHEDULE, []
        if isinstance(error, Interrupted) and self.interrupted == self.seq:
            return channel.SKIPPED, []
        return self._failure(error, start, stop, safe_repr(task)[:1000])

    def _failure(
        self, error: BaseException, start: float | None, stop: float | None, task: str = ""
    ) -> tuple[Any, ...]:
        message = error_message(error)
        traceback = message["traceback"]
        objects = [channel.dump(message["exception"].data), traceback and channel.dump(traceback.data)]
        texts = task, message["exception_text"], message["traceback_text"]
        return channel.FAILED, objects, *map(clean, texts), start, stop, self.thread

    # results that are kept; the control thread calls these, too

    def _publish(self, number: int, link: Channel) -> None:
        """Gives the daemon a result, as it is now."""
        kept = self.kept.get(number)
        if kept is None:
            return
        fds: list[int] = []
        try:
            shared = self._share(channel.dump(kept[0]), fds, None)
        except BaseException:
            # whatever a user's type raises: the control thread must live on
            logger.exception("A result could not be published")
            shared = None
        with Descriptors(fds):
            link.send((channel.PUBLISHED, number, shared), fds)

    def _forget(self, number: int) -> None:
        _, nbytes = self.kept.pop(number, (None, 0))
        self.kept_bytes -= nbytes

    # the control thread

    def _control(self) -> None:
        try:
            while True:
                message, fds = self.control.receive()
                if message[0] == channel.RETURN:
                    self.worker.call.answered(message[1], message[2], fds)
                elif message[0] == channel.REQUEST:
                    with Descriptors(fds) as descriptors:
                        self.actors.asked(message[1], message[3], descriptors)
                elif message[0] == channel.STACKS:
                    self.control.send((channel.STACKS, message[1], self._stacks()))
                elif message[0] == channel.HAND_OVER:
                    # a task that seemed brief is not
                    self.data.hand_over()
                elif message[0] == channel.PUBLISH:
                    self._publish(message[1], self.control)
                elif message[0] == channel.FORGET:
                    self._forget(message[1])
                elif message[0] == channel.INTERRUPT:
                    self.interrupted = message[1]
                    signal.pthread_kill(self.main_thread, INTERRUPT_SIGNAL)
        except Closed:
            pass
        except BaseException:
            logger.exception("A runner's control thread failed")
        finally:
            # the daemon is gone, or cannot reach this process any more: nobody is left to whom a result, or a
            # subprocess of the task, could matter
            os.killpg(os.getpgrp(), signal.SIGKILL)

    def _stacks(self) -> list[tuple[Any, list[str]]]:
        key = self.key
        frame = sys._current_frames().get(self.main_thread)
        if key is None or frame is None:
            return []
        return [(key, [clean(line) for line in distributed.profile.call_stack(frame)])]

    def _on_secede(self, key: Any, duration: float) -> None:
        if key == self.key:
            self.data.send((channel.SECEDED, self.seq, duration))

    def _on_interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self.in_task and self.interrupted == self.seq:
            raise Interrupted


INTERRUPT_SIGNAL = signal.SIGRTMIN + 6


def safe_repr(value: object) -> str:
    try:
        return repr(value)
    except Exception:
        return f"<{typename(type(value))}>"


def flush() -> None:
    """Hands over what a task printed, so that the daemon reads it before the task's result."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except Exception:
        # a task may have closed or replaced them: then it is not for us to say what is in them
        pass


def is_coroutine(task: Any) -> bool:
    """`task.is_coro`, at a fraction of its cost for ordinary functions."""
    if type(task) is Task:
        func = task.func
        kind = type(func)
        # a function without attributes is marked as a coroutine function by its flag alone
        if kind is BuiltinFunctionType or (
            kind is FunctionType and not func.__dict__ and not func.__code__.co_flags & inspect.CO_COROUTINE
        ):
            return False
    return getattr(task, "is_coro", False)


def register_barrier() -> None:
    """Lets the daemon's membarrier call order this process's memory accesses (see mailbox.rs)."""
    register_global_expedited = 1 << 2
    syscall_number = {"x86_64": 324, "aarch64": 283}.get(os.uname().machine)
    if syscall_number is not None:
        ctypes.CDLL(None).syscall(syscall_number, register_global_expedited, 0, 0)
