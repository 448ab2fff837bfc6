"""The Python end of `tests/wire/python.rs`: answers requests with what `distributed` makes of them.

Requests come on standard input, answers go to standard output, as Dask puts messages on a TCP stream.
"""

from __future__ import annotations

import operator
import random
import struct
import sys
from typing import Any

import numpy as np
import pandas as pd
from dask.utils import key_split
from distributed.comm.tcp import _add_frames_header
from distributed.core import clean_exception
from distributed.protocol import dumps, loads, to_serialize
from distributed.protocol.serialize import ToPickle
from distributed.protocol.utils import unpack_frames

# What was sent under a number, to compare with what comes back.
sent: dict[int, Any] = {}


def objects(seed: int) -> dict[Any, Any]:
    """Objects that serialize in every way Dask has: compressible or not, in one frame and in many."""
    rng = np.random.default_rng(seed)
    return {
        "zeros": np.zeros(30_000),
        "noise": rng.random(4_000),
        "small": np.arange(3),
        "frame": pd.DataFrame({"a": np.arange(5_000), "b": rng.random(5_000), "c": ["text"] * 5_000}),
        "bytes": b"ab" * 20_000,
        "plain": {"x": [1, 2.5, None, "text"], "y": (1, 2)},
        ("tuple", 1): [np.ones(5), "text", np.zeros((30, 100))],
        "function": operator.attrgetter("a.b"),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, pd.DataFrame):
        return isinstance(b, pd.DataFrame) and a.equals(b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, operator.attrgetter):
        return repr(a) == repr(b)
    return bool(a == b)


def random_value(rng: random.Random, depth: int = 0) -> Any:
    """A value that msgpack and Dask's markers can hold."""

    def key(depth: int = 0) -> Any:
        return rng.choice(
            [
                lambda: "".join(rng.choices("ab-é日🙂'\"", k=rng.randrange(40))),
                lambda: rng.randbytes(rng.randrange(40)),
                lambda: rng.randrange(-(2 ** rng.randrange(64)), 2 ** rng.randrange(65)),
                lambda: rng.choice([0.5, -0.0, 1e300, float("inf"), 3.0]),
                lambda: tuple(key(depth + 1) for _ in range(rng.randrange(4))) if depth < 3 else None,
            ]
        )()

    if depth > 5:
        return None
    sizes = [0, 1, 2, 3, 15, 16, 17]
    return rng.choice(
        [
            key,
            key,
            key,
            lambda: rng.choice([True, False, None]),
            lambda: [random_value(rng, depth + 1) for _ in range(rng.choice(sizes))],
            lambda: {key(): random_value(rng, depth + 1) for _ in range(rng.choice(sizes))},
            lambda: {key() for _ in range(rng.randrange(5))},
        ]
    )()


def describe(key: Any) -> dict[str, Any]:
    try:
        prefix = key_split(key)
    except (UnicodeDecodeError, IndexError):
        # bytes that are no text, and the empty tuple: Dask itself fails on these
        prefix = "Other"
    return {"repr": repr(key), "str": str(key), "prefix": prefix}


def answer(request: dict[str, Any]) -> tuple[Any, str | None]:
    """The answer, and how it is compressed."""
    compression = request.get("compression")
    match request["do"]:
        case "echo":
            return {"value": request["value"]}, compression
        case "random":
            rng = random.Random(request["seed"])
            return {"value": [random_value(rng) for _ in range(request["count"])]}, None
        case "make":
            made = sent[request["seed"]] = objects(request["seed"])
            data = {k: to_serialize(v) for k, v in made.items()}
            return {"data": data, "pickled": ToPickle(made)}, compression
        case "check":
            expected = sent[request["seed"]]
            back = request["back"]
            return {"same": same(expected, back["data"]) and same(expected, back["pickled"])}, None
        case "raise":
            kind, exc, tb = clean_exception(**request["error"])
            return {"module": kind.__module__, "repr": repr(exc), "str": str(exc), "traceback": tb}, None
        case "keys":
            keys = request["keys"]
            classes = [next(i for i, other in enumerate(keys) if other == key) for key in keys]
            return {"keys": [describe(key) for key in keys], "classes": classes}, None
        case other:
            raise ValueError(other)


def main() -> None:
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    while head := stdin.read(8):
        frames, missing = unpack_frames(stdin.read(struct.unpack("Q", head)[0]), partial=True)
        frames += [stdin.read(n) for n in missing]
        message, compression = answer(loads(frames))
        frames = dumps(message, context={"compression": compression, "pickle-protocol": 5})
        for part in _add_frames_header(frames)[0]:
            stdout.write(part)
        stdout.flush()


if __name__ == "__main__":
    main()
