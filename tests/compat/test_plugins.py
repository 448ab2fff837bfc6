"""Plugins of workers and nannies: set up, torn down, replaced, failing; their ops, heartbeats and hooks."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
from distributed import Client, Environ, NannyPlugin, SchedulerPlugin, WorkerPlugin, get_worker
from distributed.diagnostics.plugin import ForwardOutput, InstallPlugin, UploadDirectory, UploadFile
from harness import SOLO, eventually, join


def on_workers(client, function, **kwargs):
    """What tasks on each worker see."""
    workers = list(client.scheduler_info(n_workers=-1)["workers"])
    futures = [client.submit(function, pure=False, workers=[w], **kwargs) for w in workers]
    return client.gather(futures)


class Marks(WorkerPlugin):
    name = "marks"

    def __init__(self, value=1):
        self.value = value

    def setup(self, worker):
        self.at = worker.address
        worker.mark = self.value

    def teardown(self, worker):
        worker.mark = None


def marked():
    worker = get_worker()
    plugin = worker.plugins["marks"]
    return plugin.value, worker.mark, plugin.at == worker.address


def test_worker_plugin(client):
    client.register_plugin(Marks())
    assert set(on_workers(client, marked)) == {(1, 1, True)}
    assert set(client.run(lambda dask_worker: dask_worker.mark).values()) == {1}
    client.unregister_worker_plugin("marks")

    def gone():
        return "marks" in get_worker().plugins, get_worker().mark

    assert set(on_workers(client, gone)) == {(False, None)}
    assert set(client.run(lambda dask_worker: dask_worker.mark).values()) == {None}


def test_a_plugin_replaces_that_of_its_name(client):
    client.register_plugin(Marks(1))
    client.register_plugin(Marks(2))
    assert set(on_workers(client, marked)) == {(2, 2, True)}
    client.unregister_worker_plugin("marks")


def test_idempotent_plugins_stay(client):
    class Idempotent(Marks):
        idempotent = True

    client.register_plugin(Idempotent(1))
    assert client.register_plugin(Idempotent(2)) == {}
    assert set(on_workers(client, marked)) == {(1, 1, True)}
    client.unregister_worker_plugin("marks")


def test_async_plugin(client):
    class Async(Marks):
        async def setup(self, worker):
            super().setup(worker)

        async def teardown(self, worker):
            super().teardown(worker)

    client.register_plugin(Async(5))
    assert set(on_workers(client, marked)) == {(5, 5, True)}
    client.unregister_worker_plugin("marks")


def test_every_slot_has_the_plugin(client, gate):
    client.register_plugin(Marks())
    meeting = gate("meeting")

    def meet():
        meeting.wait()
        return marked()

    width = sum(client.nthreads().values())
    futures = client.map(lambda _: meet(), range(2 * width), pure=False)
    meeting.set()
    assert set(client.gather(futures)) == {(1, 1, True)}
    client.unregister_worker_plugin("marks")


def test_setup_that_fails(client):
    class Fails(WorkerPlugin):
        name = "fails"

        def setup(self, worker):
            raise ValueError("no setup")

    with pytest.raises(ValueError, match="no setup"):
        client.register_plugin(Fails())
    assert client.submit(lambda: 1, pure=False).result() == 1
    client.unregister_worker_plugin("fails")


def test_teardown_that_fails(client):
    class Fails(WorkerPlugin):
        name = "fails"

        def teardown(self, worker):
            raise ValueError("no teardown")

    client.register_plugin(Fails())
    with pytest.raises(ValueError, match="no teardown"):
        client.unregister_worker_plugin("fails")
    assert client.submit(lambda: 1, pure=False).result() == 1


def test_unknown_plugins_cannot_be_removed(client):
    with pytest.raises(ValueError, match="does not exist"):
        client.unregister_worker_plugin("nobody")


def test_what_is_no_plugin(client):
    with pytest.raises(TypeError):
        client.register_plugin(object())


def test_plugins_come_with_the_registration(scheduler, launch):
    with Client(scheduler.address) as client:
        client.register_plugin(Marks(7))
        client.register_plugin(Environ({"MARKED": "nanny"}), name="environ")
        worker = launch.worker(scheduler.address)
        join(client, worker)
        assert client.submit(marked, pure=False).result() == (7, 7, True)
        assert client.submit(os.getenv, "MARKED", pure=False).result() == "nanny"
        client.unregister_worker_plugin("marks")
        client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.nanny_plugins.clear())


@pytest.mark.kinds(*SOLO)
def test_a_plugin_that_fails_at_the_registration(scheduler, launch):
    class Fails(WorkerPlugin):
        name = "fails"

        def setup(self, worker):
            raise ValueError("no setup")

    with Client(scheduler.address) as client:
        client.register_plugin(Fails())
        worker = launch.worker(scheduler.address)
        join(client, worker)
        assert client.submit(lambda: 1, pure=False).result() == 1
        worker.process.wait_for("Worker plugin fails failed to setup")
        client.unregister_worker_plugin("fails")


@pytest.mark.kinds(*SOLO)
def test_plugins_are_torn_down_when_the_worker_leaves(scheduler, launch, tmp_path):
    path = str(tmp_path / "left")

    class Leaves(WorkerPlugin):
        name = "leaves"

        def teardown(self, worker):
            open(path, "a").close()

    with Client(scheduler.address) as client:
        worker = launch.worker(scheduler.address)
        join(client, worker)
        client.register_plugin(Leaves())
        client.retire_workers([worker.address])
        worker.process.wait(30)
        assert os.path.exists(path)
        client.unregister_worker_plugin("leaves")


# -- hooks and ops


class Watches(WorkerPlugin):
    name = "watches"

    def setup(self, worker):
        self.seen = []

    def transition(self, key, start, finish, **kwargs):
        if str(key).startswith("watched"):
            self.seen.append((key, start, finish))


def test_transition(client, cluster):
    client.register_plugin(Watches())
    client.submit(int, 5, key="watched-1", workers=[cluster.a]).result()

    def seen(dask_worker):
        return list(dask_worker.plugins["watches"].seen)

    def released():
        seen_on_a = client.run(seen, workers=[cluster.a])[cluster.a]
        return seen_on_a if any(finish == "forgotten" for _, _, finish in seen_on_a) else None

    assert eventually(released) == [
        ("watched-1", "released", "waiting"),
        ("watched-1", "waiting", "ready"),
        ("watched-1", "ready", "executing"),
        ("watched-1", "executing", "memory"),
        ("watched-1", "memory", "released"),
        ("watched-1", "released", "forgotten"),
    ]
    client.unregister_worker_plugin("watches")


class Talks(WorkerPlugin):
    """Ops of its own, for requests and for streams, and a part of the heartbeat."""

    name = "talks"

    def setup(self, worker):
        self.heard = []
        worker.handlers["talk"] = self.talk
        worker.handlers["talk-async"] = self.talk_async
        worker.stream_handlers["tell"] = self.tell
        worker.extensions["talks"] = self

    def teardown(self, worker):
        for ops in (worker.handlers, worker.stream_handlers, worker.extensions):
            for op in ("talk", "talk-async", "tell", "talks"):
                ops.pop(op, None)

    def talk(self, text):
        return {"text": text * 2, "heard": list(self.heard)}

    async def talk_async(self, text):
        return text * 3

    def tell(self, text):
        self.heard.append(text)

    def heartbeat(self):
        return {"beats": 1}


class Listens(SchedulerPlugin):
    name = "listens"

    async def start(self, scheduler):
        self.scheduler = scheduler
        self.heard = set()
        scheduler.extensions["talks"] = self

    def heartbeat(self, ws, data):
        self.heard.add((str(ws.name), data["beats"]))


def test_ops_of_plugins(client, cluster):
    client.register_plugin(Listens())
    client.register_plugin(Talks())

    async def ask(dask_scheduler):
        for worker in dask_scheduler.workers:
            dask_scheduler.stream_comms[worker].send({"op": "tell", "text": "stream"})
        answers = await dask_scheduler.broadcast(msg={"op": "talk-async", "text": "x"})
        return list(answers.values())

    assert set(client.run_on_scheduler(ask)) == {"xxx"}

    def told():
        answer = client.sync(lambda: client.scheduler.broadcast(msg={"op": "talk", "text": "ab"}))
        assert all(part["text"] == "abab" for part in answer.values())
        return all(list(part["heard"]) == ["stream"] for part in answer.values())

    eventually(told)

    def beats(dask_scheduler):
        return dask_scheduler.plugins["listens"].heard

    expected = {(w.name, 1) for w in cluster.workers}
    eventually(lambda: client.run_on_scheduler(beats) == expected)
    client.unregister_worker_plugin("talks")
    eventually(lambda: client.run_on_scheduler(beats) == expected)
    client.unregister_scheduler_plugin("listens")


# -- files and software


MODULE = "compat_uploaded"


def uploaded():
    import compat_uploaded

    return compat_uploaded.VALUE


def test_upload_file(client, tmp_path):
    path = tmp_path / f"{MODULE}.py"
    path.write_text("VALUE = 1")
    client.upload_file(str(path))
    assert set(on_workers(client, uploaded)) == {1}
    path.write_text("VALUE = 22")
    client.upload_file(str(path))
    assert set(on_workers(client, uploaded)) == {22}


def test_upload_file_that_cannot_be_imported(client, tmp_path):
    path = tmp_path / "compat_broken.py"
    path.write_text("this is no Python")
    with pytest.raises(SyntaxError):
        client.upload_file(str(path))
    client.upload_file(str(path), load=False)
    assert client.submit(lambda: 1, pure=False).result() == 1


def test_upload_file_plugin_without_loading(client, tmp_path):
    path = tmp_path / "compat-data.bin"
    path.write_bytes(b"x" * 100_000)
    client.register_plugin(UploadFile(str(path), load=False), name="data")

    def size():
        return os.path.getsize(os.path.join(get_worker().local_directory, "compat-data.bin"))

    assert set(on_workers(client, size)) == {100_000}
    client.unregister_worker_plugin("data")


def test_upload_directory(scheduler, launch, tmp_path):
    package = tmp_path / "compat_package"
    package.mkdir()
    (package / "__init__.py").write_text("from .inner import VALUE")
    (package / "inner.py").write_text("VALUE = 'inner'")

    def value():
        import compat_package

        return compat_package.VALUE

    with Client(scheduler.address) as client:
        worker = launch.worker(scheduler.address)
        join(client, worker)
        client.register_plugin(UploadDirectory(str(package), update_path=True, restart_workers=True))
        assert client.submit(value, pure=False).result() == "inner"
        client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.nanny_plugins.clear())
        client.unregister_scheduler_plugin("upload-directory-compat_package")


def test_install_plugin(client, tmp_path):
    """What `PipInstall` does, without a package index."""
    site = str(tmp_path)

    def install():
        with open(f"{site}/compat_installed.py", "w") as f:
            f.write("VALUE = 'installed'")
        with open(f"{site}/runs", "a") as f:
            f.write("x")

    def value():
        sys.path.insert(0, site)
        try:
            import compat_installed
        finally:
            sys.path.remove(site)
        return compat_installed.VALUE

    plugin = InstallPlugin(install, restart_workers=False)
    client.register_plugin(plugin)
    assert set(on_workers(client, value)) == {"installed"}
    # on the scheduler and on each worker, once
    assert os.path.getsize(f"{site}/runs") == 1 + len(client.nthreads())
    client.unregister_scheduler_plugin(plugin.name)
    client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.worker_plugins.pop(plugin.name))


def test_install_that_fails(client, tmp_path):
    role = str(tmp_path / "scheduler-did-it")

    def install():
        if os.path.exists(role):
            raise RuntimeError("pip install failed with 'no such package'")
        open(role, "w").close()

    plugin = InstallPlugin(install, restart_workers=False)
    with pytest.raises(RuntimeError, match="no such package"):
        client.register_plugin(plugin)
    client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.worker_plugins.pop(plugin.name))


# -- nannies


def test_environ(scheduler, launch):
    with Client(scheduler.address) as client:
        worker = launch.worker(scheduler.address)
        join(client, worker)
        before = client.submit(os.getpid, pure=False).result()
        client.register_plugin(Environ({"COMPAT_VALUE": 5}), name="environ")
        assert client.submit(os.getenv, "COMPAT_VALUE", pure=False).result() == "5"
        assert client.submit(os.getpid, pure=False).result() != before

        def in_subprocess():
            return subprocess.check_output("echo $COMPAT_VALUE", shell=True, text=True).strip()

        assert client.submit(in_subprocess, pure=False).result() == "5"
        # the nanny outlives its workers
        client.restart()
        assert client.submit(os.getenv, "COMPAT_VALUE", pure=False).result() == "5"
        client.unregister_worker_plugin("environ", nanny=True)


def test_what_a_worker_plugin_does_to_its_process_ends_with_it(scheduler, launch):
    class Sets(WorkerPlugin):
        name = "sets"

        def setup(self, worker):
            os.environ["COMPAT_SET"] = "1"
            sys.path.append("/compat")

    def seen():
        return os.getenv("COMPAT_SET"), "/compat" in sys.path

    with Client(scheduler.address) as client:
        join(client, launch.worker(scheduler.address))
        client.register_plugin(Sets())
        assert client.submit(seen, pure=False).result() == ("1", True)
        client.unregister_worker_plugin("sets")
        client.register_plugin(Environ({"COMPAT_VALUE": 5}), name="environ")
        assert client.submit(seen, pure=False).result() == (None, False)
        client.unregister_worker_plugin("environ", nanny=True)


def test_nanny_plugin(scheduler, launch, tmp_path):
    notes = str(tmp_path / "notes")

    class Notes(NannyPlugin):
        name = "notes"

        def setup(self, nanny):
            with open(notes, "a") as f:
                f.write(f"setup {nanny.address} {nanny.worker_address}\n")

        def teardown(self, nanny):
            with open(notes, "a") as f:
                f.write(f"teardown {nanny.address}\n")

    def read():
        with open(notes) as f:
            return f.read().split("\n")[:-1]

    with Client(scheduler.address) as client:
        worker = launch.worker(scheduler.address)
        join(client, worker)
        info = client.scheduler_info(n_workers=-1)["workers"][worker.address]
        before = client.submit(os.getpid, pure=False).result()
        client.register_plugin(Notes())
        assert read() == [f"setup {info['nanny']} {worker.address}"]
        assert client.submit(os.getpid, pure=False).result() == before
        client.unregister_worker_plugin("notes", nanny=True)
        assert read()[1:] == [f"teardown {info['nanny']}"]


def test_nanny_plugin_that_fails(scheduler, launch):
    class Fails(NannyPlugin):
        name = "fails"

        def setup(self, nanny):
            raise ValueError("no setup")

    with Client(scheduler.address) as client:
        worker = launch.worker(scheduler.address)
        join(client, worker)
        with pytest.raises(ValueError, match="no setup"):
            client.register_plugin(Fails())
        assert client.submit(lambda: 1, pure=False).result() == 1
        client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.nanny_plugins.clear())


# -- logs and output


def test_forward_logging(client):
    records = []

    class Handler(logging.Handler):
        def emit(self, record):
            records.append((record.name, record.levelname, record.getMessage()))

    logger = logging.getLogger("compat.forwarded")
    handler = Handler()
    logger.addHandler(handler)
    try:
        client.forward_logging("compat.forwarded", level=logging.WARNING)

        def log():
            logging.getLogger("compat.forwarded").warning("from %s", "a task")
            logging.getLogger("compat.forwarded").info("not forwarded")

        on_workers(client, log)
        expected = ("compat.forwarded", "WARNING", "from a task")
        eventually(lambda: records.count(expected) == len(client.nthreads()), what=str(records))
        assert set(records) == {expected}
        client.unforward_logging("compat.forwarded")
    finally:
        logger.removeHandler(handler)


def test_forward_output(client, cluster):
    events = []
    client.subscribe_topic("print", lambda event: events.append(event[1]["args"][0]))
    client.register_plugin(ForwardOutput(), name="output")
    client.submit(print, "to the client", pure=False, workers=[cluster.a]).result()
    eventually(lambda: any("to the client" in str(event) for event in events), what=str(events))
    client.unregister_worker_plugin("output")
    client.unsubscribe_topic("print")
