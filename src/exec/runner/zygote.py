"""The zygote: imports Dask once, then only forks runners and the service process, and reports their ends.

It has a single thread and holds nothing of any task. Everything under it dies with the daemon.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any, Final, NoReturn

import dask.multiprocessing
import distributed

from . import channel
from .channel import Channel, Closed, clean
from .service import Service
from .task import Runner, flush

RUNNER: Final = 0
SERVICE: Final = 1

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15
_PR_SET_CHILD_SUBREAPER: Final = 36

_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: Any) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class Zygote:
    """Forks on the daemon's word; knows its children by pid."""

    def __init__(self, control: Channel) -> None:
        self.control = control
        self.children: dict[int, int] = {}
        self.wake_read, self.wake_write = socket.socketpair()
        self.wake_read.setblocking(False)
        self.wake_write.setblocking(False)
        self.stopping = False

    def serve(self) -> None:
        """Forks and reaps until the daemon goes away, then ends everything that is left."""
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._on_term)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.set_wakeup_fd(self.wake_write.fileno(), warn_on_full_buffer=False)
        # SIGTERM instead of the stub's SIGKILL: time to end grandchildren, whom the kernel signals nothing
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        prctl(_PR_SET_CHILD_SUBREAPER, 1)
        prctl(_PR_SET_NAME, b"iqoqo-zygote")
        gc.collect()
        gc.freeze()
        versions = ".".join(map(str, sys.version_info[:3])), distributed.__version__
        self.control.send((channel.READY, os.getpid(), *versions))
        try:
            self._loop()
        except Closed:
            pass
        finally:
            self._end_all()

    def _loop(self) -> None:
        poll = select.poll()
        poll.register(self.control.fileno(), select.POLLIN)
        poll.register(self.wake_read.fileno(), select.POLLIN)
        self.control.do_not_wait()
        while not self.stopping:
            poll.poll()
            with contextlib.suppress(BlockingIOError):
                while self.wake_read.recv(4096):
                    pass
            self._reap()
            with contextlib.suppress(BlockingIOError):
                while not self.stopping:
                    message, fds = self.control.receive()
                    if message[0] == channel.FORK:
                        self._fork(message[1], message[2], fds)

    def _on_term(self, *_: object) -> None:
        self.stopping = True

    def _fork(self, child: int, role: int, fds: list[int]) -> None:
        threads = os.listdir("/proc/self/task")
        if len(threads) != 1:
            for fd in fds:
                os.close(fd)
            text = f"the zygote has {len(threads)} threads: a fork would not be safe"
            self.control.send((channel.FORK_FAILED, child, text))
            return
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            for fd in fds:
                os.close(fd)
            self.control.send((channel.FORK_FAILED, child, f"fork failed: {error}"))
            return
        if pid == 0:
            self._become(parent, role, fds)
        self.children[pid] = child
        for fd in fds:
            os.close(fd)
        pidfd = os.pidfd_open(pid)
        try:
            self.control.send((channel.FORKED, child, pid), (pidfd,))
        finally:
            os.close(pidfd)

    def _become(self, parent: int, role: int, fds: list[int]) -> NoReturn:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.control.close()
        self.wake_read.close()
        self.wake_write.close()
        *own, out, err = fds

        def serve() -> None:
            if role == RUNNER:
                data, control, mailbox = own
                runner = Runner(Channel(data), Channel(control), mailbox)
                os.close(mailbox)
                runner.serve()
            else:
                (data,) = own
                Service(Channel(data)).serve()

        run_to_end("iqoqo-runner" if role == RUNNER else "iqoqo-service", parent, out, err, serve)

    def _reap(self) -> None:
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            pid = ended.si_pid
            child = self.children.pop(pid, None)
            if child is not None:
                # before its number is free for others: what it left behind goes with it
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
            if child is not None:
                code = os.waitstatus_to_exitcode(status)
                self.control.send((channel.EXITED, child, code, usage.ru_maxrss * 1024))

    def _end_all(self) -> None:
        """Kills every process under this one. Orphans come here to be killed too: it is their reaper."""
        for pid in self.children:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        while True:
            for pid in child_pids():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                return


def child_pids() -> list[int]:
    """This process's children; none on a kernel that does not list them."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        return []


def run_to_end(name: str, parent: int, out: int, err: int, serve: Callable[[], None]) -> NoReturn:
    """The rest of a forked process's life."""
    code = 1
    try:
        os.setsid()
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)
        prctl(_PR_SET_NAME, name.encode())
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.close(out)
        os.close(err)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)
        atexit._clear()
        gc.enable()
        restore_threads()
        dask.multiprocessing.default_initializer()
        serve()
        code = 0
        atexit._run_exitfuncs()
    except SystemExit as error:
        code = exit_code(error)
    except KeyboardInterrupt:
        traceback.print_exc()
        flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except Closed:
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        flush()
        os._exit(code)


def restore_threads() -> None:
    """Gives OpenBLAS the number of threads it would have taken, had it not been imported in the zygote."""
    wanted = blas_threads()
    if wanted == 1:
        return
    with open("/proc/self/maps") as maps:
        libraries = {line.split()[-1] for line in maps if "openblas" in line}
    for path in libraries:
        library = ctypes.CDLL(path)
        for prefix in ("scipy_", ""):
            for suffix in ("64_", ""):
                setter = getattr(library, f"{prefix}openblas_set_num_threads{suffix}", None)
                if setter is not None:
                    setter(wanted)


def blas_threads() -> int:
    """Threads that OpenBLAS takes by the environment, or by the CPUs it may run on."""
    for name in ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > 0:
            return int(value)
    return len(os.sched_getaffinity(0))


def exit_code(error: SystemExit) -> int:
    """The code that the interpreter would exit with."""
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    with contextlib.suppress(Exception):
        print(clean(str(error.code)), file=sys.stderr)
    return 1


def main(fd: int) -> NoReturn:
    """Entry point: `fd` is the connection to the daemon."""
    gc.disable()
    Zygote(Channel(fd)).serve()
    os._exit(0)
