"""Stock workers and clients around one worker of ours. The first argument says what is to be done.

Every command prints ``ok`` at its end; ``stock`` first prints the address of a stock worker that holds data.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import sys
from typing import Any

import dask
import numpy as np
from distributed import Scheduler, Worker
from distributed.comm import connect
from distributed.core import ConnectionPool, Status, rpc
from distributed.protocol import to_serialize
from distributed.worker import get_data_from_worker

logging.getLogger("distributed").setLevel(logging.CRITICAL)

WHO = "tcp://127.0.0.1:9"
DATA: dict[Any, Any] = {
    "x": np.arange(3_000_000, dtype="u4"),
    ("y", 1): "some text",
    b"z": [np.ones(100_000), {"a": 1}, None],
    4: b"\x00" * 200_000,
}


def same(a: Any, b: Any) -> bool:
    """Equality that knows arrays, inside of lists too."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


async def line() -> str:
    """One line of what the test says."""
    return (await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)).strip()


async def fetch(address: str, keys: list[Any]) -> dict[str, Any]:
    """``get_data`` as a stock worker does it."""
    pool = await ConnectionPool()
    try:
        return await get_data_from_worker(pool, keys, address, who=WHO)
    finally:
        await pool.close()


async def stock(host: str) -> None:
    """A stock worker with data; ours fetches it; what ours serves then is what it was."""
    async with (
        Scheduler(host=host, port=0, dashboard_address=":0") as scheduler,
        Worker(scheduler.address, host=host, nthreads=1, dashboard=False) as worker,
    ):
        worker.update_data(DATA)
        print(worker.address, flush=True)
        ours = await line()
        reply = await fetch(ours, [*DATA, "missing"])
        assert reply["status"] == "OK"
        assert set(reply["data"]) == set(DATA)
        assert all(same(v, reply["data"][k]) for k, v in DATA.items())
        # and a stock worker gathers from ours
        async with Worker(scheduler.address, host=host, nthreads=1, dashboard=False) as other:
            assert await other.gather(who_has={k: [ours] for k in DATA}) == {"status": "OK"}
            assert all(same(v, other.data[k]) for k, v in DATA.items())
        print("ok", flush=True)
        await line()


async def scatter(address: str) -> None:
    """Scatters to ours and reads it back."""
    async with rpc(address) as ours:
        reply = await ours.update_data(data={k: to_serialize(v) for k, v in DATA.items()})
        assert reply["status"] == "OK"
        assert set(reply["nbytes"]) == set(DATA)
        assert set(await ours.keys()) == set(DATA)
        # what was not marked for serialization arrives as well
        assert (await ours.update_data(data={"plain": (1, "two")}))["status"] == "OK"
        reply = await fetch(address, [*DATA, "plain"])
        assert reply["data"].pop("plain") == (1, "two")
        assert all(same(v, reply["data"][k]) for k, v in DATA.items())
        assert await ours.free_keys(keys=["plain"], stimulus_id="s") is None
        assert set(await ours.keys()) == set(DATA)
        assert await ours.ping() == b"pong"
        assert same(await ours.echo(data=to_serialize(DATA["x"])), DATA["x"])
    print("ok", flush=True)


async def gather(address: str) -> None:
    """Has ours gather from two stock workers, one of which will be gone."""
    async with Scheduler(host="127.0.0.1", port=0, dashboard_address=":0") as scheduler:
        options = {"host": "127.0.0.1", "nthreads": 1, "dashboard": False}
        async with Worker(scheduler.address, **options) as a:
            async with Worker(scheduler.address, **options) as b:
                a.update_data({"a": 1, "both": 2})
                b.update_data({"b": 3, "both": 2})
                gone = b.address
                async with rpc(address) as ours:
                    who_has = {"a": [a.address], "b": [b.address], "both": [a.address, b.address]}
                    assert await ours.gather(who_has=who_has) == {"status": "OK"}
                    assert set(await ours.keys()) == {"a", "b", "both"}
                    # what is here already is not fetched again
                    assert await ours.gather(who_has={"a": [WHO]}) == {"status": "OK"}
            a.update_data({"late": 5})
            async with rpc(address) as ours:
                # the test's scheduler says that everything is at the worker named last
                print(a.address, flush=True)
                assert await line() == "go"
                reply = await ours.gather(who_has={"late": [gone], "nowhere": [gone]})
                assert reply == {"status": "partial-fail", "keys": ("nowhere",)}, reply
                assert "late" in await ours.keys()
    print("ok", flush=True)


async def ask(address: str, message: Any) -> Any:
    """One raw request and what came of it; exceptions by their text."""
    comm = await connect(address, timeout=5)
    try:
        await comm.write(message)
        reply = await asyncio.wait_for(comm.read(), 10)
    except OSError:
        return "closed"
    finally:
        comm.abort()
    if isinstance(reply, dict) and "exception" in reply:
        exception = pickle.loads(reply["exception"])
        return reply["status"], reply["exception_text"], type(exception), str(exception)
    return reply


MALFORMED: list[Any] = [
    {"op": "get_data"},
    {"op": "get_data", "keys": ["x"], "bad": 1},
    {"op": "get_data", "keys": ["x"], "comm": 1},
    {"op": "get_data", "keys": 5},
    {"op": "get_data", "keys": None},
    {"op": "get_data", "keys": [{}]},
    {"op": "identity", "a": 1},
    {"op": "keys", "foo": 1},
    {"op": "ping", "x": 1},
    {"op": "free_keys"},
    {"op": "free_keys", "keys": ["x"]},
    {"op": "free_keys", "keys": ["x"], "stimulus_id": "a", "z": 3},
    {"op": "update_data"},
    {"op": "gather"},
    {"op": "get_logs", "foo": 1},
    {"op": "get_monitor_info", "foo": 1},
    {"op": "call_stack", "foo": 1},
    {"op": "get_story"},
    {"op": "versions", "foo": 1},
    {"op": "terminate", "zz": 1},
    {"op": "echo", "foo": 1},
    # refused by configuration
    {"op": "benchmark_disk"},
]

WELL_FORMED: list[Any] = [
    {"op": "ping"},
    {"op": "ping", "close": True},
    {"op": "ping", "reply": True, "serializers": ["pickle"]},
    {"op": "keys"},
    {"op": "get_data", "keys": "abc"},
    {"op": "gather", "who_has": {}},
    {"op": "free_keys", "keys": ["nope"], "stimulus_id": "a"},
    {"op": "call_stack"},
    {"op": "get_story", "keys_or_stimuli": ["never seen"]},
    {"op": "echo"},
    {"op": "echo", "data": {"a": [1, 2.5, None]}},
    {"op": "close"},
    {"op": "close", "reply": False},
    # no op that anybody knows
    {"op": "nope"},
    {"op": 5},
    {"op": None},
    # no request at all
    {"noop": 1},
    [1, 2],
    "hello",
]


async def compare(address: str) -> None:
    """Asks a stock worker and ours the same, well and badly."""
    dask.config.set({"distributed.worker.blocked-handlers": ["benchmark_disk"]})
    # a stock server forgets to handle what it raises itself
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    async with (
        Scheduler(host="127.0.0.1", port=0, dashboard_address=":0") as scheduler,
        Worker(scheduler.address, host="127.0.0.1", nthreads=1, dashboard=False) as worker,
    ):
        for message in MALFORMED:
            expected = await ask(worker.address, message)
            assert expected[0] == "uncaught-error", (message, expected)
            assert await ask(address, message) == expected, message
        for message in WELL_FORMED:
            expected = await ask(worker.address, message)
            got = await ask(address, message)
            assert got == expected, (message, expected, got)
        # several requests on one connection, after an error and without replies
        for server in (worker.address, address):
            comm = await connect(server)
            await comm.write({"op": "get_data"})
            assert (await comm.read())["status"] == "uncaught-error"
            await comm.write({"op": "ping", "reply": False})
            await comm.write({"op": "get_data", "keys": ["nope"], "who": WHO})
            assert await comm.read() == {"status": "OK", "data": {}}
            await comm.write("NOT OK")
            reply = await comm.read()
            assert reply["exception_text"] == "AssertionError('NOT OK')", reply
            await comm.write({"op": "ping"})
            assert await comm.read() == b"pong"
            comm.abort()
        # a receiver that could not open the data leaves its "OK" out: unlike stock, we answer what is next
        comm = await connect(address)
        for _ in range(2):
            await comm.write({"op": "get_data", "keys": ["nope"], "who": WHO})
            assert await comm.read() == {"status": "OK", "data": {}}
        await comm.write({"op": "ping"})
        assert await comm.read() == b"pong"
        comm.abort()
        # terminating says nothing
        assert await ask(worker.address, {"op": "terminate"}) == "closed"
        assert await ask(address, {"op": "terminate", "reason": "enough"}) == "closed"
    print("ok", flush=True)


async def busy(address: str) -> None:
    """A worker that serves as many as it may says so, and no longer when they are done."""
    comm = await connect(address)
    await comm.write({"op": "get_data", "keys": ["x"], "who": WHO})
    assert (await comm.read())["status"] == "OK"
    assert await fetch(address, ["x"]) == {"status": "busy"}
    await comm.write("OK")
    while (await fetch(address, ["x"]))["status"] == "busy":
        pass
    # a receiver that leaves in place of its OK frees its place as well
    reply = {"status": "busy"}
    while reply["status"] == "busy":
        await comm.write({"op": "get_data", "keys": ["x"], "who": WHO})
        reply = await comm.read()
    comm.abort()
    while (await fetch(address, ["x"]))["status"] == "busy":
        pass
    print("ok", flush=True)


async def nanny(address: str) -> None:
    """The ops of a nanny."""
    async with rpc(address) as ours:
        assert (await ours.identity())["type"] == "Nanny"
        assert await ours.instantiate() == Status.running
        assert await ours.kill(timeout=3, reason="why") is None
        assert await ours.restart(timeout=1) == "OK"
        assert await ours.restart(timeout=0) == "timed out"
        reply = await ours.restart(reason="fail")
        assert reply["status"] == "error"
        assert "no worker" in reply["exception_text"]
        assert await ours.close_gracefully(reason="bye") is None
        assert await ours.get_logs(n=1) == (("INFO", "a line"),)
        assert await ours.get_logs(timestamps=True) == ((1.5, "INFO", "a line"),)
        try:
            await ours.kill(nothing=1)
        except TypeError as e:
            assert str(e) == "Nanny.kill() got an unexpected keyword argument 'nothing'"
        else:
            raise AssertionError("an unknown argument was taken")
    assert await ask(address, {"op": "terminate"}) == "closed"
    print("ok", flush=True)


async def stream(address: str) -> None:
    """Messages without answers, as one worker sends them to another."""
    comm = await connect(address)
    await comm.write({"op": "connection_stream"})
    await comm.write([{"op": "free-keys", "keys": ["a"], "stimulus_id": "1"}, {"op": "unheard-of", "n": 2}])
    await comm.write({"op": "close-stream"})
    try:
        await asyncio.wait_for(comm.read(), 10)
    except OSError:
        print("ok", flush=True)


command, *arguments = sys.argv[1:]
if command == "stock":
    dask.config.set({"distributed.comm.compression": arguments.pop() or False})
asyncio.run(globals()[command](*arguments))
