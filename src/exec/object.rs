//! Objects as children send them, made into objects of the store.
//!
//! A child is not trusted: descriptors must be sealed, regions must lie in them.

use std::os::fd::OwnedFd;

use bytes::Bytes;

use super::ipc::{Error, RawFrame, RawObject};
use crate::proto::{Payload, PayloadKind};
use crate::store::{Frame, Object, Segment, is_worth_sharing};
use crate::sys::Memfd;

/// The descriptors of one message, each mapped once.
#[derive(Debug)]
pub(super) struct Segments(Vec<(Option<Memfd>, Bytes)>);

impl Segments {
    /// Takes and maps the descriptors that came with a message. Where each mapping counts, small ones are copied.
    pub(super) fn map(fds: Vec<OwnedFd>) -> Result<Self, Error> {
        let map = |fd| {
            let memfd = Memfd::from_untrusted(fd)?;
            let mapping = memfd.map(0, memfd.len())?;
            Ok(if is_worth_sharing(mapping.as_ref().len()) {
                (Some(memfd), Bytes::from_owner(mapping))
            } else {
                (None, Bytes::copy_from_slice(mapping.as_ref()))
            })
        };
        fds.into_iter().map(map).collect::<Result<_, Error>>().map(Segments)
    }

    fn frame(&self, raw: RawFrame) -> Result<Frame, Error> {
        let (index, offset, len) = match raw {
            RawFrame::Inline(bytes) => return Ok(Frame::heap(bytes)),
            RawFrame::Shared { index, offset, len } => (index, offset, len),
        };
        let (memfd, bytes) = self.0.get(index).ok_or(Error::NoDescriptor { index })?;
        let size = bytes.len() as u64;
        let outside = crate::sys::Error::OutOfRange { offset, len, size };
        let end = offset.checked_add(len).filter(|end| *end <= size).ok_or(outside)?;
        // both fit: they are no larger than a length in memory
        let bytes = bytes.slice(offset as usize..end as usize);
        Ok(match memfd {
            Some(memfd) => Frame::shared(bytes, Segment::new(memfd.fd().clone(), offset)),
            None => Frame::heap(bytes),
        })
    }

    /// Frames that leave for the network.
    pub(super) fn frames(&self, raw: Vec<RawFrame>) -> Result<Vec<Bytes>, Error> {
        raw.into_iter().map(|frame| Ok(self.frame(frame)?.bytes().clone())).collect()
    }

    /// A result.
    pub(super) fn object(&self, raw: RawObject, nbytes: u64) -> Result<Object, Error> {
        let frames = raw.frames.into_iter().map(|f| self.frame(f)).collect::<Result<_, _>>()?;
        Ok(Object::new(PayloadKind::Serialized, raw.header, frames, nbytes))
    }

    /// An exception or a traceback.
    pub(super) fn payload(&self, raw: RawObject) -> Result<Payload, Error> {
        Ok(Payload { kind: PayloadKind::Serialized, header: raw.header, frames: self.frames(raw.frames)? })
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

    fn segments() -> Segments {
        let mut memory = MemfdMut::create("test", 100).unwrap();
        memory.as_mut()[50..52].copy_from_slice(b"xy");
        let memory = memory.seal().unwrap();
        Segments::map(vec![memory.fd().try_clone().unwrap()]).unwrap()
    }

    #[test]
    fn regions_become_frames() {
        let object = segments().object(shared(0, 50, 2), 7).unwrap();
        assert_eq!((object.nbytes(), object.shared_bytes()), (7, 2));
        assert_eq!(&object.frames()[1].bytes()[..], b"xy");
        assert_eq!(object.frames()[1].segment().unwrap().offset(), 50);
    }

    #[test]
    fn lies_are_refused() {
        for (index, offset, len) in [(1, 0, 1), (0, 99, 2), (0, u64::MAX, 2), (0, 0, u64::MAX)] {
            assert!(segments().object(shared(index, offset, len), 0).is_err());
        }
        let open = std::fs::File::open("/dev/null").unwrap();
        assert!(Segments::map(vec![open.into()]).is_err());
    }
}
