"""Dask used from inside tasks: clients, futures, seceding, and the primitives that coordinate tasks."""

from __future__ import annotations

import operator
import time

import dask
import dask.array as da
import pytest
from dask import delayed
from distributed import (
    Event,
    Lock,
    Queue,
    Semaphore,
    Variable,
    as_completed,
    get_client,
    get_worker,
    rejoin,
    secede,
    wait,
    worker_client,
)
from harness import SOLO, eventually


def inc(x):
    return x + 1


# -- clients


def test_worker_client(client):
    def fib(n):
        if n < 2:
            return n
        with worker_client() as inner:
            a, b = inner.submit(fib, n - 1), inner.submit(fib, n - 2)
            return sum(inner.gather([a, b]))

    assert client.submit(fib, 5).result() == 5


def test_worker_client_on_every_slot_at_once(client, cluster):
    """More tasks that wait for others than there are slots: they leave theirs to those they wait for."""

    def outer(i):
        with worker_client() as inner:
            return sum(inner.gather(inner.map(operator.mul, range(5), [i] * 5)))

    futures = client.map(outer, range(8), workers=[cluster.a], pure=False)
    assert client.gather(futures) == [10 * i for i in range(8)]


def test_get_client(client):
    def outer(x):
        inner = get_client()
        return inner.submit(operator.neg, x).result()

    assert client.submit(outer, 5).result() == -5


def test_collections_inside_a_task(client):
    def outer(n):
        with worker_client():
            return float(da.ones(n, chunks=100).sum().compute())

    assert client.submit(outer, 1000).result() == 1000


def test_dask_compute_in_a_task(client):
    """Without a client of its own a task computes by the cluster it runs on."""

    def outer():
        with worker_client():
            return dask.compute(*[delayed(inc)(i) for i in range(5)])

    assert client.submit(outer, pure=False).result() == (1, 2, 3, 4, 5)


def test_scatter_in_a_task(client, cluster):
    def outer():
        with worker_client() as inner:
            future = inner.scatter({"inner": [1, 2]})
            return inner.submit(sum, future["inner"]).result()

    assert client.submit(outer, pure=False, workers=[cluster.a]).result() == 3


def test_as_completed_in_a_task(client):
    def outer():
        with worker_client() as inner:
            return sorted(f.result() for f in as_completed(inner.map(inc, range(5), pure=False)))

    assert client.submit(outer, pure=False).result() == [1, 2, 3, 4, 5]


def test_errors_of_inner_tasks(client):
    def outer():
        with worker_client() as inner:
            return inner.submit(operator.truediv, 1, 0, pure=False).exception()

    error = client.submit(outer, pure=False).result()
    assert type(error) is ZeroDivisionError
    assert error.args == ("division by zero",)


def test_published_datasets_in_a_task(client):
    x = client.submit(inc, 1)
    client.publish_dataset(shared=x)

    def outer():
        with worker_client() as inner:
            return inner.get_dataset("shared").result()

    assert client.submit(outer, pure=False).result() == 2
    client.unpublish_dataset("shared")


# -- the worker


@pytest.mark.kinds(*SOLO)
def test_get_worker(client, cluster, as_stock):
    def look():
        import distributed

        worker = get_worker()
        return {
            "class": isinstance(worker, distributed.Worker),
            "address": worker.address,
            "name": str(worker.name),
            "id": worker.id,
            "nthreads": worker.state.nthreads,
            "local_directory": worker.local_directory,
            "key": worker.get_current_task(),
        }

    seen = client.submit(look, key="looker", workers=[cluster.a]).result()
    info = client.scheduler_info(n_workers=-1)["workers"][cluster.a]
    assert seen == {
        "class": True,
        "address": cluster.a,
        "name": "a",
        "id": client.sync(lambda: client.rpc(cluster.a).identity())["id"],
        "nthreads": 2,
        "local_directory": info["local_directory"],
        "key": "looker",
    }


def test_secede_and_rejoin(client, cluster, gate):
    """More seceded tasks than slots run at once: the last lets the others go."""

    def guest(i, n):
        secede()
        gate(f"guest-{i}").set()
        for j in range(n):
            if not gate(f"guest-{j}").wait(20):
                return "alone"
        rejoin()
        return i

    futures = [client.submit(guest, i, 4, workers=[cluster.a], pure=False) for i in range(4)]
    assert client.gather(futures) == [0, 1, 2, 3]


def test_scheduler_knows_of_seceded_tasks(client, cluster, gate):
    def guest():
        secede()
        gate("seceded").set()
        gate("go").wait()

    futures = [client.submit(guest, key="guest", workers=[cluster.a])]
    assert gate("seceded").wait(20)
    eventually(
        lambda: client.run_on_scheduler(
            lambda dask_scheduler, a: (
                [str(t.key) for t in dask_scheduler.workers[a].long_running] == ["guest"]
            ),
            a=cluster.a,
        )
    )
    others = client.map(inc, range(4), workers=[cluster.a])
    assert client.gather(others) == [1, 2, 3, 4]
    gate("go").set()
    wait(futures)


# -- coordination


def test_event(client):
    def opener():
        Event("door").set()

    def waiter():
        return Event("door").wait(20)

    waiting = client.submit(waiter, pure=False)
    client.submit(opener, pure=False).result()
    assert waiting.result() is True
    assert Event("door").is_set()


def test_lock(client):
    def work(i):
        with Lock("one-at-a-time"):
            start = time.time()
            time.sleep(0.01)
            return start, time.time()

    spans = sorted(client.gather(client.map(work, range(4), pure=False)))
    assert all(earlier[1] <= later[0] for earlier, later in zip(spans, spans[1:], strict=False))


def test_semaphore(client):
    semaphore = Semaphore(max_leases=1, name="leases")

    def work(semaphore):
        with semaphore:
            start = time.time()
            time.sleep(0.01)
            return start, time.time()

    spans = sorted(client.gather([client.submit(work, semaphore, pure=False) for _ in range(4)]))
    assert all(earlier[1] <= later[0] for earlier, later in zip(spans, spans[1:], strict=False))
    semaphore.close()


def test_variable_and_queue(client):
    def put(i):
        Queue("numbers").put(i)
        Variable("latest").set(i)

    wait(client.map(put, range(5), pure=False))
    queue = Queue("numbers")
    assert sorted(queue.get(timeout=10) for _ in range(5)) == [0, 1, 2, 3, 4]
    assert Variable("latest").get(timeout=10) in range(5)
    Variable("latest").delete()
    queue.close()


def test_events_are_logged_from_tasks(client, cluster):
    def work():
        get_worker().log_event(["one-topic", "other-topic"], {"seen": True})

    client.submit(work, pure=False, workers=[cluster.a]).result()
    for topic in ("one-topic", "other-topic"):
        assert eventually(lambda topic=topic: client.get_events(topic))[0][1]["seen"] is True
