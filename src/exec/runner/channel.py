"""Messages between the daemon and its Python processes, and the objects they carry.

A message is a head (u32 length, u32 number of descriptors), then a msgpack array whose first item is a tag.
Its descriptors travel by SCM_RIGHTS with its first bytes. The other end is `ipc.rs`. Knows no task and no op.
"""

from __future__ import annotations

import array
import errno
import fcntl
import mmap
import os
import pickle
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import msgpack
from dask.utils import typename
from distributed.protocol import pickle as dask_pickle
from distributed.protocol.compression import decompress
from distributed.protocol.serialize import (
    Serialize,
    merge_and_deserialize,
    msgpack_decode_default,
    msgpack_encode_default,
    serialize,
)
from distributed.protocol.utils import frame_split_size, msgpack_opts
from distributed.sizeof import safe_sizeof

# Tags, as in ipc.rs.
FORK: Final = 1
READY: Final = 2
FORKED: Final = 3
EXITED: Final = 4
FORK_FAILED: Final = 5
CONFIGURE: Final = 10
RUN: Final = 11
EXIT: Final = 12
STACKS: Final = 13
INTERRUPT: Final = 14
PLUGINS: Final = 15
UNPLUG: Final = 16
LEAVE: Final = 17
HAND_OVER: Final = 18
RUN_ACTOR: Final = 19
KEEP: Final = 60
PUBLISH: Final = 61
FORGET: Final = 62
PUBLISHED: Final = 63
FINISHED: Final = 20
FAILED: Final = 21
RESCHEDULE: Final = 22
SKIPPED: Final = 23
SECEDED: Final = 24
EVENT: Final = 25
SCATTERED: Final = 26
PLUGIN_ADDED: Final = 27
PLUGIN_REMOVED: Final = 28
HOLDS: Final = 29
REQUEST: Final = 30
REPLY: Final = 31
DESCRIBE: Final = 32
DESCRIBED: Final = 33
CALL: Final = 34
RETURN: Final = 35
STREAM: Final = 36
TRANSITIONS: Final = 37
BEAT: Final = 38
ENVIRONMENT: Final = 39

SERIALIZED: Final = 0
PICKLED: Final = 1

SHARED_FRAME_MIN: Final = 64 * 1024
"""Frames from this size on, in bytes, travel as shared memory, as in store/mod.rs."""
MEMFD_MIN: Final = 256 * 1024
"""Objects from this size on, in bytes, have a memfd of their own, as in store/mod.rs."""
MAP_MIN: Final = 128 * 1024
"""Frames from this size on, in bytes, are mapped where they lie with others; smaller ones are copied."""
ROOM: Final = 1024 * 1024
"""Bytes in which a runner leaves results for the daemon to take, as in mailbox.rs."""
INLINE_MAX: Final = 1024 * 1024
"""An object whose small frames sum up to more than this travels as shared memory as a whole."""
FRAMES_MAX: Final = 100_000
"""An object of more frames than this is pickled as a whole instead."""
ALIGNMENT: Final = 64

_HEAD = struct.Struct("<II")
# below the allocator's threshold for mapping memory, which costs more than a small message
_CHUNK = 16 * 1024
_CHUNK_MAX = 1024 * 1024
_DESCRIPTORS = 253
_ANCILLARY = socket.CMSG_SPACE(_DESCRIPTORS * array.array("i").itemsize)
_FINAL_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_SEAL_ATTEMPTS = 30
_NOEXEC_SEAL = 0x8
_WRITE_MAX = 1 << 30

Frame = Any
Object = tuple[int, bytes, list[Any]]


class Closed(Exception):
    """The daemon's end is closed."""


class Channel:
    """One end of a Unix stream socket. Any thread may send; one thread receives."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)
        self._recvmsg = self._socket.recvmsg
        self._flags = 0
        self._sendall = self._socket.sendall
        self._buffer = bytearray()
        self._chunk = _CHUNK
        self._fds: deque[int] = deque()
        self._ready: deque[tuple[tuple[Any, ...], list[int]]] = deque()
        self._held: list[bytes] = []
        self._lock = threading.Lock()
        self._pack = msgpack.Packer(autoreset=True, default=_encode_default).pack

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def do_not_wait(self) -> None:
        """From now on `receive` raises BlockingIOError when nothing is there; `send` still waits."""
        self._flags = socket.MSG_DONTWAIT

    def receive(self) -> tuple[tuple[Any, ...], list[int]]:
        """The next message and its descriptors, which the caller must close.

        Raises Closed at the end.
        """
        ready = self._ready
        if ready:
            return ready.popleft()
        while True:
            try:
                data, ancillary, _, _ = self._recvmsg(self._chunk, _ANCILLARY, self._flags)
            except ConnectionError:
                raise Closed from None
            if ancillary:
                self._collect(ancillary)
            if not data:
                raise Closed
            if not self._buffer and len(data) >= 8:
                length, nfds = _HEAD.unpack_from(data)
                if length + 8 == len(data):
                    return unpack(data[8:]), self._descriptors(nfds) if nfds else []
            self._buffer += data
            self._split()
            if ready:
                return ready.popleft()

    def _split(self) -> None:
        """Takes the messages off the buffer that are there as a whole."""
        buffer = self._buffer
        start = 0
        self._chunk = _CHUNK
        with memoryview(buffer) as view:
            while len(buffer) - start >= 8:
                length, nfds = _HEAD.unpack_from(buffer, start)
                end = start + 8 + length
                if len(buffer) < end:
                    # a large message: read on in large pieces until it is there
                    self._chunk = min(max(_CHUNK, end - len(buffer)), _CHUNK_MAX)
                    break
                self._ready.append((unpack(view[start + 8 : end]), self._descriptors(nfds) if nfds else []))
                start = end
        del buffer[:start]

    def next_is_brief(self) -> bool:
        """Whether the next message is here, and is a task that probably takes less time than a message."""
        if not self._ready:
            return False
        message = self._ready[0][0]
        return message[0] == RUN and message[-1]

    def _collect(self, ancillary: Iterable[tuple[int, int, bytes]]) -> None:
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self._fds.extend(fds)

    def _descriptors(self, count: int) -> list[int]:
        if len(self._fds) < count:
            raise OSError("descriptors of a message did not arrive: too many open files")
        return [self._fds.popleft() for _ in range(count)]

    def send(self, message: Sequence[Any], fds: Sequence[int] = ()) -> None:
        """Sends a message behind those that are held, waiting until there is room.

        Raises Closed when the daemon is gone.
        """
        body = self._pack(message)
        data = _HEAD.pack(len(body), len(fds)) + body
        with self._lock:
            if not fds:
                self._send_all(data)
                return
            if self._held:
                self._send_all(b"")
            # descriptors travel with the first byte of their message
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            try:
                sent = self._socket.sendmsg([data], rights)
            except ConnectionError:
                raise Closed from None
            self._send_all(memoryview(data)[sent:])

    def hold(self, message: Sequence[Any]) -> int:
        """Keeps a message until the next is sent. Returns how many are held."""
        body = self._pack(message)
        with self._lock:
            self._held += _HEAD.pack(len(body), 0), body
            return len(self._held) // 2

    def hand_over(self) -> None:
        """Sends what is held."""
        with self._lock:
            self._send_all(b"")

    def _send_all(self, data: bytes | memoryview) -> None:
        if self._held:
            data = b"".join([*self._held, data])
            self._held.clear()
        try:
            self._sendall(data)
        except ConnectionError:
            raise Closed from None


def unpack(data: Any) -> Any:
    return msgpack.unpackb(data, use_list=False, strict_map_key=False)


def _encode_default(obj: Any) -> Any:
    if isinstance(obj, (memoryview, bytearray)):
        return bytes(obj)
    raise TypeError(f"cannot send {type(obj)}")


def _header(frames: int, header: dict[str, Any]) -> bytes:
    header["num-sub-frames"] = frames
    return msgpack.dumps(header, default=msgpack_encode_default, use_bin_type=True)


def _split(header: dict[str, Any], frames: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    """What `serialize_and_split` does after `serialize`, without its metering."""
    compression = header.get("compression") or (None,) * len(frames)
    counts, offsets, parts, compressed = [], [], [], []
    for frame, name in zip(frames, compression, strict=True):
        pieces = [frame] if name else frame_split_size(frame)
        offsets.append(len(parts))
        counts.append(len(pieces))
        parts.extend(pieces)
        compressed.extend([name] * len(pieces))
    header["split-num-sub-frames"] = tuple(counts)
    header["split-offsets"] = tuple(offsets)
    header["compression"] = tuple(compressed)
    return header, parts


def describe(value: object) -> tuple[int, bytes, str]:
    """Size, type and type's name of a value, as the scheduler is told."""
    return max(0, int(safe_sizeof(value))), *describe_type(type(value))


def describe_type(kind: type) -> tuple[bytes, str]:
    """A type as `task-finished` has it: pickled, or its name pickled where it cannot be, and its name."""
    name = clean(typename(kind))
    try:
        return dask_pickle.dumps(kind), name
    except Exception:
        return dask_pickle.dumps(name), name


def clean(text: str) -> str:
    """Text that can be encoded: what users write may hold lone surrogates."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


_PLAIN = frozenset({type(None), bool, int, float, complex, str})
_PLAIN_HEADER = _header(1, _split(*serialize(0))[0])


def dump(value: Any) -> tuple[bytes, list[Frame]]:
    """Header and frames of a result, as `to_serialize(value)` gives them on the wire.

    A value that cannot be serialized becomes an object that raises when it is opened, as with Dask.
    """
    if type(value) in _PLAIN:
        return _PLAIN_HEADER, [pickle.dumps(value, protocol=5)]
    header, frames = serialize(value)
    if header.get("serializer") == "error":
        # say what to_serialize says, which names the item of a collection
        header, frames = serialize(Serialize(value))
    if len(frames) > FRAMES_MAX:
        header, frames = serialize(value, serializers=("pickle",), iterate_collection=False)
    header, parts = _split(header, frames)
    return _header(len(parts), header), parts


class Room:
    """Memory in which results are left that are too large for a message and too small for a memfd."""

    def __init__(self, memory: memoryview, taken: memoryview) -> None:
        self._memory = memory
        self._taken = taken
        self._left = 0
        self._end = 0

    def leave(self, frames: list[Frame], sizes: list[int]) -> list[Any] | None:
        """The frames as they go into a message, as bytes or (offset, length); None when there is no room."""
        if self._taken[0] == self._left:
            # all has been taken that was left here
            self._end = 0
        end = self._end
        if end + sum(sizes) + ALIGNMENT * len(sizes) > ROOM:
            return None
        placed: list[Any] = []
        for frame, size in zip(frames, sizes, strict=True):
            if size < SHARED_FRAME_MIN:
                placed.append(frame if type(frame) is bytes else bytes(frame))
                continue
            self._memory[end : end + size] = memoryview(frame).cast("B")
            placed.append((end, size))
            end += size + -size % ALIGNMENT
        self._end = end
        self._left += 1
        return placed


def share(header: bytes, frames: list[Frame], room: Room | None = None) -> tuple[Object, int | None]:
    """Puts the large frames of an object into the room, or into sealed memory.

    Returns the object as it goes into a message, with frames of the form bytes, (offset, length) or
    (descriptor's index, offset, length), and the descriptor, if there is one; the caller closes it.
    """
    sizes = [len(f) if type(f) is bytes else memoryview(f).nbytes for f in frames]
    minimum = SHARED_FRAME_MIN
    if sum(size for size in sizes if size < minimum) > INLINE_MAX:
        minimum = 0
    elif max(sizes, default=0) < minimum:
        return (SERIALIZED, header, [f if type(f) is bytes else bytes(f) for f in frames]), None
    elif room is not None and sum(sizes) < MEMFD_MIN:
        left = room.leave(frames, sizes)
        if left is not None:
            return (SERIALIZED, header, left), None
    fd = _memfd()
    try:
        end = 0
        placed: list[Any] = []
        for frame, size in zip(frames, sizes, strict=True):
            if size < minimum:
                placed.append(bytes(frame))
                continue
            placed.append((0, end, size))
            _write(fd, frame, end)
            end += size + -size % ALIGNMENT
        os.ftruncate(fd, end)
        _seal(fd)
    except BaseException:
        os.close(fd)
        raise
    return (SERIALIZED, header, placed), fd


def _memfd() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("iqoqo-object", flags | _NOEXEC_SEAL)
    except OSError:
        return os.memfd_create("iqoqo-object", flags)


def _seal(fd: int) -> None:
    """Makes contents and size final.

    That fails while the kernel holds on to one of the pages, as when it moves them; it does not wait for that
    for long.
    """
    for _ in range(_SEAL_ATTEMPTS):
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _FINAL_SEALS)
            return
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _FINAL_SEALS)


def _write(fd: int, frame: Frame, offset: int) -> None:
    view = memoryview(frame).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done : done + _WRITE_MAX], offset + done)


class Descriptors:
    """The descriptors of one message, mapped when first needed and closed together."""

    def __init__(self, fds: list[int]) -> None:
        self._fds = fds
        self._views: dict[int, memoryview] = {}

    def __enter__(self) -> Descriptors:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        self._views = {}

    def path(self, index: int) -> Path:
        """Where a file can be opened while this is."""
        return Path(f"/proc/self/fd/{self._fds[index]}")

    def view(self, index: int, offset: int, length: int, packed: int = 0) -> Any:
        """A private, writable buffer: what is written to it is seen by nobody else.

        Where other objects lie in the same memory, it is not mapped as a whole, which would keep all of it.
        """
        if packed:
            return self._part(self._fds[index], offset, length)
        view = self._views.get(index)
        if view is None:
            size = os.fstat(self._fds[index]).st_size
            mapping = mmap.mmap(
                self._fds[index], size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )
            view = self._views[index] = memoryview(mapping)
        return view[offset : offset + length]

    @staticmethod
    def _part(fd: int, offset: int, length: int) -> Any:
        if length < MAP_MIN:
            buffer = bytearray(length)
            if os.preadv(fd, [buffer], offset) != length:
                raise OSError("a frame in shared memory is cut off")
            return buffer
        skip = offset % mmap.ALLOCATIONGRANULARITY
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        mapping = mmap.mmap(fd, skip + length, flags=mmap.MAP_PRIVATE, prot=protection, offset=offset - skip)
        return memoryview(mapping)[skip:]


def load(kind: int, header: bytes, frames: Sequence[Any], descriptors: Descriptors) -> Any:
    """Opens an object. Raises whatever its deserializer raises."""
    if header == _PLAIN_HEADER and type(frames[0]) is bytes:
        return pickle.loads(frames[0])
    opened = [f if type(f) is bytes else descriptors.view(*f) for f in frames]
    decoded = msgpack.loads(header, object_hook=msgpack_decode_default, use_list=False, **msgpack_opts)
    if any(decoded.get("compression") or ()):
        opened = decompress(decoded, opened)
    if kind == PICKLED:
        return pickle.loads(decoded["pickled-obj"], buffers=opened)
    return merge_and_deserialize(decoded, opened)
