"""A bench's life: its processes, its time limit, its exit code. All that it starts ends with it."""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from demo.processes import Interrupted, ProcessDied, Processes, ignore_signals, raise_on_signals

from .rounds import RoundFailed


def supervise(name: str, timeout: int, run: Callable[[Processes, Path], None]) -> int:
    """Runs a bench for at most `timeout` seconds.

    Returns its exit code: 0 measured; 1 something failed; 128 + N stopped by signal N.
    """
    raise_on_signals()
    signal.alarm(timeout)
    code = 1
    with tempfile.TemporaryDirectory(prefix=f"{name}-", ignore_cleanup_errors=True) as directory:
        processes = Processes(Path(directory))
        try:
            run(processes, Path(directory))
            code = 0
        except Interrupted as interrupted:
            code = 128 + interrupted.signum
            print(f"\n{interrupted}: stopping", flush=True)
        except (RoundFailed, ProcessDied, OSError, TimeoutError) as error:
            print(f"\n{error}", file=sys.stderr)
        finally:
            ignore_signals()
            complaints = processes.stop()
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return code or (1 if complaints else 0)
