"""Results: any value of any size arrives whole wherever it is asked for, with its size and type known."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from distributed import get_task_stream, get_worker, wait
from harness import PAIR, SOLO, eventually


class Color(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Record:
    a: int
    b: list


Named = collections.namedtuple("Named", "x y")

VALUES = {
    "none": None,
    "false": False,
    "not-implemented": NotImplemented,
    "int-huge": 10**400,
    "float-nan-free": -0.0,
    "complex": 1j,
    "str-empty": "",
    "str-surrogate-free": "ü☃\U0001f600\x00",
    "bytes-empty": b"",
    "bytearray": bytearray(b"abc"),
    "tuple-empty": (),
    "nested": {"a": [1, (2, {3, 4}), {"b": b"x" * 100}]},
    "ordered": collections.OrderedDict(b=1, a=2),
    "decimal": decimal.Decimal("1.10"),
    "datetime": datetime.datetime(2020, 1, 2, tzinfo=datetime.timezone.utc),
    "enum": Color.RED,
    "dataclass": Record(1, [2]),
    "namedtuple": Named(1, 2),
    "range": range(5),
    "type": dict,
    "exception": ValueError,
    "np-scalar": np.float32(1.5),
    "np-datetime": np.datetime64("2020-01-01"),
    "np-empty": np.empty(0),
    "np-empty-2d": np.empty((0, 5), dtype="i4"),
    "np-0d": np.array(3),
    "np-bool": np.array([True, False]),
    "np-object": np.array([1, "a", None], dtype=object),
    "np-structured": np.array([(1, 2.5)], dtype=[("a", "i4"), ("b", "f8")]),
    "np-fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "np-strided": np.arange(100)[::7],
    "np-broadcast": np.broadcast_to(np.arange(3), (4, 3)),
    "np-masked": np.ma.masked_array([1, 2, 3], mask=[0, 1, 0]),
    "np-str": np.array(["a", "bcd"]),
    "np-big-endian": np.arange(5, dtype=">i8"),
    "list-of-arrays": [np.arange(10), np.arange(20_000)],
    "dict-of-arrays": {"x": np.ones(9000), "y": (np.zeros(1),)},
    "df": pd.DataFrame({"a": [1, 2], "b": ["x", None], "c": pd.to_datetime(["2020", "2021"])}),
    "df-empty": pd.DataFrame({"a": []}),
    "df-categorical": pd.DataFrame({"c": pd.Categorical(["x", "y", "x"])}),
    "series-named": pd.Series([1.0, 2.0], name="s", index=pd.Index([5, 6], name="i")),
    "index": pd.MultiIndex.from_product([["a", "b"], [1, 2]], names=["k", "l"]),
    "timestamp": pd.Timestamp("2020-01-01", tz="UTC"),
    "arrow-table": pa.table({"a": [1, 2, 3], "s": ["x", "y", None]}),
}


def equal(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
    if isinstance(a, pd.DataFrame | pd.Series | pd.Index | pa.Table):
        return a.equals(b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    return a == b


def identity(x):
    return x


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
@pytest.mark.kinds(*SOLO)
def test_value(client, as_stock, value):
    """To a task, to the next, and back; the scheduler sees the size and the type that stock tells it."""
    first = client.submit(identity, value, key="first")
    second = client.submit(identity, first, key="second")
    assert equal(second.result(), value)
    assert equal(first.result(), value)
    assert set(client.nbytes(summary=False)) == {"first", "second"}
    seen = client.run_on_scheduler(
        lambda dask_scheduler: {k: (t.type, t.nbytes) for k, t in dask_scheduler.tasks.items()}
    )
    as_stock(seen["first"])
    # The second is the same object on stock and a copy on ours: as equal, and not always as large.
    as_stock(seen["second"][0])


@pytest.mark.kinds(*PAIR)
@pytest.mark.parametrize("direction", ["a-to-b", "b-to-a"])
def test_values_from_worker_to_worker(client, cluster, direction):
    here, there = (cluster.a, cluster.b) if direction == "a-to-b" else (cluster.b, cluster.a)
    made = {
        name: client.submit(identity, value, workers=[here], pure=False) for name, value in VALUES.items()
    }

    def collect(**values):
        return [k for k, v in values.items() if not equal(v, VALUES[k])]

    assert client.submit(collect, **made, workers=[there]).result() == []


@pytest.mark.parametrize("n", [0, 1, 65_535, 65_536, 65_537, 1_000_000, 10_000_000, 100_000_000])
@pytest.mark.kinds(*SOLO)
def test_bytes_of_every_size(client, as_stock, n):
    made = client.submit(bytes, n, pure=False)
    size = client.submit(len, made)
    assert size.result() == n
    as_stock(client.nbytes(summary=False)[made.key])
    assert made.result() == bytes(n)


@pytest.mark.parametrize(
    "shape", [(0,), (1,), (8191,), (8192,), (8193,), (1000, 1000), (5000, 5000)], ids=str
)
@pytest.mark.kinds("stock", "ours", "ours2", "mixed")
def test_arrays_of_every_size(client, cluster, shape):
    """Up to 200 MB, made on one worker, read on the other if there is one, and by the client."""
    n = int(np.prod(shape))
    made = client.submit(lambda: np.arange(n, dtype="f8").reshape(shape), workers=[cluster.a], pure=False)
    total = client.submit(lambda x: (x.shape, float(x.sum())), made, workers=[cluster.workers[-1].address])
    assert total.result() == (shape, n * (n - 1) / 2)
    got = made.result()
    assert got.shape == shape and got.dtype == "f8"
    np.testing.assert_array_equal(got.ravel()[:: max(1, n // 1000)], np.arange(n)[:: max(1, n // 1000)])


def test_large_argument_inside_the_graph(client):
    """A task that carries its own data, as ``from_array`` and careless users make them."""
    x = np.random.default_rng(0).random(2_000_000)
    assert client.submit(np.sum, x).result() == pytest.approx(x.sum())


def test_thousands_of_frames(client):
    parts = client.submit(lambda: [np.full(1000, i) for i in range(3000)])
    assert client.submit(lambda xs: sum(int(x[-1]) for x in xs), parts).result() == sum(range(3000))
    got = parts.result()
    assert len(got) == 3000 and got[2999][999] == 2999


def test_many_results_at_once(client):
    futures = client.map(lambda i: np.full(20_000, i), range(300))
    got = client.gather(futures)
    assert [int(x[0]) for x in got] == list(range(300))
    assert client.submit(lambda xs: sum(int(x[-1]) for x in xs), futures).result() == sum(range(300))


def test_same_input_twice_is_one_object(client):
    x = client.submit(np.ones, 10_000)
    assert client.submit(lambda a, b, c: a is b and a is c["k"], x, x, {"k": x}).result() is True


# -- inputs are the task's to write on


@pytest.mark.parametrize("n", [10, 100_000], ids=["small", "large"])
def test_input_made_by_a_task_can_be_written(client, cluster, n):
    x = client.submit(np.ones, n, workers=[cluster.a], pure=False)

    def write(x):
        x += 1
        return float(x[-1]), bool(x.flags.writeable)

    assert client.submit(write, x, workers=[cluster.a]).result() == (2.0, True)


@pytest.mark.kinds(*PAIR)
@pytest.mark.parametrize("direction", ["a-to-b", "b-to-a"])
@pytest.mark.parametrize("n", [10, 100_000, 1_000_000], ids=["small", "large", "larger"])
def test_input_from_a_peer_can_be_written(client, cluster, direction, n):
    here, there = (cluster.a, cluster.b) if direction == "a-to-b" else (cluster.b, cluster.a)
    x = client.submit(np.ones, n, workers=[here], pure=False)
    y = client.submit(lambda n: pd.DataFrame({"a": np.ones(n)}), n, workers=[here], pure=False)

    def write(x, y):
        x += 1
        y["a"] = y["a"] * 3
        return float(x[-1]), float(y["a"].iloc[-1])

    assert client.submit(write, x, y, workers=[there]).result() == (2.0, 3.0)


def test_what_a_task_does_to_its_input(client, cluster):
    """On stock, tasks of one worker share their inputs, and a careless one spoils them for all. Ours gives
    each task its own view: the stored result stays what it was."""
    x = client.submit(np.zeros, 100_000, workers=[cluster.a], pure=False)

    def spoil(x):
        x += 7
        return float(x[0])

    assert client.submit(spoil, x, workers=[cluster.a]).result() == 7.0
    assert x.result()[0] == (0.0 if cluster.ours else 7.0)


def test_result_shares_memory_with_an_input(client, cluster):
    """A view of an input, and the input itself, returned as results."""
    x = client.submit(np.arange, 50_000, workers=[cluster.a])
    view = client.submit(lambda x: x[10:20], x)
    same = client.submit(identity, x)
    np.testing.assert_array_equal(view.result(), np.arange(10, 20))
    np.testing.assert_array_equal(same.result(), np.arange(50_000))
    x.release()
    eventually(lambda: not client.who_has()[x.key])
    np.testing.assert_array_equal(client.submit(lambda v: v + 1, same).result()[:3], [1, 2, 3])


# -- what the scheduler is told


def test_who_has_and_has_what(client, cluster):
    futures = client.map(identity, range(5), workers=[cluster.a], pure=False)
    wait(futures)
    keys = {f.key for f in futures}
    held = client.who_has(futures)
    assert set(held) == keys
    assert {tuple(workers) for workers in held.values()} == {(cluster.a,)}
    assert set(client.has_what()[cluster.a]) == keys
    assert client.ncores() == {w.address: 2 for w in cluster.workers}


@pytest.mark.kinds(*SOLO)
def test_durations_are_learnt(client):
    def takes_a_while(i):
        time.sleep(0.05)

    client.gather(client.map(takes_a_while, range(4)))
    average = client.run_on_scheduler(
        lambda dask_scheduler: dask_scheduler.task_prefixes["takes_a_while"].duration_average
    )
    assert 0.05 <= average < 0.5


@pytest.mark.kinds(*SOLO)
def test_task_stream(client, cluster, as_stock):
    with get_task_stream(client) as stream:
        before = time.time()
        future = client.submit(lambda: time.sleep(0.02) or 5, key="streamed-1", workers=[cluster.a])
        failing = client.submit(lambda: 1 / 0, key="streamed-2", workers=[cluster.a])
        wait([future, failing])
        after = time.time()
    records = {r["key"]: r for r in stream.data}
    assert set(records) == {"streamed-1", "streamed-2"}
    as_stock({k: sorted(r) for k, r in sorted(records.items())})
    good, bad = records["streamed-1"], records["streamed-2"]
    assert (good["status"], bad["status"]) == ("OK", "error")
    assert good["worker"] == bad["worker"] == cluster.a
    assert isinstance(good["thread"], int)
    assert good["nbytes"] == client.nbytes(summary=False)["streamed-1"]
    (compute,) = [s for s in good["startstops"] if s["action"] == "compute"]
    assert before - 0.1 <= compute["start"] <= compute["stop"] - 0.02 <= after + 0.1
    as_stock([sorted(s) for r in (good, bad) for s in r["startstops"]])


@pytest.mark.kinds(*PAIR)
@pytest.mark.parametrize("direction", ["a-to-b", "b-to-a"])
def test_task_stream_shows_transfers(client, cluster, direction):
    here, there = (cluster.a, cluster.b) if direction == "a-to-b" else (cluster.b, cluster.a)
    x = client.submit(np.ones, 1_000_000, workers=[here], pure=False)
    wait(x)
    with get_task_stream(client) as stream:
        y = client.submit(np.sum, x, workers=[there], pure=False)
        wait(y)
    (record,) = [r for r in stream.data if r["key"] == y.key]
    transfers = [s for s in record["startstops"] if s["action"] == "transfer"]
    assert [s["source"] for s in transfers] == [here]
    assert transfers[0]["start"] <= transfers[0]["stop"]


@pytest.mark.kinds(*SOLO)
def test_threads_told_are_those_of_the_slots(client, cluster):
    """As many different ``thread`` idents as the worker has slots, no more."""
    with get_task_stream(client) as stream:
        client.gather(client.map(lambda i: time.sleep(0.002), range(60), workers=[cluster.a], pure=False))
    threads = {r["thread"] for r in stream.data}
    assert 1 <= len(threads) <= 2


@pytest.mark.kinds(*SOLO)
def test_metadata_and_events_of_a_task(client, cluster):
    def task():
        get_worker().log_event("from-a-task", {"x": 1})
        return 1

    assert client.submit(task, pure=False, workers=[cluster.a]).result() == 1
    events = eventually(lambda: client.get_events("from-a-task"))
    assert events[0][1]["x"] == 1


# -- what tasks print


@pytest.mark.kinds(*SOLO)
def test_printed_lines_are_in_the_workers_log(client, cluster):
    def talk():
        import os
        import sys

        print("said to stdout 4711")
        print("said to stderr 4712", file=sys.stderr)
        sys.stdout.flush()
        os.write(1, b"written to fd 1 4713\n")

    client.submit(talk, key="talker", workers=[cluster.a], pure=False).result()
    process = cluster.workers[0].process
    for text in ("said to stdout 4711", "said to stderr 4712", "written to fd 1 4713"):
        process.wait_for(text, timeout=10)
    if cluster.ours:
        for line in process.text.splitlines():
            if "said to st" in line:
                assert "talker" in line


@pytest.mark.kinds(*SOLO)
def test_log_records_of_tasks_are_in_the_workers_log(client, cluster):
    def warn():
        import logging

        logging.getLogger("users.own").warning("a warning 4714")

    client.submit(warn, workers=[cluster.a], pure=False).result()
    cluster.workers[0].process.wait_for("a warning 4714", timeout=10)


@pytest.mark.kinds(*SOLO)
def test_distributed_print_and_warn_reach_the_client(client, cluster, capsys):
    def talk():
        from distributed import print as dprint

        dprint("shown at the client")

    client.submit(talk, workers=[cluster.a], pure=False).result()
    seen = ""

    def shown():
        nonlocal seen
        seen += capsys.readouterr().out
        return "shown at the client" in seen

    eventually(shown)
