"""What can be asked of a worker at its address, at its nanny's, and through ``Client.run`` and its like."""

from __future__ import annotations

import asyncio
import os
import time

import numpy as np
import pytest
from distributed import wait
from distributed.core import connect
from harness import ALL, SOLO, eventually

pytestmark = pytest.mark.kinds(*SOLO)


def info(client, cluster):
    """What the scheduler tells of the worker under test."""
    return client.scheduler_info(n_workers=-1)["workers"][cluster.a]


def ask(client, address, op, **kwargs):
    """One RPC as a client or the scheduler makes it."""

    async def call():
        return await getattr(client.rpc(address), op)(**kwargs)

    return client.sync(call)


def raw(client, address, *messages, replies=1, timeout=5):
    """Messages on a connection of their own; the replies, then "closed" if the worker has ended it."""

    async def talk():
        comm = await connect(address)
        got = []
        try:
            for message in messages:
                await comm.write(message)
            for _ in range(replies):
                got.append(await asyncio.wait_for(comm.read(), timeout))
        except OSError:
            got.append("closed")
        finally:
            comm.abort()
        return got

    return client.sync(talk)


def shape(value):
    """Field names at every depth, with the kinds of their values."""
    if isinstance(value, dict):
        return {k: shape(v) for k, v in sorted(value.items())}
    if isinstance(value, bool) or value is None:
        return repr(value)
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, list | tuple):
        return [shape(v) for v in value[:1]]
    return type(value).__name__


# -- what the scheduler knows


def test_scheduler_info_has_the_fields_of_stock(client, cluster, as_stock):
    mine = info(client, cluster)
    metrics = mine["metrics"]
    # What happened so far, and so differs: counts by state, transfers by peer, digests by activity.
    for happened in ("task_counts", "digests_total_since_heartbeat"):
        assert isinstance(metrics.pop(happened), dict)
    assert set(metrics["bandwidth"]) == {"total", "workers", "types"}
    metrics["bandwidth"] = None
    mine["services"] = sorted(set(mine["services"]) - {"dashboard"})
    as_stock(shape(mine))


def test_scheduler_info_tells_the_truth(client, cluster):
    mine = info(client, cluster)
    assert mine["type"] == "Worker"
    assert str(mine["name"]) == str(mine["id"]) == "a"
    assert mine["nthreads"] == 2
    assert mine["memory_limit"] == 2 * 2**30
    assert mine["host"] == "127.0.0.1"
    assert mine["resources"] == {"FOO": 2.0, "BAR": 1.0}
    assert mine["status"] == "running"
    assert mine["nanny"] not in (None, cluster.a)
    assert os.path.isdir(mine["local_directory"])
    assert mine["local_directory"].startswith(str(cluster.launcher.directory))
    metrics = mine["metrics"]
    assert abs(metrics["time"] - time.time()) < 60
    assert 1_000_000 < metrics["memory"] < 2 * 2**30
    assert metrics["num_fds"] > 3
    assert metrics["cpu"] >= 0
    assert 0 < metrics["event_loop_interval"] < 10
    assert set(metrics["host_net_io"]) == set(metrics["host_disk_io"]) == {"read_bps", "write_bps"}


def test_heartbeats(client, cluster):
    first = info(client, cluster)
    eventually(lambda: info(client, cluster)["last_seen"] > first["last_seen"])
    eventually(lambda: info(client, cluster)["metrics"]["time"] > first["metrics"]["time"])


def test_scheduler_sees_what_executes(client, cluster, as_stock, gate):
    """``task_counts`` and ``executing`` come with heartbeats, while tasks run."""

    def blocked(i):
        gate(f"blocked-{i}").set()
        gate("blocked-go").wait()

    def counts():
        return info(client, cluster)["metrics"]["task_counts"]

    futures = client.map(blocked, range(3), workers=[cluster.a])
    for i in range(2):
        assert gate(f"blocked-{i}").wait(20)
    seen = eventually(lambda: (c := counts()) and c.get("executing") == 2 and c)
    as_stock(seen)
    executing = eventually(
        lambda: client.run_on_scheduler(
            lambda dask_scheduler, a: sorted(
                (str(t.key).split("-")[0], d > 0) for t, d in dask_scheduler.workers[a].executing.items()
            ),
            a=cluster.a,
        )
    )
    assert executing == [("blocked", True)] * 2
    gate("blocked-go").set()
    wait(futures)
    as_stock(eventually(lambda: (c := counts()) and c.get("memory") == 3 and c))


def test_scheduler_side_of_registration(client, cluster, as_stock):
    def look(dask_scheduler, a):
        ws = dask_scheduler.workers[a]
        return {
            "pid": isinstance(ws.pid, int) and ws.pid > 1,
            "server_id": ws.server_id.split("-")[0],
            "extra": sorted(ws.extra),
            "versions": sorted(ws.versions),
            "packages": ws.versions["packages"],
            "aliases": dask_scheduler.aliases[ws.name] == a,
            "available": ws.resources,
            "saturated": ws in dask_scheduler.saturated,
            "idle": a in dask_scheduler.idle,
        }

    as_stock(client.run_on_scheduler(look, a=cluster.a))


@pytest.mark.kinds(*ALL)
def test_versions_check(client, recwarn):
    versions = client.get_versions(check=True)
    assert not [w for w in recwarn if "ersion" in str(w.message)]
    for worker in versions["workers"].values():
        assert worker["packages"] == versions["client"]["packages"]
        assert worker["host"] == versions["scheduler"]["host"]


# -- RPC at the worker's address


def test_identity(client, cluster, as_stock):
    identity = ask(client, cluster.a, "identity")
    assert identity["type"] == "Worker"
    assert identity["scheduler"] == cluster.address
    assert identity["nthreads"] == 2
    assert identity["memory_limit"] == 2 * 2**30
    as_stock(shape(identity))


def test_ping(client, cluster, as_stock):
    as_stock(ask(client, cluster.a, "ping"))


def test_versions(client, cluster, as_stock):
    as_stock(ask(client, cluster.a, "versions"))


def test_keys(client, cluster):
    x = client.submit(np.arange, 5, workers=[cluster.a], key=("k", 1))
    wait(x)
    assert list(ask(client, cluster.a, "keys")) == [("k", 1)]


def test_monitor_info(client, cluster, as_stock):
    recent = ask(client, cluster.a, "get_monitor_info", recent=True)
    as_stock(shape(recent))
    history = ask(client, cluster.a, "get_monitor_info", recent=False, start=0)
    as_stock(shape(history))
    lengths = {len(v) for v in history["range_query"].values()}
    assert len(lengths) == 1
    assert ask(client, cluster.a, "get_monitor_info", start=history["count"])["count"] >= history["count"]


def test_unknown_op(client, cluster, as_stock):
    """No error: a reply of nothing, and the connection goes on."""
    got = raw(client, cluster.a, {"op": "no-such-op"}, {"op": "ping"}, replies=2)
    as_stock(got)
    assert got == [None, b"pong"]


def test_op_with_unknown_argument(client, cluster):
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        ask(client, cluster.a, "ping", bogus=1)
    assert ask(client, cluster.a, "ping") == b"pong"


def test_messages_that_are_no_ops_end_the_connection(client, cluster, as_stock):
    as_stock([raw(client, cluster.a, m) for m in ({"no": "op"}, [1, 2], "text", None, 5)])
    assert ask(client, cluster.a, "ping") == b"pong"


def test_close_of_a_connection(client, cluster, as_stock):
    as_stock(raw(client, cluster.a, {"op": "close"}, replies=2))
    as_stock(raw(client, cluster.a, {"op": "ping", "close": True}, replies=2))


def test_op_that_wants_no_reply(client, cluster):
    assert raw(client, cluster.a, {"op": "keys", "reply": False}, {"op": "ping"}) == [b"pong"]


def test_get_data_as_a_peer_asks(client, cluster, as_stock):
    x = client.submit(lambda: [1, 2, 3], workers=[cluster.a], key="asked-for")
    wait(x)

    async def talk():
        comm = await connect(cluster.a)
        await comm.write({"op": "get_data", "keys": ["asked-for", "unheard-of"], "who": None, "reply": False})
        reply = await comm.read()
        await comm.write("OK")
        await comm.write({"op": "ping"})
        pong = await comm.read()
        comm.abort()
        return reply, pong

    as_stock(client.sync(talk))


def test_gather_op(client, cluster, as_stock):
    as_stock(ask(client, cluster.a, "gather", who_has={"nobody-has-it": [cluster.a]}))
    if len(cluster.workers) > 1:
        as_stock(ask(client, cluster.a, "gather", who_has={"nobody-has-it": [cluster.b]}))


def test_update_data_and_free_keys_ops(client, cluster, as_stock):
    from distributed.protocol import to_serialize

    data = {"put": to_serialize([1, 2]), ("put", 2): to_serialize(np.arange(10))}
    as_stock(ask(client, cluster.a, "update_data", data=data))
    assert set(ask(client, cluster.a, "keys")) == {"put", ("put", 2)}
    ask(client, cluster.a, "free_keys", keys=["put", ("put", 2)], stimulus_id="test")
    eventually(lambda: not ask(client, cluster.a, "keys"))


def test_logs(client, cluster):
    logs = client.get_worker_logs()
    assert set(logs) == {w.address for w in cluster.workers}
    entries = logs[cluster.a]
    assert all(level in ("DEBUG", "INFO", "WARNING", "ERROR") for level, _ in entries)
    assert any("Registered to" in text for _, text in entries)
    assert len(client.get_worker_logs(n=2, workers=[cluster.a])[cluster.a]) == 2


def test_call_stack(client, cluster, as_stock, gate):
    def deep_in_user_code():
        gate("stack-here").set()
        gate("stack-go").wait()

    def task():
        deep_in_user_code()

    future = client.submit(task, key="in-the-stack", workers=[cluster.a])
    other = client.submit(lambda: gate("stack-go").wait(), key="other-stack", workers=[cluster.a])
    assert gate("stack-here").wait(20)
    stacks = eventually(
        lambda: (s := client.call_stack([future])) and "deep_in_user_code" in str(s) and s,
        what="the task's stack",
    )
    as_stock(
        {address == cluster.a: {k: shape(v) for k, v in keys.items()} for address, keys in stacks.items()}
    )
    text = "".join(stacks[cluster.a]["in-the-stack"])
    assert "in task\n" in text and "deep_in_user_code()" in text
    everything = eventually(
        lambda: (s := client.call_stack()) and set(s[cluster.a]) == {"in-the-stack", "other-stack"} and s
    )
    assert set(everything) == {cluster.a}
    gate("stack-go").set()
    wait([future, other])
    eventually(lambda: not client.call_stack())


# -- running functions on workers


def test_run_on_every_worker(client, cluster):
    assert client.run(lambda x, y=0: x + y, 1, y=2) == {w.address: 3 for w in cluster.workers}
    assert client.run(os.getpid, workers=[cluster.a]).keys() == {cluster.a}
    pid = client.run(os.getpid, workers=[cluster.a])[cluster.a]
    assert pid in cluster.workers[0].process.children()


def test_run_is_answered_by_one_process(client, cluster):
    """What ``client.run`` leaves behind, ``client.run`` finds again."""

    def put(value):
        import sys

        sys.compat_left_behind = value

    def find():
        import sys

        return sys.compat_left_behind

    client.run(put, 17)
    assert set(client.run(find).values()) == {17}


def test_run_with_dask_worker(client, cluster):
    def look(dask_worker):
        return {
            "address": dask_worker.address,
            "name": str(dask_worker.name),
            "id": dask_worker.id,
            "nthreads": dask_worker.nthreads
            if hasattr(dask_worker, "nthreads")
            else dask_worker.state.nthreads,
            "local_directory": dask_worker.local_directory,
            "scheduler": dask_worker.scheduler.address,
        }

    identity = ask(client, cluster.a, "identity")
    assert client.run(look, workers=[cluster.a])[cluster.a] == {
        "address": cluster.a,
        "name": "a",
        "id": identity["id"],
        "nthreads": 2,
        "local_directory": info(client, cluster)["local_directory"],
        "scheduler": cluster.address,
    }


def test_run_coroutine(client, cluster):
    async def look(x, dask_worker=None):
        await asyncio.sleep(0.001)
        return x, dask_worker.address

    assert client.run(look, 5, workers=[cluster.a]) == {cluster.a: (5, cluster.a)}


def test_run_without_waiting(client, cluster):
    async def later(dask_worker=None):
        await asyncio.sleep(0.001)
        dask_worker.log_event("ran-later", "yes")

    assert client.run(later, wait=False, workers=[cluster.a]) is None
    assert eventually(lambda: client.get_events("ran-later"))[0][1] == "yes"


def test_run_that_raises(client, cluster, as_stock):
    class Custom(Exception):
        pass

    def fail(x):
        raise Custom("raised in run", x)

    with pytest.raises(Exception, match="raised in run") as e:
        client.run(fail, 1)
    as_stock((type(e.value).__name__, e.value.args))
    returned = client.run(fail, 2, on_error="return")
    assert [type(r).__name__ for r in returned.values()] == ["Custom"] * len(cluster.workers)
    assert client.run(fail, 3, on_error="ignore") == {}


def test_run_with_a_result_that_cannot_be_pickled(client, cluster):
    import threading

    with pytest.raises(TypeError, match="[Cc]ould not serialize|cannot pickle"):
        client.run(threading.Lock, workers=[cluster.a])
    assert client.run(lambda: 1, workers=[cluster.a]) == {cluster.a: 1}


def test_run_with_large_argument_and_result(client, cluster):
    x = np.random.default_rng(0).random(1_000_000)
    (got,) = client.run(lambda x: x * 2, x, workers=[cluster.a]).values()
    np.testing.assert_array_equal(got, x * 2)


def test_run_while_all_threads_are_busy(client, cluster, gate):
    futures = [
        client.submit(lambda: gate("busy-go").wait(), pure=False, workers=[cluster.a]) for _ in range(4)
    ]
    assert client.run(lambda: "at once", workers=[cluster.a]) == {cluster.a: "at once"}
    gate("busy-go").set()
    wait(futures)


def test_run_prints_into_the_workers_log(client, cluster):
    client.run(lambda: print("printed by run 4720", flush=True), workers=[cluster.a])
    cluster.workers[0].process.wait_for("printed by run 4720", timeout=10)


# -- the nanny


def test_nanny_has_an_address_of_its_own(client, cluster, as_stock):
    nanny = info(client, cluster)["nanny"]
    assert nanny != cluster.a
    identity = ask(client, nanny, "identity")
    assert identity["type"] == "Nanny"
    as_stock(shape(identity))


def test_nanny_logs(client, cluster):
    logs = client.get_worker_logs(nanny=True)
    assert set(logs) == {w.address for w in cluster.workers}
    assert any("Start Nanny at" in text for _, text in logs[cluster.a])


def test_run_on_the_nanny(client, cluster):
    got = client.run(lambda x: x + 1, 1, nanny=True, workers=[cluster.a])
    assert got == {cluster.a: 2}


def test_unknown_op_at_the_nanny(client, cluster, as_stock):
    nanny = info(client, cluster)["nanny"]
    as_stock(raw(client, nanny, {"op": "no-such-op"}, {"op": "identity"}, replies=2)[0])
    as_stock([raw(client, nanny, m) for m in ({"no": "op"}, [1, 2])])
