"""The parts of a runner that need no daemon."""

from __future__ import annotations

import functools
import operator

import pytest
from dask._task_spec import Alias, DataNode, Dict, Task
from distributed.utils import iscoroutinefunction
from iqoqo_runner import task, zygote


def plain():
    pass


async def coroutine():
    pass


def generator():
    yield


class Callable:
    def __call__(self):
        pass


class AsyncCallable:
    async def __call__(self):
        pass

    async def method(self):
        pass


@functools.wraps(coroutine)
def wrapped():
    return coroutine()


def marked():
    pass


marked.__tornado_coroutine__ = True

FUNCTIONS = [
    plain,
    coroutine,
    generator,
    operator.add,
    len,
    int,
    Callable(),
    AsyncCallable(),
    AsyncCallable().method,
    wrapped,
    marked,
    functools.partial(coroutine),
    functools.partial(plain),
    lambda: coroutine(),
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=repr)
def test_coroutines_are_recognised_as_dask_does(function):
    spec = Task("key", function)
    assert task.is_coroutine(spec) == spec.is_coro == iscoroutinefunction(function)


@pytest.mark.parametrize("node", [Alias("a", "b"), DataNode("a", 1), Dict({"a": 1})], ids=repr)
def test_other_nodes_are_no_coroutines(node):
    assert task.is_coroutine(node) == node.is_coro


def test_a_repr_that_fails_is_no_failure():
    class Bad:
        def __repr__(self):
            raise ValueError

    assert "Bad" in task.safe_repr(Bad())


@pytest.mark.parametrize(("argument", "code"), [(None, 0), (3, 3), (256, 0), (-1, 255), ("text", 1), ([], 1)])
def test_exit_codes_are_the_interpreters(argument, code):
    assert zygote.exit_code(SystemExit(argument)) == code
