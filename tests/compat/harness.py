"""Processes, workers and clusters for the behaviour tests.

Starts real ``dask scheduler`` processes, stock ``dask worker`` ones and ours, each in a process group of its
own with its output captured, and makes sure that nothing of them outlives the test that needed them. Knows
nothing of pytest and judges no behaviour.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from distributed import Client

ROOT = Path(__file__).resolve().parents[2]

#: In the environment of every process of this run; what still carries it at the end has been left behind.
MARKER = "COMPAT_RUN_ID"
RUN_ID = uuid.uuid4().hex

STOCK = "stock"
OURS = "ours"

#: Which worker (name, flavour) each kind of cluster has. The first is always the one under test.
KINDS: dict[str, list[tuple[str, str]]] = {
    "stock": [("a", STOCK), ("b", STOCK)],
    "ours": [("a", OURS)],
    "ours2": [("a", OURS), ("b", OURS)],
    "mixed": [("a", OURS), ("b", STOCK)],
}

#: Every kind, one of each flavour alone, and those that have two workers.
ALL = ("stock", "ours", "ours2", "mixed")
SOLO = ("stock", "ours")
PAIR = ("stock", "ours2", "mixed")

#: Rebalancing looks at the data alone, so that little data is enough to make it act.
SCHEDULER_CONFIG = {
    "distributed.worker.memory.rebalance.measure": "managed",
    "distributed.worker.memory.rebalance.sender-min": 0.0,
    "distributed.worker.memory.rebalance.sender-recipient-gap": 0.0,
}

START_TIMEOUT = 30.0
STOP_TIMEOUT = 10.0


class HarnessError(Exception):
    """The cluster could not be started, or did not end as it should."""


def binary() -> Path:
    """The worker under test. A missing one is an error, never a reason to skip."""
    named = os.environ.get("IQOQO_DASK_WORKER")
    candidates = (
        [Path(named)] if named else [ROOT / "target" / p / "iqoqo-dask-worker" for p in ("release", "debug")]
    )
    for candidate in candidates:
        if candidate.is_file() and os.access(candidate, os.X_OK):
            return candidate.resolve()
    raise HarnessError(
        f"no worker to test at {' or '.join(map(str, candidates))}: build it, or set IQOQO_DASK_WORKER"
    )


def dask_command() -> Path:
    """``dask`` of the interpreter that runs the tests, as a user calls it."""
    return Path(sys.executable).parent / "dask"


def base_env(**extra: str) -> dict[str, str]:
    """The caller's environment without what would configure Dask or Python behind a test's back."""
    env = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("DASK_", "PYTEST_", "PYTHON", "IQOQO_", "COV_"))
    }
    for threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        env.pop(threads, None)
    env[MARKER] = RUN_ID
    env.update(extra)
    return env


def eventually(check: Callable[[], Any], timeout: float = 10.0, what: str = "") -> Any:
    """Return ``check()`` as soon as it is true.

    Only for states that nothing announces (counters in the scheduler, the process table); what a client or a
    log line announces is waited for there.
    """
    deadline = time.monotonic() + timeout
    pause = 0.005
    while True:
        value = check()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout} s: {what or check}; last seen: {value!r}")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)


class Gate:
    """A latch that tests and tasks see alike, whatever process they are in: a file.

    Unlike ``distributed.Event`` it needs nothing of the worker under test.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.path = f"{directory}/gate-{name}"

    def set(self) -> None:
        open(self.path, "w").close()

    def wait(self, timeout: float = 30.0) -> bool:
        deadline = time.monotonic() + timeout
        while not os.path.exists(self.path):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True


class Tally:
    """Counts runs of tasks where no crash can lose the count: the bytes of a file."""

    def __init__(self, directory: Path, name: str) -> None:
        self.path = f"{directory}/tally-{name}"

    def add(self) -> int:
        """Count one more, and return how many there are."""
        fd = os.open(self.path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.write(fd, b"x")
        os.close(fd)
        return self.count

    @property
    def count(self) -> int:
        return os.stat(self.path).st_size if os.path.exists(self.path) else 0


class Process:
    """A child in its own process group; its stdout and stderr go to one file, and can be waited for."""

    def __init__(
        self, name: str, argv: Sequence[str | Path], directory: Path, env: dict[str, str] | None = None
    ) -> None:
        self.name = name
        #: Of a scheduler: where it listens.
        self.address = ""
        self.argv = [str(a) for a in argv]
        self.log_path = directory / f"{name}-{uuid.uuid4().hex[:6]}.log"
        self._text = ""
        self._cond = threading.Condition()
        self._ended = False
        self._popen = subprocess.Popen(
            self.argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env=base_env() if env is None else env,
            start_new_session=True,
        )
        self.pid = self._popen.pid
        self._pump = threading.Thread(target=self._read, name=f"log of {name}", daemon=True)
        self._pump.start()

    def _read(self) -> None:
        assert self._popen.stdout is not None
        with self.log_path.open("wb") as log:
            while chunk := os.read(self._popen.stdout.fileno(), 65536):
                log.write(chunk)
                log.flush()
                with self._cond:
                    self._text += chunk.decode(errors="replace")
                    self._cond.notify_all()
        with self._cond:
            self._ended = True
            self._cond.notify_all()

    @property
    def text(self) -> str:
        """All it has printed so far."""
        with self._cond:
            return self._text

    def wait_for(self, pattern: str, timeout: float = START_TIMEOUT, since: int = 0) -> re.Match[str]:
        """Wait until its output, from the offset ``since`` on, matches."""
        regex = re.compile(pattern)
        deadline = time.monotonic() + timeout
        with self._cond:
            while not (match := regex.search(self._text, since)):
                left = deadline - time.monotonic()
                if self._ended:
                    raise HarnessError(
                        f"{self.name} ended before it printed {pattern!r}:\n{self._text[-4000:]}"
                    )
                if left <= 0:
                    raise TimeoutError(
                        f"{self.name} did not print {pattern!r} in {timeout} s:\n{self._text[-4000:]}"
                    )
                self._cond.wait(left)
        return match

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    def wait(self, timeout: float) -> int:
        """The exit code (negative: the signal); raises ``subprocess.TimeoutExpired``."""
        code = self._popen.wait(timeout)
        self._pump.join(STOP_TIMEOUT)
        return code

    def signal(self, signum: int) -> None:
        """To the process alone, as an operator or systemd would."""
        self._popen.send_signal(signum)

    def kill(self) -> None:
        """End the whole group now."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait(STOP_TIMEOUT)
        self._pump.join(STOP_TIMEOUT)

    def terminate(self, timeout: float = STOP_TIMEOUT) -> int | None:
        """SIGTERM, then the whole group; returns the exit code, or None if it had to be killed."""
        code = None
        if self.running:
            self.signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._popen.wait(timeout)
        else:
            code = self._popen.returncode
        self.kill()
        return code

    def children(self) -> list[int]:
        """Pids of all processes below it."""
        parents: dict[int, list[int]] = {}
        for pid, parent in _process_table():
            parents.setdefault(parent, []).append(pid)
        found, todo = [], [self.pid]
        while todo:
            below = parents.get(todo.pop(), [])
            found += below
            todo += below
        return found


def _process_table() -> Iterator[tuple[int, int]]:
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                state, parent = Path(entry.path, "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    yield int(entry.name), int(parent)


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    return any(p == pid for p, _ in _process_table())


def marked(marker: str = RUN_ID) -> list[int]:
    """Processes that were started, however indirectly, by this run."""
    needle = f"{MARKER}={marker}".encode()
    found = []
    for pid, _ in _process_table():
        with contextlib.suppress(OSError):
            if needle in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(pid)
    return found


def describe(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return "?"


def dask_env(config: dict[str, Any] | None) -> dict[str, str]:
    """Dask's configuration as its environment variables: ``{"a.b-c": 1}`` is ``DASK_A__B_C=1``."""
    return {
        "DASK_" + key.upper().replace(".", "__").replace("-", "_"): value
        if isinstance(value, str)
        else repr(value)
        for key, value in (config or {}).items()
    }


class Worker:
    """One worker process and what the scheduler calls it."""

    def __init__(self, name: str, flavour: str, process: Process) -> None:
        self.name = name
        self.flavour = flavour
        self.process = process
        self.address = ""

    @property
    def ours(self) -> bool:
        return self.flavour == OURS

    @property
    def log(self) -> str:
        return self.process.text


class Launcher:
    """Starts schedulers and workers of one kind, and ends all of them."""

    def __init__(self, kind: str, directory: Path) -> None:
        self.kind = kind
        self.directory = directory
        self.processes: list[Process] = []
        #: Processes of others that the test uses, and how much they had printed before.
        self.seen: list[tuple[Process, int]] = []
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def ours(self) -> bool:
        """Whether the worker under test is ours."""
        return KINDS[self.kind][0][1] == OURS

    def start(self, name: str, argv: Sequence[str | Path], env: dict[str, str] | None = None) -> Process:
        process = Process(name, argv, self.directory, env)
        self.processes.append(process)
        return process

    def scheduler(self, *args: str, config: dict[str, Any] | None = None, port: int = 0) -> Process:
        """A stock scheduler, listening; its address is ``process.address``."""
        process = self.start(
            "scheduler",
            [
                dask_command(),
                "scheduler",
                "--host=127.0.0.1",
                f"--port={port}",
                "--no-dashboard",
                *args,
            ],
            base_env(**dask_env(config)),
        )
        process.address = process.wait_for(r"Scheduler at:\s+(tcp://\S+)")[1]
        return process

    def worker_argv(self, flavour: str, *args: str) -> list[str | Path]:
        """The command of a worker, up to what the two flavours have in common."""
        common = ["--no-dashboard", f"--local-directory={self.directory}", *args]
        if flavour == STOCK:
            return [dask_command(), "worker", *common]
        return [binary(), f"--python={sys.executable}", *common]

    def worker(
        self,
        scheduler: str | None,
        *args: str,
        name: str = "a",
        flavour: str | None = None,
        nthreads: int = 2,
        config: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
    ) -> Worker:
        """Start a worker and return at once. The flavour of ``name`` is the kind's, unless given."""
        if flavour is None:
            flavour = dict(KINDS[self.kind]).get(name, KINDS[self.kind][0][1])
        common = [f"--nthreads={nthreads}", f"--name={name}"]
        if not any(a.startswith("--memory-limit") for a in args):
            common.append("--memory-limit=2GiB")
        argv = self.worker_argv(flavour, *([scheduler] if scheduler else []), *common, *args)
        # The tasks of some tests behave otherwise on a worker than where they are pickled on their way.
        env = {"COMPAT_ROLE": "worker", **dask_env(config), **(env or {})}
        process = self.start(f"{flavour}-{name}", argv, base_env(**env))
        return Worker(name, flavour, process)

    def close(self) -> None:
        for process in reversed(self.processes):
            process.kill()


def worker_names(client: Client) -> dict[str, str]:
    """Name to address of every worker the scheduler has."""

    def names(dask_scheduler):  # noqa: ANN001, ANN202
        return {
            str(ws.name): addr for addr, ws in dask_scheduler.workers.items() if ws.status.name == "running"
        }

    return client.run_on_scheduler(names)


def join(client: Client, *workers: Worker, timeout: float = START_TIMEOUT) -> None:
    """Wait until the scheduler knows the workers, and note their addresses."""

    def registered() -> bool:
        for worker in workers:
            if not worker.process.running:
                raise HarnessError(f"worker {worker.name} ended:\n{worker.log[-4000:]}")
        names = worker_names(client)
        for worker in workers:
            worker.address = names.get(worker.name, "")
        return all(worker.address for worker in workers)

    eventually(registered, timeout, f"workers {[w.name for w in workers]} at the scheduler")


class Cluster:
    """A scheduler and the workers of one kind, shared by many tests."""

    NTHREADS = 2

    def __init__(self, kind: str, directory: Path) -> None:
        self.kind = kind
        self.launcher = Launcher(kind, directory)
        self.control: Client | None = None
        #: Set by a test after which no other can use the cluster.
        self.spoilt = False
        try:
            self.scheduler = self.launcher.scheduler(config=SCHEDULER_CONFIG)
            self.address = self.scheduler.address
            self.workers = [
                self.launcher.worker(
                    self.address,
                    "--resources=FOO=2 BAR=1",
                    name=name,
                    flavour=flavour,
                    nthreads=self.NTHREADS,
                )
                for name, flavour in KINDS[kind]
            ]
            # Not the default client: tests bring their own.
            self.control = Client(self.address, set_as_default=False, timeout=START_TIMEOUT)
            join(self.control, *self.workers)
        except BaseException:
            self.close()
            raise

    @property
    def ours(self) -> bool:
        """Whether the worker under test, ``a``, is ours."""
        return self.launcher.ours

    @property
    def a(self) -> str:
        """Address of the worker under test."""
        return self.workers[0].address

    @property
    def b(self) -> str:
        """Address of the second worker, of the kinds that have one."""
        return self.workers[1].address

    def settle(self, timeout: float = 10.0) -> str | None:
        """Wait until the last test's tasks are gone; return what is wrong with the cluster if they stay."""
        expected = {w.name: w.address for w in self.workers}

        def state(dask_scheduler):  # noqa: ANN001, ANN202
            return (
                {str(ws.name): a for a, ws in dask_scheduler.workers.items() if ws.status.name == "running"},
                [str(k) for k in dask_scheduler.tasks][:20],
                [
                    c
                    for c in dask_scheduler.clients
                    if not c.startswith(("fire-and-forget", "Client-worker", "published-"))
                ],
            )

        seen: Any = None

        def clean() -> bool:
            nonlocal seen
            assert self.control is not None
            seen = self.control.run_on_scheduler(state)
            return seen[0] == expected and not seen[1] and len(seen[2]) == 1

        try:
            eventually(clean, timeout)
        except Exception as e:  # whatever it is, the cluster is no good for the next test
            return f"{type(e).__name__}: {e}; wanted only {expected}; workers, tasks, clients: {seen}"
        return None

    def close(self) -> None:
        if self.control is not None:
            with contextlib.suppress(Exception):
                self.control.close(timeout=2)
        self.launcher.close()


def scheduler_file_address(path: Path) -> str:
    return json.loads(path.read_text())["address"]
