//! The machine's results by key, with exact accounting.
//!
//! Shared between the driver, which alone inserts and removes, and the data server, which reads. Knows no task
//! states: what must be kept is the state machine's decision.

mod object;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustc_hash::FxHashMap;

use crate::proto::Key;
use crate::sys;

pub use object::{Frame, Object, Segment};

/// Frames from this size on, in bytes, live in shared memory; smaller ones on the daemon's heap.
///
/// Below it a message costs less than a descriptor and two mappings.
pub const SHARED_FRAME_MIN: usize = 64 * 1024;

/// Objects of fewer bytes than this stay on the heap where the process has no mappings or descriptors to waste.
const CROWDED_MIN: usize = 1024 * 1024;

/// Whether an object with `total` bytes in large frames should take a memfd of its own.
pub fn is_worth_sharing(total: usize) -> bool {
    total >= CROWDED_MIN || (total > 0 && !sys::memory_is_crowded())
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
    /// On the daemon's heap.
    pub heap: u64,
}

/// All results this worker holds. Cloning gives another handle to the same store.
#[derive(Clone, Debug, Default)]
pub struct Store(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    objects: FxHashMap<Key, Object>,
    usage: Usage,
}

impl Store {
    /// An empty store.
    pub fn new() -> Self {
        Store::default()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // No code path panics while it holds the lock; were there one, the map would still be whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.lock().usage
    }

    /// Lets go of everything.
    pub fn clear(&self) {
        *self.lock() = Inner::default();
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
        assert_eq!(store.usage(), Usage { count: 2, nbytes: 15, shared: 0, heap: 17 });

        store.insert("a".into(), object(1));
        assert_eq!(store.usage(), Usage { count: 2, nbytes: 6, shared: 0, heap: 8 });

        assert!(store.remove(&"a".into()).is_some());
        assert!(store.remove(&"a".into()).is_none());
        assert_eq!(store.usage(), Usage { count: 1, nbytes: 5, shared: 0, heap: 6 });

        store.clear();
        assert_eq!(store.usage(), Usage::default());
    }

    #[test]
    fn large_frames_are_shared_and_keep_their_place() {
        let sizes = [3, SHARED_FRAME_MIN, 0, SHARED_FRAME_MIN + 1];
        let frames: Vec<Bytes> =
            sizes.iter().enumerate().map(|(i, n)| Bytes::from(vec![i as u8 + 1; *n])).collect();
        let payload = Payload { kind: PayloadKind::Serialized, header: Bytes::new(), frames };
        let object = Object::from_payload(payload.clone(), 7).unwrap();

        assert_eq!(object.to_payload(), payload);
        let shared: Vec<bool> = object.frames().iter().map(|f| f.segment().is_some()).collect();
        assert_eq!(shared, [false, true, false, true]);
        assert_eq!(object.shared_bytes(), 2 * SHARED_FRAME_MIN as u64 + 1);
        assert_eq!(object.heap_bytes(), 3);
        assert_eq!(object.frames()[3].segment().unwrap().offset(), SHARED_FRAME_MIN as u64);
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
