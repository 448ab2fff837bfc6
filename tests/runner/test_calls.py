"""Calls of the service process, without a daemon between."""

from __future__ import annotations

import socket
import threading
from contextlib import closing

import numpy as np
import pytest
from distributed.shuffle._exceptions import P2PConsistencyError
from iqoqo_runner import calls, channel, plugins, shuffle
from iqoqo_runner.channel import Channel, Descriptors

VALUES = [
    None,
    ("text", 5, {"a": [1]}),
    b"x" * 200_000,
    {"worker": (3, [((0, 1), np.arange(5)), ((1, 1), np.arange(100_000))])},
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_survive(value):
    body, fds = calls.bundle(value)
    with Descriptors(fds) as descriptors:
        np.testing.assert_equal(calls.unbundle(body, descriptors), value)


def test_large_buffers_are_shared():
    body, fds = calls.bundle(np.zeros(100_000))
    with Descriptors(fds) as descriptors:
        assert len(fds) == 1
        assert len(body) < 1000
        assert calls.unbundle(body, descriptors).sum() == 0


@pytest.mark.parametrize("size", [10, 200_000])
def test_shards_of_dataframes_are_bytes_again(size):
    body, fds = calls.bundle(shuffle.outlined(b"x" * size))
    with Descriptors(fds) as descriptors:
        shard = shuffle.inlined(calls.unbundle(body, descriptors))
    assert type(shard) is bytes
    assert shard == b"x" * size


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    with closing(Channel(ours.detach())) as caller, closing(Channel(theirs.detach())) as service:
        yield calls.Calls(caller), caller, service


def served(call, caller, service, answer):
    """The result of a call that `answer` answers, or what it raises."""

    def serve():
        (tag, number, body), fds = service.receive()
        assert tag == channel.CALL
        with Descriptors(fds) as descriptors:
            op, args = calls.unbundle(body, descriptors)
        result = answer(op, *args)
        body, fds = result if isinstance(result, tuple) else (result, [])
        with Descriptors(fds):
            service.send((channel.RETURN, number, body), fds)
        (_, number, body), fds = caller.receive()
        call.answered(number, body, fds)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        return call("op", 1, "two")
    finally:
        thread.join(10)


def test_calls_are_answered(ends):
    assert served(*ends, lambda *args: calls.bundle((True, args))) == ("op", 1, "two")


def test_what_is_raised_is_raised(ends):
    def fail(*_):
        return calls.bundle(calls.failure(P2PConsistencyError("stale")))

    with pytest.raises(P2PConsistencyError, match="stale"):
        served(*ends, fail)


def test_without_a_service_there_is_a_reason(ends):
    with pytest.raises(RuntimeError, match="the service process ended"):
        served(*ends, lambda *_: "the service process ended")


def test_only_hooks_that_do_something_are_called():
    class Quiet(plugins.WorkerPlugin):
        pass

    class Watching(plugins.WorkerPlugin):
        def transition(self, key, start, finish, **kwargs):
            pass

    assert not plugins.wants_transitions(Quiet())
    assert plugins.wants_transitions(Watching())
    quiet = Quiet()
    quiet.transition = lambda *args, **kwargs: None
    assert plugins.wants_transitions(quiet)
