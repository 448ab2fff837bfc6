//! Results that are still only in the process that made them: handed out as they are there, published on demand.
//!
//! Most results are used by the process that made them and by no other, and publishing a large one, which is a copy into
//! fresh shared memory, costs more than what many tasks compute. Such a result is lost with its process.

use std::fmt::Debug;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use rustc_hash::FxHashMap;
use tokio::sync::Notify;

use super::Object;
use crate::proto::Key;

/// The process that results are in.
pub trait Home: Debug + Send + Sync {
    /// Has it publish the result it knows by `token`. What comes of it is told to the [`Live`].
    fn publish(&self, token: u64);

    /// Nobody wants that result any more.
    fn forget(&self, token: u64);
}

/// A result in the process that made it. The process lets go of it when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct Live(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    key: Key,
    nbytes: u64,
    place: Place,
    home: Arc<dyn Home>,
    asked: AtomicBool,
    /// The published object; none when the result was lost.
    outcome: OnceLock<Option<Object>>,
    changed: Notify,
}

/// Where a live result is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Number of the process.
    pub process: u64,
    /// Name of the result there.
    pub token: u64,
}

/// A [`Live`] that does not keep the result.
#[derive(Clone, Debug)]
pub struct WeakLive(Weak<Inner>);

impl WeakLive {
    /// The result, if somebody wants it still.
    pub fn upgrade(&self) -> Option<Live> {
        self.0.upgrade().map(Live)
    }
}

impl Live {
    /// The result of `key`, of `nbytes` bytes by `sizeof`.
    pub fn new(key: Key, nbytes: u64, place: Place, home: Arc<dyn Home>) -> Self {
        let (asked, outcome, changed) = Default::default();
        Live(Arc::new(Inner { key, nbytes, place, home, asked, outcome, changed }))
    }

    /// Whose result it is.
    pub fn key(&self) -> &Key {
        &self.0.key
    }

    /// Bytes by `sizeof`.
    pub fn nbytes(&self) -> u64 {
        self.0.nbytes
    }

    /// Where it is.
    pub fn place(&self) -> Place {
        self.0.place
    }

    /// Does not keep the result.
    pub fn downgrade(&self) -> WeakLive {
        WeakLive(Arc::downgrade(&self.0))
    }

    /// Whether both are the same result.
    pub fn is_same(&self, other: &Live) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// What was published; `None` when nothing was yet, or it is lost.
    pub fn object(&self) -> Option<&Object> {
        self.0.outcome.get()?.as_ref()
    }

    /// Whether it was lost with its process.
    pub fn is_lost(&self) -> bool {
        matches!(self.0.outcome.get(), Some(None))
    }

    /// Whether it is neither published nor lost.
    pub fn is_only_there(&self) -> bool {
        self.0.outcome.get().is_none()
    }

    /// Asks for it to be published, once.
    pub fn ask(&self) {
        if self.is_only_there() && !self.0.asked.swap(true, Relaxed) {
            self.0.home.publish(self.0.place.token);
        }
    }

    /// Has it published, and waits for that. `None` when it is lost.
    pub async fn published(&self) -> Option<Object> {
        self.ask();
        loop {
            let changed = self.0.changed.notified();
            if let Some(outcome) = self.0.outcome.get() {
                return outcome.clone();
            }
            changed.await;
        }
    }

    /// Tells what became of it: published, or lost. What is told first counts; true if it is this.
    pub fn settle(&self, outcome: Option<Object>) -> bool {
        let is_first = self.0.outcome.set(outcome).is_ok();
        self.0.changed.notify_waiters();
        is_first
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.home.forget(self.place.token);
    }
}

/// Live results by key.
#[derive(Debug, Default)]
pub(super) struct Lives {
    by_key: Mutex<FxHashMap<Key, Live>>,
    count: AtomicUsize,
    bytes: AtomicU64,
}

impl Lives {
    fn lock(&self) -> MutexGuard<'_, FxHashMap<Key, Live>> {
        // nothing panics while it holds the lock
        self.by_key.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what is held. What is let go of is dropped outside of the lock.
    fn change<T>(&self, change: impl FnOnce(&mut FxHashMap<Key, Live>) -> T) -> T {
        let mut by_key = self.lock();
        let changed = change(&mut by_key);
        self.count.store(by_key.len(), Relaxed);
        changed
    }

    /// Whether there is none: the usual case, for which nothing is locked.
    pub(super) fn is_empty(&self) -> bool {
        self.count.load(Relaxed) == 0
    }

    pub(super) fn insert(&self, live: Live) {
        self.bytes.fetch_add(live.nbytes(), Relaxed);
        let old = self.change(|by_key| by_key.insert(live.key().clone(), live));
        self.dropped(old.as_ref());
    }

    pub(super) fn get(&self, key: &Key) -> Option<Live> {
        if self.is_empty() { None } else { self.lock().get(key).cloned() }
    }

    pub(super) fn remove(&self, key: &Key) -> bool {
        let old = if self.is_empty() { None } else { self.change(|by_key| by_key.remove(key)) };
        self.dropped(old.as_ref());
        old.is_some()
    }

    /// Lets go of this one, if it is still what is under its key.
    pub(super) fn remove_same(&self, live: &Live) -> bool {
        let is_same = self.get(live.key()).is_some_and(|there| there.is_same(live));
        is_same && self.remove(live.key())
    }

    pub(super) fn clear(&self) {
        let all = self.change(std::mem::take);
        all.values().for_each(|live| self.dropped(Some(live)));
    }

    pub(super) fn keys(&self) -> Vec<Key> {
        self.lock().keys().cloned().collect()
    }

    /// Sum of their sizes by `sizeof`.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }

    fn dropped(&self, old: Option<&Live>) {
        self.bytes.fetch_sub(old.map_or(0, Live::nbytes), Relaxed);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(super) mod tests {
    use super::*;
    use crate::proto::PayloadKind;

    #[derive(Debug, Default)]
    pub(in crate::store) struct Process(pub(in crate::store) Mutex<Vec<String>>);

    impl Home for Process {
        fn publish(&self, token: u64) {
            self.0.lock().unwrap().push(format!("publish {token}"));
        }

        fn forget(&self, token: u64) {
            self.0.lock().unwrap().push(format!("forget {token}"));
        }
    }

    pub(in crate::store) fn live(home: &Arc<Process>, token: u64) -> Live {
        Live::new("x".into(), 70, Place { process: 1, token }, home.clone())
    }

    fn object() -> Object {
        Object::new(PayloadKind::Serialized, "h".into(), Vec::new(), 70)
    }

    #[tokio::test]
    async fn it_is_published_once_for_all_who_ask() {
        let home = Arc::new(Process::default());
        let live = live(&home, 5);
        let (one, two) = (live.clone(), live.clone());
        let waiting = [
            tokio::spawn(async move { one.published().await }),
            tokio::spawn(async move { two.published().await }),
        ];
        while home.0.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        assert!(live.is_only_there() && live.object().is_none());
        assert!(live.settle(Some(object())));
        assert!(!live.settle(None));
        for waiting in waiting {
            assert_eq!(waiting.await.unwrap().unwrap().nbytes(), 70);
        }
        assert!(live.object().is_some() && !live.is_lost());
        drop(live);
        assert_eq!(*home.0.lock().unwrap(), ["publish 5", "forget 5"]);
    }

    #[tokio::test]
    async fn what_is_lost_is_not_waited_for() {
        let live = live(&Arc::default(), 5);
        live.settle(None);
        assert!(live.is_lost() && !live.is_only_there());
        assert!(live.published().await.is_none());
    }
}
