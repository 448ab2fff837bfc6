"""Programs that this process starts, and the promise that none outlives it.

Every program gets a process group of its own, so that a Ctrl-C in the terminal reaches this process alone,
which then stops the others in order. Descendants that their parents leave behind come to us (we are a child
subreaper), so `stop` finds and ends them all, whatever group or session they moved to. Knows nothing of Dask.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)


class Interrupted(BaseException):
    """A signal asked us to stop. Not an `Exception`: nothing on the way out may take it for a failed task."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class ProcessDied(RuntimeError):
    """A program that has to run until we stop it ended by itself."""


def raise_on_signals() -> None:
    """Turn the first SIGINT, SIGTERM, SIGHUP or SIGALRM into `Interrupted`; ignore the ones that follow.

    A second Ctrl-C from an impatient user must not cut the clean-up short: that has time limits of its own.
    """

    def handle(signum: int, _frame: FrameType | None) -> None:
        ignore_signals()
        raise Interrupted(signum)

    for signum in _STOPPING:
        signal.signal(signum, handle)


def ignore_signals() -> None:
    """From here on nothing interrupts us: to be called before the clean-up starts."""
    for signum in _STOPPING:
        signal.signal(signum, signal.SIG_IGN)


def descendants(root: int) -> list[int]:
    """The ids of all living descendants of process `root`, zombies not counted."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            # The second field, the name in parentheses, may hold spaces and parentheses of its own.
            state, parent = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended since we listed the directory
        if state != "Z":
            children.setdefault(int(parent), []).append(int(entry))
    found, queue = [], [root]
    while queue:
        for child in children.get(queue.pop(), ()):
            found.append(child)
            queue.append(child)
    return found


def command_line(pid: int) -> str:
    """What `pid` runs, as one line for a person; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def poll(condition: Callable[[], bool], seconds: float, interval: float = 0.02) -> bool:
    """Ask `condition` until it holds, for at most `seconds`: for what has no event to wait for."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(interval)
    return True


class Processes:
    """Programs that are started one by one and stopped together, last one first."""

    def __init__(self, log_directory: Path) -> None:
        self._log_directory = log_directory
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")

    def start(
        self, name: str, argv: Sequence[str | Path], env: Mapping[str, str] | None = None, log: bool = True
    ) -> int:
        """Start `argv` in a process group of its own; returns its id. Output goes to `NAME.log` or ours."""
        parent = os.getpid()

        def die_with_parent() -> None:
            # The signals that we ignore or turn into `Interrupted` mean to the program what they always do.
            for signum in _STOPPING:
                signal.signal(signum, signal.SIG_DFL)
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)  # we were killed before the line above could take effect

        with contextlib.ExitStack() as stack:
            output = stack.enter_context(self.log_file(name).open("ab")) if log else None
            self._running[name] = subprocess.Popen(
                [str(part) for part in argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if log else None,
                env=None if env is None else dict(env),
                process_group=0,
                preexec_fn=die_with_parent,
            )
        return self._running[name].pid

    def check(self, names: Iterable[str] | None = None) -> None:
        """Raise `ProcessDied`, with the end of its log, if one of the programs has ended by itself."""
        for name in self._running if names is None else names:
            if (code := self._running[name].poll()) is not None:
                raise ProcessDied(f"{name} ended with code {code}; its last lines:\n{self.log_tail(name)}")

    def wait_for(self, what: str, condition: Callable[[], bool], seconds: float = 30.0) -> None:
        """Wait until `condition` holds; raises `ProcessDied` or `TimeoutError` when it cannot any more."""

        def holds() -> bool:
            self.check()
            return condition()

        if not poll(holds, seconds):
            logs = "\n".join(f"{name}:\n{self.log_tail(name)}" for name in self._running)
            raise TimeoutError(f"waited {seconds:.0f} s for {what}\n{logs}")

    def wait_until_end(self, name: str, among: Iterable[str]) -> int:
        """Wait until `name` ends, while the programs `among` have to stay up; returns its exit code."""
        while True:
            try:
                return self._running[name].wait(0.5)
            except subprocess.TimeoutExpired:
                self.check(among)

    def log_file(self, name: str) -> Path:
        return self._log_directory / f"{name}.log"

    def log_tail(self, name: str, lines: int = 15) -> str:
        text = self.log_file(name).read_text(errors="replace") if self.log_file(name).exists() else ""
        return "\n".join("    " + line for line in text.splitlines()[-lines:])

    def stop_one(self, name: str, grace: float = 15.0) -> bool:
        """End one program: SIGTERM, SIGKILL to its group after `grace` seconds; whether it went willingly."""
        process = self._running.pop(name)
        if process.poll() is None:
            process.terminate()
        willing = True
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            willing = False
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(5)
        return willing

    def stop(self, grace: float = 15.0) -> list[str]:
        """End everything; returns one line for each thing that did not end by itself, best none."""
        complaints = []
        for name in list(reversed(self._running)):
            if not self.stop_one(name, grace):
                complaints.append(f"{name} did not end within {grace:.0f} s of SIGTERM")
        # Orphans that are on their way out get a moment before they count as left behind.
        if not poll(lambda: not self._orphans(), 3.0):
            complaints += [f"left behind, killed: {pid} {command_line(pid)}" for pid in self._orphans()]
            # Killing a parent may bring its children to us: again until nothing is left.
            poll(self._kill_orphans, 10.0, interval=0.1)
        return complaints

    def _orphans(self) -> list[int]:
        """Our descendants still alive, those that have ended reaped; only once nothing is in `_running`."""
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0] != 0:
                pass
        return descendants(os.getpid())

    def _kill_orphans(self) -> bool:
        """One round of SIGKILL; whether there was nothing left to kill."""
        orphans = self._orphans()
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not orphans
