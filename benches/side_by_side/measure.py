"""What a worker costs: processor time and memory of all its processes, read from the kernel.

A worker runs in a cgroup of its own where the kernel lets us make one: its counter is exact to a microsecond
and misses no process, however short its life. Without that, `/proc` is walked; what a process that was never
waited for has used is then lost. Starts nothing and knows nothing of Dask.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from demo.processes import descendants, poll

_TICK = os.sysconf("SC_CLK_TCK")


class CpuMeter:
    """Counts the processor time of a program and everything it starts, from its first instruction on."""

    def __init__(self, name: str) -> None:
        self._pid: int | None = None
        self._cgroup = _make_cgroup(name)

    @property
    def method(self) -> str:
        return "cgroup" if self._cgroup else "/proc"

    def wrap(self, argv: Sequence[str | Path]) -> list[str]:
        """The command line that runs `argv` inside the meter."""
        command = [str(part) for part in argv]
        if self._cgroup is None:
            return command
        enter = f'echo $$ > {shlex.quote(str(self._cgroup / "cgroup.procs"))} && exec "$@"'
        return ["/bin/sh", "-c", enter, "sh", *command]

    def watch(self, pid: int) -> None:
        """Tell which process `wrap`'s command line has become."""
        self._pid = pid

    def pids(self) -> list[int]:
        """All living processes of the program."""
        if self._cgroup is not None:
            return [int(line) for line in (self._cgroup / "cgroup.procs").read_text().split()]
        return [] if self._pid is None else [self._pid, *descendants(self._pid)]

    def seconds(self) -> float:
        """Processor time used so far: user and system, living processes and ended ones."""
        if self._cgroup is not None:
            fields = dict(line.split() for line in (self._cgroup / "cpu.stat").read_text().splitlines())
            return int(fields["usage_usec"]) / 1e6
        return sum(_proc_seconds(pid) for pid in self.pids())

    def close(self) -> None:
        """Remove the cgroup, once the last of its processes is gone."""
        cgroup, self._cgroup = self._cgroup, None
        if cgroup is not None:
            poll(lambda: not (cgroup / "cgroup.procs").read_text(), 5)
            # A busy cgroup stays behind, empty and harmless: not worth losing the measurements for.
            with contextlib.suppress(OSError):
                cgroup.rmdir()


def _make_cgroup(name: str) -> Path | None:
    """A new cgroup (version 2) beside our own, or None where there is none that we may write."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
        root = next(Path(mount[1]) for mount in mounts if mount[2] == "cgroup2")
        groups = Path("/proc/self/cgroup").read_text().splitlines()
        own = next(line[3:] for line in groups if line.startswith("0::"))
        cgroup = root / own.lstrip("/") / f"side-by-side-{os.getpid()}-{name}"
        cgroup.mkdir()
        (cgroup / "cpu.stat").read_text()
    except (OSError, StopIteration):
        return None
    return cgroup


def _proc_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(int(field) for field in fields[11:15]) / _TICK  # utime, stime, cutime, cstime


def pss(pids: Sequence[int]) -> int:
    """Bytes of memory of `pids`, a page that processes share split among them (proportional set size)."""
    total = 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total * 1024
