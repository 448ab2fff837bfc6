"""What a task finds around it: environment, interpreter, paths, working directory, configuration."""

from __future__ import annotations

import os
import sys

import pytest
from distributed import Client
from harness import SOLO, join

pytestmark = pytest.mark.kinds(*SOLO)

#: Not compared: what differs from process to process, and
#: - __DASK_PARENT_PID, which a stock nanny leaves to its worker for their own use;
#: - JE_ARROW_MALLOC_CONF, without which arrow's threads would be lost in the fork that makes a runner.
OWN = {"COMPAT_ROLE", "COMPAT_RUN_ID", "_", "SHLVL", "PWD", "OLDPWD", "LINES", "COLUMNS"}
OWN |= {"__DASK_PARENT_PID", "JE_ARROW_MALLOC_CONF", "DASK_INTERNAL_INHERIT_CONFIG"}


def environment():
    import os

    return dict(os.environ)


def on_worker(client, function, *args, **kwargs):
    return client.submit(function, *args, **kwargs, pure=False).result(timeout=30)


def test_environment_variables(client, cluster, as_stock):
    """All of them. What the nanny adds for the threads of numeric libraries and for hashes is there too."""
    env = client.submit(environment, workers=[cluster.a], pure=False).result()
    assert env["PYTHONHASHSEED"] not in ("", "0", "random")
    assert env["OMP_NUM_THREADS"] == env["MKL_NUM_THREADS"] == env["OPENBLAS_NUM_THREADS"] == "1"
    assert env["MALLOC_TRIM_THRESHOLD_"] == "65536"
    private = {k for k in env if k in OWN or k.startswith("PYTEST")}
    as_stock(
        sorted((k, v) for k, v in env.items() if k not in private and k != "DASK_INTERNAL_INHERIT_CONFIG")
    )


def test_hashes_agree_between_tasks_and_with_stock(client, cluster, as_stock):
    hashes = [
        client.submit(
            lambda: (hash("a string"), hash((b"bytes", "x"))), pure=False, workers=[cluster.a]
        ).result()
        for _ in range(6)
    ]
    assert len(set(hashes)) == 1
    as_stock(hashes[0])


def test_interpreter(client, cluster, as_stock):
    def look():
        import sys

        return sys.executable, sys.prefix, sys.version, tuple(sys.flags), sys.getrecursionlimit()

    found = client.submit(look, workers=[cluster.a], pure=False).result()
    assert found[1:3] == (sys.prefix, sys.version)
    assert os.path.samefile(found[0], sys.executable)
    as_stock(found[2:])


def test_working_directory(client, cluster):
    """That of the worker's start, as on stock."""
    got = client.submit(os.getcwd, workers=[cluster.a], pure=False).result()
    assert os.path.samefile(got, cluster.launcher.directory)


def test_sys_path(client, cluster, as_stock):
    """The interpreter's own, with the worker's ``local_directory`` for uploaded files."""

    def look():
        import sys

        from distributed import get_worker

        return sys.path, get_worker().local_directory

    path, local = client.submit(look, workers=[cluster.a], pure=False).result()
    assert local in path
    # Stock has its nanny's directory too, and that of its own script.
    own = (local, os.path.dirname(local), os.path.dirname(sys.executable))
    as_stock([p for p in path if p not in own])


def test_main_module_of_a_task(client, cluster):
    """A function of the user's ``__main__`` may not collide with what the runner's own main module holds."""

    def look():
        import __main__

        return [n for n in ("Client", "test_main_module_of_a_task", "inc") if hasattr(__main__, n)]

    assert client.submit(look, workers=[cluster.a], pure=False).result() == []


def test_threads_signals_and_limits(client, cluster, as_stock):
    """All but the size of core files: ours writes none, since they would hold users' data."""

    def look():
        import resource
        import signal
        import threading

        pending = [
            signal.getsignal(s) == signal.SIG_IGN for s in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGHUP)
        ]
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        limits = [
            resource.getrlimit(r) for r in (resource.RLIMIT_AS, resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC)
        ]
        return pending, sorted(blocked), limits, isinstance(threading.current_thread().name, str)

    as_stock(client.submit(look, workers=[cluster.a], pure=False).result())


def test_standard_streams(client, cluster):
    def look():
        import sys

        return sys.stdin.read(), sys.stdout.writable(), sys.stderr.writable(), sys.stdout.encoding

    assert client.submit(look, workers=[cluster.a], pure=False).result() == ("", True, True, "utf-8")


def test_subprocesses_and_threads_of_tasks(client, cluster):
    def look():
        import subprocess
        import sys
        import threading

        found = []
        thread = threading.Thread(target=lambda: found.append("thread"))
        thread.start()
        thread.join()
        out = subprocess.run(
            [sys.executable, "-c", "print('child')"], capture_output=True, text=True, check=True
        )
        return found[0], out.stdout.strip()

    assert client.submit(look, workers=[cluster.a], pure=False).result() == ("thread", "child")


def test_imported_modules_stay_imported(client, cluster):
    """Module state is kept between tasks of one process; a task never sees another user's ``__main__``."""

    def count():
        import json.tool

        json.tool.seen = getattr(json.tool, "seen", 0) + 1
        return json.tool.seen

    got = [client.submit(count, workers=[cluster.a], pure=False).result() for _ in range(9)]
    # On two threads of one process, or in one process for each of two slots: some slot is used again.
    assert max(got) >= 4


# -- workers started with an environment and configuration of the test's own


@pytest.fixture
def start(launch, scheduler):
    clients = []

    def start(*args, **kwargs):
        worker = launch.worker(scheduler.address, *args, **kwargs)
        client = Client(scheduler.address)
        clients.append(client)
        join(client, worker)
        return client

    yield start
    for client in clients:
        client.close()


def test_dask_configuration_from_the_environment(start, launch):
    """Variables, and what tasks see of them: ``dask.config`` and the variables themselves."""

    def look():
        import os

        import dask

        return (
            dask.config.get("compat.some-key"),
            dask.config.get("array.chunk-size"),
            os.environ["COMPAT_OWN"],
        )

    client = start(
        config={"compat.some-key": {"nested": [1, 2]}, "array.chunk-size": "7MiB"},
        env={"COMPAT_OWN": "of the user's"},
    )
    assert on_worker(client, look) == ({"nested": [1, 2]}, "7MiB", "of the user's")


def test_dask_configuration_from_files(start, tmp_path):
    directory = tmp_path / "dask-config"
    directory.mkdir()
    (directory / "own.yaml").write_text(
        "compat:\n  from-file: 5\n  overridden: file\ndistributed:\n  admin:\n    max-error-length: 50\n"
    )

    def look():
        import dask

        return dask.config.get("compat.from-file"), dask.config.get("compat.overridden")

    client = start(config={"compat.overridden": "environment"}, env={"DASK_CONFIG": str(directory)})
    assert on_worker(client, look) == (5, "environment")

    def long_error():
        raise ValueError("x" * 100)

    assert client.submit(long_error).exception().args == ("Long error message", "x" * 50)


def test_variables_that_the_nanny_is_told_to_set(start):
    def look():
        import os

        return os.environ["COMPAT_ENVIRON"], os.environ["COMPAT_PRE"], os.environ["OMP_NUM_THREADS"]

    client = start(
        config={
            "distributed.nanny.environ": {"COMPAT_ENVIRON": "1"},
            "distributed.nanny.pre-spawn-environ": {"COMPAT_PRE": 2, "OMP_NUM_THREADS": 3},
        }
    )
    assert on_worker(client, look) == ("1", "2", "3")


def test_variables_of_the_caller_win_over_the_nannys(start, as_stock):
    def look():
        import os

        return os.environ["OMP_NUM_THREADS"], os.environ["PYTHONHASHSEED"], hash("x")

    as_stock(on_worker(start(env={"OMP_NUM_THREADS": "5", "PYTHONHASHSEED": "123"}), look))


def test_without_a_nanny_nothing_is_set(start, as_stock):
    def look():
        import os

        return os.environ.get("OMP_NUM_THREADS"), os.environ.get("MALLOC_TRIM_THRESHOLD_")

    as_stock(on_worker(start("--no-nanny"), look))


def test_modules_on_pythonpath(start, tmp_path):
    """Functions and exception classes by reference, from a module that both sides can import."""
    (tmp_path / "compat_user_module.py").write_text(
        "class OwnError(Exception):\n"
        "    def __init__(self, code):\n        super().__init__(f'code {code}')\n        self.code = code\n"
        "    def __reduce__(self):\n        return OwnError, (self.code,)\n"
        "def fail(code):\n    raise OwnError(code)\n"
        "def double(x):\n    return 2 * x\n"
    )
    client = start(env={"PYTHONPATH": str(tmp_path)})
    sys.path.insert(0, str(tmp_path))
    try:
        import compat_user_module as user

        def look():
            import compat_user_module

            return compat_user_module.double(21), compat_user_module.__file__

        assert on_worker(client, look) == (42, str(tmp_path / "compat_user_module.py"))

        def fail():
            import compat_user_module

            compat_user_module.fail(9)

        error = client.submit(fail).exception(timeout=20)
        assert type(error) is user.OwnError
        assert (error.code, str(error)) == (9, "code 9")
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("compat_user_module", None)


def test_nthreads_and_memory_limit_as_told(start, as_stock):
    client = start("--memory-limit=123 MB", nthreads=3)
    (info,) = client.scheduler_info()["workers"].values()
    assert (info["nthreads"], info["memory_limit"]) == (3, 123_000_000)


@pytest.mark.parametrize("limit", ["auto", "0", "0.25"])
def test_memory_limits(start, as_stock, limit):
    (info,) = start(f"--memory-limit={limit}").scheduler_info()["workers"].values()
    as_stock(info["memory_limit"])


def test_nthreads_auto(launch, scheduler, as_stock):
    """Neither threads nor memory told: the machine's, within affinity and control group."""
    argv = launch.worker_argv("ours" if launch.ours else "stock", scheduler.address, "--name=auto")
    from harness import Worker, base_env

    worker = Worker("auto", "", launch.start("auto", argv, base_env()))
    with Client(scheduler.address) as client:
        join(client, worker)
        (info,) = client.scheduler_info()["workers"].values()
        as_stock((info["nthreads"], info["memory_limit"]))


def test_affinity_is_respected(launch, scheduler, as_stock):
    """On one CPU of several, ``auto`` is one thread."""
    from harness import Worker, base_env

    cpu = str(min(os.sched_getaffinity(0)))
    argv = launch.worker_argv("ours" if launch.ours else "stock", scheduler.address, "--name=pinned")
    worker = Worker("pinned", "", launch.start("pinned", ["taskset", "-c", cpu, *argv], base_env()))
    with Client(scheduler.address) as client:
        join(client, worker)
        (info,) = client.scheduler_info()["workers"].values()
        assert info["nthreads"] == 1
        as_stock(info["memory_limit"])
