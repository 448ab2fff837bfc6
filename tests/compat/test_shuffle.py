"""P2P shuffles, joins and rechunks: right answers, whoever the workers are, and after failures."""

from __future__ import annotations

import os
import re

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from distributed import Client, get_worker, wait
from harness import ALL, PAIR, SOLO, eventually, join


@pytest.fixture(autouse=True)
def p2p(plain_config):
    with dask.config.set({"dataframe.shuffle.method": "p2p", "array.rechunk.method": "p2p"}):
        yield


def frame(n, seed=0):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "key": rng.integers(0, n // 4, n),
            "value": rng.random(n),
            "text": rng.choice(["a", "bb", "ccc"], n),
            "time": pd.to_datetime("2020-01-01") + pd.to_timedelta(rng.integers(0, 10**6, n), "s"),
        }
    )


def same(got, want):
    pd.testing.assert_frame_equal(
        got.sort_values(list(got.columns)).reset_index(drop=True),
        want.sort_values(list(want.columns)).reset_index(drop=True),
        check_dtype=False,
    )


def has_p2p(collection):
    return any("p2p" in str(key) for key in collection.__dask_graph__())


def is_clean(client):
    """The scheduler has no shuffle, and neither has any worker."""

    def runs(dask_worker):
        plugin = dask_worker.plugins.get("shuffle")
        return len(plugin.shuffle_runs._runs) if plugin else 0

    def clean():
        states = client.run_on_scheduler(
            lambda dask_scheduler: len(dask_scheduler.plugins["shuffle"].active_shuffles)
        )
        return not states and not any(client.run(runs).values())

    return eventually(clean)


def test_shuffle(client):
    df = frame(20_000)
    d = dd.from_pandas(df, npartitions=7).shuffle("key", npartitions=5)
    assert d.npartitions == 5
    parts = client.compute([d.get_partition(i) for i in range(5)], sync=True)
    same(pd.concat(parts), df)
    keys = [set(part["key"]) for part in parts]
    assert sum(map(len, keys)) == len(set.union(*keys))
    is_clean(client)


def test_the_shuffle_is_spread(client, cluster):
    df = frame(5_000)
    d = dd.from_pandas(df, npartitions=6).shuffle("key").persist()
    wait(d)
    holders = {w for workers in client.who_has(d).values() for w in workers}
    assert holders == {w.address for w in cluster.workers}


def test_set_index(client):
    df = frame(20_000)
    d = dd.from_pandas(df, npartitions=6).set_index("key")
    got = d.compute()
    assert got.index.is_monotonic_increasing
    want = df.set_index("key").sort_index()
    assert got["value"].groupby(level=0).sum().round(6).equals(want["value"].groupby(level=0).sum().round(6))
    assert len(got) == len(want)


@pytest.mark.parametrize("how", ["inner", "left", "outer"])
def test_merge(client, how):
    left, right = frame(8_000, 1), frame(6_000, 2)[["key", "value"]].rename(columns={"value": "other"})
    d = dd.from_pandas(left, npartitions=5).merge(dd.from_pandas(right, npartitions=4), on="key", how=how)
    assert has_p2p(d.optimize())
    same(d.compute(), left.merge(right, on="key", how=how))
    is_clean(client)


def test_groupby_apply(client):
    df = frame(5_000)
    d = dd.from_pandas(df, npartitions=5).groupby("key")["value"].apply(len, meta=("value", int)).compute()
    assert d.sort_index().tolist() == df.groupby("key")["value"].apply(len).sort_index().tolist()


def test_empty_partitions(client):
    df = frame(1_000)
    df["key"] = 1
    d = dd.from_pandas(df, npartitions=4).shuffle("key", npartitions=8)
    parts = client.compute([d.get_partition(i) for i in range(8)], sync=True)
    assert sorted(map(len, parts)) == [0] * 7 + [1000]
    assert all(list(part.columns) == list(df.columns) for part in parts)


def test_rechunk(client):
    x = np.random.default_rng(0).random((300, 200, 4))
    d = da.from_array(x, chunks=(50, 200, 1)).rechunk((300, 20, 4), method="p2p")
    assert has_p2p(d)
    np.testing.assert_array_equal(d.compute(), x)
    is_clean(client)


def test_rechunk_of_large_chunks(client):
    d = da.arange(4_000_000, chunks=250_000).reshape((2000, 2000)).rechunk((2000, 100), method="p2p")
    assert int(d.sum().compute()) == sum(range(4_000_000))


@pytest.mark.parametrize("disk", [True, False])
def test_storage(client, disk):
    df = frame(10_000)
    x = np.arange(90_000).reshape(300, 300)
    with dask.config.set({"distributed.p2p.storage.disk": disk}):
        same(dd.from_pandas(df, npartitions=6).shuffle("key").compute(), df)
        d = da.from_array(x, chunks=(30, 300)).rechunk((300, 30), method="p2p")
        np.testing.assert_array_equal(d.compute(), x)


def test_more_data_than_buffers(scheduler, launch):
    """Buffers that hold a fraction of one partition: senders wait for receivers, data goes to disk."""
    config = {"distributed.p2p.comm.buffer": "200 kB", "distributed.p2p.storage.buffer": "200 kB"}
    names = ["a", "b"] if launch.kind in PAIR else ["a"]
    with Client(scheduler.address) as client:
        workers = [launch.worker(scheduler.address, name=name, config=config) for name in names]
        join(client, *workers)
        df = frame(400_000)
        d = dd.from_pandas(df, npartitions=8).shuffle("key")
        got = client.compute(d["value"].sum(), sync=True)
        assert got == pytest.approx(df["value"].sum())
        x = da.ones((3000, 3000), chunks=(300, 3000)).cumsum(axis=0)
        assert x.rechunk((3000, 300), method="p2p").sum().compute() == 3000 * (3000 * 3001 / 2)


def test_shuffles_side_by_side(client):
    frames = [frame(4_000, seed) for seed in range(4)]
    ds = [dd.from_pandas(df, npartitions=4).shuffle("key") for df in frames]
    for got, want in zip(dask.compute(*ds), frames, strict=True):
        same(got, want)


def test_the_same_shuffle_twice(client):
    df = frame(5_000)
    d = dd.from_pandas(df, npartitions=4).shuffle("key")
    same(d.compute(), df)
    is_clean(client)
    same(d.compute(), df)


def test_bad_data_is_an_error(client):
    d = dd.from_pandas(frame(1_000), npartitions=4)

    def drop(part):
        return part.drop(columns="text")

    bad = d.map_partitions(drop, meta=d._meta, enforce_metadata=False).shuffle("key")
    with pytest.raises(RuntimeError, match="P2P .* failed during transfer phase") as caught:
        bad.compute()
    assert isinstance(caught.value.__cause__, ValueError)
    is_clean(client)
    same(d.shuffle("key").compute(), d.compute())


def test_errors_in_inputs(client):
    def fail(part, partition_info=None):
        if partition_info and partition_info["number"] == 2:
            raise KeyError("bad input")
        return part

    d = dd.from_pandas(frame(1_000), npartitions=4)
    with pytest.raises(KeyError, match="bad input"):
        d.map_partitions(fail, meta=d._meta).shuffle("key").compute()
    is_clean(client)


def test_released_half_way(client, gate):
    hold = gate("hold")

    def slow(part, partition_info=None):
        if partition_info and partition_info["number"] == 3:
            hold.wait()
        return part

    d = dd.from_pandas(frame(1_000), npartitions=4)
    future = client.compute(d.map_partitions(slow, meta=d._meta).shuffle("key"))
    started = lambda dask_scheduler: len(dask_scheduler.plugins["shuffle"].active_shuffles)  # noqa: E731
    eventually(lambda: client.run_on_scheduler(started))
    future.release()
    hold.set()
    is_clean(client)


# -- failures


def slow_input(part, go, partition_info=None):
    """The last partition comes when the test says so."""
    if partition_info and partition_info["number"] == 5:
        go.wait()
    return part


@pytest.mark.kinds(*PAIR)
def test_a_worker_is_lost_half_way(scheduler, launch, gate):
    go = gate("go")
    with Client(scheduler.address) as client:
        a = launch.worker(scheduler.address, name="a")
        b = launch.worker(scheduler.address, "--no-nanny", name="b")
        join(client, a, b)
        df = frame(3_000)
        d = dd.from_pandas(df, npartitions=6)
        d = d.map_partitions(slow_input, go, meta=d._meta).shuffle("key")
        future = client.compute(d)

        def sent(dask_scheduler):
            done = [ts for ts in dask_scheduler.tasks.values() if "transfer" in str(ts.key)]
            return sum(ts.state == "memory" for ts in done) >= 3

        eventually(lambda: client.run_on_scheduler(sent))
        b.process.kill()
        go.set()
        same(future.result(timeout=60), df)


@pytest.mark.kinds(*SOLO)
def test_a_task_dies_half_way(scheduler, launch, tmp_path):
    """A process that ends while it shards costs its own work, and no more."""
    once = str(tmp_path / "died")

    def die_once(part, partition_info=None):
        if partition_info and partition_info["number"] == 2 and not os.path.exists(once):
            open(once, "w").close()
            os._exit(1)
        return part

    with Client(scheduler.address) as client:
        join(client, launch.worker(scheduler.address))
        df = frame(3_000)
        d = dd.from_pandas(df, npartitions=6)
        d = d.map_partitions(die_once, meta=d._meta).shuffle("key")
        same(d.compute(), df)


@pytest.mark.kinds("ours", "ours2")
def test_the_service_process_dies_half_way(scheduler, launch, gate):
    """What it held of the shuffle is lost with it: the worker begins anew, and so does the shuffle."""
    go = gate("go")
    with Client(scheduler.address) as client:
        names = ["a", "b"] if launch.kind == "ours2" else ["a"]
        workers = [launch.worker(scheduler.address, name=name) for name in names]
        join(client, *workers)
        df = frame(3_000)
        d = dd.from_pandas(df, npartitions=6)
        d = d.map_partitions(slow_input, go, meta=d._meta).shuffle("key")
        future = client.compute(d)

        def sent(dask_scheduler):
            done = [ts for ts in dask_scheduler.tasks.values() if "transfer" in str(ts.key)]
            return sum(ts.state == "memory" for ts in done) >= 3

        eventually(lambda: client.run_on_scheduler(sent))
        pid = client.run(os.getpid, workers=[workers[0].address])[workers[0].address]
        os.kill(pid, 9)
        workers[0].process.wait_for("held a part of a shuffle")
        go.set()
        same(future.result(timeout=60), df)


@pytest.mark.kinds(*SOLO)
def test_files_are_gone_afterwards(client):
    same(dd.from_pandas(frame(2_000), npartitions=4).shuffle("key").compute(), frame(2_000))
    is_clean(client)

    def left():
        return [f for f in os.listdir(get_worker().local_directory) if re.match("shuffle-", f)]

    assert client.submit(left, pure=False).result() == []


@pytest.mark.kinds(*ALL)
def test_restart_between_shuffles(scheduler, launch):
    names = ["a", "b"] if launch.kind in PAIR else ["a"]
    with Client(scheduler.address) as client:
        join(client, *[launch.worker(scheduler.address, name=name) for name in names])
        df = frame(2_000)
        d = dd.from_pandas(df, npartitions=4).shuffle("key")
        same(d.compute(), df)
        client.restart()
        same(d.compute(), df)
