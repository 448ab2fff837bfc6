"""Preload of the test scheduler: lets a test look inside with a Python expression."""

from __future__ import annotations

import asyncio
import json
from typing import Any


def dask_setup(scheduler: Any) -> None:
    async def evaluate(expression: str) -> str:
        result = eval(expression, {"s": scheduler, "asyncio": asyncio})
        if asyncio.iscoroutine(result):
            result = await result
        return json.dumps(result, default=repr)

    scheduler.handlers["evaluate"] = evaluate
