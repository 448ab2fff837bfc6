//! Objects as children send them, made into objects of the store.
//!
//! A child is not trusted: descriptors must be sealed, regions must lie in them.

use std::os::fd::OwnedFd;

use bytes::Bytes;

use super::ipc::{Error, RawFrame, RawObject};
use super::mailbox::Mailbox;
use crate::proto::{Payload, PayloadKind};
use crate::store::{Arena, Frame, Object, SHARED_FRAME_MIN, Segment, is_worth_memfd};
use crate::sys::{self, Memfd};

/// The descriptors of one message, each mapped once.
#[derive(Debug)]
pub(super) struct Segments(Vec<(Option<Memfd>, Bytes)>);

/// Where the parts of a result are that is to be held.
pub(super) struct Places<'a> {
    /// Descriptors that came along.
    pub(super) segments: &'a Segments,
    /// Where the runner leaves what needs no descriptor.
    pub(super) mailbox: Option<&'a Mailbox>,
    /// Where objects go that are not worth a memfd.
    pub(super) arena: &'a Arena,
}

impl Segments {
    /// Takes and maps the descriptors that came with a message. Small ones are copied.
    pub(super) fn map(fds: Vec<OwnedFd>) -> Result<Self, Error> {
        let map = |fd| {
            let memfd = Memfd::from_untrusted(fd)?;
            let mapping = memfd.map(0, memfd.len())?;
            Ok(if is_worth_memfd(mapping.as_ref().len()) {
                (Some(memfd), Bytes::from_owner(mapping))
            } else {
                (None, Bytes::copy_from_slice(mapping.as_ref()))
            })
        };
        fds.into_iter().map(map).collect::<Result<_, Error>>().map(Segments)
    }

    /// The memfd of a region, if it is one's own, and the bytes of the region.
    fn region(&self, index: usize, offset: u64, len: u64) -> Result<(Option<&Memfd>, Bytes), Error> {
        let (memfd, bytes) = self.0.get(index).ok_or(Error::NoDescriptor { index })?;
        let size = bytes.len() as u64;
        let outside = sys::Error::OutOfRange { offset, len, size };
        let end = offset.checked_add(len).filter(|end| *end <= size).ok_or(outside)?;
        // both fit: they are no larger than a length in memory
        Ok((memfd.as_ref(), bytes.slice(offset as usize..end as usize)))
    }

    fn bytes(&self, raw: RawFrame) -> Result<Bytes, Error> {
        match raw {
            RawFrame::Inline(bytes) => Ok(bytes),
            RawFrame::Shared { index, offset, len } => Ok(self.region(index, offset, len)?.1),
            RawFrame::Left { .. } => Err(Error::Form { tag: None }),
        }
    }

    /// Frames that leave for the network.
    pub(super) fn frames(&self, raw: Vec<RawFrame>) -> Result<Vec<Bytes>, Error> {
        raw.into_iter().map(|frame| self.bytes(frame)).collect()
    }

    /// An exception or a traceback.
    pub(super) fn payload(&self, raw: RawObject) -> Result<Payload, Error> {
        Ok(Payload { kind: PayloadKind::Serialized, header: raw.header, frames: self.frames(raw.frames)? })
    }
}

impl Places<'_> {
    /// A result to be held.
    pub(super) fn object(&self, raw: RawObject, nbytes: u64) -> Result<Object, Error> {
        let left = raw.frames.iter().any(|frame| matches!(frame, RawFrame::Left { .. }));
        let frames = raw.frames.into_iter().map(|f| self.frame(f)).collect::<Result<_, _>>()?;
        if let Some(mailbox) = self.mailbox.filter(|_| left) {
            mailbox.taken();
        }
        Ok(Object::new(PayloadKind::Serialized, raw.header, frames, nbytes))
    }

    fn frame(&self, raw: RawFrame) -> Result<Frame, Error> {
        match (raw, self.mailbox) {
            (RawFrame::Shared { index, offset, len }, _) => match self.segments.region(index, offset, len)? {
                (Some(memfd), bytes) => Ok(Frame::shared(bytes, Segment::new(memfd.fd().clone(), offset))),
                (None, bytes) if bytes.len() < SHARED_FRAME_MIN => Ok(Frame::heap(bytes)),
                (None, bytes) => Ok(self.arena.copy(&bytes)?),
            },
            (RawFrame::Left { offset, len }, Some(mailbox)) => {
                Ok(self.arena.place(len, |place| mailbox.copy(offset, place))?)
            }
            (raw, _) => Ok(Frame::heap(self.segments.bytes(raw)?)),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::sys::MemfdMut;

    fn shared(index: usize, offset: u64, len: u64) -> RawObject {
        let frames = vec![RawFrame::Inline("a".into()), RawFrame::Shared { index, offset, len }];
        RawObject { header: "h".into(), frames }
    }

    fn segments(len: u64) -> Segments {
        let mut memory = MemfdMut::create("test", len).unwrap();
        memory.as_mut()[64..66].copy_from_slice(b"xy");
        let memory = memory.seal().unwrap();
        Segments::map(vec![memory.fd().try_clone().unwrap()]).unwrap()
    }

    fn object(segments: &Segments, raw: RawObject) -> Result<Object, Error> {
        Places { segments, mailbox: None, arena: &Arena::new() }.object(raw, 7)
    }

    #[test]
    fn regions_become_frames() {
        let (small, large) = (100_000, 1_000_000);
        for (memfd, len, shared_bytes, is_packed) in
            [(small, 2, 0, None), (small, 70_000, 70_000, Some(true)), (large, 2, 2, Some(false))]
        {
            let object = object(&segments(memfd), shared(0, 64, len)).unwrap();
            assert_eq!((object.nbytes(), object.shared_bytes()), (7, shared_bytes));
            assert_eq!(&object.frames()[1].bytes()[..2], b"xy");
            assert_eq!(object.frames()[1].segment().map(Segment::is_packed), is_packed);
        }
    }

    #[test]
    fn lies_are_refused() {
        for (index, offset, len) in [(1, 0, 1), (0, 99, 2), (0, u64::MAX, 2), (0, 0, u64::MAX)] {
            assert!(object(&segments(100), shared(index, offset, len)).is_err());
        }
        let open = std::fs::File::open("/dev/null").unwrap();
        assert!(Segments::map(vec![open.into()]).is_err());
    }

    #[test]
    fn what_lies_in_the_mailbox_is_copied_within_bounds() {
        let (mailbox, segments, arena) = (Mailbox::create().unwrap(), segments(100), Arena::new());
        let take = |offset, len, mailbox| {
            let raw = RawObject { header: "h".into(), frames: vec![RawFrame::Left { offset, len }] };
            Places { segments: &segments, mailbox, arena: &arena }.object(raw, 7)
        };
        let object = take(5, 70_000, Some(&mailbox)).unwrap();
        assert_eq!((object.shared_bytes(), object.frames()[0].bytes().len()), (70_000, 70_000));
        for (offset, len) in [(1 << 20, 1), (u64::MAX, 1), (0, (1 << 20) + 1), (0, usize::MAX)] {
            assert!(take(offset, len, Some(&mailbox)).is_err());
        }
        assert!(take(0, 1, None).is_err());
    }
}
