"""Stock ``distributed`` as the client of our listener, an echo of each message. Prints ``ok`` at the end."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import dask
import numpy as np
from distributed.comm import connect
from distributed.protocol import Serialized, to_serialize


def same(a: Any, b: Any) -> bool:
    """Equality that knows arrays."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    return bool(a == b)


async def main(address: str, compression: str) -> None:
    dask.config.set({"distributed.comm.compression": compression or False})
    comm = await connect(address, timeout=20)
    assert comm.handshake_options["compression"] == (compression or None), comm.handshake_options
    values = [
        {"op": "echo", "x": 1, "y": None, "z": [True, 1.5, "text", b"bytes", {"a": {1, 2}}]},
        [{"op": "a"}, {"op": "b", "key": ("x", 1)}],
        "OK",
        {"data": {"small": to_serialize(1), "text": to_serialize("x" * 100_000)}},
        {"data": {i: to_serialize(np.full(20_000, i)) for i in range(30)}},
        {"data": to_serialize(np.arange(20_000_000, dtype="u1"))},
        {"data": to_serialize([np.zeros(3_000_000), b"", np.arange(70_000)])},
    ]
    for value in values:
        await comm.write(value)
        echoed = await asyncio.wait_for(comm.read(), 30)
        check(value, echoed)
    # one after the other, without waiting
    for i in range(500):
        await comm.write({"i": i, "pad": "p" * (i * 7 % 5000)})
    for i in range(500):
        assert (await asyncio.wait_for(comm.read(), 30))["i"] == i
    await comm.close()
    print("ok", flush=True)


def check(sent: Any, got: Any) -> None:
    """Compares what was sent with its echo; serialized objects by what they hold."""
    if hasattr(sent, "data") and not isinstance(sent, dict | np.ndarray):
        assert not isinstance(got, Serialized)
        sent = sent.data
    if isinstance(sent, dict):
        assert set(sent) == set(got), (sent, got)
        for k, v in sent.items():
            check(v, got[k])
    elif isinstance(sent, list | tuple):
        assert len(sent) == len(got), (sent, got)
        for a, b in zip(sent, got, strict=True):
            check(a, b)
    else:
        assert same(sent, got), (sent, got)


asyncio.run(main(sys.argv[1], sys.argv[2]))
