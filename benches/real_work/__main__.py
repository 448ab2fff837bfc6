"""`python -m benches.real_work`: the same work on stock `dask worker` and on ours, in turns.

Rounds are interleaved and each begins with another kind. In a round a worker does every piece of work once to
warm up and then `--repeats` times; the fastest counts. Exit codes as of `supervise`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
import sys
import time
from pathlib import Path

import cloudpickle

from benches.side_by_side import report, rounds
from benches.side_by_side.supervise import supervise
from demo.processes import Processes

from . import workloads
from .workloads import WORKLOADS


@dataclasses.dataclass(frozen=True)
class Settings(rounds.Settings):
    """How a worker is started and how often work is repeated."""

    memory_limit: str
    repeats: int

    def options(self) -> list[str]:
        return [*super().options(), "--memory-limit", self.memory_limit]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benches.real_work", description="Work side by side.")
    parser.add_argument("--kinds", default="stock,ours", help=f"of {','.join(rounds.KINDS)} (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="for each kind (%(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="of each piece of work in a round (%(default)s)"
    )
    parser.add_argument("--nthreads", type=int, default=2, help="of each worker (%(default)s)")
    parser.add_argument("--memory-limit", default="4GiB", help="of each worker (%(default)s)")
    parser.add_argument("--only", default="", help="work whose name has this in it")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds for it all (%(default)s)")
    parser.add_argument(
        "--json", type=Path, default=rounds.ROOT / "target/real_work.json", help="(%(default)s)"
    )
    arguments = parser.parse_args()
    arguments.kinds = arguments.kinds.split(",")
    if unknown := set(arguments.kinds) - (set(rounds.KINDS) - {"nothing"}):
        parser.error(f"no kind of worker that does work: {', '.join(sorted(unknown))}")
    return arguments


def one_round(kind: str, cluster: rounds.Cluster, settings: Settings, names: list[str]) -> dict[str, float]:
    """Seconds, and seconds of worker CPU, of each piece of work."""
    found: dict[str, float] = {}
    with cluster.worker(kind, settings) as meter:
        cluster.wait_for_worker()
        for name in names:
            best = (math.inf, math.inf)
            for repeat in range(settings.repeats + 1):
                cpu, start = meter.seconds(), time.perf_counter()
                WORKLOADS[name](cluster.client)
                taken = time.perf_counter() - start, meter.seconds() - cpu
                if repeat:
                    best = min(best, taken)
            found[name], found[f"{name} (CPU)"] = best
    return found


def run(arguments: argparse.Namespace, processes: Processes, directory: Path) -> None:
    settings = Settings(0, 0, 0, arguments.nthreads, arguments.memory_limit, arguments.repeats)
    names = [name for name in WORKLOADS if arguments.only in name]
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in arguments.kinds}
    cluster = rounds.Cluster(processes, directory)
    method = cluster.scheduler_cpu.method
    try:
        for number in range(arguments.rounds):
            turn = number % len(arguments.kinds)
            for kind in arguments.kinds[turn:] + arguments.kinds[:turn]:
                start = time.monotonic()
                found[kind].append(one_round(kind, cluster, settings, names))
                print(
                    f"round {number + 1} of {arguments.rounds}, {kind}: {time.monotonic() - start:.0f} s",
                    flush=True,
                )
    finally:
        cluster.close()
    rows = {row: f"{row} (s)" for name in names for row in (name, f"{name} (CPU)")}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    document = report.document(found, rows, dataclasses.asdict(settings), method)
    arguments.json.write_text(document + "\n")
    print(f"\n{report.table(found, rows)}\n")
    if {"stock", "ours"} <= set(found):
        logs = [math.log(statistics.median(report.ratios(found, name, "ours", "stock"))) for name in names]
        print(f"geometric mean of the time, ours / stock: {math.exp(statistics.mean(logs)):.3f}")
    print(f"single rounds: {arguments.json}")


def main() -> int:
    arguments = parse()
    # neither scheduler nor workers can import it
    cloudpickle.register_pickle_by_value(workloads)
    return supervise("real-work", arguments.timeout, functools.partial(run, arguments))


if __name__ == "__main__":
    sys.exit(main())
