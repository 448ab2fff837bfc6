//! One stored result, as Dask serialized it: a header and its frames, on the heap or in shared memory.
//!
//! Values only: nothing here opens a payload.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};

use bytes::Bytes;

use super::arena::{Arena, FRAME_MAX, Tally};
use super::{SHARED_FRAME_MIN, is_worth_memfd};
use crate::proto::{Payload, PayloadKind};
use crate::sys::{self, MemfdMut};

/// Where frames begin in a segment or file, in bytes: arrays on them are aligned then, whatever their items.
pub(super) const ALIGNMENT: usize = 64;

/// Where a shared frame lies: where nobody can change it, so that another process can map it.
#[derive(Clone, Debug)]
pub struct Segment {
    fd: Arc<OwnedFd>,
    offset: u64,
    place: Place,
}

/// What a segment is a part of.
#[derive(Clone, Debug)]
enum Place {
    /// A memfd of the object's own.
    Own,
    /// A segment of the arena's.
    Packed(Arc<Tally>),
    /// A spill file.
    File,
}

impl Segment {
    /// A region that begins `offset` bytes into an object's own, sealed memfd.
    pub fn new(fd: Arc<OwnedFd>, offset: u64) -> Self {
        Segment { fd, offset, place: Place::Own }
    }

    /// A region of an arena's segment.
    pub(super) fn packed(fd: Arc<OwnedFd>, offset: u64, tally: Arc<Tally>) -> Self {
        Segment { fd, offset, place: Place::Packed(tally) }
    }

    /// Whether other objects lie in the same memfd, so that it is not to be mapped as a whole.
    pub fn is_packed(&self) -> bool {
        matches!(self.place, Place::Packed(_))
    }

    /// Whether most of what once lay around it is gone.
    pub(super) fn is_sparse(&self) -> bool {
        matches!(&self.place, Place::Packed(tally) if tally.is_sparse())
    }

    /// Whether it lies in a file.
    fn is_on_disk(&self) -> bool {
        matches!(self.place, Place::File)
    }

    /// A region that begins `offset` bytes into a file whose contents are final.
    pub(super) fn of_file(fd: Arc<OwnedFd>, offset: u64) -> Self {
        Segment { fd, offset, place: Place::File }
    }

    /// The memfd or file; several frames may share one.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Bytes before this frame in it.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Whether both lie in the same memfd or file.
    pub fn same_fd(&self, other: &Segment) -> bool {
        Arc::ptr_eq(&self.fd, &other.fd)
    }
}

/// One frame of an object. Cloning is a reference count.
#[derive(Clone, Debug)]
pub struct Frame {
    bytes: Bytes,
    segment: Option<Segment>,
}

impl Frame {
    /// A frame on the daemon's heap.
    pub fn heap(bytes: Bytes) -> Self {
        Frame { bytes, segment: None }
    }

    /// A frame in shared memory or a file; `bytes` is the daemon's read-only mapping of it.
    pub fn shared(bytes: Bytes, segment: Segment) -> Self {
        Frame { bytes, segment: Some(segment) }
    }

    /// The contents, without a copy.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Where another process can map it, if it is shared.
    pub fn segment(&self) -> Option<&Segment> {
        self.segment.as_ref()
    }
}

/// A stored result. Cloning costs a reference count.
#[derive(Clone, Debug)]
pub struct Object(Arc<Inner>);

/// Finds an object that somebody still uses.
#[derive(Clone, Debug, Default)]
pub(super) struct WeakObject(Weak<Inner>);

impl WeakObject {
    /// The object, if anybody has it.
    pub(super) fn upgrade(&self) -> Option<Object> {
        self.0.upgrade().map(Object)
    }

    /// Whether anybody has it.
    pub(super) fn is_used(&self) -> bool {
        self.0.strong_count() > 0
    }

    /// Whether it is this one.
    pub(super) fn is(&self, object: &Object) -> bool {
        std::ptr::eq(self.0.as_ptr(), Arc::as_ptr(&object.0))
    }
}

#[derive(Debug)]
struct Inner {
    kind: PayloadKind,
    header: Bytes,
    frames: Vec<Frame>,
    nbytes: u64,
}

impl Object {
    /// An object of `nbytes` bytes by Dask's `sizeof`, which need not be what header and frames occupy.
    pub fn new(kind: PayloadKind, header: Bytes, frames: Vec<Frame>, nbytes: u64) -> Self {
        Object(Arc::new(Inner { kind, header, frames, nbytes }))
    }

    /// Takes what a peer or client sent. Frames of [`SHARED_FRAME_MIN`](super::SHARED_FRAME_MIN) bytes and more are
    /// moved to shared memory, so that runners read them there instead of being sent a copy: into `arena`, or into a
    /// memfd of the object's own where they are large.
    ///
    /// # Errors
    /// [`super::Error::Share`] when the system gives no shared memory or no descriptor for it.
    pub fn from_payload(payload: Payload, nbytes: u64, arena: &Arena) -> Result<Self, super::Error> {
        let Payload { kind, header, frames } = payload;
        let frames = frames.into_iter().map(|frame| (frame.len(), frame)).collect();
        Object::from_parts(kind, header, frames, nbytes, arena, Ok)
    }

    /// As [`Object::from_payload`], of frames that `open` gives when their turn comes, each of the length it stands with.
    ///
    /// # Errors
    /// Those of `open` besides.
    pub(super) fn from_parts<T>(
        kind: PayloadKind,
        header: Bytes,
        frames: Vec<(usize, T)>,
        nbytes: u64,
        arena: &Arena,
        open: impl FnMut(T) -> Result<Bytes, super::Error>,
    ) -> Result<Self, super::Error> {
        let large = frames.iter().map(|(len, _)| *len).filter(|len| *len >= SHARED_FRAME_MIN);
        let bytes: usize = large.clone().map(|n| n.next_multiple_of(ALIGNMENT)).sum();
        let packs = !is_worth_memfd(bytes) && large.max().is_none_or(|len| len <= FRAME_MAX);
        let frames =
            if packs { pack(frames, arena, open) } else { place_in_memfd(frames, bytes as u64, open) }?;
        Ok(Object::new(kind, header, frames, nbytes))
    }

    /// The same object in other segments, if one it lies in is mostly empty.
    ///
    /// # Errors
    /// When there is no memory for the copy.
    pub(super) fn moved(&self, arena: &Arena) -> Result<Option<Self>, sys::Error> {
        let is_sparse = |frame: &Frame| frame.segment().is_some_and(Segment::is_sparse);
        if !self.frames().iter().any(is_sparse) {
            return Ok(None);
        }
        let place = |frame: &Frame| match is_sparse(frame) {
            true => arena.copy(frame.bytes()),
            false => Ok(frame.clone()),
        };
        let frames = self.frames().iter().map(place).collect::<Result<_, _>>()?;
        Ok(Some(Object::new(self.kind(), self.header().clone(), frames, self.nbytes())))
    }

    /// Marker it travels under.
    pub fn kind(&self) -> PayloadKind {
        self.0.kind
    }

    /// The msgpack sub-header.
    pub fn header(&self) -> &Bytes {
        &self.0.header
    }

    /// The frames the header speaks of.
    pub fn frames(&self) -> &[Frame] {
        &self.0.frames
    }

    /// Size by Dask's `sizeof`, in bytes: what the scheduler is told.
    pub fn nbytes(&self) -> u64 {
        self.0.nbytes
    }

    /// The same object, of another size by Dask's `sizeof`: known only once Python has looked at it.
    pub fn with_nbytes(&self, nbytes: u64) -> Self {
        let Inner { kind, header, frames, .. } = &*self.0;
        Object::new(*kind, header.clone(), frames.clone(), nbytes)
    }

    /// Bytes in shared memory. What is mapped from a file takes none: the kernel drops and reads it as it likes.
    pub fn shared_bytes(&self) -> u64 {
        self.sum(|frame| frame.segment().is_some_and(|segment| !segment.is_on_disk()))
    }

    /// Whether frames of it are mapped from a file.
    pub(super) fn is_on_disk(&self) -> bool {
        self.0.frames.iter().any(|frame| frame.segment().is_some_and(|segment| segment.is_on_disk()))
    }

    /// Whether somebody has it besides the one who asks.
    pub(super) fn is_used_elsewhere(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    /// To find it again for as long as somebody uses it.
    pub(super) fn downgrade(&self) -> WeakObject {
        WeakObject(Arc::downgrade(&self.0))
    }

    /// Bytes on the daemon's heap, header included.
    pub fn heap_bytes(&self) -> u64 {
        self.0.header.len() as u64 + self.sum(|frame| frame.segment().is_none())
    }

    fn sum(&self, of: impl Fn(&Frame) -> bool) -> u64 {
        self.0.frames.iter().filter(|f| of(f)).map(|f| f.bytes.len() as u64).sum()
    }

    /// The object as it goes over the network.
    pub fn to_payload(&self) -> Payload {
        Payload {
            kind: self.0.kind,
            header: self.0.header.clone(),
            frames: self.0.frames.iter().map(|f| f.bytes.clone()).collect(),
        }
    }
}

/// Places the large ones of an object's frames in the arena.
fn pack<T>(
    frames: Vec<(usize, T)>,
    arena: &Arena,
    mut open: impl FnMut(T) -> Result<Bytes, super::Error>,
) -> Result<Vec<Frame>, super::Error> {
    let place = |(len, part)| {
        let frame = open(part)?;
        if len < SHARED_FRAME_MIN {
            return Ok(Frame::heap(frame));
        }
        arena.copy(&frame).map_err(|source| super::Error::Share { bytes: len as u64, source })
    };
    frames.into_iter().map(place).collect()
}

/// Places the large ones of an object's frames in a memfd of its own; they take `total` bytes in it. No more than one of
/// them is there twice.
fn place_in_memfd<T>(
    frames: Vec<(usize, T)>,
    total: u64,
    mut open: impl FnMut(T) -> Result<Bytes, super::Error>,
) -> Result<Vec<Frame>, super::Error> {
    let share = |source| super::Error::Share { bytes: total, source };
    let mut memory = MemfdMut::create("iqoqo-object", total).map_err(share)?;
    let mut end = 0;
    let mut placed = Vec::with_capacity(frames.len());
    for (len, part) in frames {
        let frame = open(part)?;
        if len < SHARED_FRAME_MIN {
            placed.push(Err(frame));
            continue;
        }
        memory.as_mut()[end..end + len].copy_from_slice(&frame);
        placed.push(Ok(end..end + len));
        end += len.next_multiple_of(ALIGNMENT);
    }
    let memory = memory.seal().map_err(share)?;
    let mapped = Bytes::from_owner(memory.map(0, total).map_err(share)?);
    let frame = |place| match place {
        Ok(Range { start, end }) => {
            let segment = Segment::new(memory.fd().clone(), start as u64);
            Frame::shared(mapped.slice(start..end), segment)
        }
        Err(small) => Frame::heap(small),
    };
    Ok(placed.into_iter().map(frame).collect())
}
