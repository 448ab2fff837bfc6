"""Actors: objects on a worker, with methods and attributes for clients, tasks and other actors."""

from __future__ import annotations

import asyncio
import gc
import operator
import os
import threading
import time

import numpy as np
import pytest
from distributed import Actor, Client, get_client, get_worker, wait
from harness import PAIR, SOLO, eventually, join


class Counter:
    # a handle asks the class what an attribute is
    n = 0
    step = 1

    def __init__(self, n=0):
        self.n = n
        self.lock = threading.Lock()

    def increment(self, by=1):
        self.n += by
        return self.n

    def fail(self):
        raise ZeroDivisionError("as asked")

    async def later(self, by):
        await asyncio.sleep(0.01)
        self.n += by
        return self.n

    def where(self):
        worker = get_worker()
        return worker.address, os.getpid()

    def unpicklable(self):
        return self.lock

    def large(self, n):
        return np.arange(n)

    def total(self, array, scale=1):
        return int(array.sum()) * scale

    def spawn(self, x):
        return get_client().submit(operator.neg, x, pure=False).result()

    def die(self):
        os._exit(3)


def test_methods_and_attributes(client):
    counter = client.submit(Counter, 5, actor=True).result()
    assert isinstance(counter, Actor)
    assert repr(counter).startswith("<Actor: Counter, key=Counter-")
    assert [counter.increment().result() for _ in range(3)] == [6, 7, 8]
    assert counter.increment(by=10).result() == 18
    assert counter.n == 18
    assert counter.step == 1
    assert "increment" in dir(counter)
    with pytest.raises(AttributeError):
        counter.nothing  # noqa: B018


def test_the_type_is_the_actors(client):
    future = client.submit(Counter, actor=True)
    wait(future)
    types = client.run_on_scheduler(lambda dask_scheduler: {ts.type for ts in dask_scheduler.tasks.values()})
    assert {t.rpartition(".")[2] for t in types} == {"Counter"}


def test_actors_from_other_callables(client):
    def make(n):
        return Counter(n)

    assert client.submit(make, 7, actor=True).result().increment().result() == 8


def test_errors_of_methods(client):
    counter = client.submit(Counter, actor=True).result()
    with pytest.raises(ZeroDivisionError, match="as asked"):
        counter.fail().result()
    assert counter.increment().result() == 1


def test_a_constructor_that_fails(client):
    class Bad:
        def __init__(self):
            raise ValueError("no actor")

    future = client.submit(Bad, actor=True)
    with pytest.raises(ValueError, match="no actor"):
        future.result()
    assert client.submit(operator.add, 1, 2, pure=False).result() == 3


def test_async_methods(client):
    counter = client.submit(Counter, actor=True).result()
    futures = [counter.later(1) for _ in range(5)]
    assert sorted(f.result() for f in futures) == [1, 2, 3, 4, 5]


def test_calls_in_a_row(client):
    counter = client.submit(Counter, actor=True).result()
    futures = [counter.increment() for _ in range(50)]
    assert sorted(f.result() for f in futures) == list(range(1, 51))
    assert counter.n == 50


def test_large_arguments_and_results(client):
    counter = client.submit(Counter, actor=True).result()
    assert counter.total(np.ones(1_000_000), scale=2).result() == 2_000_000
    np.testing.assert_array_equal(counter.large(500_000).result(), np.arange(500_000))


def test_actors_do_not_take_slots(client, cluster):
    """More actors than slots, and tasks besides them."""
    futures = client.map(Counter, range(6), actor=True, workers=[cluster.a], pure=False)
    counters = client.gather(futures)
    assert [c.increment().result() for c in counters] == list(range(1, 7))
    assert client.gather(client.map(operator.neg, range(10), workers=[cluster.a], pure=False)) == [
        -i for i in range(10)
    ]
    assert [c.n for c in counters] == list(range(1, 7))


def test_actors_behind_tasks(client, cluster, gate):
    """Actors and tasks wait for busy slots together, and nothing waits for an actor to end."""
    go = gate("go")
    on_a = {"workers": [cluster.a], "pure": False}
    blocking = client.map(lambda _: go.wait(), range(cluster.NTHREADS), **on_a)
    mixed = []
    for i in range(4):
        mixed.append(client.submit(Counter, i, actor=True, **on_a))
        mixed.append(client.submit(operator.neg, i, **on_a))
    go.set()
    assert all(client.gather(blocking))
    results = client.gather(mixed)
    assert results[1::2] == [0, -1, -2, -3]
    assert [counter.increment().result() for counter in results[::2]] == [1, 2, 3, 4]
    assert client.gather(client.map(operator.neg, range(5), **on_a)) == [0, -1, -2, -3, -4]


def test_actors_in_tasks(client, cluster):
    counter = client.submit(Counter, actor=True, workers=[cluster.a])

    def use(counter, n):
        return [counter.increment().result() for _ in range(n)]

    for worker in cluster.workers:
        client.submit(use, counter, 3, workers=[worker.address], pure=False).result()
    assert counter.result().n == 3 * len(cluster.workers)


def test_actors_made_in_tasks(scheduler, launch):
    """On workers of its own: the worker's client keeps the actor."""

    def make_and_use():
        counter = get_client().submit(Counter, 3, actor=True, pure=False).result()
        return counter.increment().result()

    with Client(scheduler.address) as client:
        join(client, launch.worker(scheduler.address))
        assert client.submit(make_and_use, pure=False).result() == 4


class Holder:
    """An actor that has another."""

    def __init__(self, counter):
        self.counter = counter

    def increment(self):
        return self.counter.increment().result()


def test_actors_of_actors(client):
    counter = client.submit(Counter, actor=True)
    holder = client.submit(Holder, counter, actor=True).result()
    assert [holder.increment().result() for _ in range(3)] == [1, 2, 3]
    assert counter.result().n == 3


def test_tasks_from_actors(client):
    counter = client.submit(Counter, actor=True).result()
    assert counter.spawn(5).result() == -5


@pytest.mark.kinds(*SOLO)
def test_the_actors_worker(client, cluster):
    counter = client.submit(Counter, actor=True).result()
    address, pid = counter.where().result()
    assert address in {w.address for w in cluster.workers}
    assert counter.where().result() == (address, pid)


@pytest.mark.kinds(*PAIR)
def test_actors_on_different_workers(client, cluster):
    futures = [
        client.submit(Counter, i, actor=True, workers=[w.address]) for i, w in enumerate(cluster.workers)
    ]
    counters = client.gather(futures)
    assert [c.where().result()[0] for c in counters] == [w.address for w in cluster.workers]
    assert [c.increment().result() for c in counters] == [1, 2]


def test_released_actors_are_gone(client, cluster):
    future = client.submit(Counter, actor=True, workers=[cluster.a])
    counter = future.result()
    pid = counter.where().result()[1]
    key = future.key
    counter = future = None

    def forgotten(dask_scheduler):
        return key not in dask_scheduler.tasks

    def released():
        # the client tells the scheduler when Python has collected the future, which may be in a cycle
        gc.collect()
        return client.run_on_scheduler(forgotten)

    eventually(released)
    if cluster.ours:
        eventually(lambda: not os.path.exists(f"/proc/{pid}"))


def test_async_client(cluster):
    async def use():
        async with Client(cluster.address, asynchronous=True) as client:
            counter = await client.submit(Counter, actor=True)
            assert await counter.increment() == 1
            assert await counter.n == 1

    asyncio.run(use())


def test_an_actor_whose_process_dies(scheduler, launch):
    """The error says so; the worker goes on."""
    with Client(scheduler.address) as client:
        worker = launch.worker(scheduler.address)
        join(client, worker)
        counter = client.submit(Counter, actor=True).result()
        calls = [counter.die(), counter.increment()]
        errors = []
        deadline = time.monotonic() + 30
        for call in calls:
            with pytest.raises((RuntimeError, OSError)) as caught:
                call.result(timeout=deadline - time.monotonic())
            errors.append(str(caught.value))
        if launch.ours:
            assert "exited with code 3" in errors[0]
            with pytest.raises(RuntimeError, match="exited with code 3"):
                counter.increment().result()
        assert client.submit(operator.add, 1, 2, pure=False).result() == 3
