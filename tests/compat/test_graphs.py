"""Every form in which a graph reaches a worker: the nodes of ``dask._task_spec``, legacy tuples, all keys."""

from __future__ import annotations

import asyncio
import operator

import numpy as np
import pytest
from dask import delayed
from dask._task_spec import Alias, DataNode, Dict, List, Set, Task, TaskRef, Tuple
from dask._task_spec import fuse_linear_task_spec as fuse_linear
from dask.core import flatten
from distributed import get_worker


def get(client, dsk, keys):
    """The graph as it is: ``Client.get`` changes nothing in it."""
    return client.get(dsk, keys, sync=True)


def test_task_with_kwargs_and_nested_references(client):
    def f(a, b, *rest, c=None, **more):
        return a, b, rest, c, more

    dsk = {
        "x": DataNode("x", 10),
        "y": Task("y", operator.add, TaskRef("x"), 1),
        "z": Task("z", f, TaskRef("y"), [TaskRef("x")], {"lit": 1}, c=TaskRef("x"), d=TaskRef("y")),
        "nested": Task(
            "nested", f, List(TaskRef("x"), Tuple(TaskRef("y"), 5)), Dict({"k": TaskRef("y")}), c=3
        ),
    }
    z, nested = get(client, dsk, ["z", "nested"])
    assert z[0] == 11 and z[2] == ({"lit": 1},) and z[3] == 10 and z[4] == {"d": 11}
    assert nested == ([10, (11, 5)], {"k": 11}, (), 3, {})


def test_aliases(client):
    dsk = {
        "a": Task("a", operator.mul, 6, 7),
        "b": Alias("b", "a"),
        "c": Alias("c", "b"),
        "d": Task("d", operator.add, TaskRef("c"), TaskRef("b")),
    }
    assert get(client, dsk, ["b", "c", "d", "a"]) == [42, 42, 84, 42]


@pytest.mark.parametrize(
    "value", [0, None, b"", "text", [1, [2]], {"a": (1, 2)}, {1, 2}, 2.5, range(3), Ellipsis], ids=repr
)
def test_data_nodes(client, value):
    dsk = {"v": DataNode("v", value), "same": Task("same", lambda v: v, TaskRef("v"))}
    assert get(client, dsk, ["v", "same"]) == [value, value]


def test_data_node_with_an_array(client):
    x = np.arange(100_000)
    dsk = {"v": DataNode("v", x), "sum": Task("sum", np.sum, TaskRef("v"))}
    assert get(client, dsk, "sum") == x.sum()


def test_containers_of_every_type(client):
    dsk = {
        "one": DataNode("one", 1),
        "two": Task("two", operator.add, TaskRef("one"), TaskRef("one")),
        "list": List(TaskRef("one"), TaskRef("two"), 3),
        "tuple": Task("tuple", tuple, Tuple(TaskRef("one"), List(TaskRef("two"), "x"))),
        "set": Task("set", lambda s: s, Set(TaskRef("one"), TaskRef("two"), TaskRef("one"))),
        "dict": Task(
            "dict",
            lambda d: d,
            Dict({"a": TaskRef("one"), "b": List(TaskRef("two"), Dict(c=TaskRef("one")))}),
        ),
    }
    dsk["list"].key = "list"
    assert get(client, dsk, ["list", "tuple", "set", "dict"]) == [
        [1, 2, 3],
        (1, [2, "x"]),
        {1, 2},
        {"a": 1, "b": [2, {"c": 1}]},
    ]


def test_fused_tasks(client):
    def inc(x):
        return x + 1

    tasks = [Task("f0", inc, 0), Task("f1", inc, TaskRef("f0")), Task("f2", inc, TaskRef("f1"))]
    fused = Task.fuse(*tasks)
    assert fused.key == "f2"
    assert get(client, {"f2": fused}, "f2") == 3


def test_fused_task_with_outside_inputs_and_alias(client):
    def add(x, y):
        return x + y

    fused = Task.fuse(
        Task("in", add, TaskRef("p"), TaskRef("q")), Task("out", add, TaskRef("in"), 100), key="renamed"
    )
    dsk = {
        "p": Task("p", int, 1),
        "q": Task("q", int, 2),
        "renamed": fused,
        "end": Task("end", add, TaskRef("renamed"), TaskRef("p")),
    }
    assert get(client, dsk, ["renamed", "end"]) == [103, 104]


def test_fuse_linear(client):
    dsk = {"c0": Task("c0", int, 0)}
    for i in range(1, 10):
        dsk[f"c{i}"] = Task(f"c{i}", operator.add, TaskRef(f"c{i - 1}"), i)
    fused = fuse_linear(dsk, {"c9"})
    assert len(fused) < len(dsk)
    assert get(client, fused, "c9") == sum(range(10))


def test_legacy_tuples(client):
    dsk = {
        "x": 1,
        "y": (operator.add, "x", (operator.mul, 3, "x")),
        "z": (sum, ["x", "y", (operator.neg, "y")]),
        "w": "z",
    }
    assert get(client, dsk, ["y", "z", "w"]) == [4, 1, 1]


def test_coroutine_task_in_a_graph(client):
    async def double(x):
        await asyncio.sleep(0)
        return 2 * x

    dsk = {
        "x": Task("x", int, 4),
        "y": Task("y", double, TaskRef("x"), _data_producer=False),
        "z": Task("z", operator.add, TaskRef("y"), 1),
    }
    assert get(client, dsk, ["y", "z"]) == [8, 9]


def test_partial_class_and_method_as_functions(client):
    class Point:
        def __init__(self, x):
            self.x = x

        def plus(self, n):
            return self.x + n

        def __call__(self, n):
            return self.x * n

    p = client.submit(Point, 5)
    assert client.submit(lambda p: p.plus(1), p).result() == 6
    assert client.submit(Point(7), 3).result() == 21
    assert client.submit(Point(7).plus, 3).result() == 10
    from functools import partial

    assert client.submit(partial(pow, 2), 5).result() == 32


KEYS = {
    "str": "plain",
    "str-odd": 'sp ace/ü☃\n"quoted"',
    "str-long": "k" * 3000,
    "int": 12345,
    "int-negative": -3,
    "int-big": 2**63 - 1,
    "float": 1.5,
    "tuple": ("x", 1, 2),
    "tuple-nested": ("x", ("y", 1.5), (7, ("w",))),
    "tuple-str-digits": ("1", 1),
}


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS.keys())
def test_keys(client, key):
    second = ("after", key) if key != "plain" else "after"
    dsk = {key: Task(key, int, 20), second: Task(second, operator.add, TaskRef(key), 1)}
    futures = client.get(dsk, [key, second], sync=False)
    assert client.gather(futures) == [20, 21]
    held = client.who_has()
    assert set(held) == {key, second}
    assert {type(k) for k in held} == {type(key), type(second)}
    assert {k for keys in client.has_what().values() for k in keys} == {key, second}


def test_keys_that_python_calls_equal_are_one(client):
    dsk = {1: Task(1, int, 5), ("p", 1): Task(("p", 1), int, 6), "1": Task("1", int, 7)}
    futures = client.get(dsk, [1.0, ("p", 1.0), "1"], sync=False)
    assert client.gather(futures) == [5, 6, 7]


def test_graph_order_depth_first_within_one_thread(client):
    # 40 tasks deep and wide; the answer depends on every edge.
    dsk = {("r", 0, j): Task(("r", 0, j), int, j) for j in range(8)}
    for i in range(1, 5):
        for j in range(8):
            dsk["r", i, j] = Task(
                ("r", i, j), operator.add, TaskRef(("r", i - 1, j)), TaskRef(("r", i - 1, (j + 1) % 8))
            )
    level = list(range(8))
    for _ in range(4):
        level = [level[j] + level[(j + 1) % 8] for j in range(8)]
    assert list(flatten(get(client, dsk, [[("r", 4, j) for j in range(8)]]))) == level


def test_delayed_of_collections_and_futures(client):
    f = client.submit(lambda: [1, 2, 3])
    total = delayed(sum)(delayed(f))
    assert client.compute(total).result() == 6


def test_tasks_know_their_key_and_worker(client, cluster):
    def who():
        worker = get_worker()
        return worker.address, worker.name, worker.get_current_task()

    address, name, key = client.submit(who, key="who-am-i", workers=[cluster.a]).result()
    assert (address, str(name), key) == (cluster.a, "a", "who-am-i")
