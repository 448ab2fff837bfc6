"""Objects and messages as the runner writes them."""

from __future__ import annotations

import fcntl
import functools
import os
import socket
import struct
import threading

import msgpack
import numpy as np
import pytest
from distributed.protocol import dumps, loads
from distributed.protocol.serialize import Serialize, Serialized
from iqoqo_runner import channel
from iqoqo_runner.channel import Channel, Closed, Descriptors


def reopen(header, frames):
    """What a peer makes of an object, through the wire."""
    sent = dumps({"x": Serialized(msgpack.loads(header, use_list=False), frames)})
    return loads([bytes(frame) for frame in sent])["x"]


def through_memory(value):
    """What the next task makes of an object."""
    shared, fd = channel.share(*channel.dump(value))
    with Descriptors([] if fd is None else [fd]) as descriptors:
        return channel.load(*shared, descriptors)


VALUES = [
    None,
    True,
    5,
    2.5,
    1j,
    "text",
    "x" * 200_000,
    b"bytes",
    b"x" * 200_000,
    bytearray(b"x" * 100_000),
    [1, "a", None],
    {"a": [1, 2], 5: (3,)},
    {"arrays": [np.arange(10), np.arange(20_000)]},
    [np.zeros(3), np.ones(30_000)],
    (np.arange(5),),
    set(range(10)),
    np.arange(0),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda v: f"{type(v).__name__}-{len(repr(v))}")
def test_values_survive(value):
    for again in (reopen(*channel.dump(value)), through_memory(value)):
        assert type(again) is type(value)
        np.testing.assert_equal(again, value)


@pytest.mark.parametrize("value", [None, True, 7, 10**30, 0.5, "x", "y" * 100_000, b"z"])
def test_plain_values_are_written_as_dask_writes_them(value):
    header, frames = channel.dump(value)
    _, expected_header, *expected = dumps({"x": Serialize(value)}, context={"compression": None})
    assert msgpack.loads(header) == msgpack.loads(expected_header)
    assert [bytes(f) for f in frames] == [bytes(f) for f in expected]


def test_what_cannot_be_serialized_raises_when_it_is_opened():
    header, frames = channel.dump([threading.Lock()])
    with pytest.raises(TypeError, match="Could not serialize object of type lock"):
        reopen(header, frames)


def test_arrays_are_mapped_writable_and_private():
    (kind, header, frames), fd = channel.share(*channel.dump(np.zeros(100_000)))
    with Descriptors([fd, os.dup(fd)]) as descriptors:
        first = channel.load(kind, header, frames, descriptors)
        second = channel.load(
            kind, header, [f if type(f) is bytes else (1, *f[1:]) for f in frames], descriptors
        )
    assert first.flags.writeable
    first[:] = 1
    assert second.sum() == 0


def test_shared_memory_is_final():
    _, fd = channel.share(*channel.dump(b"x" * 100_000))
    try:
        with pytest.raises(OSError):
            os.pwrite(fd, b"y", 0)
        with pytest.raises(OSError):
            os.ftruncate(fd, 1)
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        assert seals & fcntl.F_SEAL_SEAL
    finally:
        os.close(fd)


def test_frames_in_shared_memory_are_aligned():
    value = [np.ones(10_001, dtype="u1"), np.ones(100_001, dtype="u1"), np.ones(30_000)]
    (_, _, frames), fd = channel.share(*channel.dump(value))
    os.close(fd)
    places = [f for f in frames if type(f) is tuple]
    assert len(places) == 2
    assert all(offset % channel.ALIGNMENT == 0 for _, offset, _ in places)


def test_many_small_frames_travel_together():
    (_, _, frames), fd = channel.share(*channel.dump([np.ones(1000) for _ in range(500)]))
    assert fd is not None
    os.close(fd)
    assert all(type(f) is tuple for f in frames)


def test_an_object_of_too_many_frames_is_one_pickle(monkeypatch):
    monkeypatch.setattr(channel, "FRAMES_MAX", 10)
    value = [np.full(3, i) for i in range(20)]
    header, _ = channel.dump(value)
    assert "sub-headers" not in msgpack.loads(header)
    np.testing.assert_equal(through_memory(value), value)


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    with ours:
        yield ours, Channel(theirs.detach())


def framed(message, fds=0):
    body = msgpack.packb(message)
    return struct.pack("<II", len(body), fds) + body


def test_messages_may_come_in_pieces_and_together(ends):
    ours, theirs = ends
    data = framed([1, "first"]) + framed([2, ("a", 1)]) + framed([3, b"x" * 100])
    for cut in (3, 8, 12, len(data) - 1):
        ours.send(data[:cut])
        ours.send(data[cut:])
        assert [theirs.receive()[0] for _ in range(3)] == [(1, "first"), (2, ("a", 1)), (3, b"x" * 100)]


def test_descriptors_stay_with_their_messages(ends):
    ours, theirs = ends
    theirs.do_not_wait()
    read, write = os.pipe()
    socket.send_fds(ours, [framed([1])], [])
    socket.send_fds(ours, [framed([2], 1)], [read])
    socket.send_fds(ours, [framed([3], 2)], [read, write])
    counts = []
    for _ in range(3):
        message, fds = theirs.receive()
        counts.append((message[0], len(fds)))
        for fd in fds:
            os.close(fd)
    assert counts == [(1, 0), (2, 1), (3, 2)]
    with pytest.raises(BlockingIOError):
        theirs.receive()
    os.close(read)
    os.close(write)


def test_the_end_is_told_from_silence(ends):
    ours, theirs = ends
    ours.close()
    with pytest.raises(Closed):
        theirs.receive()
    with pytest.raises(Closed):
        theirs.send([1])


def test_sending_waits_for_room(ends):
    ours, theirs = ends
    sender = threading.Thread(target=theirs.send, args=([1, b"x" * 5_000_000],))
    sender.start()
    reader = Channel(ours.detach())
    message, _ = reader.receive()
    sender.join(20)
    assert len(message[1]) == 5_000_000


@pytest.mark.parametrize("kind", [int, np.ndarray, type(threading.Lock()), functools.partial])
def test_types_are_described_as_in_task_finished(kind):
    pickled, name = channel.describe_type(kind)
    opened = dumps({"x": Serialize(pickled)})
    assert loads(opened)["x"] == pickled
    assert name.endswith(kind.__name__)


def test_sizes_never_break_the_protocol():
    class Odd:
        def __sizeof__(self):
            raise ValueError

    class Negative:
        def __sizeof__(self):
            return -1000

    assert channel.describe(Odd())[0] == 1_000_000
    assert channel.describe(Negative())[0] >= 0


def room():
    memory, taken = memoryview(bytearray(channel.ROOM)), memoryview(bytearray(8)).cast("Q")
    return channel.Room(memory, taken), memory, taken


def test_results_of_middling_size_are_left_in_the_room():
    left, memory, taken = room()
    value = [np.arange(3), np.arange(10_000), np.full(12_000, 7)]
    header, frames = channel.dump(value)
    (_, _, placed), fd = channel.share(header, frames, left)
    assert fd is None
    places = [f for f in placed if type(f) is tuple]
    assert places == [(0, 80_000), (80_000, 96_000)]
    again = reopen(header, [f if type(f) is bytes else memory[f[0] : sum(f)] for f in placed])
    np.testing.assert_equal(again, value)


def test_what_was_left_is_written_over_only_once_it_is_taken():
    left, _, taken = room()
    header, frames = channel.dump(b"x" * 200_000)

    def share():
        (_, _, placed), fd = channel.share(header, frames, left)
        if fd is not None:
            os.close(fd)
        return placed[-1][-2] if fd is None else None

    offsets = [share() for _ in range(6)]
    assert offsets[0] == 0 and offsets[5] is None
    assert all(b >= a + 200_000 for a, b in zip(offsets[:4], offsets[1:5], strict=True))
    taken[0] = 4
    assert share() is None
    taken[0] = 5
    assert share() == 0


@pytest.mark.parametrize("size", [70_000, 300_000])
def test_a_frame_that_lies_with_others_is_read_alone(size):
    fd = os.memfd_create("test")
    os.pwrite(fd, b"a" * 5000 + b"b" * size + b"c" * 5000, 0)
    with Descriptors([fd]) as descriptors:
        buffer = memoryview(descriptors.view(0, 5000, size, 1))
    assert bytes(buffer) == b"b" * size
    assert not buffer.readonly
    buffer[0] = 0
