"""Large results that are used where they were made.

A stock worker's tasks share one process, and with it each other's results. With ours a large result stays in
the process that made it, until another one, a peer or a client asks for it.
"""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
from distributed import Client, wait
from harness import OURS, SOLO, join

pytestmark = pytest.mark.kinds(*SOLO)

#: Items of arrays that are large enough to stay.
COUNT = 500_000


def ones(path=None):
    if path is not None:
        with open(path, "a") as file:
            file.write(".")
    return np.ones(COUNT)


def add(array, number):
    array += number
    return float(array[0])


def twice(array):
    return array + array


class Odd:
    """Large, and nothing that could be sent anywhere."""

    def __init__(self):
        self.lock = threading.Lock()

    def __sizeof__(self):
        return 5_000_000

    def works(self):
        with self.lock:
            return True


def hold(array, ready, proceed):
    with open(ready, "w"):
        pass
    with open(proceed) as fifo:
        fifo.read()
    return float(array.sum())


@pytest.fixture
def client(scheduler, launch):
    worker = launch.worker(scheduler.address, nthreads=1)
    with Client(scheduler.address) as client:
        join(client, worker)
        yield client


def test_tasks_on_one_thread_share_their_inputs(client):
    array = client.submit(ones)
    assert client.submit(add, array, 1, pure=False).result() == 2
    assert client.submit(add, array, 1, pure=False).result() == 3


def test_what_cannot_be_serialized_is_used_where_it_is(client):
    odd = client.submit(Odd)
    assert client.submit(Odd.works, odd).result()


def test_chain(client):
    future = client.submit(ones)
    for _ in range(10):
        future = client.submit(twice, future)
    assert (future.result() == 2**10).all()


@pytest.mark.kinds(OURS)
def test_what_was_sent_does_not_change(client):
    array = client.submit(ones)
    assert array.result()[0] == 1
    assert client.submit(add, array, 1, pure=False).result() == 2
    assert array.result()[0] == 1


def test_result_of_a_busy_process(client, tmp_path):
    ready, proceed = tmp_path / "ready", tmp_path / "proceed"
    os.mkfifo(ready)
    os.mkfifo(proceed)
    array = client.submit(ones)
    sum_ = client.submit(hold, array, str(ready), str(proceed))
    with open(ready) as fifo:
        fifo.read()
    try:
        assert (array.result() == 1).all()
    finally:
        with open(proceed, "w"):
            pass
    assert sum_.result() == COUNT


@pytest.mark.scheduler(distributed__scheduler__allowed_failures=0)
def test_result_is_computed_again_when_its_process_is_lost(client, tmp_path):
    runs = tmp_path / "runs"
    array = client.submit(ones, str(runs))
    wait(array)
    client.submit(os._exit, 3).exception()
    assert client.submit(add, array, 1, pure=False).result() == 2
    assert runs.read_text() == ".."


@pytest.mark.scheduler(distributed__scheduler__allowed_failures=0)
def test_task_that_takes_its_inputs_along_ends(client, tmp_path):
    """It is not tried for ever, each time with inputs computed anew."""
    runs = tmp_path / "runs"
    array = client.submit(ones, str(runs))
    wait(array)
    assert client.submit(lambda array: os._exit(3), array).exception(timeout=60) is not None
    assert (array.result() == 1).all()
    assert len(runs.read_text()) <= 3


@pytest.mark.parametrize("nthreads", [2, 4])
def test_results_of_several_processes_come_together(scheduler, launch, nthreads):
    worker = launch.worker(scheduler.address, nthreads=nthreads)
    with Client(scheduler.address) as client:
        join(client, worker)
        parts = client.map(lambda i: np.full(COUNT, float(i)), range(8))
        while len(parts) > 1:
            pairs = zip(parts[::2], parts[1::2], strict=True)
            parts = [client.submit(np.add, one, two) for one, two in pairs]
        assert (parts[0].result() == sum(range(8))).all()


def test_results_reach_other_workers(scheduler, launch):
    workers = [launch.worker(scheduler.address, name=name, nthreads=1) for name in "ab"]
    with Client(scheduler.address) as client:
        join(client, *workers)
        one, two = (client.submit(ones, workers=[worker.address]) for worker in workers)
        assert (client.submit(np.add, one, two).result() == 2).all()
        client.replicate([one])
        assert len(client.who_has([one])[one.key]) == 2
        # a worker that leaves gives its results away
        client.retire_workers([workers[0].address])
        assert (one.result() == 1).all() and (two.result() == 1).all()
