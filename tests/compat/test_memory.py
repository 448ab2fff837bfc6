"""Memory: what is spilled and read back, what is reported of it, what a full disk or a full memory does."""

from __future__ import annotations

import os
import re
import signal
import stat
import time
from pathlib import Path

import numpy as np
import pytest
from distributed import Client, wait
from harness import OURS, PAIR, SOLO, eventually, join

pytestmark = pytest.mark.kinds(*SOLO)

MIB = 2**20
#: Bytes of the arrays here, by `sizeof`.
SIZE = 1_000_000

#: Nothing but the size of results makes a worker with a limit of 100 MB spill, above ten arrays.
MANAGED_ONLY = {
    "distributed.worker.memory.target": 0.1,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
}
LIMIT = "--memory-limit=100MB"


def make(i, size=SIZE):
    """Noise, which no compression makes smaller."""
    return np.random.default_rng(i).integers(0, 256, size, dtype="u1")


def check(i, array):
    return bool((make(i, len(array)) == array).all())


@pytest.fixture
def client(scheduler):
    with Client(scheduler.address) as client:
        yield client


def metrics(client):
    """What the last heartbeat of the only worker told, and what the scheduler makes of it."""

    def get(dask_scheduler):
        (ws,) = dask_scheduler.workers.values()
        return {**ws.metrics, "managed": ws.memory.managed, "spilled": ws.memory.spilled}

    return client.run_on_scheduler(get)


def spilled(client):
    return metrics(client)["spilled_bytes"]["memory"]


def storage(launch):
    """The folders of spill files of all workers of this test."""
    return [
        path for path in Path(launch.directory).glob("dask-scratch-space/worker-*/storage") if path.is_dir()
    ]


def spill_files(launch):
    return [path for folder in storage(launch) for path in folder.iterdir()]


def put(client, count, size=SIZE):
    """Arrays in a known order."""
    futures = []
    for i in range(count):
        futures.append(client.submit(make, i, size, key=f"array-{i}"))
        wait(futures[-1])
    return futures


def test_results_above_the_target_are_spilled_and_read_back(launch, scheduler, client):
    worker = launch.worker(scheduler.address, LIMIT, config=MANAGED_ONLY, nthreads=1)
    join(client, worker)
    futures = put(client, 15)
    eventually(lambda: spilled(client) == 5 * SIZE)
    told = metrics(client)
    assert told["managed_bytes"] == 15 * SIZE
    assert told["managed"] == 10 * SIZE
    # the arrays, and what Dask says of them
    assert 5 * SIZE < told["spilled_bytes"]["disk"] < 5 * SIZE + 10_000
    assert told["spilled"] == told["spilled_bytes"]["disk"]
    assert len(spill_files(launch)) == 5
    # a task, a client: what is read back is in memory again, and others are spilled
    assert client.submit(check, 0, futures[0], key="check").result()
    assert check(1, futures[1].result())
    eventually(lambda: metrics(client)["managed"] <= 10 * SIZE)
    assert spilled(client) == 5 * SIZE
    checks = [client.submit(check, i, future, key=f"check-{i}") for i, future in enumerate(futures)]
    assert all(client.gather(checks))
    assert all(check(i, array) for i, array in enumerate(client.gather(futures)))
    del futures, checks
    eventually(lambda: metrics(client)["managed_bytes"] == 0 and spilled(client) == 0)
    eventually(lambda: not spill_files(launch))


def test_the_least_recently_used_is_spilled(launch, scheduler, client):
    worker = launch.worker(scheduler.address, LIMIT, config=MANAGED_ONLY, nthreads=1)
    join(client, worker)
    futures = put(client, 10)
    assert client.submit(check, 0, futures[0], key="use").result()
    futures += [client.submit(make, 10, key="array-10")]
    wait(futures)
    eventually(lambda: spilled(client) == SIZE)
    del futures[1]
    # it was the second: the first had been used meanwhile
    eventually(lambda: spilled(client) == 0)
    assert metrics(client)["managed"] == 10 * SIZE


def test_a_result_larger_than_the_target(launch, scheduler, client):
    worker = launch.worker(scheduler.address, LIMIT, config=MANAGED_ONLY, nthreads=1)
    join(client, worker)
    small, large = put(client, 1)[0], client.submit(make, 5, 11 * SIZE, key="large")
    wait(large)
    eventually(lambda: spilled(client) == 11 * SIZE)
    assert client.submit(check, 5, large, key="check").result()
    assert check(5, large.result())
    assert client.submit(check, 0, small, key="check-small").result()
    assert spilled(client) == 11 * SIZE


@pytest.mark.parametrize("how", ["lz4", "zlib", "auto", False])
def test_compression(launch, scheduler, client, how):
    config = {**MANAGED_ONLY, "distributed.worker.memory.spill-compression": how}
    worker = launch.worker(scheduler.address, LIMIT, config=config, nthreads=1)
    join(client, worker)
    zeros = client.submit(np.zeros, 20 * SIZE, "u1", key="zeros")
    wait(zeros)
    eventually(lambda: spilled(client) == 20 * SIZE)
    disk = metrics(client)["spilled_bytes"]["disk"]
    assert disk > 20 * SIZE if how is False else disk < 2 * SIZE
    assert client.submit(lambda a: int(a.sum()) + len(a), zeros, key="sum").result() == 20 * SIZE


def test_many_small_and_odd_results(launch, scheduler, client):
    """All sorts of results go through files and back."""
    config = {**MANAGED_ONLY, "distributed.worker.memory.target": 1e-6}
    worker = launch.worker(scheduler.address, LIMIT, config=config)
    join(client, worker)
    values = [
        None,
        b"",
        b"x" * 100_000,
        "text" * 1000,
        {"a": np.arange(10), "b": np.zeros((0, 3))},
        [np.full(70_000, i, "u1") for i in range(5)],
        np.array([{"an": "object"}, None], dtype=object),
        np.asfortranarray(np.arange(200_000).reshape(400, 500)),
        *[(i, "a" * i) for i in range(200)],
    ]
    futures = client.map(lambda i: values[i], range(len(values)), pure=False)
    wait(futures)
    eventually(lambda: spilled(client) > 1_000_000)
    same = client.map(lambda i, value: repr(value) == repr(values[i]), range(len(values)), futures)
    assert all(client.gather(same))
    assert [repr(value) for value in client.gather(futures)] == [repr(value) for value in values]


@pytest.mark.parametrize("size", [1000, 100_000, 300_000])
def test_a_task_of_many_spilled_inputs(launch, scheduler, client, size):
    config = {**MANAGED_ONLY, "distributed.worker.memory.target": 1e-4}
    worker = launch.worker(scheduler.address, LIMIT, config=config)
    join(client, worker)
    futures = client.map(make, range(300), size=size, pure=False)
    wait(futures)
    eventually(lambda: spilled(client) >= 300 * size - 20_000)
    assert client.submit(lambda xs: [check(i, x) for i, x in enumerate(xs)], futures).result() == [True] * 300


@pytest.mark.kinds(*PAIR)
def test_peers_get_what_was_spilled(launch, scheduler, client):
    a, b = (launch.worker(scheduler.address, LIMIT, name=n, config=MANAGED_ONLY) for n in "ab")
    join(client, a, b)
    futures = [client.submit(make, i, workers=[a.address], key=f"array-{i}") for i in range(30)]
    wait(futures)
    address = a.address

    def on_disk(dask_scheduler):
        return dask_scheduler.workers[address].metrics["spilled_bytes"]["memory"]

    eventually(lambda: client.run_on_scheduler(on_disk) >= 19 * SIZE)
    checks = [
        client.submit(check, i, future, workers=[b.address], key=f"check-{i}")
        for i, future in enumerate(futures)
    ]
    assert all(client.gather(checks))


def test_data_put_by_a_client_is_spilled(launch, scheduler, client):
    worker = launch.worker(scheduler.address, LIMIT, config=MANAGED_ONLY)
    join(client, worker)
    futures = client.scatter([make(i) for i in range(15)], hash=False)
    eventually(lambda: spilled(client) == 5 * SIZE)
    assert all(client.gather([client.submit(check, i, f, pure=False) for i, f in enumerate(futures)]))


def test_memory_in_use_leads_to_spilling(launch, scheduler, client):
    """The target is off: it is the processes that use too much."""
    config = {
        "distributed.worker.memory.target": False,
        "distributed.worker.memory.spill": 0.6,
        "distributed.worker.memory.pause": 0.9,
        "distributed.worker.memory.terminate": False,
        "distributed.worker.memory.monitor-interval": "20ms",
    }
    worker = launch.worker(scheduler.address, "--memory-limit=400MiB", config=config)
    join(client, worker)
    futures = client.map(make, range(80), size=5 * MIB, pure=False)
    wait(futures)
    eventually(lambda: spilled(client) >= 20 * MIB)
    eventually(lambda: metrics(client)["memory"] < 0.75 * 400 * MIB)
    assert all(client.gather(client.map(check, range(80), futures, pure=False)))


def test_three_times_the_memory(launch, scheduler, client):
    """A job that holds three times the limit finishes, with nothing lost or run twice."""
    limit = 320 * MIB
    worker = launch.worker(scheduler.address, f"--memory-limit={limit}")
    join(client, worker)
    size, count = 8 * MIB, 120
    arrays = client.map(make, range(count), size=size, pure=False)
    wait(arrays)
    eventually(lambda: metrics(client)["managed_bytes"] == count * size)
    assert metrics(client)["managed"] < limit
    pairs = client.map(np.bitwise_xor, arrays, arrays[::-1], pure=False)
    sums = client.map(lambda a, b: int((a ^ b).sum(dtype="u8")), pairs, pairs[::-1], pure=False)
    assert client.gather(sums) == [0] * count
    assert all(check(i, arrays[i].result()) for i in (0, count // 2, count - 1))
    assert "error" not in worker.log.lower() and "Restarting" not in worker.log


# -- a full disk


def holds_all(client, futures):
    """Whatever the disk says, nothing is lost, and new tasks run."""
    assert all(client.gather([client.submit(check, i, f, pure=False) for i, f in enumerate(futures)]))


def test_limit_of_spill_files(launch, scheduler, client):
    config = {**MANAGED_ONLY, "distributed.worker.memory.max-spill": "3.5 MB"}
    worker = launch.worker(scheduler.address, LIMIT, config=config, nthreads=1)
    join(client, worker)
    futures = put(client, 20)
    worker.process.wait_for("Spill file on disk reached capacity; keeping data in memory")
    eventually(lambda: spilled(client) == 3 * SIZE)
    assert metrics(client)["managed"] == 17 * SIZE
    assert sum(path.stat().st_size for path in spill_files(launch)) < 3_500_000
    if launch.ours:
        # a stock worker fails the tasks that read one back then: others would have to go in its place
        holds_all(client, futures)
        assert sum(path.stat().st_size for path in spill_files(launch)) < 3_500_000
    # throttled, whatever happens how often
    assert worker.log.count("reached capacity") <= 3


def test_disk_that_takes_no_files(launch, scheduler, client):
    worker = launch.worker(scheduler.address, LIMIT, config=MANAGED_ONLY, nthreads=1)
    join(client, worker)
    (folder,) = Path(launch.directory).glob("dask-scratch-space/worker-*/")
    if (folder / "storage").exists():
        (folder / "storage").rmdir()
    (folder / "storage").touch()
    futures = put(client, 15)
    worker.process.wait_for("Spill to disk failed; keeping data in memory")
    assert spilled(client) == 0
    holds_all(client, futures)
    # and takes them again
    (folder / "storage").unlink()
    (folder / "storage").mkdir(0o700)
    more = iter(range(15, 1000))
    eventually(lambda: futures.append(client.submit(make, next(more), pure=False)) or spilled(client) > 0, 20)
    holds_all(client, futures)


def test_full_memory_and_full_disk_pause_the_worker(launch, scheduler, client):
    """It keeps what it holds, serves it, takes nothing new, and goes on once there is room."""
    config = {
        "distributed.worker.memory.max-spill": "1 MB",
        "distributed.worker.memory.target": 0.2,
        "distributed.worker.memory.pause": 0.6,
        "distributed.worker.memory.terminate": False,
    }
    worker = launch.worker(scheduler.address, "--memory-limit=500MiB", config=config)
    join(client, worker)
    futures = client.map(make, range(200), size=5 * MIB, pure=False)
    worker.process.wait_for(
        r"Worker is at \d+% memory usage. Pausing worker.  Process memory: \S+ MiB -- Wor"
    )
    worker.process.wait_for("Spill file on disk reached capacity; keeping data in memory")

    counts = [-1]

    def settled(futures):
        counts.append(sum(future.done() for future in futures))
        time.sleep(0.3)
        return counts[-1] == counts[-2]

    eventually(lambda: settled(futures))
    done = [(i, future) for i, future in enumerate(futures) if future.done()]
    assert 5 < len(done) < 150
    assert {future.status for _, future in done} == {"finished"}
    (info,) = client.scheduler_info()["workers"].values()
    assert info["status"] == "paused"
    assert all(check(i, future.result(timeout=20)) for i, future in done[:5])
    late = client.submit(sum, [1, 2], key="late")
    done.clear()
    futures.clear()
    assert late.result(timeout=30) == 3
    worker.process.wait_for("Resuming worker")


@pytest.mark.kinds(OURS)
def test_damaged_files_lose_their_keys_alone(launch, scheduler, client):
    """One file is cut, another gone, a third changed: what was in them is computed again."""
    worker = launch.worker(scheduler.address, LIMIT, config=MANAGED_ONLY, nthreads=1)
    join(client, worker)
    futures = put(client, 15)
    eventually(lambda: spilled(client) == 5 * SIZE)
    cut, gone, changed, *others = sorted(spill_files(launch), key=lambda path: int(path.name))
    os.truncate(cut, 1000)
    gone.unlink()
    contents = bytearray(changed.read_bytes())
    contents[-1] ^= 1
    changed.write_bytes(contents)
    checks = [client.submit(check, i, future, key=f"check-{i}") for i, future in enumerate(futures)]
    assert all(client.gather(checks))
    assert worker.log.count("a result is lost") == 3
    assert worker.process.running


# -- files


@pytest.mark.kinds(OURS)
def test_spill_files_are_private(launch, scheduler, client):
    worker = launch.worker(scheduler.address, LIMIT, config=MANAGED_ONLY)
    join(client, worker)
    futures = put(client, 12)
    files = eventually(lambda: spill_files(launch))
    modes = {stat.S_IMODE(path.stat().st_mode) for path in files}
    folders = {stat.S_IMODE(folder.stat().st_mode) for path in files for folder in path.parents[:2]}
    assert (modes, folders) == ({0o600}, {0o700})
    del futures


def test_spill_files_are_gone_after_the_end(launch, scheduler, client):
    worker = launch.worker(scheduler.address, LIMIT, config=MANAGED_ONLY)
    join(client, worker)
    futures = put(client, 12)
    eventually(lambda: spill_files(launch))
    worker.process.signal(signal.SIGINT)
    worker.process.wait(30)
    assert not storage(launch)
    del futures


def test_spill_files_of_a_killed_worker_are_removed_by_the_next(launch, scheduler, client):
    first = launch.worker(scheduler.address, LIMIT, config=MANAGED_ONLY, name="a")
    join(client, first)
    futures = put(client, 12)
    (left,) = {path.parent for path in eventually(lambda: spill_files(launch))}
    first.process.kill()
    assert left.exists()
    second = launch.worker(scheduler.address, LIMIT, config=MANAGED_ONLY, name="b", flavour=first.flavour)
    join(client, second)
    assert not left.exists()
    assert all(check(i, array) for i, array in enumerate(client.gather(futures)))


def test_restarted_worker_has_no_spill_files(launch, scheduler, client):
    worker = launch.worker(scheduler.address, LIMIT, config=MANAGED_ONLY)
    join(client, worker)
    futures = put(client, 12)
    eventually(lambda: spill_files(launch))
    client.restart()
    eventually(lambda: not spill_files(launch))
    assert client.submit(check, 1, client.submit(make, 1, key="again"), key="check").result()
    del futures


# -- what is ours alone


@pytest.mark.kinds(OURS)
def test_metrics_for_prometheus(launch, scheduler, client):
    worker = launch.worker(scheduler.address, LIMIT, "--dashboard", config=MANAGED_ONLY, nthreads=1)
    join(client, worker)
    futures = put(client, 15)
    eventually(lambda: spilled(client) == 5 * SIZE)
    assert client.submit(check, 0, futures[0], key="check").result()
    url = worker.process.wait_for(r"dashboard at:\s+(\S+)")[1]

    def shown():
        from urllib.request import urlopen

        text = urlopen(f"http://{url}/metrics", timeout=10).read().decode()
        return dict(re.findall(r"^(\w+(?:\{[^}]*\})?) (\S+)$", text, re.M))

    def done():
        shows = shown()
        return float(shows.get('dask_worker_spill_count_total{activity="disk-write"}', 0)) >= 6 and shows

    shows = eventually(done)
    # the answer of the check takes a few bytes, too
    on_disk = int(shows['dask_worker_tasks{state="disk"}'])
    assert on_disk in (5, 6)
    assert 0 < float(shows['dask_worker_memory_bytes{type="spilled"}']) - on_disk * SIZE < 10_000
    assert float(shows["iqoqo_worker_spill_files_bytes"]) > 6 * SIZE
    assert float(shows['dask_worker_spill_count_total{activity="disk-read"}']) == 1
    assert float(shows['dask_worker_spill_time_seconds_total{activity="disk-write"}']) > 0


@pytest.mark.kinds(OURS)
def test_runner_that_has_grown_is_replaced(launch, scheduler, client):
    """What user code hoards between tasks is given back when memory is tight, and no task notices."""
    config = {**MANAGED_ONLY, "distributed.worker.memory.pause": 0.9}
    worker = launch.worker(scheduler.address, "--memory-limit=1GiB", config=config, nthreads=1)
    join(client, worker)

    def hoard(mib):
        import builtins

        builtins.hoard = np.ones(mib * 2**17)
        return os.getpid()

    small = client.submit(hoard, 1, pure=False).result()
    assert client.submit(os.getpid, pure=False).result() == small
    large = client.submit(hoard, 200, pure=False).result()
    assert large == small
    eventually(lambda: not os.path.exists(f"/proc/{large}"))
    worker.process.wait_for(rf"memory is tight: runner {large}, which has grown by 2\d\d.* MiB, is replaced")
    assert client.submit(os.getpid, pure=False).result() != large
    assert "a runner exited" not in worker.log and worker.flavour == OURS
