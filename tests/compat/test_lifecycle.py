"""Coming, going and coming back: registration, lost schedulers and peers, retirement, pauses, signals."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time

import numpy as np
import pytest
from distributed import Client, get_worker, wait
from distributed.comm import CommClosedError
from harness import PAIR, SOLO, alive, eventually, join, worker_names

pytestmark = pytest.mark.kinds(*SOLO)


def inc(x):
    return x + 1


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def ended(process, timeout=20):
    """The exit code of a process that is to end by itself."""
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"{process.name} is still there after {timeout} s") from None


@pytest.fixture
def client(scheduler):
    with Client(scheduler.address) as client:
        yield client


# -- coming


def test_scheduler_that_is_not_there_yet(launch):
    port = free_port()
    worker = launch.worker(f"tcp://127.0.0.1:{port}", "--no-nanny")
    worker.process.wait_for(rf"Waiting to connect to:\s+tcp://127.0.0.1:{port}")
    launch.scheduler(port=port)
    with Client(f"tcp://127.0.0.1:{port}") as client:
        join(client, worker)
        assert client.submit(inc, 1).result(timeout=30) == 2


def test_scheduler_file_that_is_not_there_yet(launch, tmp_path):
    path = tmp_path / "scheduler.json"
    worker = launch.worker(None, f"--scheduler-file={path}", "--no-nanny")
    scheduler = launch.scheduler(f"--scheduler-file={path}")
    with Client(scheduler.address) as client:
        join(client, worker)
        assert client.submit(inc, 1).result(timeout=30) == 2


def test_scheduler_address_from_the_environment(launch, scheduler, client):
    worker = launch.worker(None, "--no-nanny", config={"scheduler-address": scheduler.address})
    join(client, worker)
    assert client.submit(inc, 1).result(timeout=30) == 2


def test_log_lines_that_scripts_wait_for(launch, scheduler, client):
    worker = launch.worker(scheduler.address)
    join(client, worker)
    worker.process.wait_for(rf"Start worker at:\s+'?{worker.address}")
    worker.process.wait_for(rf"Registered to:\s+'?{scheduler.address}")
    worker.process.wait_for(r"Start Nanny at:\s+'?tcp://")


def test_several_workers_of_one_command(launch, scheduler, client):
    launch.worker(scheduler.address, "--nworkers=2", name="many", nthreads=1)
    names = eventually(lambda: (n := worker_names(client)) and len(n) == 2 and n, 30)
    assert set(names) == {"many-0", "many-1"}
    found = [
        client.submit(lambda: get_worker().name, workers=[a], pure=False).result(20) for a in names.values()
    ]
    assert found == list(names)


def test_without_a_nanny(launch, scheduler, client):
    join(client, launch.worker(scheduler.address, "--no-nanny"))
    (info,) = client.scheduler_info()["workers"].values()
    assert info["nanny"] is None
    assert client.submit(inc, 1).result(timeout=30) == 2


def test_name_that_is_taken(launch, scheduler, client):
    first = launch.worker(scheduler.address, "--no-nanny")
    join(client, first)
    second = launch.worker(scheduler.address, "--no-nanny")
    assert ended(second.process) == (76 if second.ours else 1)
    assert "name taken, a" in second.log
    assert client.submit(inc, 1).result(timeout=20) == 2


def test_worker_that_comes_while_work_goes_on(launch, scheduler, client):
    """It takes over what waits at the first one."""
    first = launch.worker(scheduler.address, "--no-nanny", nthreads=1)
    join(client, first)

    def work(i):
        time.sleep(0.1)
        return get_worker().address

    futures = client.map(work, range(100))
    wait(futures[:1])
    second = launch.worker(scheduler.address, "--no-nanny", name="late", nthreads=1)
    join(client, second)
    assert set(client.gather(futures)) == {first.address, second.address}


# -- nobody there


@pytest.mark.parametrize("nanny", [True, False], ids=["nanny", "no-nanny"])
def test_death_timeout_without_a_scheduler(launch, nanny):
    start = time.monotonic()
    args = ["--death-timeout=2", *([] if nanny else ["--no-nanny"])]
    worker = launch.worker(f"tcp://127.0.0.1:{free_port()}", *args)
    assert ended(worker.process, 30) == (69 if worker.ours else 1)
    assert time.monotonic() - start >= 2


def test_lost_scheduler(launch):
    """Stock ends with its scheduler. Ours drops what it holds and waits for a new one at the address."""
    port = free_port()
    old = launch.scheduler(port=port)
    worker = launch.worker(old.address, "--no-nanny")
    with Client(old.address) as client:
        join(client, worker)
        kept = client.submit(np.ones, 100_000, key="of-the-old-scheduler")
        wait(kept)
        old.kill()
    if not worker.ours:
        assert ended(worker.process) == 0
        return
    new = launch.scheduler(port=port)
    with Client(new.address) as client:
        join(client, worker)
        assert client.has_what() == {worker.address: ()}
        assert list(client.sync(lambda: client.rpc(worker.address).keys())) == []
        assert client.submit(inc, 1).result(timeout=30) == 2
        (info,) = client.scheduler_info()["workers"].values()
        assert info["nthreads"] == 2


def test_lost_scheduler_while_tasks_run(launch):
    """What ran for the old scheduler does not trouble the new one."""
    port = free_port()
    old = launch.scheduler(port=port)
    worker = launch.worker(old.address, "--no-nanny")
    with Client(old.address) as client:
        join(client, worker)
        futures = client.map(lambda i: time.sleep(0.5) or i, range(10), key=[f"old-{i}" for i in range(10)])
        eventually(lambda: client.processing()[worker.address])
        old.kill()
        del futures
    if not worker.ours:
        ended(worker.process)
        return
    new = launch.scheduler(port=port)
    with Client(new.address) as client:
        join(client, worker)
        assert client.gather(client.map(inc, range(50))) == list(range(1, 51))
        keys = client.run_on_scheduler(lambda dask_scheduler: [str(k) for k in dask_scheduler.tasks])
        assert not [k for k in keys if k.startswith("old-")]


def test_death_timeout_after_a_lost_scheduler(launch):
    scheduler = launch.scheduler()
    worker = launch.worker(scheduler.address, "--no-nanny", "--death-timeout=2")
    with Client(scheduler.address) as client:
        join(client, worker)
        scheduler.kill()
    assert ended(worker.process, 30) == (69 if worker.ours else 0)


def lose_worker(client, address, taken=False):
    """Make the scheduler forget a worker, and take its name for somebody else if so wanted."""

    async def lose(dask_scheduler):
        name = dask_scheduler.workers[address].name
        await dask_scheduler.remove_worker(address, stimulus_id="test-lost", close=False)
        if taken:
            dask_scheduler.aliases[name] = "tcp://127.0.0.1:1"

    client.run_on_scheduler(lose)


def test_worker_that_the_scheduler_has_lost(launch, scheduler, client):
    """As after a network that was gone for a while: stock closes, ours registers again."""
    worker = launch.worker(scheduler.address, "--no-nanny")
    join(client, worker)
    lose_worker(client, worker.address)
    if not worker.ours:
        ended(worker.process)
        return
    join(client, worker)
    assert client.submit(inc, 1).result(timeout=30) == 2


@pytest.mark.kinds("ours")
def test_name_that_is_taken_when_the_worker_comes_back(launch, scheduler, client):
    """By its own former self, as a rule, which the scheduler has not missed yet: it goes on trying."""
    worker = launch.worker(scheduler.address, "--no-nanny")
    join(client, worker)
    lose_worker(client, worker.address, taken=True)
    worker.process.wait_for("name taken")
    client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.aliases.pop("a") and None)
    join(client, worker)
    assert client.submit(inc, 1).result(timeout=30) == 2


# -- going


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
@pytest.mark.parametrize("nanny", [True, False], ids=["nanny", "no-nanny"])
def test_signal(launch, scheduler, client, signum, nanny):
    worker = launch.worker(scheduler.address, *([] if nanny else ["--no-nanny"]))
    join(client, worker)
    assert client.submit(inc, 1).result(timeout=30) == 2
    (info,) = client.scheduler_info()["workers"].values()
    below = worker.process.children()
    worker.process.signal(signum)
    eventually(lambda: not worker_names(client), 20)
    if not worker.ours:
        # It hangs now and then, with a nanny.
        return
    assert ended(worker.process) == 0
    eventually(lambda: not [pid for pid in below if alive(pid)])
    assert not os.path.exists(info["local_directory"])


def test_signal_while_a_task_runs(launch, scheduler, client, gate):
    worker = launch.worker(scheduler.address, "--no-nanny")
    join(client, worker)
    future = client.submit(lambda: gate("in-the-task").set() or gate("never").wait())
    assert gate("in-the-task").wait(20)
    worker.process.signal(signal.SIGTERM)
    eventually(lambda: not worker_names(client), 30)
    if worker.ours:
        assert ended(worker.process, 40) == 0
    assert future.status == "pending"


@pytest.mark.kinds("ours")
def test_second_signal_ends_at_once(launch, scheduler, client, gate):
    worker = launch.worker(scheduler.address, "--no-nanny")
    join(client, worker)
    future = client.submit(lambda: gate("to-be-left").set() or gate("never").wait())
    assert gate("to-be-left").wait(20)
    below = worker.process.children()
    worker.process.signal(signal.SIGTERM)
    worker.process.signal(signal.SIGTERM)
    code = ended(worker.process, 5)
    assert code in (0, 128 + signal.SIGTERM)
    eventually(lambda: not [pid for pid in below if alive(pid)])
    future.release()


def test_killed_leaves_no_process(launch, scheduler, client):
    """Also when the worker itself could not tidy up."""
    worker = launch.worker(scheduler.address)
    join(client, worker)
    assert client.submit(inc, 1).result(timeout=30) == 2
    below = worker.process.children()
    assert below
    worker.process.signal(signal.SIGKILL)
    eventually(lambda: not [pid for pid in below if alive(pid)], 20)
    eventually(lambda: not worker_names(client), 20)


def test_closed_by_the_scheduler(launch, scheduler, client):
    worker = launch.worker(scheduler.address)
    join(client, worker)
    client.run_on_scheduler(lambda dask_scheduler, a: dask_scheduler.close_worker(a), a=worker.address)
    assert ended(worker.process) == 0
    eventually(lambda: not worker_names(client))


def test_terminated_by_rpc(launch, scheduler, client):
    worker = launch.worker(scheduler.address, "--no-nanny")
    join(client, worker)

    async def terminate():
        # Stock ends before it answers.
        with contextlib.suppress(CommClosedError):
            await client.rpc(worker.address).terminate(reason="asked for")

    client.sync(terminate)
    assert ended(worker.process) == 0
    eventually(lambda: not worker_names(client))


def test_shutdown_of_the_cluster(launch):
    scheduler = launch.scheduler()
    worker = launch.worker(scheduler.address)
    client = Client(scheduler.address)
    join(client, worker)
    client.shutdown()
    assert ended(scheduler) == 0
    assert ended(worker.process) == 0


def test_lifetime(launch, scheduler, client):
    worker = launch.worker(scheduler.address, "--no-nanny", "--lifetime=2s")
    join(client, worker)
    assert ended(worker.process, 30) == 0
    eventually(lambda: not worker_names(client))


# -- peers


#: Only what the test says pauses and resumes a worker, not how much memory is free.
NO_MEMORY_PAUSE = {"distributed.worker.memory.pause": False}


@pytest.fixture
def pair(launch, scheduler, client):
    """Two workers that no nanny brings back."""
    workers = [
        launch.worker(scheduler.address, "--no-nanny", name=name, config=NO_MEMORY_PAUSE)
        for name in ("a", "b")
    ]
    join(client, *workers)
    return workers


@pytest.mark.kinds(*PAIR)
@pytest.mark.parametrize("victim", ["a", "b"])
def test_retired_worker_hands_its_data_over(launch, client, pair, victim):
    leaver, stayer = pair if victim == "a" else reversed(pair)
    futures = [client.submit(np.full, 30_000, i, workers=[leaver.address], pure=False) for i in range(10)]
    wait(futures)
    gone = client.retire_workers([leaver.address])
    assert set(gone) == {leaver.address}
    assert ended(leaver.process) == 0
    assert {tuple(v) for v in client.who_has(futures).values()} == {(stayer.address,)}
    assert [int(x[-1]) for x in client.gather(futures)] == list(range(10))


@pytest.mark.kinds(*PAIR)
@pytest.mark.parametrize("victim", ["a", "b"])
def test_work_goes_on_after_a_peer_is_lost(client, pair, victim):
    """Killed with results on it, tasks running, and data on its way: all is computed again."""
    leaver, stayer = pair if victim == "a" else reversed(pair)

    def make(i):
        time.sleep(0.02)
        return np.full(20_000, i)

    parts = client.map(make, range(40), pure=False)
    pairs = [client.submit(lambda x, y: x + y, parts[i], parts[-1 - i]) for i in range(20)]
    total = client.submit(lambda xs: sum(int(x[0]) for x in xs), pairs)
    eventually(lambda: len(client.has_what()[leaver.address]) >= 5, 20)
    leaver.process.kill()
    assert total.result(timeout=60) == sum(range(40))
    assert set(client.has_what()) == {stayer.address}


@pytest.mark.kinds(*PAIR)
@pytest.mark.parametrize("victim", ["a", "b"])
def test_input_whose_only_holder_is_lost(client, pair, victim):
    leaver, stayer = pair if victim == "a" else reversed(pair)
    x = client.submit(np.ones, 50_000, workers=[leaver.address], allow_other_workers=True, pure=False)
    wait(x)
    leaver.process.kill()
    assert client.submit(np.sum, x, workers=[stayer.address]).result(timeout=60) == 50_000


@pytest.mark.kinds(*PAIR)
@pytest.mark.parametrize("victim", ["a", "b"])
def test_scattered_data_is_lost_with_its_holder(client, pair, victim):
    """Nobody can compute it again: its dependents are cancelled as on stock."""
    leaver, stayer = pair if victim == "a" else reversed(pair)
    (x,) = client.scatter([np.ones(1000)], workers=[leaver.address], hash=False)
    leaver.process.kill()
    eventually(lambda: x.status in ("cancelled", "lost"), 20)
    assert client.submit(inc, 1).result(timeout=30) == 2


@pytest.mark.kinds(*PAIR)
@pytest.mark.parametrize("victim", ["a", "b"])
def test_peer_that_hangs(client, pair, victim):
    """A peer that takes the connection and says nothing, killed in the end: the data comes from elsewhere."""
    leaver, stayer = pair if victim == "a" else reversed(pair)
    x = client.submit(np.ones, 500_000, workers=[leaver.address], allow_other_workers=True, pure=False)
    wait(x)
    os.killpg(leaver.process.pid, signal.SIGSTOP)
    total = client.submit(np.sum, x, workers=[stayer.address])
    other = client.submit(inc, 1, workers=[stayer.address])
    assert other.result(timeout=20) == 2
    leaver.process.kill()
    assert total.result(timeout=60) == 500_000


# -- pauses


def set_status(client, address, status):
    """As the scheduler does it, over the worker's stream."""

    def send(dask_scheduler):
        dask_scheduler.stream_comms[address].send(
            {"op": "worker-status-change", "status": status, "stimulus_id": "test-status"}
        )

    client.run_on_scheduler(send)

    def seen():
        return (
            client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.workers[address].status.name)
            == status
        )

    eventually(seen, what=f"status {status} at the scheduler")


def test_paused_worker(launch, scheduler, client, gate):
    """It ends what it runs, starts nothing, and serves what it holds."""
    worker = launch.worker(scheduler.address, "--no-nanny", config=NO_MEMORY_PAUSE)
    join(client, worker)
    held = client.submit(np.arange, 1000, key="held")
    wait(held)
    running = client.submit(lambda: gate("before-go").wait(), key="running")
    running2 = client.submit(lambda: gate("before-go").wait(), key="running2")
    eventually(lambda: len(client.processing()[worker.address]) == 2)
    queued = client.submit(inc, 1, key="queued")
    set_status(client, worker.address, "paused")
    assert client.scheduler_info()["workers"][worker.address]["status"] == "paused"
    late = client.submit(inc, 2, key="late")
    gate("before-go").set()
    wait([running, running2])
    assert held.result()[-1] == 999
    with pytest.raises(TimeoutError):
        wait([queued, late], timeout=0.5, return_when="FIRST_COMPLETED")
    set_status(client, worker.address, "running")
    assert client.gather([queued, late]) == [2, 3]


@pytest.mark.kinds(*PAIR)
@pytest.mark.parametrize("victim", ["a", "b"])
def test_work_of_a_paused_worker_goes_elsewhere(client, pair, victim):
    paused, other = pair if victim == "a" else reversed(pair)
    x = client.submit(np.ones, 100_000, workers=[paused.address], pure=False)
    wait(x)
    set_status(client, paused.address, "paused")
    futures = client.map(lambda i: get_worker().address, range(10), pure=False)
    assert set(client.gather(futures)) == {other.address}
    # Its data is still served, to peers and to clients.
    assert client.submit(np.sum, x, workers=[other.address], pure=False).result(timeout=20) == 100_000
    assert len(x.result()) == 100_000
    set_status(client, paused.address, "running")
    assert client.submit(inc, 1, workers=[paused.address], pure=False).result(timeout=20) == 2
