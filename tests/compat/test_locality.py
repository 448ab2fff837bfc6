"""Where data lies: what the workers report, what the scheduler makes of it, and that both tell the truth."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from distributed import get_worker, wait
from harness import ALL, PAIR, eventually

pytestmark = pytest.mark.kinds(*PAIR)

both_ways = pytest.mark.parametrize("direction", ["a-to-b", "b-to-a"])


def ends(cluster, direction):
    return (cluster.a, cluster.b) if direction == "a-to-b" else (cluster.b, cluster.a)


def where(*args, **kwargs):
    return get_worker().address


def held(client, address):
    """The keys that a worker has in truth, asked of itself."""

    async def keys():
        return await client.rpc(address).keys()

    return set(client.sync(keys))


def truthful(client, cluster):
    """Wait until workers and scheduler agree, and return who holds what."""
    known = {}

    def agree():
        nonlocal known
        known = {address: set(keys) for address, keys in client.has_what().items()}
        return known == {w.address: held(client, w.address) for w in cluster.workers}

    eventually(agree, what="workers and scheduler agree on who has what")
    return known


# -- work goes to the data


@both_ways
def test_task_is_sent_to_the_holder_of_its_large_input(client, cluster, direction):
    here, _ = ends(cluster, direction)
    large = [client.submit(np.ones, 2_500_000, workers=[here], pure=False) for _ in range(4)]
    wait(large)
    assert set(client.gather([client.submit(where, x, pure=False) for x in large])) == {here}


@both_ways
def test_task_is_sent_to_the_holder_of_the_larger_input(client, cluster, direction):
    here, there = ends(cluster, direction)
    large = client.submit(np.ones, 2_500_000, workers=[here], pure=False)
    small = client.submit(np.ones, 1000, workers=[there], pure=False)
    wait([large, small])
    for _ in range(3):
        assert client.submit(where, small, large, pure=False).result() == here


@both_ways
def test_large_scattered_data_draws_work(client, cluster, direction):
    here, _ = ends(cluster, direction)
    (x,) = client.scatter([np.ones(2_500_000)], workers=[here], hash=False)
    assert client.submit(where, x, pure=False).result() == here


@both_ways
def test_fetched_input_is_reported_as_a_second_copy(client, cluster, direction):
    here, there = ends(cluster, direction)
    x = client.submit(np.ones, 200_000, workers=[here], pure=False)
    wait(x)
    assert client.who_has(x)[x.key] == (here,)
    y = client.submit(np.sum, x, workers=[there])
    assert y.result() == 200_000
    eventually(lambda: set(client.who_has(x)[x.key]) == {here, there})
    assert truthful(client, cluster) == {here: {x.key}, there: {x.key, y.key}}


@both_ways
def test_released_data_is_gone_from_every_holder(client, cluster, direction):
    here, there = ends(cluster, direction)
    x = client.submit(np.ones, 200_000, workers=[here], pure=False)
    y = client.submit(np.sum, x, workers=[there])
    wait(y)
    x.release()
    eventually(lambda: held(client, here) == set() and held(client, there) == {y.key})


# -- moving data on request


@both_ways
def test_replicate(client, cluster, direction):
    here, there = ends(cluster, direction)
    futures = [client.submit(np.full, 50_000, i, workers=[here], pure=False) for i in range(5)]
    wait(futures)
    client.replicate(futures, workers=[there])
    keys = {f.key for f in futures}
    assert truthful(client, cluster) == {here: keys, there: keys}
    assert {frozenset(v) for v in client.who_has(futures).values()} == {frozenset([here, there])}


def test_replicate_to_n_and_reduce_by_the_memory_manager(client, cluster):
    x = client.submit(np.ones, 100_000, workers=[cluster.a], pure=False)
    client.replicate(x, n=2)
    assert truthful(client, cluster) == {cluster.a: {x.key}, cluster.b: {x.key}}
    client.amm.run_once()
    eventually(lambda: len(client.who_has(x)[x.key]) == 1)
    known = truthful(client, cluster)
    assert sorted(len(keys) for keys in known.values()) == [0, 1]
    assert x.result().sum() == 100_000


@both_ways
def test_rebalance(client, cluster, direction):
    here, there = ends(cluster, direction)
    futures = [client.submit(np.full, 500_000, i, workers=[here], pure=False) for i in range(10)]
    wait(futures)
    client.rebalance()
    known = truthful(client, cluster)
    assert 4 <= len(known[there]) <= 6
    assert known[here] | known[there] == {f.key for f in futures}
    assert not known[here] & known[there]
    assert [int(x[0]) for x in client.gather(futures)] == list(range(10))


# -- scatter


def test_scatter_to_one_worker(client, cluster):
    for address in (cluster.a, cluster.b):
        future = client.scatter({"scattered": 1}, workers=[address])["scattered"]
        assert truthful(client, cluster)[address] == {"scattered"}
        assert client.submit(lambda x: x + 1, future).result() == 2
        future.release()
        eventually(lambda: not client.who_has())


def test_scatter_broadcast(client, cluster):
    x = client.scatter(np.arange(300_000), broadcast=True)
    assert truthful(client, cluster) == {cluster.a: {x.key}, cluster.b: {x.key}}
    sums = [client.submit(np.sum, x, workers=[w.address], pure=False) for w in cluster.workers]
    assert client.gather(sums) == [np.arange(300_000).sum()] * 2


@pytest.mark.kinds(*ALL)
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "through-scheduler"])
def test_scatter_and_gather(client, cluster, direct, as_stock):
    values = {
        "bytes": b"x" * 10,
        ("tuple", 1): np.arange(20_000),
        b"raw\x00": [1, {"a": 2}],
        "frame": pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}),
        "empty": np.empty(0),
    }
    futures = client.scatter(values, direct=direct)
    assert set(futures) == set(values)
    got = client.gather(futures, direct=direct)
    assert got["bytes"] == values["bytes"] and got[b"raw\x00"] == values[b"raw\x00"]
    np.testing.assert_array_equal(got["tuple", 1], values["tuple", 1])
    assert got["frame"].equals(values["frame"])
    assert len(got["empty"]) == 0
    assert {k for keys in client.has_what().values() for k in keys} == set(values)
    as_stock(
        client.run_on_scheduler(
            lambda dask_scheduler: sorted((str(k), t.nbytes, t.type) for k, t in dask_scheduler.tasks.items())
        )
    )


@pytest.mark.kinds(*ALL)
def test_scatter_hash_names_data_by_content(client):
    one, two = client.scatter(np.arange(100)), client.scatter(np.arange(100))
    other = client.scatter(np.arange(101))
    assert one.key == two.key != other.key
    unhashed = [client.scatter(5, hash=False) for _ in range(2)]
    assert unhashed[0].key != unhashed[1].key


@pytest.mark.kinds(*ALL)
def test_scattered_arrays_can_be_written_by_tasks_or_not_as_on_stock(client, cluster, as_stock):
    small, large = client.scatter([np.ones(10), np.ones(500_000)], workers=[cluster.a])
    writable = [
        client.submit(lambda x: x.flags.writeable, x, workers=[cluster.a]).result() for x in (small, large)
    ]
    as_stock(writable)


@pytest.mark.kinds(*ALL)
def test_scatter_many(client):
    futures = client.scatter(list(range(500)))
    assert client.gather(futures) == list(range(500))
    assert client.submit(sum, futures).result() == sum(range(500))


@pytest.mark.kinds(*ALL)
def test_scatter_large(client):
    x = np.random.default_rng(0).random(6_000_000)
    future = client.scatter(x)
    assert client.submit(lambda v: float(v.sum()), future).result() == pytest.approx(x.sum())
    np.testing.assert_array_equal(client.gather(future, direct=True), x)


def test_gather_from_both_at_once(client, cluster):
    futures = [
        client.submit(np.full, 20_000, i, workers=[cluster.workers[i % 2].address], pure=False)
        for i in range(30)
    ]
    for direct in (True, False):
        assert [int(x[-1]) for x in client.gather(futures, direct=direct)] == list(range(30))


# -- what transfers leave behind in the scheduler


def transfers(client, address):
    return client.scheduler_info(n_workers=-1)["workers"][address]["metrics"]["transfer"]


@both_ways
def test_bandwidths_and_counters_of_transfers(client, cluster, direction):
    here, there = ends(cluster, direction)
    incoming = transfers(client, there)["incoming_count_total"]
    outgoing = transfers(client, here)["outgoing_count_total"]
    for _ in range(3):
        x = client.submit(np.ones, 1_000_000, workers=[here], pure=False)
        assert client.submit(np.sum, x, workers=[there], pure=False).result() == 1_000_000

    def known():
        return client.run_on_scheduler(
            lambda dask_scheduler: (
                dict(dask_scheduler.bandwidth_workers),
                dict(dask_scheduler.bandwidth_types),
            )
        )

    workers, types = eventually(
        lambda: (k := known()) and (there, here) in k[0] and "numpy.ndarray" in k[1] and k
    )
    assert 1e6 < workers[there, here] < 1e12
    assert 1e6 < types["numpy.ndarray"] < 1e12
    eventually(lambda: transfers(client, there)["incoming_count_total"] >= incoming + 3)
    eventually(lambda: transfers(client, here)["outgoing_count_total"] >= outgoing + 3)
    # a heartbeat in the middle of a transfer shows it until the next one
    eventually(lambda: transfers(client, there)["incoming_count"] == 0)
    eventually(lambda: transfers(client, there)["incoming_bytes"] == 0)


@both_ways
def test_many_small_inputs_from_the_other_worker(client, cluster, direction):
    here, there = ends(cluster, direction)
    parts = client.map(lambda i: i, range(400), workers=[here], pure=False)
    total = client.submit(sum, parts, workers=[there])
    assert total.result() == sum(range(400))


@both_ways
def test_large_inputs_from_the_other_worker(client, cluster, direction):
    here, there = ends(cluster, direction)
    parts = [client.submit(np.full, 1_500_000, i, workers=[here], pure=False) for i in range(12)]
    total = client.submit(lambda xs: [int(x[-1]) for x in xs], parts, workers=[there])
    assert total.result() == list(range(12))


def test_cross_traffic(client, cluster):
    """Both workers make, send and receive at the same time."""
    level = [
        client.submit(np.full, 50_000, i, workers=[cluster.workers[i % 2].address], pure=False)
        for i in range(16)
    ]
    for step in range(4):
        level = [
            client.submit(
                lambda x, y: x + y,
                level[i],
                level[(i + 1) % 16],
                workers=[cluster.workers[(i + step) % 2].address],
                pure=False,
            )
            for i in range(16)
        ]
    values = list(range(16))
    for _ in range(4):
        values = [values[i] + values[(i + 1) % 16] for i in range(16)]
    assert [int(x[0]) for x in client.gather(level)] == values
