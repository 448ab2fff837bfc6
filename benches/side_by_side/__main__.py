"""`python -m benches.side_by_side`: stock `dask worker`, ours and a worker that does nothing, in turns.

Rounds are interleaved, and each begins with another kind, so that a machine that gets slower or faster does
so for all. Exit codes: 0 measured; 1 something failed; 128 + N stopped by signal N.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
import time
from pathlib import Path

from demo.processes import Processes

from . import report, rounds
from .supervise import supervise


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benches.side_by_side", description="Workers side by side."
    )
    parser.add_argument(
        "--kinds", default="stock,ours,nothing", help=f"of {','.join(rounds.KINDS)} (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="for each kind (%(default)s)")
    parser.add_argument("--tasks", type=int, default=10_000, help="trivial tasks (%(default)s)")
    parser.add_argument(
        "--leaves", type=int, default=2_000, help="of the tree; twice as many tasks (%(default)s)"
    )
    parser.add_argument("--idle", type=float, default=10, help="seconds of idleness to watch (%(default)s)")
    parser.add_argument("--nthreads", type=int, default=2, help="of each worker (%(default)s)")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds for it all (%(default)s)")
    parser.add_argument(
        "--json", type=Path, default=rounds.ROOT / "target/side_by_side.json", help="(%(default)s)"
    )
    arguments = parser.parse_args()
    arguments.kinds = arguments.kinds.split(",")
    if unknown := set(arguments.kinds) - set(rounds.KINDS):
        parser.error(f"unknown kind of worker: {', '.join(sorted(unknown))}")
    for kind in arguments.kinds:
        if not os.access(program := rounds.KINDS[kind][0], os.X_OK):
            parser.error(f"{kind}: nothing to run at {program}: `make bench` builds what it needs")
    return arguments


def measure(
    arguments: argparse.Namespace, cluster: rounds.Cluster, settings: rounds.Settings
) -> report.Rounds:
    """All rounds of all kinds."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in arguments.kinds}
    for number in range(arguments.rounds):
        turn = number % len(arguments.kinds)
        for kind in arguments.kinds[turn:] + arguments.kinds[:turn]:
            start = time.monotonic()
            found[kind].append(rounds.run(kind, cluster, settings))
            cpu = found[kind][-1]["trivial_cpu_us"]
            print(
                f"round {number + 1} of {arguments.rounds}, {kind}: {cpu:.0f} µs of CPU for a trivial task"
                f" ({time.monotonic() - start:.0f} s)",
                flush=True,
            )
    return found


def run(arguments: argparse.Namespace, processes: Processes, directory: Path) -> None:
    settings = rounds.Settings(arguments.tasks, arguments.leaves, arguments.idle, arguments.nthreads)
    cluster = rounds.Cluster(processes, directory)
    method = cluster.scheduler_cpu.method
    try:
        found = measure(arguments, cluster, settings)
    finally:
        cluster.close()
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(
        report.document(found, report.ROWS, dataclasses.asdict(settings), method) + "\n"
    )
    print(f"\nmedian (least-most) of {arguments.rounds} rounds, CPU from {method}\n")
    print(report.table(found, report.ROWS))
    print(f"\nwritten to {arguments.json}")


def main() -> int:
    arguments = parse()
    return supervise("side-by-side", arguments.timeout, functools.partial(run, arguments))


if __name__ == "__main__":
    sys.exit(main())
