"""Fixtures of the behaviour tests: the kinds of cluster a test runs on, their order, and the cleaning up.

Every test runs on stock ``dask worker`` first. A test that fails there is a wrong test, and says so for the
other kinds.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import dask
import harness
import pytest
from distributed import Client
from harness import ALL, KINDS, Cluster, Gate, HarnessError, Launcher, Process, Tally


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "kinds(*names): the kinds of cluster this test makes sense on (default: all)"
    )
    config.addinivalue_line(
        "markers", "scheduler(**config): the configuration of the scheduler, __ for a dot"
    )
    unknown = set(selected(config)) - set(ALL)
    if unknown:
        raise pytest.UsageError(f"--kinds: no such kind: {', '.join(sorted(unknown))}")


def selected(config: pytest.Config) -> list[str]:
    return [k.strip() for k in config.getoption("--kinds").split(",") if k.strip()]


def pytest_sessionstart() -> None:
    move_to_main({"gate": Gate, "tally": Tally}, harness.__name__)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kind" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("kinds")
        wanted = marker.args if marker else ALL
        chosen = selected(metafunc.config)
        metafunc.parametrize("kind", [k for k in wanted if k in chosen], scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def kind(item: pytest.Item) -> Any:
        spec = getattr(item, "callspec", None)
        return spec.params.get("kind", ALL[0]) if spec else ALL[0]

    # A test for kinds that were not asked for is left out, not skipped.
    left_out = [item for item in items if kind(item) not in ALL]
    config.hook.pytest_deselected(items=left_out)
    # All of stock first, then kind by kind, so that one cluster at a time is up.
    items[:] = sorted(
        (item for item in items if item not in left_out), key=lambda item: ALL.index(kind(item))
    )


# -- what fails on stock is a wrong test

STOCK_FAILURES: set[str] = set()


def base_id(item: pytest.Item) -> str:
    """The test without its kind."""
    kind = item.callspec.params["kind"]  # type: ignore[attr-defined]
    name = item.nodeid.rpartition("::")[2]
    parts = name.partition("[")[2].rstrip("]").split("-")
    parts.remove(kind)
    return f"{item.nodeid.partition('[')[0]}[{'-'.join(parts)}]"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    spec = getattr(item, "callspec", None)
    if report.failed and spec and "kind" in spec.params:
        if spec.params["kind"] == "stock":
            STOCK_FAILURES.add(base_id(item))
        elif base_id(item) in STOCK_FAILURES:
            report.sections.append(("NOTE", "this test failed on stock dask worker too: the test is wrong"))
    if report.failed:
        for process, offset in item.stash.get(LOGS, []):
            new = process.text[offset:]
            report.sections.append(
                (f"output of {process.name} (pid {process.pid}, {process.argv[0]})", new[-8000:])
            )
    return report


LOGS: pytest.StashKey[list[tuple[Process, int]]] = pytest.StashKey()


# -- clusters


class Shared:
    """The one shared cluster that is up; replaced when another kind is wanted or a test has spoilt it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.current: Cluster | None = None
        self.started = 0

    def get(self, kind: str) -> Cluster:
        if self.current is None or self.current.kind != kind:
            self.drop()
            self.started += 1
            self.current = Cluster(kind, self.directory / f"{kind}-{self.started}")
        return self.current

    def drop(self) -> None:
        cluster, self.current = self.current, None
        if cluster is not None:
            cluster.close()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    shared = Shared(tmp_path_factory.mktemp("shared"))
    try:
        yield shared
    finally:
        shared.drop()


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """At the end of the run, no process that any test started is alive, wherever it moved."""
    yield
    left = harness.marked()
    left.remove(os.getpid()) if os.getpid() in left else None
    told = [f"{pid}: {harness.describe(pid)}" for pid in left]
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not told, "processes left behind:\n" + "\n".join(told)


def move_to_main(namespace: Mapping[str, Any], module: str) -> None:
    """Make functions and classes pickle by value, as those of a user's notebook do."""
    for thing in list(namespace.values()):
        if getattr(thing, "__module__", None) == module:
            if isinstance(thing, type):
                move_to_main(vars(thing), module)
            with contextlib.suppress(AttributeError):
                thing.__module__ = "__main__"


@pytest.fixture(scope="module", autouse=True)
def from_main(request: pytest.FixtureRequest) -> None:
    move_to_main(vars(request.module), request.module.__name__)


@pytest.fixture
def gate(tmp_path: Path) -> Callable[[str], Gate]:
    """``gate(name)``: what holds tasks up until the test, or another task, sets it."""
    return lambda name: Gate(tmp_path, name)


@pytest.fixture
def tally(tmp_path: Path) -> Callable[[str], Tally]:
    """``tally(name)``: how often tasks ran."""
    return lambda name: Tally(tmp_path, name)


@pytest.fixture(autouse=True)
def plain_config() -> Iterator[None]:
    """Collections exchange data by tasks, but where a test is about P2P shuffles."""
    with dask.config.set({"dataframe.shuffle.method": "tasks", "array.rechunk.method": "tasks"}):
        yield


@pytest.fixture
def cluster(request: pytest.FixtureRequest, kind: str, shared: Shared) -> Iterator[Cluster]:
    """The shared cluster of this kind, settled before and after the test."""
    cluster = shared.get(kind)
    request.node.stash[LOGS] = [(p, len(p.text)) for p in cluster.launcher.processes]
    try:
        yield cluster
    finally:
        wrong = cluster.settle()
        if wrong or cluster.spoilt:
            shared.drop()
    assert not wrong, f"the test left the cluster in a bad state: {wrong}"


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    """A stock client of the shared cluster."""
    with Client(cluster.address, timeout=harness.START_TIMEOUT) as client:
        yield client


@pytest.fixture
def launch(request: pytest.FixtureRequest, kind: str, tmp_path: Path, shared: Shared) -> Iterator[Launcher]:
    """For tests that need schedulers or workers of their own: all that was started is killed at the end."""
    if any(flavour == harness.OURS for _, flavour in KINDS[kind]):
        harness.binary()
    launcher = Launcher(kind, tmp_path)
    request.node.stash[LOGS] = Offsets(launcher)
    try:
        yield launcher
    finally:
        launcher.close()


class Offsets:
    """All output of all processes of a launcher, also of those started later."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher

    def __iter__(self) -> Iterator[tuple[Process, int]]:
        return iter([*self.launcher.seen, *((p, 0) for p in self.launcher.processes)])


class Schedulers:
    """Schedulers without workers of their own, one for each configuration, kept for the whole run."""

    def __init__(self, directory: Path) -> None:
        self.launcher = Launcher("stock", directory)
        self.running: dict[str, Process] = {}

    def get(self, **config: Any) -> Process:
        key = repr(sorted(config.items()))
        if key not in self.running or not self.running[key].running:
            self.running[key] = self.launcher.scheduler(
                config={k.replace("__", "."): v for k, v in config.items()}
            )
        return self.running[key]

    def drop(self, process: Process) -> None:
        process.kill()
        self.running = {k: p for k, p in self.running.items() if p is not process}


@pytest.fixture(scope="session")
def schedulers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Schedulers]:
    schedulers = Schedulers(tmp_path_factory.mktemp("schedulers"))
    try:
        yield schedulers
    finally:
        schedulers.launcher.close()


@pytest.fixture
def scheduler(request: pytest.FixtureRequest, schedulers: Schedulers, launch: Launcher) -> Iterator[Process]:
    """A scheduler for workers that the test itself launches.

    Shared by all tests that want the same configuration, ``@pytest.mark.scheduler(**config)``; clean before
    and after each.
    """
    marker = request.node.get_closest_marker("scheduler")
    process = schedulers.get(**(marker.kwargs if marker else {}))
    launch.seen = [(process, len(process.text))]
    clean = False
    try:
        yield process
        launch.close()
        with Client(process.address, set_as_default=False, timeout=harness.START_TIMEOUT) as client:
            empty = lambda dask_scheduler: not dask_scheduler.workers and not dask_scheduler.tasks  # noqa: E731
            harness.eventually(lambda: client.run_on_scheduler(empty))
        clean = True
    finally:
        if not clean:
            schedulers.drop(process)


@pytest.fixture
def as_stock(request: pytest.FixtureRequest, kind: str) -> Any:
    """``as_stock(value)``: note the value on stock, and assert that every other kind shows the same.

    For what is too long, or too much of one version of Dask, to write down: field names, tracebacks.
    """
    cache: Any = request.config.cache
    calls = 0

    def check(value: object) -> None:
        nonlocal calls
        calls += 1
        key = f"compat/{base_id(request.node).replace('::', '/').replace('.', '_')}/{calls}"
        text = repr(value)
        if kind == "stock":
            cache.set(key, text)
            return
        stock = cache.get(key, None)
        if stock is None:
            raise HarnessError("nothing noted from stock: run the test with --kinds stock first")
        assert text == stock

    return check
