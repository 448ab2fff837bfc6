"""Tasks that take their process down.

On stock that process is the worker: the nanny starts another, all results it held are lost and computed
again, and the scheduler blames every task that ran there. With ours a crash costs the one task that
crashed: it is tried once more in a fresh process, then errs; results stay, the worker's address stays, what
was queued runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

import pytest
from distributed import Client, KilledWorker, wait
from harness import SOLO, eventually, join

pytestmark = pytest.mark.kinds(*SOLO)

# One lost worker is enough for the blame, which spares stock three restarts for each test.
strict = pytest.mark.scheduler(distributed__scheduler__allowed_failures=0)


def exit_at_once():
    os._exit(3)


def exit_politely():
    sys.exit(4)


def interrupt():
    raise KeyboardInterrupt


def kill_myself():
    os.kill(os.getpid(), signal.SIGKILL)


def fault():
    ctypes.string_at(0)


def abort():
    os.abort()


def say_something_and_exit():
    print("famous last words", flush=True)
    print("and some on stderr", file=sys.stderr, flush=True)
    os._exit(7)


def inc(x):
    return x + 1


@pytest.fixture
def worker(launch, scheduler):
    return launch.worker(scheduler.address)


@pytest.fixture
def client(scheduler, worker):
    with Client(scheduler.address) as client:
        join(client, worker)
        yield client


@strict
@pytest.mark.parametrize(
    ("crash", "told"),
    [
        (exit_at_once, r"code 3\b"),
        (exit_politely, r"code 4\b"),
        (kill_myself, r"signal 9 \(SIGKILL\)"),
        (fault, r"signal 11 \(SIGSEGV\)"),
        (abort, r"signal 6 \(SIGABRT\)"),
        (interrupt, r"signal 2 \(SIGINT\)"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_crash_costs_the_task_alone(client, worker, tally, crash, told):
    kept = client.submit(lambda: tally("kept").add() and "kept", key="kept")
    assert kept.result(timeout=20) == "kept"

    def task():
        tally("crashed").add()
        crash()

    future = client.submit(task, key="crashing")
    if worker.ours:
        with pytest.raises(RuntimeError, match=told) as e:
            future.result(timeout=30)
        assert "crashing" in str(e.value)
        assert tally("crashed").count == 2
        assert kept.result(timeout=10) == "kept"
        assert tally("kept").count == 1
        assert client.who_has(kept)["kept"] == (worker.address,)
        assert client.submit(inc, 1, workers=[worker.address]).result(timeout=20) == 2
    else:
        with pytest.raises(KilledWorker):
            future.result(timeout=30)
        # Computed again, by the worker's successor at another address.
        assert kept.result(timeout=30) == "kept"
        assert tally("kept").count == 2
        assert worker.address not in client.scheduler_info()["workers"]


@strict
def test_the_error_quotes_the_last_words(client, worker):
    error = client.submit(say_something_and_exit).exception(timeout=30)
    if worker.ours:
        assert "famous last words" in str(error)
        assert "and some on stderr" in str(error)
    else:
        assert isinstance(error, KilledWorker)
    # On both the operator finds them in the worker's log.
    worker.process.wait_for("famous last words")
    worker.process.wait_for("and some on stderr")


@strict
def test_retries_count_on_top(client, worker, tally):
    def task():
        tally("tries").add()
        os._exit(1)

    error = client.submit(task, retries=1).exception(timeout=60)
    if worker.ours:
        assert type(error) is RuntimeError
        assert tally("tries").count == 4
    else:
        # A lost worker is not an error that ``retries`` is about.
        assert isinstance(error, KilledWorker)
        assert tally("tries").count == 1


def test_crash_once_then_all_right(client, tally):
    """With the scheduler's default patience, stock tries again too, on a new worker process."""

    def task():
        if tally("once").add() == 1:
            os._exit(1)
        return "second time lucky"

    assert client.submit(task).result(timeout=60) == "second time lucky"
    assert tally("once").count == 2


@strict
def test_running_and_queued_neighbours_are_not_blamed(client, worker, tally, gate):
    """A task on the other slot runs through, and what waits behind the crash runs once."""

    def neighbour():
        tally("neighbour").add()
        gate("neighbour-started").set()
        gate("neighbour-go").wait()
        return "through"

    def crash():
        gate("neighbour-started").wait()
        os._exit(1)

    def queued(i):
        tally(f"queued-{i}").add()
        return i

    running = client.submit(neighbour, key="neighbour")
    crashing = client.submit(crash, key="crash")
    behind = client.map(queued, range(10))
    assert gate("neighbour-started").wait(30)
    error = crashing.exception(timeout=30)
    if worker.ours:
        assert type(error) is RuntimeError
        assert client.gather(behind) == list(range(10))
        assert running.status == "pending"
        gate("neighbour-go").set()
        assert running.result(timeout=20) == "through"
        assert tally("neighbour").count == 1
        assert [tally(f"queued-{i}").count for i in range(10)] == [1] * 10
    else:
        # The neighbour is blamed for having run in the same process.
        assert isinstance(error, KilledWorker)
        with pytest.raises(KilledWorker):
            running.result(timeout=20)
        gate("neighbour-go").set()


def test_dependents_of_results_that_outlived_a_crash(client, worker, tally):
    import numpy as np

    parts = [client.submit(lambda i: tally(f"part-{i}").add() and np.full(50_000, i), i) for i in range(4)]
    wait(parts)
    crash = client.submit(exit_at_once)
    if worker.ours:
        assert type(crash.exception(timeout=30)) is RuntimeError
    else:
        # It would take three more workers with it; one is enough here.
        eventually(lambda: worker.address not in client.scheduler_info()["workers"], 30)
        crash.release()
    total = client.submit(lambda xs: sum(int(x[-1]) for x in xs), parts)
    assert total.result(timeout=60) == 6
    if worker.ours:
        assert [tally(f"part-{i}").count for i in range(4)] == [1] * 4


def test_many_crashes_in_a_row(client, worker, gate):
    """The worker goes on, with all its slots."""
    # the scheduler sends the task again as soon as a stock worker is back, and a crash then may end the nanny
    n = 20 if worker.ours else 0
    for _ in range(n):
        crash = client.submit(exit_at_once, pure=False, retries=0)
        assert type(crash.exception(timeout=30)) is RuntimeError

    def meet(i):
        gate(f"meet-{i}").set()
        return gate(f"meet-{1 - i}").wait(20)

    assert client.gather(client.map(meet, range(2))) == [True, True]


def test_python_killed_from_outside_while_idle(client, worker):
    """Every Python process below the worker, one by one, as an operator or the kernel might."""
    kept = client.submit(inc, 1, key="kept")
    assert kept.result() == 2
    victims = worker.process.children()
    assert victims
    for pid in victims if worker.ours else victims[:1]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        assert client.submit(inc, 10, pure=False).result(timeout=30) == 11
    if worker.ours:
        assert kept.result(timeout=10) == 2
        assert client.who_has(kept)["kept"] == (worker.address,)


@strict
def test_crash_in_client_run(client, worker):
    """On stock it is the worker that goes; with ours, what ``client.run`` runs in, and results stay."""
    kept = client.submit(inc, 1, key="kept")
    assert kept.result() == 2
    client.run(os._exit, 1, on_error="return")
    if worker.ours:
        assert client.run(lambda: "again", workers=[worker.address]) == {worker.address: "again"}
        assert client.who_has(kept)["kept"] == (worker.address,)
        assert kept.result(timeout=10) == 2
    else:
        eventually(lambda: worker.address not in client.scheduler_info()["workers"], 30)
    assert client.submit(inc, 5).result(timeout=30) == 6
