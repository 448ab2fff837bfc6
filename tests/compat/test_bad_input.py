"""Garbage at the worker's port: whoever sends it loses his connection, and nobody else notices."""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import struct
import subprocess
import sys
import time

import msgpack
import pytest
from distributed.comm.addressing import parse_host_port
from distributed.protocol import dumps as dump_message
from harness import SOLO, Worker, base_env, dask_env, eventually, join

pytestmark = pytest.mark.kinds(*SOLO)


def frames(*parts):
    """A message of these frames as it goes over a socket (``comm/tcp.py``)."""
    prelude = struct.pack("<Q", len(parts)) + b"".join(struct.pack("<Q", len(p)) for p in parts)
    body = prelude + b"".join(parts)
    return struct.pack("<Q", len(body)) + body


HANDSHAKE = frames(
    *[
        bytes(f)
        for f in dump_message({"compression": None, "python": sys.version_info[:3], "pickle-protocol": 5})
    ]
)


def nested(depth):
    return b"\x91" * depth + b"\xc0"


GARBAGE = {
    "random": random.Random(0).randbytes(4096),
    "http": b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "tls-hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,
    "zeros": b"\x00" * 1024,
    "giant-length": struct.pack("<Q", 2**62),
    "largest-length": struct.pack("<Q", 2**64 - 1),
    "giant-frame-count": struct.pack("<QQ", 64, 2**61) + b"\x00" * 56,
    "giant-frame": struct.pack("<QQQ", 16, 1, 2**60),
    "frames-do-not-add-up": struct.pack("<QQQ", 24, 1, 2**63) + b"\x00" * 8,
    "no-frames": struct.pack("<QQ", 8, 0),
    "bad-msgpack": frames(b"\xc1\xc1\xc1"),
    "msgpack-cut-off": frames(b"\x85\xa2op"),
    "deep-msgpack": frames(nested(100_000)),
    "giant-map": frames(b"\xdf\xff\xff\xff\xff"),
    "giant-string": frames(b"\xdb\xff\xff\xff\xffabc"),
    "after-handshake-random": HANDSHAKE + random.Random(1).randbytes(4096),
    "after-handshake-bad-msgpack": HANDSHAKE + frames(b"\xc1\xc1\xc1"),
    "after-handshake-deep-msgpack": HANDSHAKE + frames(nested(100_000)),
    "after-handshake-giant-length": HANDSHAKE + struct.pack("<Q", 2**62),
    "payload-out-of-range": HANDSHAKE
    + frames(msgpack.packb({"op": "update_data", "data": {"__Serialized__": 7}})),
    "payload-without-frames": HANDSHAKE
    + frames(
        msgpack.packb({"op": "x", "a": {"__Serialized__": 1}}), msgpack.packb({"num-sub-frames": 2**40})
    ),
    "payload-of-false-length": HANDSHAKE
    + frames(
        msgpack.packb({"op": "update_data", "data": {"k": {"__Serialized__": 1}}}),
        msgpack.packb(
            {"num-sub-frames": 1, "compression": ["lz4"], "serializer": "pickle", "split-num-sub-frames": [1]}
        ),
        struct.pack("<I", 2**32 - 1) + b"\x00" * 20,
    ),
}


def send(address, data, half_close=False):
    """Send the bytes; True when the worker then closes the connection, in what it says or not."""
    host, port = parse_host_port(address.split("://")[1])
    with socket.create_connection((host, port), timeout=5) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
            if half_close:
                sock.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + 5
        sock.settimeout(5)
        try:
            while time.monotonic() < deadline:
                if not sock.recv(65536):
                    return True
        except TimeoutError:
            return False
        except ConnectionError:
            return True
    return False


def memory(pid):
    """Resident bytes of a process."""
    with open(f"/proc/{pid}/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def addresses(client, cluster):
    nanny = client.scheduler_info(n_workers=-1)["workers"][cluster.a]["nanny"]
    return {"worker": cluster.a, "nanny": nanny}


def lines_since(process, offset):
    return [line for line in process.text[offset:].splitlines() if line.strip()]


@pytest.fixture
def bystander(client, cluster):
    """A held result and a working worker, before and after."""
    kept = client.submit(lambda: [1, 2], key="bystander", workers=[cluster.a])
    assert kept.result() == [1, 2]
    yield kept
    assert kept.result(timeout=10) == [1, 2]
    assert client.submit(sum, kept, workers=[cluster.a], pure=False).result(timeout=10) == 3
    assert client.who_has(kept)["bystander"] == (cluster.a,)


@pytest.mark.parametrize("what", GARBAGE)
@pytest.mark.parametrize("port", ["worker", "nanny"])
def test_garbage(client, cluster, bystander, port, what):
    address = addresses(client, cluster)[port]
    process = cluster.workers[0].process
    before, offset = memory(process.pid), len(process.text)
    if not cluster.ours:
        # Stock takes lengths at their word, and would wait for the rest for ever: the other end goes, then.
        send(address, GARBAGE[what], half_close=True)
        return
    assert send(address, GARBAGE[what]), "the connection was not ended"
    assert memory(process.pid) < before + 64 * 2**20
    assert client.submit(int, 1, pure=False, workers=[cluster.a]).result() == 1
    lines = eventually(lambda: lines_since(process, offset), what="a log line")
    assert len(lines) == 1, f"one log line was wanted: {lines}"


@pytest.mark.parametrize(
    "data", [HANDSHAKE[:3], HANDSHAKE[:-5], HANDSHAKE + frames(b"\x81\xa2op")[:-2]], ids=len
)
def test_half_a_message(client, cluster, bystander, data):
    """The other end goes away in the middle: the connection is closed."""
    assert send(cluster.a, data, half_close=True)


def test_connections_that_say_nothing(client, cluster, bystander):
    """Hundreds that are opened and left alone, while work goes on."""
    host, port = parse_host_port(cluster.a.split("://")[1])
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(socket.create_connection((host, port), timeout=5))
        assert client.gather(client.map(abs, range(20), workers=[cluster.a], pure=False)) == list(range(20))
        assert client.run(lambda: 1, workers=[cluster.a]) == {cluster.a: 1}


def test_connections_that_come_and_go(client, cluster, bystander):
    host, port = parse_host_port(cluster.a.split("://")[1])
    for _ in range(300):
        socket.create_connection((host, port), timeout=5).close()


# -- the command line


def run(launch, *args, env=None, config=None, timeout=20):
    """Start a worker that cannot come up; its exit code and what it printed."""
    argv = launch.worker_argv("ours" if launch.ours else "stock", *args)
    process = launch.start("refused", argv, base_env(**dask_env(config), **(env or {})))
    try:
        return process.wait(timeout), process.text
    except subprocess.TimeoutExpired:
        raise AssertionError(f"still running after {timeout} s:\n{process.text}") from None


def refused(launch, code, text, *args, stock=1, **options):
    """Ours ends with ``code`` and a clear line that says ``text``; stock with its code, or a traceback."""
    got, output = run(launch, *args, **options)
    if not launch.ours:
        assert got == stock, output
        return
    assert got == code, output
    assert re.search(text, output), output
    assert "panicked" not in output and "Traceback" not in output
    assert "Start worker at" not in output
    assert len([line for line in output.splitlines() if line.strip()]) <= 5, output


SCHEDULER = "tcp://127.0.0.1:9"


def test_unknown_option(launch):
    refused(launch, 64, "--no-such-option", SCHEDULER, "--no-such-option", stock=2)


def test_bad_number(launch):
    refused(launch, 64, "nthreads", SCHEDULER, "--nthreads=many", stock=2)


def test_no_scheduler(launch):
    refused(launch, 64, "(?i)scheduler")


def test_bad_memory_limit(launch):
    refused(launch, 64, "memory-limit", SCHEDULER, "--memory-limit=lots")


def test_bad_resources(launch):
    refused(launch, 64, "resources", SCHEDULER, "--resources=GPU")


def test_contact_address_needs_a_listen_address(launch):
    refused(launch, 64, "listen-address", SCHEDULER, "--contact-address=tcp://127.0.0.1:1234")


def test_listen_address_and_worker_port(launch):
    refused(
        launch, 64, "listen-address", SCHEDULER, "--listen-address=tcp://127.0.0.1:0", "--worker-port=4000"
    )


def test_several_workers_without_nannies(launch):
    refused(launch, 64, "nanny", SCHEDULER, "--nworkers=2", "--no-nanny")


def test_no_workers(launch):
    refused(launch, 64, "nworkers", SCHEDULER, "--nworkers=0")


@pytest.mark.parametrize(
    "address", ["tcp://", "tcp://host:port", "nonsense://127.0.0.1:8786", "tcp://127.0.0.1:99999999"]
)
def test_scheduler_address_that_does_not_parse(launch, address):
    if launch.ours:
        refused(launch, 64, "(?i)address|protocol|port", address)
    else:
        got, _ = run(launch, address, "--no-nanny", "--death-timeout=2")
        assert got != 0


@pytest.mark.kinds("ours")
def test_worker_class_is_refused(launch):
    refused(launch, 64, "worker-class", SCHEDULER, "--worker-class=distributed.Worker")


@pytest.mark.kinds("ours")
def test_local_directory_that_cannot_be_made(launch):
    """Stock warns and takes another one; who names a directory wants that one."""
    refused(launch, 73, "/dev/null/inside", SCHEDULER, "--local-directory=/dev/null/inside")


@pytest.mark.kinds("ours")
@pytest.mark.parametrize("python", ["/nonexistent/python3", "/dev/null", "/bin/false", "/bin/cat"])
def test_interpreter_that_is_none(launch, python):
    refused(launch, 78, python, SCHEDULER, f"--python={python}")


def virtual_environment(path, packages):
    """A Python environment that has these packages by name and version alone."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", path], check=True, timeout=60)
    site = next(path.glob("lib/python*/site-packages"))
    for name, version in packages.items():
        (site / name).mkdir()
        (site / name / "__init__.py").write_text(f"__version__ = {version!r}\n")
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return path / "bin" / "python"


@pytest.mark.kinds("ours")
def test_interpreter_without_distributed(launch, tmp_path):
    python = virtual_environment(tmp_path / "bare", {})
    refused(launch, 78, "distributed", SCHEDULER, f"--python={python}")


@pytest.mark.kinds("ours")
@pytest.mark.parametrize("version", ["2021.1.0", "2099.1.0"])
def test_interpreter_with_an_unsupported_distributed(launch, tmp_path, version):
    python = virtual_environment(
        tmp_path / "odd", {"distributed": version, "dask": version, "msgpack": "1.0"}
    )
    refused(launch, 78, re.escape(version), SCHEDULER, f"--python={python}")


@pytest.mark.kinds("ours")
def test_bad_variable_names_its_source(launch):
    refused(launch, 78, "IQOQO_NTHREADS", SCHEDULER, env={"IQOQO_NTHREADS": "many"})
    refused(
        launch,
        78,
        "DASK_DISTRIBUTED__WORKER__MEMORY__PAUSE",
        SCHEDULER,
        env={"DASK_DISTRIBUTED__WORKER__MEMORY__PAUSE": "high"},
    )


@pytest.mark.kinds("ours")
def test_bad_configuration_file_names_its_line(launch, tmp_path):
    path = tmp_path / "worker.toml"
    path.write_text('nthreads = "many"\n')
    refused(launch, 78, "worker.toml", SCHEDULER, f"--config={path}")
    path.write_text("nthreads = = 2\n")
    refused(launch, 78, "worker.toml", SCHEDULER, f"--config={path}")
    path.write_text("no-such-setting = 1\n")
    refused(launch, 78, "no-such-setting", SCHEDULER, f"--config={path}")
    refused(launch, 78, "missing.toml", SCHEDULER, f"--config={tmp_path / 'missing.toml'}")


def test_port_that_is_taken(launch, scheduler):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        got, output = run(
            launch, scheduler.address, "--no-nanny", "--host=127.0.0.1", f"--worker-port={port}"
        )
    assert got == (71 if launch.ours else 1), output
    assert "in use" in output


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_options_that_start_nothing(launch, option):
    code, output = run(launch, option)
    assert code == 0
    assert "worker" in output.lower() or "version" in output.lower()


@pytest.mark.kinds("ours")
def test_help_has_every_option_of_dask_worker(launch):
    _, output = run(launch, "--help")
    stock = subprocess.run(
        [sys.executable, "-m", "dask", "worker", "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    options = set(re.findall(r"--[a-z][a-z-]+", stock)) - {"--nworkers'"}
    missing = {o for o in options if o not in output}
    assert missing <= {"--worker-class"}, missing


def test_options_that_a_worker_must_obey(launch, scheduler):
    """A few at once, seen from the scheduler."""
    from distributed import Client

    argv = launch.worker_argv(
        "ours" if launch.ours else "stock",
        scheduler.address,
        "--nthreads=1",
        "--name=7",
        "--host=127.0.0.1",
        "--worker-port=39100:39199",
        "--nanny-port=39200:39299",
        "--resources=GPU=2,MEM=10e9",
        f"--pid-file={launch.directory}/pid",
    )
    worker = Worker("7", "", launch.start("obedient", argv, base_env()))
    with Client(scheduler.address) as client:
        join(client, worker)
        (info,) = client.scheduler_info()["workers"].values()
        assert info["name"] == 7
        assert info["resources"] == {"GPU": 2.0, "MEM": 10e9}
        assert 39100 <= parse_host_port(worker.address.split("://")[1])[1] <= 39199
        assert 39200 <= parse_host_port(info["nanny"].split("://")[1])[1] <= 39299
        assert (launch.directory / "pid").read_text().strip() == str(worker.process.pid)
