"""Cancelling, releasing, stealing and rescheduling: tasks that end otherwise than by running through."""

from __future__ import annotations

import time
from concurrent.futures import CancelledError

import pytest
from distributed import Client, Reschedule, get_worker, wait
from harness import ALL, PAIR, eventually


def inc(x):
    return x + 1


def block(gate, name):
    gate(f"{name}-started").set()
    gate(f"{name}-go").wait()
    return name


def processing(client, address):
    return client.run_on_scheduler(
        lambda dask_scheduler: [str(t.key) for t in dask_scheduler.workers[address].processing]
    )


def test_cancel_of_a_waiting_task(client, cluster, gate):
    fill = [client.submit(block, gate, f"fill-{i}", workers=[cluster.a]) for i in range(2)]
    for i in range(2):
        assert gate(f"fill-{i}-started").wait(20)
    waiting = client.submit(inc, 1, workers=[cluster.a])
    dependent = client.submit(inc, waiting)
    waiting.cancel()
    with pytest.raises(CancelledError):
        waiting.result()
    with pytest.raises(CancelledError):
        dependent.result()
    for i in range(2):
        gate(f"fill-{i}-go").set()
    assert client.gather(fill) == ["fill-0", "fill-1"]


def test_cancel_of_a_running_task(client, cluster, gate):
    """The client is free at once; the worker goes on with other work."""
    running = client.submit(block, gate, "running", workers=[cluster.a])
    assert gate("running-started").wait(20)
    client.cancel([running])
    with pytest.raises(CancelledError):
        running.result(timeout=10)
    assert client.submit(inc, 1, workers=[cluster.a]).result(timeout=10) == 2
    gate("running-go").set()


def test_cancelled_and_asked_for_again_while_running(client, cluster, gate):
    first = client.submit(block, gate, "again", key="again", workers=[cluster.a])
    assert gate("again-started").wait(20)
    client.cancel([first])
    eventually(lambda: not client.run_on_scheduler(lambda dask_scheduler: "again" in dask_scheduler.tasks))
    # By somebody else: the first one may yet be told that it is cancelled.
    with Client(cluster.address, set_as_default=False) as other:
        second = other.submit(block, gate, "again", key="again", workers=[cluster.a])
        gate("again-go").set()
        assert second.result(timeout=20) == "again"


def test_released_while_running(client, cluster, gate):
    running = client.submit(block, gate, "released", workers=[cluster.a])
    assert gate("released-started").wait(20)
    key = running.key
    running.release()
    del running
    eventually(
        lambda: key not in processing(client, cluster.a), what="the released task leaves the worker's list"
    )
    gate("released-go").set()
    assert client.submit(inc, 1, workers=[cluster.a]).result(timeout=10) == 2


def test_release_of_intermediate_results(client, cluster):
    x = client.submit(bytes, 1_000_000, key="x")
    y = client.submit(len, x, key="y")
    assert y.result() == 1_000_000
    x.release()
    # The scheduler goes on knowing what y was made of, but nobody holds it.
    eventually(lambda: not client.who_has()["x"])
    assert client.has_what()[client.who_has()["y"][0]] == ("y",)
    y.release()
    eventually(lambda: not any(client.has_what().values()))


def test_results_released_free_the_workers_memory(client, cluster):
    x = client.submit(bytes, 50_000_000, workers=[cluster.a])
    wait(x)

    def managed():
        return client.run_on_scheduler(
            lambda dask_scheduler, a=cluster.a: dask_scheduler.workers[a].metrics["managed_bytes"]
        )

    eventually(lambda: managed() >= 50_000_000, what="managed_bytes in a heartbeat")
    x.release()
    eventually(lambda: managed() < 1_000_000, what="managed_bytes in a heartbeat after the release")


def test_cancel_force_of_a_result(client):
    x = client.submit(inc, 1)
    assert x.result() == 2
    client.cancel([x], force=True)
    assert x.cancelled()


def test_reschedule(client, tally):
    runs = tally("rescheduled")

    def third_time():
        if runs.add() < 3:
            raise Reschedule
        return runs.count

    assert client.submit(third_time, pure=False).result(timeout=20) == 3


def test_reschedule_does_not_count_as_a_retry(client, tally):
    runs = tally("rescheduled")

    def task():
        if runs.add() < 4:
            raise Reschedule()
        raise ValueError(runs.count)

    with pytest.raises(ValueError) as e:
        client.submit(task, pure=False, retries=0).result(timeout=20)
    assert e.value.args == (4,)


@pytest.mark.kinds(*PAIR)
@pytest.mark.parametrize("direction", ["from-a", "from-b"])
def test_steal(client, cluster, direction):
    """Tasks that all went to one worker, since it held their input, are taken over by the idle one."""
    source = cluster.a if direction == "from-a" else cluster.b
    held = client.submit(inc, 0, workers=[source], key=f"held-{direction}")
    wait(held)

    def slow(x, i):
        time.sleep(0.05)
        return get_worker().address

    futures = client.map(slow, [held] * 40, range(40), workers=[cluster.a, cluster.b], pure=False)
    counts = client.gather(futures)
    assert set(counts) == {cluster.a, cluster.b}
    assert len(counts) == 40


@pytest.mark.kinds(*PAIR)
@pytest.mark.parametrize("direction", ["from-a", "from-b"])
def test_no_task_runs_twice_when_stolen(client, cluster, direction, tally):
    source = cluster.a if direction == "from-a" else cluster.b
    held = client.submit(inc, 0, workers=[source], key=f"once-{direction}")
    wait(held)

    def count(x, i):
        tally(i).add()
        time.sleep(0.02)
        return i

    futures = client.map(count, [held] * 60, range(60), pure=False)
    assert client.gather(futures) == list(range(60))
    assert [tally(i).count for i in range(60)] == [1] * 60


@pytest.mark.kinds(*PAIR)
def test_a_waiting_task_behind_a_long_one_is_stolen(client, cluster, gate):
    """What is queued behind tasks that do not end goes to the other worker, wherever the queue is kept."""
    held = client.submit(inc, 0, workers=[cluster.a], key="stolen-input")

    def slowly(x, i):
        time.sleep(0.2)
        return get_worker().address

    # Now the scheduler knows how long tasks of this prefix take, and that stealing them pays.
    client.submit(slowly, held, -1, key="slowly-first").result()
    fill = [client.submit(block, gate, f"long-{i}", workers=[cluster.a]) for i in range(2)]
    for i in range(2):
        assert gate(f"long-{i}-started").wait(20)

    futures = client.map(slowly, [held] * 6, range(6), pure=False, key=[f"slowly-{i}" for i in range(6)])
    assert set(client.gather(futures)) == {cluster.b}
    for i in range(2):
        gate(f"long-{i}-go").set()
    client.gather(fill)


@pytest.mark.kinds(*ALL)
def test_cancel_storm(client):
    """Half of a thousand tasks cancelled as they run: the others are all right."""
    futures = client.map(inc, range(1000), pure=False)
    client.cancel(futures[::2])
    assert client.gather(futures[1::2]) == list(range(2, 1001, 2))
