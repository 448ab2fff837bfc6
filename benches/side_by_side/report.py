"""Figures for people (a table of ratios) and for programs (JSON). Measures nothing."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dask
import distributed

ROWS = {
    "trivial_cpu_us": "worker CPU, trivial task (µs)",
    "trivial_wall_us": "wall time, trivial task (µs)",
    "trivial_scheduler_cpu_us": "scheduler CPU, trivial task (µs)",
    "tree_cpu_us": "worker CPU, task of a tree (µs)",
    "tree_wall_us": "wall time, task of a tree (µs)",
    "tree_scheduler_cpu_us": "scheduler CPU, task of a tree (µs)",
    "registered_s": "start to registered (s)",
    "first_result_s": "start to first result (s)",
    "fresh_memory_mib": "memory before the first task (MiB)",
    "memory_mib": "memory when idle after work (MiB)",
    "idle_cpu_percent": "CPU when idle (% of a core)",
}

Rounds = Mapping[str, Sequence[Mapping[str, float]]]
"""Measurements of each kind of worker, round by round; round N of all kinds ran at about the same time."""


def ratios(rounds: Rounds, row: str, kind: str, to: str) -> list[float]:
    """`kind` as a multiple of `to`, round by round: a slow minute of the machine then hits both."""
    pairs = zip(rounds[kind], rounds[to], strict=True)
    return [ours[row] / theirs[row] for ours, theirs in pairs if theirs[row] > 0]


def table(rounds: Rounds, rows: Mapping[str, str]) -> str:
    """Medians with their extremes, and ratios to stock and to the floor."""
    kinds = list(rounds)
    references = [kind for kind in ("stock", "nothing") if kind in kinds]
    compared = [(kind, to) for to in references for kind in kinds if kind not in ("nothing", to)]
    header = ["", *kinds, *(f"{kind} / {to}" for kind, to in compared)]
    lines = [header]
    for row, title in rows.items():
        values = [spread([round_[row] for round_ in rounds[kind]]) for kind in kinds]
        shares = [spread(ratios(rounds, row, kind, to)) for kind, to in compared]
        lines.append([title, *values, *shares])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    texts = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(text.rstrip() for text in texts)


def spread(values: Sequence[float]) -> str:
    """The median, and the extremes if there is more than one value."""
    if not values:
        return "-"
    middle = number(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({number(min(values))}-{number(max(values))})"


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"


def document(rounds: Rounds, rows: Iterable[str], settings: Mapping[str, Any], cpu_method: str) -> str:
    """Everything that was measured, with what is needed to read it later."""
    return json.dumps(
        {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "machine": {
                "cores": os.cpu_count(),
                "processor": processor(),
                "kernel": platform.release(),
                "python": platform.python_version(),
                "dask": dask.__version__,
                "distributed": distributed.__version__,
            },
            "settings": {**settings, "cpu_from": cpu_method},
            "rounds": {kind: list(values) for kind, values in rounds.items()},
            "median": {
                kind: {row: statistics.median([round_[row] for round_ in values]) for row in rows}
                for kind, values in rounds.items()
            },
        },
        indent=2,
    )


def commit() -> str | None:
    """The commit that was measured, marked when the tree has changes on top; None outside of a repository."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10, check=False
    )
    return git.stdout.strip() or None


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )
