//! The machine's results by key, with exact accounting.
//!
//! Shared between the driver, which alone inserts and removes, and the data server, which reads. Knows no task
//! states: what must be kept is the state machine's decision.

mod arena;
mod object;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustc_hash::FxHashMap;

use crate::proto::Key;
use crate::sys;

pub use arena::Arena;
pub use object::{Frame, Object, Segment};

/// Frames from this size on, in bytes, live in shared memory; smaller ones on the daemon's heap.
///
/// Below it a message costs less than a descriptor and a region of shared memory.
pub const SHARED_FRAME_MIN: usize = 64 * 1024;

/// Objects from this size on, in bytes, have a memfd of their own; what is smaller lies in the arena with others.
///
/// Below it the calls for a memfd and its mappings cost more than a copy.
const MEMFD_MIN: usize = 256 * 1024;

/// The same where the process has no mappings or descriptors to waste.
const CROWDED_MEMFD_MIN: usize = 16 * 1024 * 1024;

/// Bytes that [`Store::tidy`] moves in one go, about: it holds its caller up.
const MOVED_MAX: u64 = 64 * 1024 * 1024;

/// Whether `bytes` in large frames should take a memfd of their own.
pub fn is_worth_memfd(bytes: usize) -> bool {
    bytes >= CROWDED_MEMFD_MIN || (bytes >= MEMFD_MIN && !sys::memory_is_crowded())
}

/// Why an object could not be held.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No shared memory, or no descriptor for it.
    #[error("could not place {bytes} bytes in shared memory")]
    Share {
        /// Asked for.
        bytes: u64,
        /// What the system said.
        #[source]
        source: crate::sys::Error,
    },
}

/// What the store holds, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Objects held.
    pub count: usize,
    /// Sum of Dask's `sizeof` of them.
    pub nbytes: u64,
    /// In shared memory.
    pub shared: u64,
    /// In shared memory and nobody's any more: held by what lies beside it.
    pub waste: u64,
    /// On the daemon's heap.
    pub heap: u64,
}

/// All results this worker holds. Cloning gives another handle to the same store.
#[derive(Clone, Debug, Default)]
pub struct Store {
    inner: Arc<Mutex<Inner>>,
    arena: Arena,
}

#[derive(Debug, Default)]
struct Inner {
    objects: FxHashMap<Key, Object>,
    usage: Usage,
    /// Waste that the last tidying left, in bytes.
    left: u64,
}

impl Store {
    /// An empty store.
    pub fn new() -> Self {
        Store::default()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // No code path panics while it holds the lock; were there one, the map would still be whole.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where objects to be held are placed.
    pub fn arena(&self) -> &Arena {
        &self.arena
    }

    /// Holds `object` under `key`, in place of what was there.
    pub fn insert(&self, key: Key, object: Object) {
        let mut inner = self.lock();
        inner.usage.add(&object);
        if let Some(old) = inner.objects.insert(key, object) {
            inner.usage.subtract(&old);
        }
    }

    /// The object under `key`.
    pub fn get(&self, key: &Key) -> Option<Object> {
        self.lock().objects.get(key).cloned()
    }

    /// Lets go of `key`. Its memory is free when the last reader is done.
    pub fn remove(&self, key: &Key) -> Option<Object> {
        let mut inner = self.lock();
        let old = inner.objects.remove(key)?;
        inner.usage.subtract(&old);
        Some(old)
    }

    /// Whether `key` is held.
    pub fn contains(&self, key: &Key) -> bool {
        self.lock().objects.contains_key(key)
    }

    /// All keys held, in no order.
    pub fn keys(&self) -> Vec<Key> {
        self.lock().objects.keys().cloned().collect()
    }

    /// What is held now.
    pub fn usage(&self) -> Usage {
        Usage { waste: self.arena.waste(), ..self.lock().usage }
    }

    /// Lets go of everything.
    pub fn clear(&self) {
        *self.lock() = Inner::default();
    }

    /// Gives memory back that is held by a few objects in segments that were full once: moves those. Does nothing where
    /// that would not give much, and only a part of it at a time.
    ///
    /// # Errors
    /// When there is no memory to move them to.
    pub fn tidy(&self) -> Result<(), Error> {
        self.arena.release_empty();
        let mut inner = self.lock();
        // what jobs hold cannot be moved: that is not looked for again until something changes
        if !self.arena.is_wasteful() || self.arena.waste() == inner.left {
            return Ok(());
        }
        let mut bytes = 0;
        for object in inner.objects.values_mut() {
            if bytes >= MOVED_MAX {
                inner.left = 0;
                return Ok(());
            }
            let moved = object.moved(&self.arena);
            let share = |source| Error::Share { bytes: object.shared_bytes(), source };
            if let Some(moved) = moved.map_err(share)? {
                bytes += moved.shared_bytes();
                *object = moved;
            }
        }
        inner.left = self.arena.waste();
        Ok(())
    }
}

impl Usage {
    fn add(&mut self, object: &Object) {
        self.count += 1;
        self.nbytes += object.nbytes();
        self.shared += object.shared_bytes();
        self.heap += object.heap_bytes();
    }

    fn subtract(&mut self, object: &Object) {
        self.count -= 1;
        self.nbytes -= object.nbytes();
        self.shared -= object.shared_bytes();
        self.heap -= object.heap_bytes();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::proto::{Payload, PayloadKind};

    fn object(nbytes: u64) -> Object {
        let frame = Frame::heap(Bytes::from(vec![0; nbytes as usize]));
        Object::new(PayloadKind::Serialized, Bytes::from_static(b"h"), vec![frame], nbytes)
    }

    #[test]
    fn usage_follows_every_change() {
        let store = Store::new();
        store.insert("a".into(), object(10));
        store.insert("b".into(), object(5));
        assert_eq!(store.usage(), Usage { count: 2, nbytes: 15, heap: 17, ..Usage::default() });

        store.insert("a".into(), object(1));
        assert_eq!(store.usage(), Usage { count: 2, nbytes: 6, heap: 8, ..Usage::default() });

        assert!(store.remove(&"a".into()).is_some());
        assert!(store.remove(&"a".into()).is_none());
        assert_eq!(store.usage(), Usage { count: 1, nbytes: 5, heap: 6, ..Usage::default() });

        store.clear();
        assert_eq!(store.usage(), Usage::default());
    }

    fn payload(sizes: &[usize]) -> Payload {
        let frames = sizes.iter().enumerate().map(|(i, n)| Bytes::from(vec![i as u8 + 1; *n])).collect();
        Payload { kind: PayloadKind::Serialized, header: Bytes::new(), frames }
    }

    #[test]
    fn large_frames_are_shared_and_keep_their_place() {
        for (large, offset) in
            [(SHARED_FRAME_MIN, 2 * SHARED_FRAME_MIN as u64), (MEMFD_MIN, MEMFD_MIN as u64)]
        {
            let arena = Arena::new();
            let payload = payload(&[3, large, 0, large + 1]);
            Object::from_payload(payload.clone(), 7, &arena).unwrap();
            let object = Object::from_payload(payload.clone(), 7, &arena).unwrap();

            assert_eq!(object.to_payload(), payload);
            let shared: Vec<bool> = object.frames().iter().map(|f| f.segment().is_some()).collect();
            assert_eq!(shared, [false, true, false, true]);
            assert_eq!(object.shared_bytes(), 2 * large as u64 + 1);
            assert_eq!(object.heap_bytes(), 3);
            let segments: Vec<&Segment> = object.frames().iter().filter_map(Frame::segment).collect();
            assert!(segments[0].same_fd(segments[1]));
            assert_eq!(segments[0].is_packed(), large < MEMFD_MIN);
            assert_eq!(segments[1].offset() - segments[0].offset(), large as u64);
            assert!(segments[1].offset() >= offset);
        }
    }

    fn descriptors() -> usize {
        std::fs::read_dir("/proc/self/fd").unwrap().count()
    }

    #[test]
    fn many_objects_take_few_descriptors() {
        hold_many(2_000);
    }

    #[test]
    #[ignore = "takes 14 GiB of memory"]
    fn two_hundred_thousand_objects_take_few_descriptors() {
        hold_many(200_000);
    }

    /// Holds `count` objects of 70 KiB, then every eighth of them, then none.
    fn hold_many(count: usize) {
        const SIZE: usize = 70 * 1024;
        let (store, before) = (Store::new(), descriptors());
        let key = |i: usize| Key::from(format!("x-{i}"));
        for i in 0..count {
            let mut payload = payload(&[SIZE]);
            payload.frames[0] = Bytes::from(vec![i as u8; SIZE]);
            store.insert(key(i), Object::from_payload(payload, SIZE as u64, store.arena()).unwrap());
        }
        let expected = (count * SIZE) as u64;
        assert_eq!((store.usage().nbytes, store.usage().shared), (expected, expected));
        // other tests run beside this one
        let allowed = 100 + count * SIZE / (30 << 20);
        assert!(descriptors() < before + allowed, "{} descriptors", descriptors() - before);

        (0..count).filter(|i| i % 8 > 0).for_each(|i| drop(store.remove(&key(i))));
        let waste = store.usage().waste;
        assert!(waste > expected / 2);
        for _ in 0..count {
            store.tidy().unwrap();
        }
        let (left, allowed) = (store.usage().waste, (100 << 20).max(expected / 8 / 3));
        assert!(left < waste && left <= allowed, "{left} bytes are nobody's");
        for i in (0..count).step_by(8) {
            let object = store.remove(&key(i)).unwrap();
            assert!(object.frames()[0].bytes().iter().all(|byte| *byte == i as u8));
        }
        store.tidy().unwrap();
        assert_eq!(store.usage(), Usage::default());
    }

    #[test]
    fn a_reader_keeps_what_was_removed() {
        let store = Store::new();
        store.insert("a".into(), object(3));
        let held = store.get(&"a".into());
        store.remove(&"a".into());
        assert_eq!(held.map(|o| o.frames()[0].bytes().len()), Some(3));
    }
}
