"""What people do with Dask, in pieces of a second or a few on two cores, each with an answer to check.

Data is made on the workers, so that its making is part of the work; seeds are fixed.
"""

from __future__ import annotations

import collections
import operator
import random
from collections.abc import Callable

import dask
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
from dask.distributed import Client, wait

SIDE = 6000
WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")


def square() -> da.Array:
    return da.random.default_rng(7).random((SIDE, SIDE), chunks=1000)


def transpose(_: Client) -> None:
    """(x + x.T) of 275 MiB in 36 chunks, and its mean: half of the inputs come from another task."""
    x = square()
    assert abs((x + x.T).mean().compute() - 1) < 0.01


def rechunk(_: Client) -> None:
    """275 MiB from squares into stripes, as Dask chooses to do it."""
    assert square().rechunk((SIDE, 300)).max(axis=0).sum().compute() > SIDE * 0.99


def svd(_: Client) -> None:
    """The singular values of a tall matrix, 60,000 by 100."""
    x = da.random.default_rng(7).random((60_000, 100), chunks=(5_000, 100))
    _, s, _ = da.linalg.svd(x)
    assert s.compute()[0] > 1000


def rolling(_: Client) -> None:
    """A moving mean over a series of 20 million, with overlap between its chunks."""
    x = da.random.default_rng(7).random(20_000_000, chunks=1_000_000)
    kernel = np.ones(25) / 25
    y = x.map_overlap(np.convolve, v=kernel, mode="same", depth=12, boundary="reflect", dtype=float)
    assert abs(y.mean().compute() - 0.5) < 0.01


def chain(client: Client) -> None:
    """An array of 80 MiB through ten tasks, one after the other."""
    future = client.submit(np.ones, 10 << 20, pure=False)
    for _ in range(10):
        future = client.submit(operator.add, future, 1, pure=False)
    assert client.submit(np.min, future, pure=False).result() == 11


def fan_out(client: Client) -> None:
    """An array of 80 MiB read by 40 tasks."""
    source = client.submit(np.ones, 10 << 20, pure=False)
    sums = client.map(lambda i, x: float(x[i::64].sum()), range(40), x=source, pure=False)
    assert client.gather(sums) == [float((10 << 20) // 64)] * 40


def table(days: int = 20) -> dd.DataFrame:
    return dask.datasets.timeseries(
        start="2000-01-01",
        end=str(pd.Timestamp("2000-01-01") + pd.Timedelta(days=days))[:10],
        freq="3s",
        partition_freq="1d",
        seed=7,
    )


def groupby(_: Client) -> None:
    """Means of half a million rows by name."""
    means = table().groupby("name")[["x", "y"]].mean().compute()
    assert len(means) > 20 and means.x.abs().max() < 0.1


def set_index(_: Client) -> None:
    """A shuffle of half a million rows into the order of another column."""
    sorted_ = table().set_index("x", divisions=list(np.linspace(-1, 1, 11)))
    assert sorted_.map_partitions(len).sum().compute() == 20 * 28_800


def merge(_: Client) -> None:
    """A join of two tables on a column that neither is sorted by."""
    left = table(8)
    right = left[["id", "y"]].drop_duplicates(subset="id")
    joined = left.merge(right, on="id", suffixes=("", "_right"))
    assert len(joined) == 8 * 28_800


def strings(_: Client) -> None:
    """Text: upper case, a pattern, lengths, counts."""
    names = table().name
    assert names.str.upper().str.contains("A|E").sum().compute() > 0
    assert names.str.len().value_counts().compute().sum() == 20 * 28_800


def _text(seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=12)) for _ in range(8_000)]


def _count(lines: list[str]) -> collections.Counter[str]:
    counter: collections.Counter[str] = collections.Counter()
    for line in lines:
        for word in line.split():
            counter[word.upper()[::-1]] += 1
    return counter


def word_count(_: Client) -> None:
    """A bag of 128,000 lines, words counted in pure Python: what holds the GIL."""
    bag = db.from_delayed([dask.delayed(_text)(seed) for seed in range(16)])
    counts = bag.map_partitions(lambda lines: [_count(list(lines))]).fold(operator.add).compute()
    assert sum(counts.values()) == 16 * 8_000 * 12


def small_futures(client: Client) -> None:
    """A thousand tasks with small dictionaries, and a task over all of them."""
    parts = client.map(lambda i: {"i": i, "square": i * i}, range(1_000), pure=False)
    total = client.submit(lambda parts: sum(part["square"] for part in parts), parts, pure=False)
    assert total.result() == sum(i * i for i in range(1_000))


def scatter_and_gather(client: Client) -> None:
    """Ten arrays of 8 MiB to the worker, and back."""
    futures = client.scatter([np.full(1 << 20, float(i)) for i in range(10)], hash=False)
    wait(client.map(np.sum, futures, pure=False))
    assert [float(x[0]) for x in client.gather(futures)] == list(range(10))


WORKLOADS: dict[str, Callable[[Client], None]] = {
    "array: x + x.T": transpose,
    "array: rechunk": rechunk,
    "array: svd": svd,
    "array: rolling mean": rolling,
    "array: chain of ten": chain,
    "array: read by forty": fan_out,
    "dataframe: groupby": groupby,
    "dataframe: set_index": set_index,
    "dataframe: merge": merge,
    "dataframe: strings": strings,
    "bag: word count": word_count,
    "futures: a thousand": small_futures,
    "futures: scatter, gather": scatter_and_gather,
}
