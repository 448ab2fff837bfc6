//! Where objects of middling size lie together: a few large segments instead of a memfd for each object.
//!
//! A segment is filled from its beginning to its end and never written twice, so runners may map what lies in it without
//! anybody keeping track of them. Its memory goes back to the system when the last object in it is gone; what keeps a
//! segment alive that is mostly empty is moved to another one ([`super::Store::tidy`]).

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use super::object::{ALIGNMENT, Frame, Segment};
use crate::sys::{self, Appended, Appender};

/// Bytes in a segment. 200,000 objects of 70 KiB take 430 of them.
const SEGMENT: usize = 32 * 1024 * 1024;

/// Largest frame that is placed here, in bytes.
pub(super) const FRAME_MAX: usize = SEGMENT / 2;

/// Waste that is not worth any work, in bytes.
const WASTE_MIN: u64 = 2 * SEGMENT as u64;

/// Segments that are filled one after another. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Arena(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    open: Mutex<Option<Open>>,
    totals: Arc<Totals>,
}

/// Bytes of all segments together.
#[derive(Debug, Default)]
struct Totals {
    used: AtomicU64,
    live: AtomicU64,
}

/// The segment being filled.
#[derive(Debug)]
struct Open {
    memory: Appender,
    tally: Arc<Tally>,
}

/// How much of a segment was filled, and how much of that is still somebody's.
#[derive(Debug)]
pub(super) struct Tally {
    used: AtomicU64,
    live: AtomicU64,
    full: AtomicU64,
    totals: Arc<Totals>,
}

impl Tally {
    /// Whether the segment is full, and more than a quarter of it nobody's.
    pub(super) fn is_sparse(&self) -> bool {
        self.full.load(Relaxed) != 0 && self.live.load(Relaxed) * 4 < self.used.load(Relaxed) * 3
    }
}

impl Drop for Tally {
    fn drop(&mut self) {
        self.totals.used.fetch_sub(self.used.load(Relaxed), Relaxed);
    }
}

/// A region of a segment, and its share in the tally.
struct Region {
    bytes: Appended,
    tally: Arc<Tally>,
}

impl AsRef<[u8]> for Region {
    fn as_ref(&self) -> &[u8] {
        self.bytes.as_ref()
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let len = self.bytes.as_ref().len() as u64;
        self.tally.live.fetch_sub(len, Relaxed);
        self.tally.totals.live.fetch_sub(len, Relaxed);
    }
}

impl Arena {
    /// An arena without a segment.
    pub fn new() -> Self {
        Arena::default()
    }

    fn open(&self) -> MutexGuard<'_, Option<Open>> {
        // a `fill` that panicked has lost its region and nothing else
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Places a frame of `len` bytes, which `fill` writes.
    ///
    /// # Errors
    /// Those of `fill`; that there is no memory or no descriptor; [`sys::Error::OutOfRange`] for a frame of more than
    /// half a segment.
    pub fn place(
        &self,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), sys::Error>,
    ) -> Result<Frame, sys::Error> {
        if len > FRAME_MAX {
            return Err(sys::Error::OutOfRange { offset: 0, len: len as u64, size: FRAME_MAX as u64 });
        }
        let mut place = self.open();
        if place.as_ref().is_some_and(|open| open.memory.room() < len) {
            place.take().inspect(|full| full.tally.full.store(1, Relaxed));
        }
        let open = match &mut *place {
            Some(open) => open,
            none => none.insert(Open::new(&self.0.totals)?),
        };
        let before = open.memory.end();
        let written = open.memory.append(len, fill);
        open.memory.align(ALIGNMENT);
        let used = (open.memory.end() - before) as u64;
        open.tally.used.fetch_add(used, Relaxed);
        self.0.totals.used.fetch_add(used, Relaxed);
        let bytes = written?;
        open.tally.live.fetch_add(len as u64, Relaxed);
        self.0.totals.live.fetch_add(len as u64, Relaxed);
        let tally = open.tally.clone();
        let segment = Segment::packed(bytes.fd().clone(), bytes.offset() as u64, tally.clone());
        Ok(Frame::shared(Bytes::from_owner(Region { bytes, tally }), segment))
    }

    /// Places a copy of `bytes`.
    ///
    /// # Errors
    /// As [`Arena::place`].
    pub fn copy(&self, bytes: &[u8]) -> Result<Frame, sys::Error> {
        self.place(bytes.len(), |place| {
            place.copy_from_slice(bytes);
            Ok(())
        })
    }

    /// Bytes of memory in all segments that are nobody's any more.
    pub fn waste(&self) -> u64 {
        let Totals { used, live } = &*self.0.totals;
        used.load(Relaxed).saturating_sub(live.load(Relaxed))
    }

    /// Whether moving what is in sparse segments would give much memory back.
    pub(super) fn is_wasteful(&self) -> bool {
        self.waste() > WASTE_MIN.max(self.0.totals.live.load(Relaxed) / 3)
    }

    /// Lets go of the segment being filled if nothing in it is anybody's.
    pub(super) fn release_empty(&self) {
        let mut place = self.open();
        if place.as_ref().is_some_and(|open| open.tally.live.load(Relaxed) == 0) {
            *place = None;
        }
    }
}

impl Open {
    fn new(totals: &Arc<Totals>) -> Result<Self, sys::Error> {
        let memory = Appender::create("iqoqo-objects", SEGMENT)?;
        let [used, live, full] = Default::default();
        Ok(Open { memory, tally: Arc::new(Tally { used, live, full, totals: totals.clone() }) })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_lives_as_long_as_something_in_it() {
        let arena = Arena::new();
        let third = 10 * 1024 * 1024;
        let mut frames: Vec<Frame> = (0..4u8).map(|i| arena.copy(&vec![i; third]).unwrap()).collect();
        assert!(frames[0].segment().unwrap().same_fd(frames[2].segment().unwrap()));
        assert!(!frames[0].segment().unwrap().same_fd(frames[3].segment().unwrap()));
        assert_eq!(arena.waste(), 0);

        let kept = frames[1].bytes().clone();
        frames.truncate(1);
        // what `kept` refers to counts, what nobody refers to does not
        assert_eq!(arena.waste(), 2 * third as u64);
        drop(kept);
        assert!(frames[0].segment().unwrap().is_sparse());
        assert_eq!(arena.waste(), 3 * third as u64);
        assert!(!arena.is_wasteful());
        frames.clear();
        assert_eq!(arena.waste(), third as u64);
        arena.release_empty();
        assert_eq!(arena.waste(), 0);
    }

    #[test]
    fn a_frame_that_could_not_be_filled_is_waste() {
        let arena = Arena::new();
        let failed = arena.place(100, |_| Err(sys::Error::NotSealed));
        assert!(failed.is_err());
        assert_eq!(arena.waste(), 128);
        assert_eq!(&arena.copy(b"abc").unwrap().bytes()[..], b"abc");
    }

    #[test]
    fn what_is_too_large_is_refused() {
        assert!(Arena::new().place(FRAME_MAX + 1, |_| Ok(())).is_err());
    }
}
