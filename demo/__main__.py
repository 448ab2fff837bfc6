"""`python -m demo`: a stock scheduler, one worker and the program `flights.py`; then everything is stopped.

Exit codes: 0 all answers right and nothing left running; 1 a wrong answer or a failure; 128 + N stopped by
signal N.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from .processes import Interrupted, ProcessDied, Processes, ignore_signals, raise_on_signals

ROOT = Path(__file__).resolve().parent.parent
OURS = ROOT / "target/release/iqoqo-dask-worker"
DASK = Path(sys.executable).parent / "dask"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo", description="A real Dask job on one worker.")
    parser.add_argument(
        "--worker",
        default=os.environ.get("DEMO_WORKER", str(OURS)),
        help="the worker's binary, or 'stock' for `dask worker` (default: $DEMO_WORKER or our release build)",
    )
    parser.add_argument("--nthreads", type=int, default=2, help="tasks at once (default: %(default)s)")
    parser.add_argument("--timeout", type=int, default=240, help="seconds for it all (default: %(default)s)")
    return parser.parse_args()


def worker_command(arguments: argparse.Namespace, scheduler: str, directory: Path) -> list[str | Path]:
    options = ["--nthreads", str(arguments.nthreads), "--local-directory", str(directory / "worker")]
    if arguments.worker == "stock":
        return [DASK, "worker", scheduler, *options, "--no-dashboard"]
    return [arguments.worker, scheduler, *options, "--python", sys.executable]


def start_cluster(arguments: argparse.Namespace, processes: Processes, directory: Path) -> str:
    """Start the scheduler and the worker, wait until it has registered; returns the scheduler's address."""
    scheduler_file = directory / "scheduler.json"
    local = ["--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0"]
    processes.start("scheduler", [DASK, "scheduler", *local, "--scheduler-file", scheduler_file])
    processes.wait_for("the scheduler", scheduler_file.exists)
    scheduler = json.loads(scheduler_file.read_text())
    print(f"scheduler: {scheduler['address']}, dashboard on port {scheduler['services'].get('dashboard')}")

    start = time.monotonic()
    processes.start("worker", worker_command(arguments, scheduler["address"], directory))
    registered = "Registered to:"
    processes.wait_for("the worker", lambda: registered in processes.log_file("worker").read_text())
    print(f"worker:    {arguments.worker}, registered after {time.monotonic() - start:.2f} s", flush=True)
    return str(scheduler["address"])


def run(arguments: argparse.Namespace, processes: Processes, directory: Path) -> int:
    """The whole demonstration; returns the program's exit code."""
    if arguments.worker != "stock" and not os.access(arguments.worker, os.X_OK):
        raise FileNotFoundError(f"no worker at {arguments.worker}: `make build` makes one")
    scheduler = start_cluster(arguments, processes, directory)
    # Its files go where ours are, so that they go with ours even if it is stopped half-way.
    env = os.environ | {"TMPDIR": str(directory)}
    processes.start("program", [sys.executable, ROOT / "demo/flights.py", scheduler], env, log=False)
    return processes.wait_until_end("program", among=("scheduler", "worker"))


def main() -> int:
    arguments = parse()
    raise_on_signals()
    signal.alarm(arguments.timeout)
    start = time.monotonic()
    code = 1
    with tempfile.TemporaryDirectory(prefix="iqoqo-demo-", ignore_cleanup_errors=True) as directory:
        processes = Processes(Path(directory))
        try:
            code = 1 if run(arguments, processes, Path(directory)) else 0
        except Interrupted as interrupted:
            code = 128 + interrupted.signum
            print(f"\n{interrupted}: stopping", flush=True)
        except (ProcessDied, OSError, TimeoutError) as error:
            print(f"\n{error}", file=sys.stderr, flush=True)
        finally:
            ignore_signals()
            complaints = processes.stop()
        if code == 1 or complaints:
            with contextlib.suppress(OSError):
                print(f"the end of the worker's log:\n{processes.log_tail('worker')}", file=sys.stderr)
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    code = code or (1 if complaints else 0)
    verdict = "done" if code == 0 else "FAILED" if code == 1 else "stopped"
    remains = "see above for what was left running" if complaints else "nothing left running"
    print(f"{verdict} after {time.monotonic() - start:.1f} s, {remains}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
