"""Answers what Dask and PyYAML make of texts: the reference for our own parsers.

Each line in is a JSON list of requests `[kind, argument...]`, each line out the list of answers,
`["ok", value]` or `["error"]`.
"""

from __future__ import annotations

import json
import logging
import math
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import dask.config
import distributed
import distributed.system
import distributed.worker_memory as worker_memory
import yaml
from dask.utils import parse_bytes, parse_timedelta
from distributed.cli.dask_worker import _apportion_ports
from distributed.deploy.utils import nprocesses_nthreads
from distributed.utils import parse_ports

logging.disable(logging.CRITICAL)


def plain(value: Any) -> Any:
    """JSON that tells floats from integers, bit by bit."""
    if isinstance(value, float):
        return "f:nan" if math.isnan(value) else "f:" + struct.pack(">d", value).hex()
    if isinstance(value, dict):
        return {"m": [[str(key), plain(item)] for key, item in value.items()]}
    if isinstance(value, list | tuple | set):
        return {"l": [plain(item) for item in value]}
    if isinstance(value, bytes):
        return "s:" + value.decode("latin-1")
    if isinstance(value, str):
        return "s:" + value
    if value is None or isinstance(value, bool | int):
        return value
    raise ValueError(f"no value of ours: {value!r}")


def literal(text: str) -> Any:
    value = dask.config.interpret_value(text)
    # complex numbers and dots are no setting: the text itself will do
    return text if isinstance(value, complex) or value is ... else plain(value)


def memory_limit(text: str, nthreads: int, cores: int, system: int) -> int | None:
    distributed.system.MEMORY_LIMIT = system
    logger = logging.getLogger("oracle")
    return worker_memory.parse_memory_limit(text, nthreads, cores, logger=logger)


def resources(text: str) -> Any:
    """The lines of `distributed/cli/dask_worker.py: main` about --resources."""
    pairs = dict(pair.split("=") for pair in text.replace(",", " ").split())
    return plain({name: float(value) for name, value in pairs.items()})


def apportion(worker: str | None, nanny: str | None, workers: int) -> Any:
    shares = []
    for share in _apportion_ports(worker, nanny, workers, True):
        ports = [share["worker_port"], share["port"]]
        shares.append([[port or 0] if not isinstance(port, list) else port for port in ports])
    return shares


def collect(files: list[list[str]], variables: dict[str, str], key: str) -> Any:
    """What Dask makes of files in folders and of variables, at one key."""
    with tempfile.TemporaryDirectory() as root:
        paths = []
        for name, text in files:
            path = Path(root, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            if str(path.parent) not in paths:
                paths.append(str(path.parent))
        config = dask.config.collect(paths=paths, env=variables)
    return plain(dask.config.get(key, None, config=config))


ANSWERS = {
    # a size of 64 bits stands for any larger one
    "bytes": lambda text: min(parse_bytes(text), 2**64 - 1),
    "timedelta": lambda text, default: plain(float(parse_timedelta(text, default))),
    "memory": memory_limit,
    "ports": parse_ports,
    "resources": resources,
    "apportion": apportion,
    "nprocesses": nprocesses_nthreads,
    "float": lambda text: plain(float(text)),
    "literal": literal,
    "yaml": lambda text: plain(yaml.safe_load(text)),
    "collect": collect,
    "has": lambda key: dask.config.get(key, "nothing") != "nothing",
    "defaults": lambda: Path(distributed.__file__).with_name("distributed.yaml").read_text(),
}


def answer(kind: str, *arguments: Any) -> list[Any]:
    try:
        return ["ok", ANSWERS[kind](*arguments)]
    except Exception:
        return ["error"]


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps([answer(*request) for request in json.loads(line)]), flush=True)
