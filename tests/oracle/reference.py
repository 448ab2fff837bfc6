"""The Python side of the oracle: drives Dask's own WorkerState with the events that the Rust side sends.

One line of JSON in for each sequence of events, one line out. Every step is answered with a digest of what
both sides must agree on: the instructions as a multiset, the whole observable state, and the new lines of the
transition log. With "verbose" the texts themselves come back.

Two things in Dask depend on chance and are pinned here, as they are in the Rust code: sets iterate in the
order of the objects' addresses (here: insertion order, the last item filling the hole that a removal leaves),
and among peers equal in everything else one is drawn (here: the smallest address).
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, MutableSet
from typing import Any

import dask
import distributed.collections
from distributed import worker_state_machine as wsm

Json = Any
# A sequence that takes longer than this (seconds) hangs.
SEQUENCE_TIMEOUT = 300


class SwapSet(MutableSet):
    """A set with the iteration order of Rust's `IndexSet::swap_remove`."""

    __slots__ = ("items", "positions")

    def __init__(self, items: Iterable = ()) -> None:
        self.items: list = []
        self.positions: dict = {}
        for item in items:
            self.add(item)

    def __contains__(self, item: object) -> bool:
        return item in self.positions

    def __iter__(self) -> Iterator:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def add(self, item: Any) -> None:
        if item not in self.positions:
            self.positions[item] = len(self.items)
            self.items.append(item)

    def discard(self, item: Any) -> None:
        hole = self.positions.pop(item, None)
        if hole is None:
            return
        last = self.items.pop()
        if hole < len(self.items):
            self.items[hole] = last
            self.positions[last] = hole

    def clear(self) -> None:
        self.items.clear()
        self.positions.clear()


class TaskState(wsm.TaskState):
    """A task whose sets iterate in a known order."""

    __slots__ = ()

    def __post_init__(self) -> None:
        wsm_task_state.__post_init__(self)
        self.dependencies = SwapSet()
        self.dependents = SwapSet()
        self.waiting_for_data = SwapSet()
        self.waiters = SwapSet()
        self.who_has = SwapSet()


class InFlightWorkers(dict):
    """Keeps the keys of a transfer in the order in which they were selected."""

    selected: list = []

    def __setitem__(self, worker: str, keys: Collection) -> None:
        assert set(keys) == set(self.selected)
        super().__setitem__(worker, SwapSet(self.selected))


class SmallestFirst:
    """Stands in for the random tie-breaker; the tuples' next item, the address, decides."""

    @staticmethod
    def random() -> float:
        return 0.0


class A:
    """A value of a known size."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


class B(A):
    """A value of another type."""


COVERAGE: Counter[tuple[str, str, str]] = Counter()
wsm_task_state = wsm.TaskState


def pin_chance() -> None:
    """Replaces what would differ from run to run: set order, random choice, clocks, sizes."""
    wsm.TaskState = TaskState
    wsm.set = SwapSet
    distributed.collections.set = SwapSet
    wsm.time = wsm.monotonic = lambda: 0.0
    wsm.sizeof = lambda value: value.nbytes

    select = wsm.WorkerState._select_keys_for_gather

    def select_keys_for_gather(self: wsm.WorkerState, available: Any) -> tuple:
        to_gather, nbytes = select(self, available)
        InFlightWorkers.selected = [ts.key for ts in to_gather]
        return to_gather, nbytes

    wsm.WorkerState._select_keys_for_gather = select_keys_for_gather


def count_transitions() -> None:
    """Wraps the transition table, so that we know what was reached."""

    def counted(start: str, finish: str, transition: Callable) -> Callable:
        def wrapper(self: wsm.WorkerState, ts: wsm.TaskState, *args: Any, **kwargs: Any) -> Any:
            detail = f"{ts.previous or ''}{' done' if ts.done else ''}".strip()
            COVERAGE[start, finish, detail] += 1
            return transition(self, ts, *args, **kwargs)

        return wrapper

    table = wsm.WorkerState._TRANSITIONS_TABLE
    wsm.WorkerState._TRANSITIONS_TABLE = {k: counted(*k, f) for k, f in table.items()}


class Sequence:
    """One worker and the events that happen to it."""

    def __init__(self, setup: Json) -> None:
        self.keys = [self.decode_key(key) for key in setup["keys"]]
        self.workers: list[str] = setup["workers"]
        self.resources = [dict(r) for r in setup["restrictions"]]
        self.actors: list[bool] = setup["actors"]
        self.names = {key: f"k{i}" for i, key in enumerate(self.keys)}
        self.worker_names = {address: f"w{i}" for i, address in enumerate(self.workers)}
        config = setup["config"]
        threshold = config.pop("transfer_incoming_bytes_throttle_threshold")
        self.state = wsm.WorkerState(
            address=self.workers[0], validate=True, transition_counter_max=1_000_000, **config
        )
        self.state.transfer_incoming_bytes_throttle_threshold = threshold
        self.state.rng = SmallestFirst()
        self.state.in_flight_workers = InFlightWorkers()

    def decode_key(self, key: Json) -> Any:
        """Keys that JSON can't tell: tuples are lists, bytes are {"b": text}."""
        if isinstance(key, list):
            return tuple(map(self.decode_key, key))
        if isinstance(key, dict):
            return key["b"].encode()
        return key

    def value(self, nbytes: int) -> A:
        return (B if nbytes % 2 else A)(nbytes)

    def who_has(self, items: Json) -> dict:
        return {self.keys[key]: [self.workers[w] for w in workers] for key, workers in items}

    def event(self, data: Json, stimulus_id: str) -> wsm.StateMachineEvent:
        """Builds Dask's event from ours: a kind and its arguments."""
        kind, *args = data
        return getattr(self, f"event_{kind}")(stimulus_id, *args)

    def event_compute(self, sid: str, key: int, run_id: int, deps: Json, priority: Json) -> Any:
        return wsm.ComputeTaskEvent(
            key=self.keys[key],
            run_id=run_id,
            who_has={self.keys[d]: [self.workers[w] for w in workers] for d, workers, _ in deps},
            nbytes={self.keys[d]: nbytes for d, _, nbytes in deps},
            priority=tuple(priority),
            run_spec=wsm.ComputeTaskEvent.dummy_runspec(self.keys[key]),
            resource_restrictions=self.resources[key],
            actor=self.actors[key],
            annotations={},
            span_id=None,
            stimulus_id=sid,
        )

    def event_cancel(self, sid: str, key: int) -> Any:
        return wsm.CancelComputeEvent(key=self.keys[key], stimulus_id=sid)

    def event_free(self, sid: str, keys: Json) -> Any:
        return wsm.FreeKeysEvent(keys=[self.keys[k] for k in keys], stimulus_id=sid)

    def event_remove_replicas(self, sid: str, keys: Json) -> Any:
        return wsm.RemoveReplicasEvent(keys=[self.keys[k] for k in keys], stimulus_id=sid)

    def event_acquire(self, sid: str, items: Json) -> Any:
        return wsm.AcquireReplicasEvent(
            who_has=self.who_has([(key, workers) for key, workers, _ in items]),
            nbytes={self.keys[key]: nbytes for key, _, nbytes in items},
            stimulus_id=sid,
        )

    def event_steal(self, sid: str, key: int) -> Any:
        return wsm.StealRequestEvent(key=self.keys[key], stimulus_id=sid)

    def event_refresh(self, sid: str, items: Json) -> Any:
        return wsm.RefreshWhoHasEvent(who_has=self.who_has(items), stimulus_id=sid)

    def event_remove_worker(self, sid: str, worker: int) -> Any:
        return wsm.RemoveWorkerEvent(worker=self.workers[worker], stimulus_id=sid)

    def event_pause(self, sid: str) -> Any:
        return wsm.PauseEvent(stimulus_id=sid)

    def event_unpause(self, sid: str) -> Any:
        return wsm.UnpauseEvent(stimulus_id=sid)

    def event_update_data(self, sid: str, items: Json) -> Any:
        data = {self.keys[key]: self.value(nbytes) for key, nbytes in items}
        return wsm.UpdateDataEvent(data=data, stimulus_id=sid)

    def event_gather_success(self, sid: str, worker: int, total: int, items: Json) -> Any:
        data = {self.keys[key]: self.value(nbytes) for key, nbytes in items}
        return wsm.GatherDepSuccessEvent(
            worker=self.workers[worker], total_nbytes=total, data=data, stimulus_id=sid
        )

    def event_gather_busy(self, sid: str, worker: int, total: int) -> Any:
        return wsm.GatherDepBusyEvent(worker=self.workers[worker], total_nbytes=total, stimulus_id=sid)

    def event_gather_network_failure(self, sid: str, worker: int, total: int) -> Any:
        return wsm.GatherDepNetworkFailureEvent(
            worker=self.workers[worker], total_nbytes=total, stimulus_id=sid
        )

    def event_gather_failure(self, sid: str, worker: int, total: int) -> Any:
        return wsm.GatherDepFailureEvent(
            worker=self.workers[worker], total_nbytes=total, stimulus_id=sid, **self.error(sid)
        )

    def event_retry_busy_worker(self, sid: str, worker: int) -> Any:
        return wsm.RetryBusyWorkerEvent(worker=self.workers[worker], stimulus_id=sid)

    def event_find_missing(self, sid: str) -> Any:
        return wsm.FindMissingEvent(stimulus_id=sid)

    def event_execute_success(self, sid: str, key: int, run_id: int, nbytes: int) -> Any:
        # what Worker.execute does before it returns the event
        self.state.threads[self.keys[key]] = run_id
        value = self.value(nbytes)
        return wsm.ExecuteSuccessEvent(
            key=self.keys[key],
            run_id=run_id,
            value=value,
            start=1.0,
            stop=2.5,
            nbytes=nbytes,
            type=type(value),
            stimulus_id=sid,
        )

    def event_execute_failure(self, sid: str, key: int, run_id: int, began: bool) -> Any:
        if began:
            self.state.threads[self.keys[key]] = run_id
        start, stop = (1.0, 2.5) if began else (None, None)
        return wsm.ExecuteFailureEvent(
            key=self.keys[key], run_id=run_id, start=start, stop=stop, stimulus_id=sid, **self.error(sid)
        )

    def event_reschedule(self, sid: str, key: int) -> Any:
        return wsm.RescheduleEvent(key=self.keys[key], stimulus_id=sid)

    def event_secede(self, sid: str, key: int) -> Any:
        return wsm.SecedeEvent(key=self.keys[key], compute_duration=1.5, stimulus_id=sid)

    @staticmethod
    def error(sid: str) -> dict[str, str]:
        return {
            "exception": f"exception {sid}",
            "traceback": f"traceback {sid}",
            "exception_text": f"boom {sid}",
            "traceback_text": f"line {sid}",
        }

    # What the Rust side writes in the same words

    def some(self, keys: Iterable, *, sort: bool = True) -> str:
        names = [self.names[key] for key in keys]
        return ",".join(sorted(names) if sort else names)

    def tasks_text(self, tasks: Iterable) -> str:
        return self.some(ts.key for ts in tasks)

    def in_order(self, tasks: Iterable) -> str:
        return self.some((ts.key for ts in tasks), sort=False)

    def peers_text(self, workers: Iterable) -> str:
        return ",".join(sorted(self.worker_names[w] for w in workers))

    def instruction(self, inst: wsm.Instruction) -> str:
        if isinstance(inst, wsm.GatherDep):
            keys, worker = self.some(inst.to_gather), self.worker_names[inst.worker]
            return f"gather {worker} {keys} {inst.total_nbytes} {inst.stimulus_id}"
        if isinstance(inst, wsm.Execute):
            return f"execute {self.names[inst.key]} {inst.stimulus_id}"
        if isinstance(inst, wsm.RetryBusyWorkerLater):
            return f"retry {self.worker_names[inst.worker]} {inst.stimulus_id}"
        assert isinstance(inst, wsm.SendMessageToScheduler)
        message = inst.to_dict()
        if "key" in message:
            message["key"] = self.names[message["key"]]
        if "keys" in message:
            message["keys"] = sorted(self.names[key] for key in message["keys"])
        message.pop("type", None)
        return json.dumps(message, sort_keys=True, separators=(",", ":"))

    def log_line(self, entry: tuple) -> str:
        *entry, _, _ = entry  # stimulus id and time
        first = entry[0]
        if first == "free-keys":
            return f"free-keys {self.some(entry[1], sort=False)}"
        if first == "gather-dependencies":
            return f"gather-dependencies {self.worker_names[entry[1]]} {self.some(entry[2])}"
        name = self.names[first]
        if len(entry) == 5:
            start, recommended, finish, recs = entry[1:]
            new = ",".join(f"{self.names[key]}:{state}" for key, state in recs.items())
            return f"{name} {start} {recommended} {finish} {new}"
        return " ".join((name, *entry[1:]))

    def task(self, ts: wsm.TaskState) -> str:
        ws = self.state
        actor = ts.key in ws.actors
        kind = "actor" if actor else "data" if ts.key in ws.data else ""
        restrictions = ",".join(f"{k}={v}" for k, v in ts.resource_restrictions.items())
        priority = ",".join(map(str, ts.priority or ()))
        coming_from = self.worker_names[ts.coming_from] if ts.coming_from else ""
        error = ts.exception_text if ts.state == "error" else ""
        return (
            f"{self.names[ts.key]} {ts.prefix} {ts.state} {ts.previous} {ts.next} n={ts.nbytes} p={priority} "
            f"r={ts.run_id} h={self.peers_text(ts.who_has)} f={coming_from} "
            f"d={self.in_order(ts.dependencies)} t={self.in_order(ts.dependents)} "
            f"w={self.tasks_text(ts.waiting_for_data)} v={self.tasks_text(ts.waiters)} "
            f"{int(ts.done)} {kind} {restrictions} s={len(ts.startstops)} {error}"
        )

    def snapshot(self) -> str:
        ws = self.state
        names, workers = self.names, self.worker_names
        counter = ws.task_counter
        counts = sorted(f"{prefix}/{state}={n}" for (prefix, state), n in counter.current_count().items())
        by_state = sorted(f"{state}={n}" for state, n in counter.current_count(by_prefix=False).items())
        needed = sorted(
            f"{workers[w]}:{self.in_order(tss.sorted())}" for w, tss in ws.data_needed.items() if tss
        )
        has_what = sorted(f"{workers[w]}:{self.some(keys)}" for w, keys in ws.has_what.items() if keys)
        in_flight = sorted(
            f"{workers[w]}:{self.some(keys, sort=False)}" for w, keys in ws.in_flight_workers.items()
        )
        lines = sorted(map(self.task, ws.tasks.values()))
        lines += (
            f"running={int(ws.running)} executed={ws.executed_count} nbytes={ws.nbytes} "
            f"transitions={ws.transition_counter} incoming={ws.transfer_incoming_bytes}/"
            f"{ws.transfer_incoming_count}/{ws.transfer_incoming_count_total}",
            f"ready={self.in_order(ws.ready.sorted())}",
            f"constrained={self.in_order(ws.constrained.sorted())}",
            f"executing={self.in_order(ws.executing)}",
            f"long-running={self.in_order(ws.long_running)}",
            f"in-flight-tasks={self.in_order(ws.in_flight_tasks)}",
            f"missing={self.in_order(ws.missing_dep_flight)}",
            f"waiting={len(ws.waiting)}",
            f"busy={self.peers_text(ws.busy_workers)}",
            f"data={','.join(sorted(names[key] for key in ws.data))}",
            f"data-needed={' '.join(needed)}",
            f"has-what={' '.join(has_what)}",
            f"in-flight-workers={' '.join(in_flight)}",
            f"resources={','.join(f'{k}={v}' for k, v in ws.available_resources.items())}",
            f"counts={' '.join(counts)}",
            f"by-state={' '.join(by_state)}",
        )
        return "\n".join(lines)

    def step(self, data: Json, stimulus_id: str) -> str:
        """Handles one event; gives all that the two sides must agree on."""
        instructions = self.state.handle_stimulus(self.event(data, stimulus_id))
        self.state.validate_state()
        lines = sorted(map(self.instruction, instructions))
        lines.append("--")
        lines += map(self.log_line, self.state.log)
        self.state.log.clear()
        lines.append("--")
        lines.append(self.snapshot())
        return "\n".join(lines)


def run(request: Json) -> Json:
    sequence = Sequence(request["setup"])
    answers: list[Json] = []
    error = None
    for i, event in enumerate(request["events"]):
        try:
            text = sequence.step(event, f"s{i}")
        except Exception as e:
            cause = f" from {e.__cause__!r}" if e.__cause__ else ""
            error = f"{type(e).__name__}: {e!s:.2000}{cause:.2000}"
            break
        answers.append(text if request["verbose"] else zlib.crc32(text.encode()))
    coverage = [[*k, n] for k, n in COVERAGE.items()]
    COVERAGE.clear()
    return {"answers": answers, "error": error, "coverage": coverage}


def main() -> None:
    # what is raised is in the answer
    logging.disable()
    dask.config.set({"distributed.admin.low-level-log-length": 1000})
    pin_chance()
    count_transitions()
    table = sorted(wsm.WorkerState._TRANSITIONS_TABLE)
    print(json.dumps({"version": distributed.__version__, "table": table}), flush=True)
    for line in sys.stdin:
        signal.alarm(SEQUENCE_TIMEOUT)
        answer = run(json.loads(line))
        signal.alarm(0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
