"""Writes `tests/data/wire/*.bin`: messages as a stock `distributed` puts them on a TCP stream, one a file.

    cd tests/data && ../../.venv/bin/python capture.py

Two sources: a whole cluster in this process, whose TCP writes are recorded (the first and the longest message
of each kind), and messages made to order, in each compression, with frames cut into shards. The files are
checked in, so a test run does not need this script; run it again for a new version of `distributed`, and look
at what changed. Tracebacks hold the paths of the interpreter and of `distributed`: run it from an
installation whose paths may be read by anyone.
"""

from __future__ import annotations

import asyncio
import operator
import pickle
import random
import re
import socket
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import distributed.comm.tcp as tcp
import msgpack
import numpy as np
import pandas as pd
from distributed import Client, Scheduler, Worker
from distributed.core import Status, error_message
from distributed.protocol import dumps, to_serialize
from distributed.protocol.compression import compressions
from distributed.protocol.serialize import ToPickle

OUT = Path(__file__).parent / "wire"
# Names of the machine this runs on have no place in the files.
socket.gethostname = lambda: "host"

# Larger recorded messages are not worth their place in the repository.
MAX_BYTES = 40_000


def stream(frames: list[Any]) -> bytes:
    """The frames as `TCP.write` puts them on the stream."""
    return b"".join(bytes(f) for f in add_frames_header(frames)[0])


add_frames_header = tcp._add_frames_header


def save(name: str, data: bytes) -> None:
    (OUT / f"{name}.bin").write_bytes(data)


def kind(frames: list[Any]) -> str:
    """A file name that tells what a message is about."""

    def op(msg: Any) -> str:
        if not isinstance(msg, dict):
            return type(msg).__name__
        named = msg.get("op") or msg.get("status")
        if isinstance(named, str) and named != "OK":
            return named
        fields = sorted({re.sub(r"[^a-z_-].*", "", k) for k in msg if isinstance(k, str)})
        return "-".join(["reply", *fields[:3]])

    msg = msgpack.loads(bytes(frames[0]), use_list=False, strict_map_key=False)
    if isinstance(msg, tuple):
        return "stream-" + "+".join(sorted({op(m) for m in msg}))
    return "message-" + op(msg)


def record() -> dict[str, list[bytes]]:
    """Records the messages of each kind that this process writes from now on."""
    seen: dict[str, list[bytes]] = {}

    def recording(frames: list[Any]) -> Any:
        seen.setdefault(kind(frames)[:80], []).append(stream(frames))
        return add_frames_header(frames)

    tcp._add_frames_header = recording
    return seen


async def cluster() -> None:
    """What a client, a scheduler and two workers say to each other while work of every sort is done."""
    async with Scheduler(host="127.0.0.1", port=0, dashboard_address=":0") as scheduler:
        async with (
            Worker(scheduler.address, nthreads=1, name="a", resources={"GPU": 1}) as a,
            Worker(scheduler.address, nthreads=2, name="b") as b,
            Client(scheduler.address, asynchronous=True) as client,
        ):
            x = client.submit(operator.add, 1, 2, key="x-1", workers=[a.address])
            y = client.submit(operator.mul, x, 10, key="y-1", workers=[b.address])
            with dask.annotate(who="me"):
                z = client.submit(pow, y, 2, key=("z", ("nested", 1), 0.5), resources={"GPU": 1})
            assert await client.gather(z) == 900
            many = client.map(operator.neg, range(50), key=[("n", i) for i in range(50)])
            total = client.submit(sum, many, key="sum-1", priority=3, actor=False)
            assert await client.gather(total) == -1225
            array = await client.scatter({"array-1": np.arange(1000)}, direct=False)
            assert await client.submit(np.sum, array["array-1"], key="np") == 499500
            bad = client.submit(operator.truediv, 1, 0, key="bad-1")
            await bad.exception()
            frame = client.submit(pd.DataFrame, {"a": [1, 2, 3], "b": list("xyz")}, key="df-1")
            await frame
            await client.replicate([frame], n=2)
            await client.who_has()
            await client.has_what()
            await client.run(int, 3)
            await client.get_versions()
            slow = client.submit(asyncio.sleep, 0.2, key="sleep-1")
            await asyncio.sleep(0.05)
            await client.cancel([slow])
            a.status = Status.paused
            await asyncio.sleep(0.1)
            a.status = Status.running
            del x, y, z, many, total, array, frame, bad, slow
            await asyncio.sleep(1.2)
            await scheduler.retire_workers([b.address])


def payloads() -> dict[str, Any]:
    """Objects as results and scattered data have them."""
    rng = np.random.default_rng(0)
    return {
        "array": np.arange(2_000).reshape(20, 100),
        "random": rng.random(1_300),
        "broadcast": np.broadcast_to(np.float32(1.5), (40, 50)),
        "structured": np.zeros(5, dtype=[("a", "i4"), ("b", "f8")]),
        "empty": np.empty(0),
        "frame": pd.DataFrame({"i": np.arange(1_500), "s": pd.Series(["abc"] * 1_500, dtype=object)}),
        "bytes": b"z" * 11_000,
        "bytearray": bytearray(b"y" * 10_000),
        "list": [np.arange(500), {"x": 1}, "text"],
        "dict": {"a": np.ones(3), ("b", 1): None},
        "none": None,
    }


def messages() -> Iterator[tuple[str, Any]]:
    """Messages made to order."""
    yield "get-data", {"status": "OK", "data": {k: to_serialize(v) for k, v in payloads().items()}}
    yield (
        "update-data",
        {
            "op": "update_data",
            "data": {("d", i): to_serialize(np.arange(3_000) + i) for i in range(2)},
            "report": False,
        },
    )
    yield (
        "pickled",
        [{"op": "x", "run_spec": ToPickle((operator.add, np.arange(2_000), np.zeros(3))), "n": ToPickle(1)}],
    )


def values() -> Iterator[tuple[str, Any]]:
    """Plain values, in each form that msgpack has for them."""
    ints = [0, 1, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**63, 2**64 - 1]
    ints += [-1, -32, -33, -128, -129, -32768, -32769, -(2**31), -(2**31) - 1, -(2**63)]
    yield "value-ints", ints
    yield "value-floats", [0.0, -0.0, 1.5, 1e300, float("inf"), float("nan"), 2.0**63]
    yield "value-texts", ["", "a" * 31, "b" * 32, "c" * 256, "d" * 65536, "schön 日本 🙂", "a\x00b"]
    yield "value-bytes", [b"", b"\xff" * 255, b"\x00" * 256, b"\x80" * 65536]
    yield "value-lists", [[], (1,), list(range(15)), list(range(16)), [None] * 65536]
    yield (
        "value-maps",
        {"small": {}, "big": {i: -i for i in range(16)}, "huge": {str(i): i for i in range(300)}},
    )
    yield "value-sets", {"set": {1}, "empty": set(), "nested": [{"a"}, {("t", 2)}]}
    yield "value-keys", {("a", 1): 1, b"raw": 2, 3: 4, 1.5: None, ("n", ("m", (0, 1))): True, None: False}
    yield "value-enum", {"status": Status.running}
    deep: Any = "bottom"
    for _ in range(200):
        deep = [deep]
    yield "value-deep", deep


def made_to_order() -> None:
    rng = random.Random(0)
    text = "".join(rng.choices(string.ascii_lowercase, k=100))
    for name, value in values():
        save(name, stream(dumps(value)))
    exceptions = {
        "runtime": RuntimeError("text"),
        "memory": MemoryError(text * 4),
        "unicode": ValueError("'schön'\n"),
        "unpicklable": RuntimeError(lambda: 1),
    }
    for name, exc in exceptions.items():
        save(f"error-{name}", stream(dumps(error_message(exc))))
        save(f"exception-{name}", stream(dumps({"status": "error", "exception": to_serialize(exc)})))
    for name, message in messages():
        for compression in [None, "lz4", "zstd", "snappy", "zlib"]:
            assert compression in compressions, f"install {compression}"
            context = {"compression": compression, "pickle-protocol": 5}
            frames = dumps(message, context=context)
            save(f"{name}-{compression or 'plain'}", stream(frames))
        shards = dumps(message, context=context | {"compression": None}, frame_split_size=5_000)
        save(f"{name}-shards", stream(shards))
        shards = dumps(message, context=context | {"compression": "lz4"}, frame_split_size=30_000)
        save(f"{name}-shards-lz4", stream(shards))
    handshake = {"compression": None, "python": (3, 11, 7), "pickle-protocol": pickle.HIGHEST_PROTOCOL}
    save("handshake-none", stream(dumps(handshake)))
    save("handshake-lz4", stream(dumps(handshake | {"compression": "lz4"})))


def main() -> None:
    OUT.mkdir(exist_ok=True)
    for old in OUT.glob("*.bin"):
        old.unlink()
    made_to_order()
    seen = record()
    # without the limit on tasks for each worker, the scheduler sends them in batches
    with dask.config.set(
        {"distributed.scheduler.worker-saturation": "inf", "temporary-directory": "/tmp/dask"}
    ):
        asyncio.run(cluster())
    for name, written in seen.items():
        first, *rest = [data for data in written if len(data) <= MAX_BYTES]
        save(name, first)
        longest = max(rest, key=len, default=first)
        if len(longest) > 1.5 * len(first):
            save(f"{name}-long", longest)


if __name__ == "__main__":
    main()
