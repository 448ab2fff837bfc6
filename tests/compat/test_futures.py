"""The futures interface: submit, map, wait, as_completed, and the options that say where and when."""

from __future__ import annotations

import asyncio
import operator
import threading
import time

import pytest
from distributed import Client, as_completed, fire_and_forget, get_worker, wait
from harness import PAIR, eventually


def inc(x):
    return x + 1


def constrained(client, address):
    """Tasks that wait for resources on a worker, by its own latest word."""
    worker = client.scheduler_info(n_workers=-1)["workers"][address]
    return worker["metrics"]["task_counts"].get("constrained", 0)


def where(*args):
    return get_worker().address


def test_submit_with_dependencies(client):
    x = client.submit(inc, 1)
    y = client.submit(inc, x)
    z = client.submit(operator.add, x, y)
    nested = client.submit(lambda d, k: (d, k), {"xs": [x, (y, z)]}, k=[{"z": z}])
    assert nested.result() == ({"xs": [2, (3, 5)]}, [{"z": 5}])
    assert [f.status for f in (x, y, z)] == ["finished"] * 3


def test_map_of_several_iterables_with_kwargs(client):
    futures = client.map(lambda a, b, c=0: (a, b, c), range(10), range(10, 20), c=client.submit(inc, 4))
    assert client.gather(futures) == [(i, i + 10, 5) for i in range(10)]


def test_map_with_explicit_keys(client):
    futures = client.map(inc, [1, 2, 3], key=["one", "two", "three"])
    assert [f.key for f in futures] == ["one", "two", "three"]
    assert client.gather(futures) == [2, 3, 4]


def test_map_in_batches(client):
    assert client.gather(client.map(inc, range(60), batch_size=20)) == list(range(1, 61))


def test_many_small_tasks(client):
    futures = client.map(inc, range(1500))
    assert sum(client.gather(futures)) == sum(range(1, 1501))


def test_pure_tasks_run_once_impure_ones_each_time(client):
    def unique():
        return object.__new__(object).__repr__(), time.perf_counter_ns()

    a, b = client.submit(unique, pure=True), client.submit(unique, pure=True)
    assert a.key == b.key
    assert a.result() == b.result()
    c, d = client.submit(unique, pure=False), client.submit(unique, pure=False)
    assert c.key != d.key
    assert c.result() != d.result()


def test_as_completed_in_order_of_completion(client, gate):
    events = [gate(f"step-{i}") for i in range(3)]

    def step(i):
        events[i].wait()
        return i

    futures = [
        client.submit(step, i, pure=False, workers=list(client.scheduler_info()["workers"])[:1])
        for i in (0, 1)
    ]
    # Two threads, two tasks: both wait at once, and end in the order in which they are let go.
    got = []
    completed = as_completed(futures, with_results=True)
    events[1].set()
    got.append(next(completed)[1])
    events[0].set()
    got.append(next(completed)[1])
    assert got == [1, 0]


def test_as_completed_adding_futures(client):
    completed = as_completed([client.submit(inc, 0)])
    seen = []
    for future in completed:
        value = future.result()
        seen.append(value)
        if value < 5:
            completed.add(client.submit(inc, value))
    assert seen == [1, 2, 3, 4, 5]


def test_wait_all_first_completed_and_timeout(client, gate):
    go = gate("go")
    blocked = client.submit(lambda: go.wait(), pure=False)
    done = client.submit(inc, 1)
    first = wait([blocked, done], return_when="FIRST_COMPLETED")
    assert first.done == {done} and first.not_done == {blocked}
    with pytest.raises(asyncio.TimeoutError):  # Python 3.10 does not call it the same
        wait(blocked, timeout=0.05)
    with pytest.raises(asyncio.TimeoutError):  # Python 3.10 does not call it the same
        blocked.result(timeout=0.05)
    go.set()
    assert wait([blocked, done]).not_done == set()


def test_callback_and_async_result(client):
    called = threading.Event()
    future = client.submit(inc, 1)
    future.add_done_callback(lambda f: called.set())
    assert called.wait(10)


def test_future_as_argument_and_released(client):
    x = client.submit(list, range(5))
    y = client.submit(sum, x)
    del x
    assert y.result() == 10


def test_retries(client, tally):
    def flaky(n, runs):
        if runs.add() < n:
            raise ValueError(f"try {runs.count}")
        return runs.count

    assert client.submit(flaky, 3, tally("enough"), retries=5, pure=False).result() == 3
    with pytest.raises(ValueError, match="^try 2$"):
        client.submit(flaky, 10, tally("too few"), retries=1, pure=False).result()


def filled(client, address, gate, name):
    """Fill the worker's threads with tasks that wait for the event ``name``."""

    def hold(i):
        gate(f"{name}-{i}").set()
        gate(name).wait()

    fill = [client.submit(hold, i, pure=False, workers=[address]) for i in range(2)]
    for i in range(2):
        assert gate(f"{name}-{i}").wait(20)
    return fill


def test_priorities(client, cluster, gate):
    """Held back behind tasks that fill the worker's threads, the others run by priority."""
    fill = filled(client, cluster.a, gate, "hold-priorities")
    order = [3, -5, 10, 0, 7]
    futures = [
        client.submit(lambda n: (time.time(), n), n, workers=[cluster.a], priority=n, resources={"BAR": 1})
        for n in order
    ]
    eventually(lambda: constrained(client, cluster.a) == 5)
    gate("hold-priorities").set()
    assert [n for _, n in sorted(client.gather(futures))] == sorted(order, reverse=True)
    client.gather(fill)


def test_fifo_within_one_priority(client, cluster, gate):
    fill = filled(client, cluster.a, gate, "hold-fifo")
    futures = [
        client.submit(
            lambda i: (time.time(), i), i, workers=[cluster.a], resources={"BAR": 1}, fifo_timeout="0 ms"
        )
        for i in range(6)
    ]
    eventually(lambda: constrained(client, cluster.a) == 6)
    gate("hold-fifo").set()
    assert [i for _, i in sorted(client.gather(futures))] == list(range(6))
    client.gather(fill)


def test_resources_limit_how_many_run_at_once(client, cluster):
    def busy():
        start = time.time()
        time.sleep(0.03)
        return start, time.time()

    futures = [client.submit(busy, resources={"BAR": 1}, pure=False, workers=[cluster.a]) for _ in range(4)]
    spans = sorted(client.gather(futures))
    assert all(earlier[1] <= later[0] for earlier, later in zip(spans, spans[1:], strict=False))


def test_resources_that_nobody_has_wait(client):
    future = client.submit(inc, 1, resources={"GPU": 1})
    other = client.submit(inc, 2)
    assert other.result() == 3
    state = client.run_on_scheduler(
        lambda dask_scheduler: {str(k): t.state for k, t in dask_scheduler.tasks.items()}
    )
    assert state[future.key] == "no-worker"


def test_resources_are_told_to_the_scheduler(client, cluster):
    for worker in client.scheduler_info(n_workers=-1)["workers"].values():
        assert worker["resources"] == {"FOO": 2.0, "BAR": 1.0}


@pytest.mark.kinds(*PAIR)
def test_worker_restrictions(client, cluster):
    a = client.map(where, range(6), workers=[cluster.a], pure=False)
    b = client.map(where, range(6), workers="b", pure=False)
    assert set(client.gather(a)) == {cluster.a}
    assert set(client.gather(b)) == {cluster.b}


def test_worker_restriction_to_nobody(client, cluster):
    stuck = client.submit(inc, 1, workers=["127.0.0.1:9"])
    free = client.submit(where, workers=["127.0.0.1:9"], allow_other_workers=True)
    assert free.result() in {w.address for w in cluster.workers}
    assert stuck.status == "pending"


def test_coroutine_tasks_run_side_by_side(client, cluster):
    """More coroutines than threads, each waiting for a word from the last one."""

    async def meet(i, n):
        # Coroutines share the worker's event loop and do not take a thread each... but a slot they do take.
        await asyncio.sleep(0.01)
        return i

    assert client.gather(client.map(meet, range(10), n=10)) == list(range(10))


def test_coroutine_task_with_dependencies_and_errors(client):
    async def double(x):
        await asyncio.sleep(0)
        return 2 * x

    async def fail(x):
        await asyncio.sleep(0)
        raise LookupError("not", "there", x)

    x = client.submit(double, client.submit(inc, 1))
    assert client.submit(double, x).result() == 8
    with pytest.raises(LookupError) as e:
        client.submit(fail, x).result()
    assert e.value.args == ("not", "there", 4)


def test_fire_and_forget(client, gate):
    done = gate("forgotten")
    fire_and_forget(client.submit(lambda: done.set(), pure=False))
    assert done.wait(10)


def test_sequences_of_keys_with_annotations(client, cluster):
    import dask

    with dask.annotate(workers=[cluster.a], priority=5, resources={"FOO": 1}):
        parts = [dask.delayed(where)(i) for i in range(3)]
    assert set(dask.compute(*parts)) == {cluster.a}


def test_concurrent_futures_executor(client):
    with client.get_executor(pure=False) as executor:
        assert list(executor.map(inc, range(10))) == list(range(1, 11))
        assert executor.submit(inc, 1).result(10) == 2


def test_two_clients_share_a_result(client, cluster):
    future = client.submit(inc, 10, key="shared-key")
    client.publish_dataset(kept=future)
    with Client(cluster.address, set_as_default=False) as other:
        same = other.get_dataset("kept")
        assert same.key == "shared-key"
        assert same.result() == 11
        assert other.submit(inc, same).result() == 12
    client.unpublish_dataset("kept")
