"""A task's exception reaches the client as from stock: type, arguments, text, causes, frames; so do results
and exceptions that cannot be pickled."""

from __future__ import annotations

import concurrent.futures
import linecache
import os
import threading
import traceback

import pytest
from distributed import Client, wait
from harness import PAIR, SOLO, join

pytestmark = pytest.mark.kinds(*SOLO)

HERE = os.path.basename(__file__)


class Custom(Exception):
    def __init__(self, a, b):
        super().__init__(a, b)
        self.extra = {"a": a}


class Unpicklable(Exception):
    def __init__(self):
        super().__init__("has a lock", 1)
        self.lock = threading.Lock()


class ArgumentsLost(Exception):
    """Its ``args`` are not what its constructor takes, so a plain pickle could not be read."""

    def __init__(self, a, b):
        super().__init__("just one")


class ReadsOnlyOnTheWorker(Exception):
    def __reduce__(self):
        return (only_on_the_worker, ("x",))


class Falsy(Exception):
    def __bool__(self):
        return False


def only_on_the_worker(x):
    if os.environ.get("COMPAT_ROLE") != "worker":
        raise RuntimeError("read elsewhere")
    return ReadsOnlyOnTheWorker(x)


def raise_custom():
    raise Custom(1, "x")


def raise_unpicklable():
    raise Unpicklable()


def raise_arguments_lost():
    raise ArgumentsLost(1, 2)


def raise_huge_message():
    raise ValueError("x" * 1_000_000)


def raise_huge_argument():
    raise ValueError(b"y" * 1_000_000, 5)


def raise_huge_custom():
    raise Custom("z" * 20_000, "b")


def raise_huge_arguments_lost():
    error = ArgumentsLost(1, 2)
    error.args = ("w" * 20_000,)
    raise error


def raise_from_cause():
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError as e:
        raise KeyError("chained") from e


def raise_in_handler():
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError:
        raise KeyError("during") from None


def raise_in_context():
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError:
        raise KeyError("during")  # noqa: B904


def raise_three_deep():
    try:
        raise_from_cause()
    except KeyError as e:
        raise Custom("outer", e) from e


def raise_group():
    raise ExceptionGroup("several", [ValueError(1), KeyError("two")])  # noqa: F821 (3.11 and later)


def raise_with_notes():
    error = ValueError("noted")
    error.add_note("first note")
    error.add_note("second note")
    raise error


def raise_stop_iteration():
    raise StopIteration(5)


def raise_syntax_error():
    exec("1 +")


def raise_memory_error():
    raise MemoryError("mine")


def raise_timeout():
    raise TimeoutError("task's own")


def raise_os_error():
    open("/nonexistent/file")


def raise_unicode_error():
    b"\xff".decode()


def raise_cancelled():
    raise concurrent.futures.CancelledError("a task's own")


def raise_assertion():
    assert 1 == 2, "not equal"


def raise_unicode_text():
    raise ValueError("ünïcode ☃ \U0001f600")


def raise_empty():
    raise ValueError


def raise_falsy():
    raise Falsy("no")


def raise_from_a_nested_call():
    def outer(n):
        if n:
            return outer(n - 1)
        return inner()

    def inner():
        return [raise_os_error() for _ in range(1)]

    return outer(3)


def raise_in_a_library():
    import json

    json.loads("{")


def raise_lambda():
    return (lambda x: x["missing"])({})


def frames(tb, inside=False):
    """Of a traceback: file, function, line and its text, from the task's first frame on."""
    found = [
        (os.path.basename(f.filename), f.name, f.lineno, (f.line or "").strip())
        for f in traceback.extract_tb(tb)
    ]
    if inside:
        return found
    # What the client adds above is its own: from the first function of this module that is no test.
    start = next((i for i, f in enumerate(found) if f[0] == HERE and f[1].startswith("raise_")), len(found))
    return found[start:]


def describe(error, seen=()):
    if error is None:
        return None
    return {
        "type": f"{type(error).__module__}.{type(error).__qualname__}",
        "args": repr(error.args),
        "str": str(error),
        "repr": repr(error),
        "notes": getattr(error, "__notes__", None),
        "dict": repr(getattr(error, "extra", None)),
        "frames": frames(error.__traceback__, inside=bool(seen)),
        "cause": describe(error.__cause__, (*seen, error)),
        "context": describe(error.__context__, (*seen, error)),
        "suppress": error.__suppress_context__,
    }


RAISERS = [f for name, f in list(globals().items()) if name.startswith("raise_")]


@pytest.mark.parametrize("function", RAISERS, ids=lambda f: f.__name__)
def test_exception_as_from_stock(client, as_stock, function):
    future = client.submit(function)
    try:
        future.result(timeout=20)
    except Exception as e:
        error = e
    else:
        raise AssertionError("did not raise")
    as_stock(describe(error))
    as_stock(frames(future.traceback(), inside=True))
    texts = client.run_on_scheduler(
        lambda dask_scheduler, key: (
            dask_scheduler.tasks[key].exception_text,
            dask_scheduler.tasks[key].traceback_text,
        ),
        key=future.key,
    )
    as_stock(texts)


def test_custom_exception_is_the_users_class(client):
    with pytest.raises(Custom) as e:
        client.submit(raise_custom).result()
    assert e.value.args == (1, "x")
    assert e.value.extra == {"a": 1}


def test_traceback_lines(client):
    """Spelt out, for one: function names, lines and no frame of the worker's own."""
    future = client.submit(raise_from_a_nested_call)
    wait(future)
    got = [(name, text) for file, name, _, text in frames(future.traceback(), inside=True)]
    assert got == [
        ("raise_from_a_nested_call", "return outer(3)"),
        *[("outer", "return outer(n - 1)")] * 3,
        ("outer", "return inner()"),
        ("inner", "return [raise_os_error() for _ in range(1)]"),
        *(
            [("<listcomp>", "return [raise_os_error() for _ in range(1)]")]
            if "<listcomp>" in dict(got)
            else []
        ),
        ("raise_os_error", 'open("/nonexistent/file")'),
    ]
    assert all(
        line == linecache.getline(__file__, n).strip() for _, _, n, line in frames(future.traceback(), True)
    )


def test_chained_causes(client):
    with pytest.raises(Custom) as e:
        client.submit(raise_three_deep).result()
    assert isinstance(e.value.__cause__, KeyError)
    assert isinstance(e.value.__cause__.__cause__, ZeroDivisionError)


def test_unpicklable_exception_comes_as_its_repr(client):
    error = client.submit(raise_unpicklable).exception()
    assert type(error) is Exception
    assert error.args == ("Unpicklable('has a lock', 1)",)


def test_huge_messages_are_cut(client):
    error = client.submit(raise_huge_message).exception()
    assert type(error) is ValueError
    assert error.args == ("Long error message", "x" * 10_000)


def test_dependents_err_with_the_same_exception(client):
    x = client.submit(raise_custom, key="the-culprit")
    y = client.submit(lambda v: v, x, key="innocent")
    z = client.submit(sum, [y, 1], key="bystander")
    with pytest.raises(Custom) as e:
        z.result()
    assert e.value.args == (1, "x")
    assert [f.status for f in (x, y, z)] == ["error"] * 3
    blamed = client.run_on_scheduler(
        lambda dask_scheduler: dask_scheduler.tasks["bystander"].exception_blame.key
    )
    assert blamed == "the-culprit"


def test_siblings_of_a_failed_task_are_all_right(client):
    def half(x):
        if x % 2:
            raise Custom(x, "odd")
        return x

    futures = client.map(half, range(20))
    wait(futures)
    assert client.gather(futures, errors="skip") == list(range(0, 20, 2))
    assert [f.exception().args[0] for f in futures[1::2]] == list(range(1, 20, 2))


def test_erred_on_names_the_worker(client, cluster):
    future = client.submit(raise_custom, workers=[cluster.a])
    wait(future)
    where = client.run_on_scheduler(
        lambda dask_scheduler, key: sorted(dask_scheduler.tasks[key].erred_on), key=future.key
    )
    assert where == [cluster.a]


def test_retry_after_an_error(client, tally):
    runs = tally("tries")

    def task():
        if runs.add() < 2:
            raise ValueError("not yet")
        return "now"

    future = client.submit(task, pure=False)
    with pytest.raises(ValueError, match="not yet"):
        future.result()
    future.retry()
    assert future.result() == "now"


def test_failing_task_is_in_the_workers_log(client, cluster):
    client.submit(raise_custom, key="log-this-key", workers=[cluster.a]).exception()
    cluster.workers[0].process.wait_for("log-this-key", timeout=10)


# -- what cannot be pickled, and what cannot be read again


class FailsToPickle:
    def __reduce__(self):
        raise ValueError("no pickle of this")


class FailsToRead:
    def __reduce__(self):
        return (int, ("not a number",))


@pytest.mark.parametrize(
    "make", [threading.Lock, lambda: (i for i in range(3)), FailsToPickle], ids=["lock", "gen", "own"]
)
def test_unpicklable_result(client, make):
    """The task has finished; whoever asks for its result is told why he can't have it."""
    future = client.submit(lambda: make())
    wait(future)
    assert future.status == "finished"
    with pytest.raises(
        TypeError, match="^Could not serialize object of type (lock|generator|FailsToPickle)\n"
    ):
        future.result()
    assert client.submit(sum, [1, 2]).result() == 3


def test_dependent_of_an_unpicklable_result_on_the_same_worker(client, cluster):
    """Stock hands the object over within its process.

    Ours runs tasks in processes of their own, so what cannot be pickled does not pass from one to the next:
    the dependent errs.
    """
    lock = client.submit(threading.Lock, workers=[cluster.a], pure=False)
    future = client.submit(lambda lock: lock.locked(), lock, workers=[cluster.a])
    if not cluster.ours:
        assert future.result() is False
    else:
        with pytest.raises(TypeError, match="^Could not serialize object of type lock\n"):
            future.result()


@pytest.mark.kinds(*PAIR)
def test_dependent_of_an_unpicklable_result_on_another_worker(client, cluster):
    """Stock fails to read what it received, tells the scheduler so of a key that it thinks is fine, and waits
    for ever. Ours does not read what it receives; the task that does errs."""
    # The connection on which stock failed stays in its pool, out of step, and spoils a later transfer.
    cluster.spoilt = "stock" in (worker.flavour for worker in cluster.workers)
    for here, there in (cluster.workers, reversed(cluster.workers)):
        lock = client.submit(threading.Lock, workers=[here.address], pure=False)
        future = client.submit(lambda lock: lock.locked(), lock, workers=[there.address])
        if there.ours:
            with pytest.raises(TypeError, match="^Could not serialize object of type lock\n"):
                future.result(timeout=20)
        else:
            with pytest.raises(TimeoutError):
                future.result(timeout=1)


def test_result_that_cannot_be_read_again(client):
    future = client.submit(FailsToRead)
    wait(future)
    assert future.status == "finished"
    with pytest.raises(ValueError, match="invalid literal for int"):
        future.result()


class ReadOnlyElsewhere:
    """Can be read by the client and the scheduler, and not by a worker."""

    def __init__(self):
        pass

    def __reduce__(self):
        return (not_on_the_worker, ())

    def __call__(self):
        return 1


def not_on_the_worker():
    if os.environ.get("COMPAT_ROLE") == "worker":
        raise OSError("a worker can't read this")
    return ReadOnlyElsewhere()


def test_task_that_the_worker_cannot_read(launch, scheduler):
    """Stock reads tasks where it reads its messages: the worker loses its scheduler, and takes itself down.

    Ours never reads a task but in a runner: that task errs with what its reading raised.
    """
    worker = launch.worker(scheduler.address, "--no-nanny")
    with Client(scheduler.address) as client:
        join(client, worker)
        future = client.submit(ReadOnlyElsewhere(), key="unreadable")
        if not worker.ours:
            worker.process.wait(20)
            assert "a worker can't read this" in worker.log
            return
        with pytest.raises(OSError, match="^a worker can't read this$"):
            future.result(timeout=20)
        assert client.submit(sum, [1, 2]).result(timeout=20) == 3


def test_result_of_a_type_that_lies_about_its_size(client):
    class Odd:
        def __sizeof__(self):
            raise ValueError("no size")

    assert type(client.submit(lambda: Odd()).result()).__name__ == "Odd"
