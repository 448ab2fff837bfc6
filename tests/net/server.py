"""A stock ``distributed.core.Server`` for our client side. Prints its address; ends when stdin does."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import dask
import numpy as np
from distributed.core import Server, Status
from distributed.protocol import to_serialize


class Echo(Server):
    """Some handlers that a test asks for."""

    def __init__(self) -> None:
        self.streamed: list[Any] = []
        self.batches: list[int] = []
        self.gate = asyncio.Event()
        handlers = {
            "array": self.array,
            "back": self.back,
            "fail": self.fail,
            "hang": self.hang,
            "stream": self.stream,
            "streamed": lambda: {"messages": self.streamed, "batches": self.batches},
            "open_gate": self.gate.set,
        }
        super().__init__(handlers, needs_workdir=False)

    def array(self, n: int) -> Any:
        """An array of n bytes, as data of a key."""
        return {"data": to_serialize(np.arange(n, dtype="u1"))}

    def back(self, data: Any) -> Any:
        """An object that arrived opened, sent once more."""
        assert isinstance(data, np.ndarray)
        return {"data": to_serialize(data)}

    def fail(self) -> None:
        """An exception in a handler."""
        raise ValueError("as it must be")

    async def hang(self) -> str:
        """Answers when the gate is opened."""
        await self.gate.wait()
        return "late"

    async def stream(self, comm: Any, slow: bool = False) -> Any:
        """Notes the messages of a batched stream, until it ends."""
        if slow:
            await self.gate.wait()
        while True:
            try:
                batch = await comm.read()
            except OSError:
                return Status.dont_reply
            self.batches.append(len(batch))
            self.streamed.extend(m["i"] for m in batch)


async def main(host: str, compression: str) -> None:
    dask.config.set({"distributed.comm.compression": compression or False})
    async with Echo() as server:
        await server.listen(f"tcp://{host}")
        print(server.address, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


asyncio.run(main(sys.argv[1], sys.argv[2]))
