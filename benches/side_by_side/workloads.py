"""What the workers are given to do, and the answers to expect.

Only functions of the standard library run on the workers: what is measured is Dask's and the worker's cost.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable

import dask
from dask.distributed import Client, Future, wait

TIMEOUT = 600
"""Seconds that one workload may take."""


def trivial(client: Client, tasks: int) -> tuple[float, Callable[[], None]]:
    """Independent tasks that do next to nothing; seconds until all are done, and a check of the results."""
    start = time.perf_counter()
    futures = client.map(operator.neg, range(tasks), pure=False)
    wait(futures, timeout=TIMEOUT)
    elapsed = time.perf_counter() - start

    def check() -> None:
        assert client.gather(futures) == [-number for number in range(tasks)], (
            "wrong results of trivial tasks"
        )

    return elapsed, check


def tree(client: Client, leaves: int) -> tuple[float, Callable[[], None]]:
    """A sum as a binary tree, every task a task of its own: about twice as many tasks as leaves."""
    level = [dask.delayed(operator.neg)(number) for number in range(leaves)]
    while len(level) > 1:
        pairs = [dask.delayed(operator.add)(*level[i : i + 2]) for i in range(0, len(level) - 1, 2)]
        level = pairs + level[2 * len(pairs) :]
    start = time.perf_counter()
    future: Future = client.compute(level[0], optimize_graph=False)
    wait(future, timeout=TIMEOUT)
    elapsed = time.perf_counter() - start

    def check() -> None:
        assert future.result() == -sum(range(leaves)), "wrong sum of the tree"

    return elapsed, check
