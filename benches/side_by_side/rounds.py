"""One round: a worker of one kind is started, put to work, left idle and stopped, and measured meanwhile."""

from __future__ import annotations

import contextlib
import operator
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dask.distributed import Client

from demo.processes import Processes, poll

from . import workloads
from .measure import CpuMeter, pss

ROOT = Path(__file__).resolve().parents[2]
DASK = Path(sys.executable).parent / "dask"
OURS = ROOT / "target/release/iqoqo-dask-worker"
NOTHING = ROOT / "target/release/examples/do_nothing_worker"

KINDS: dict[str, tuple[str | Path, ...]] = {
    "stock": (DASK, "worker", "--no-dashboard"),
    "ours": (OURS, "--python", sys.executable, "--no-dashboard"),
    "nothing": (NOTHING,),
    "control": (DASK, "worker", "--no-dashboard"),  # stock once more: how far apart are equals?
}


class RoundFailed(Exception):
    """A worker did not do what it was asked; the message ends with the last lines of its log."""


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    tasks: int
    leaves: int
    idle_seconds: float
    nthreads: int

    def options(self) -> list[str]:
        """What each worker is started with."""
        return ["--nthreads", str(self.nthreads)]


class Cluster:
    """The scheduler and the client that all kinds of worker share."""

    def __init__(self, processes: Processes, directory: Path) -> None:
        self.processes = processes
        self.directory = directory
        self.scheduler_cpu = CpuMeter("scheduler")
        scheduler_file = directory / "scheduler.json"
        local = ["--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0"]
        argv = [DASK, "scheduler", *local, "--scheduler-file", scheduler_file]
        self.scheduler_cpu.watch(processes.start("scheduler", self.scheduler_cpu.wrap(argv)))
        processes.wait_for("the scheduler", scheduler_file.exists)
        self.client = Client(scheduler_file=str(scheduler_file))
        self._started = 0

    @contextlib.contextmanager
    def worker(self, kind: str, settings: Settings) -> Iterator[CpuMeter]:
        """A worker from its start to its end, on a meter; does not wait for its registration."""
        self._started += 1
        name = f"{kind}-{self._started}"
        meter = CpuMeter(name)
        options = [*settings.options(), "--local-directory", self.directory / name]
        argv = [*KINDS[kind], self.client.scheduler.address, *options]
        try:
            meter.watch(self.processes.start(name, meter.wrap(argv)))
            yield meter
            self.processes.check()
        except Exception as error:
            raise RoundFailed(f"{name}: {error!r}\n{self.processes.log_tail(name)}") from error
        finally:
            self.processes.stop_one(name)
            meter.close()
        if not poll(lambda: not self.client.nthreads(), 15):
            raise TimeoutError(f"the scheduler still counts {name} among its workers")

    def wait_for_worker(self) -> None:
        self.processes.wait_for("the worker", lambda: bool(self.client.nthreads()))

    def registered_at(self, since: float) -> float:
        """When (seconds since the epoch) the scheduler added the worker that was started at `since`."""
        events = [event for topic in self.client.get_events().values() for event in topic]
        return min(at for at, what in events if at >= since and _is_add_worker(what))

    def close(self) -> None:
        """Disconnect and end the scheduler; a second time, or after it has died, is no error."""
        self.client.close(timeout=5)
        self.processes.stop_one("scheduler")
        self.scheduler_cpu.close()


def _is_add_worker(what: object) -> bool:
    return isinstance(what, dict) and what.get("action") == "add-worker"


def run(kind: str, cluster: Cluster, settings: Settings) -> dict[str, float]:
    """All measurements of one round, by name; see `report.ROWS` for what they mean."""
    found = alone(kind, cluster, settings)
    started = time.time()
    first = cluster.client.submit(operator.neg, 1, pure=False)
    with cluster.worker(kind, settings) as meter:
        first.result(timeout=60)
        found["first_result_s"] = time.time() - started
        found["registered_s"] = cluster.registered_at(started) - started
        del first

        workloads.trivial(
            cluster.client, 500
        )  # warm: imports are done, connections are open, code is paged in
        for name, workload, size in (
            ("trivial", workloads.trivial, settings.tasks),
            ("tree", workloads.tree, settings.leaves),
        ):
            found |= measured(name, workload, size, cluster, meter, kind != "nothing")

        time.sleep(2)  # what the work has left behind (keys being released, for one) is not idleness yet
        before = meter.seconds()
        time.sleep(settings.idle_seconds)
        found["idle_cpu_percent"] = (meter.seconds() - before) / settings.idle_seconds * 100
        found["memory_mib"] = pss(meter.pids()) / 2**20
    return found


def alone(kind: str, cluster: Cluster, settings: Settings) -> dict[str, float]:
    """The memory of a worker that has not been given a task since it started."""
    with cluster.worker(kind, settings) as meter:
        cluster.wait_for_worker()
        time.sleep(1)  # start-up may go on for a moment after the registration
        return {"fresh_memory_mib": pss(meter.pids()) / 2**20}


def measured(
    name: str,
    workload: Callable[[Client, int], tuple[float, Callable[[], None]]],
    size: int,
    cluster: Cluster,
    meter: CpuMeter,
    checked: bool,
) -> dict[str, float]:
    """Time of a workload and processor time of worker and scheduler, each for one task."""
    tasks = size if name == "trivial" else 2 * size - 1
    worker, scheduler = meter.seconds(), cluster.scheduler_cpu.seconds()
    elapsed, check = workload(cluster.client, size)
    worker, scheduler = meter.seconds() - worker, cluster.scheduler_cpu.seconds() - scheduler
    if checked:
        check()
    return {
        f"{name}_cpu_us": worker / tasks * 1e6,
        f"{name}_wall_us": elapsed / tasks * 1e6,
        f"{name}_scheduler_cpu_us": scheduler / tasks * 1e6,
    }
