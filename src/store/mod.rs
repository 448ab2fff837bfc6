//! The machine's results by key, in memory and on disk, with exact accounting.
//!
//! Shared between the driver, which alone inserts and removes, and the data server, which reads. Knows no task
//! states: what must be kept is the state machine's decision. What is spilled, and when, is this room's.

mod arena;
mod contents;
mod live;
mod object;
mod spill;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use tokio::sync::{Notify, Semaphore};
use tokio::task::spawn_blocking;

use crate::proto::Key;
use crate::{sys, telemetry};
use contents::{Contents, Found, Leaving, Step, Thresholds};
use live::Lives;
use spill::{Files, Garbage};

pub use arena::Arena;
pub use live::{Home, Live, Place, WeakLive};
pub use object::{Frame, Object, Segment};
pub use spill::Codec;

/// Frames from this size on, in bytes, live in shared memory; smaller ones on the daemon's heap.
///
/// Below it a message costs less than a descriptor and a region of shared memory.
pub const SHARED_FRAME_MIN: usize = 64 * 1024;

/// Objects from this size on, in bytes, have a memfd of their own; what is smaller lies in the arena with others.
///
/// Below it the calls for a memfd and its mappings cost more than a copy.
const MEMFD_MIN: usize = 256 * 1024;

/// Files read at once.
const READERS: u32 = 4;
/// Time between two lines of the same complaint in the log.
const COMPLAINTS: Duration = Duration::from_secs(10);
/// Where a stock worker logs what goes wrong with spilling.
const SPILL: &str = "distributed.spill";

/// The same where the process has no mappings or descriptors to waste.
const CROWDED_MEMFD_MIN: usize = 16 * 1024 * 1024;

/// Whether `bytes` in large frames should take a memfd of their own.
pub fn is_worth_memfd(bytes: usize) -> bool {
    bytes >= CROWDED_MEMFD_MIN || (bytes >= MEMFD_MIN && !sys::memory_is_crowded())
}

/// Why an object could not be held, spilled or read back.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No shared memory, or no descriptor for it.
    #[error("could not place {bytes} bytes in shared memory")]
    Share {
        /// Asked for.
        bytes: u64,
        /// What the system said.
        #[source]
        source: sys::Error,
    },
    /// Spill files take all they may.
    #[error("the spill files have reached their limit")]
    NoRoom,
    /// A spill file could not be written.
    #[error("could not write the spill file {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A spill file could not be read.
    #[error("could not read the spill file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A spill file is not as it was written.
    #[error("the spill file {} is damaged: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A spill file could not be mapped.
    #[error("could not map a spill file")]
    Map {
        /// What the system said.
        #[source]
        source: sys::Error,
    },
}

impl Error {
    /// Whether it is the file's fault, and no other try will help.
    fn is_loss(&self) -> bool {
        match self {
            Error::Damaged { .. } => true,
            Error::Read { source, .. } => {
                let code = source.raw_os_error().map(Errno::from_raw);
                !matches!(
                    code,
                    Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::EINTR | Errno::EAGAIN)
                )
            }
            _ => false,
        }
    }
}

/// Where results are spilled, and when. Sizes are those of Dask's `sizeof`.
#[derive(Clone, Debug)]
pub struct SpillConfig {
    /// Folder of the files; made when it is needed, removed by its owner.
    pub directory: PathBuf,
    /// Bytes of results in memory; what is beyond is spilled, oldest use first.
    pub target: u64,
    /// Bytes of results in memory that are more than spilling keeps up with.
    pub crowded: u64,
    /// Bytes that the files may take; `None` for any number.
    pub files: Option<u64>,
    /// How frames are compressed.
    pub codec: Option<Arc<dyn Codec>>,
}

/// What the store holds, in bytes, and what spilling has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Objects held.
    pub count: usize,
    /// Sum of Dask's `sizeof` of them, in memory or not.
    pub nbytes: u64,
    /// In shared memory.
    pub shared: u64,
    /// Of results in the processes that made them, by Dask's `sizeof`; not in the other figures.
    pub live: u64,
    /// In shared memory and nobody's any more: held by what lies beside it.
    pub waste: u64,
    /// In shared memory and held no longer, but used: by a task, or on the way to a peer.
    pub lingering: u64,
    /// On the daemon's heap.
    pub heap: u64,
    /// What is on disk alone.
    pub spilled: Spilled,
    /// All files, those of objects that are in memory again included.
    pub files: u64,
    /// Objects that were in memory when they were asked for.
    pub memory_read: Activity,
    /// Files read.
    pub disk_read: Activity,
    /// Files written.
    pub disk_write: Activity,
}

impl Usage {
    /// Bytes of shared memory, held or not.
    pub fn shared_memory(&self) -> u64 {
        self.shared + self.waste + self.lingering
    }

    /// Sum of Dask's `sizeof` of what is in memory.
    pub fn in_memory(&self) -> u64 {
        self.nbytes - self.spilled.memory
    }
}

/// What is on disk alone (`distributed/spill.py: SpilledSize`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spilled {
    /// Objects.
    pub count: usize,
    /// Sum of Dask's `sizeof` of them.
    pub memory: u64,
    /// Bytes of their files.
    pub disk: u64,
}

/// What was done since the start (`SpillBuffer.cumulative_metrics`).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Activity {
    /// How often.
    pub count: u64,
    /// Bytes moved.
    pub bytes: u64,
    /// Seconds it took.
    pub seconds: f64,
}

/// What is under a key, without waiting for it.
#[derive(Debug)]
pub enum Lookup {
    /// In memory.
    Here(Object),
    /// On disk: [`Store::load`] reads it.
    OnDisk,
    /// Not held.
    Nowhere,
}

/// All results this worker holds. Cloning gives another handle to the same store.
#[derive(Clone, Debug, Default)]
pub struct Store(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    contents: Mutex<Contents>,
    arena: Arena,
    lives: Lives,
    files: Option<Arc<Files>>,
    garbage: Arc<Garbage>,
    /// Keys were lost, or there is more room.
    changed: Notify,
    readers: Semaphore,
}

impl Default for Shared {
    fn default() -> Self {
        Shared {
            contents: Mutex::default(),
            arena: Arena::new(),
            lives: Lives::default(),
            files: None,
            garbage: Arc::default(),
            changed: Notify::new(),
            readers: Semaphore::new(READERS as usize),
        }
    }
}

impl Store {
    /// An empty store. With `spill`, somebody must run [`Store::keep_spilling`].
    pub fn new(spill: Option<SpillConfig>) -> Self {
        let Some(SpillConfig { directory, target, crowded, files, codec }) = spill else {
            return Store::default();
        };
        let thresholds = Thresholds { target, crowded, files: files.unwrap_or(u64::MAX) };
        let garbage = Arc::<Garbage>::default();
        Store(Arc::new(Shared {
            contents: Mutex::new(Contents::new(Some(thresholds))),
            files: Some(Arc::new(Files::new(directory, codec, garbage.clone()))),
            garbage,
            ..Shared::default()
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        // No code path panics while it holds the lock; were there one, the map would still be whole.
        self.0.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where objects to be held are placed.
    pub fn arena(&self) -> &Arena {
        &self.0.arena
    }

    /// Holds a result under its key that is in the process that made it, in place of what was there.
    pub fn keep(&self, live: Live) {
        self.remove(live.key());
        self.0.lives.insert(live);
    }

    /// The result under `key`, if it is in the process that made it.
    pub fn live(&self, key: &Key) -> Option<Live> {
        self.0.lives.get(key)
    }

    /// Whether any result is in the process that made it.
    pub fn has_live(&self) -> bool {
        !self.0.lives.is_empty()
    }

    /// A live result has been published: holds what was, if it is still wanted.
    pub fn published(&self, live: &Live) {
        if let Some(object) = live.object()
            && self.0.lives.remove_same(live)
        {
            self.insert(live.key().clone(), object.clone());
        }
    }

    /// A live result is lost; true if it was still held.
    pub fn lost(&self, live: &Live) -> bool {
        self.0.lives.remove_same(live)
    }

    /// Holds `object` under `key`, in place of what was there.
    pub fn insert(&self, key: Key, object: Object) {
        self.0.lives.remove(&key);
        let mut contents = self.lock();
        let old = contents.insert(key, object);
        let wants_room = contents.wants_room();
        drop(contents);
        drop(old);
        if wants_room {
            self.0.garbage.wake.notify_one();
        }
    }

    /// What is under `key`. To be asked for makes it the last to be spilled.
    pub fn find(&self, key: &Key) -> Lookup {
        match self.lock().find(key) {
            Found::Here(object) => Lookup::Here(object),
            Found::OnDisk(_) => Lookup::OnDisk,
            Found::Nowhere => Lookup::Nowhere,
        }
    }

    /// The object under `key`, read back from disk if it is there; it counts as in memory again then, unless it is larger
    /// than the target. `None` if it is not held, or its file is damaged: then it is lost ([`Store::take_lost`]).
    ///
    /// # Errors
    /// The system has no memory or descriptor for it now.
    pub async fn load(&self, key: &Key) -> Result<Option<Object>, Error> {
        let file = match self.lock().find(key) {
            Found::Here(object) => return Ok(Some(object)),
            Found::OnDisk(file) => file,
            Found::Nowhere => return Ok(None),
        };
        // nobody closes the semaphore
        let _permit = self.0.readers.acquire_many(if file.takes_memory() { READERS } else { 1 }).await;
        let (task, arena) = (file.clone(), self.0.arena.clone());
        let read = spawn_blocking(move || {
            let start = Instant::now();
            (task.read(&arena), start.elapsed().as_secs_f64())
        });
        // reading neither panics nor is it cancelled while the runtime lives, and with the runtime all ends
        let (read, seconds) =
            read.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
        let found = match read {
            Ok(object) => self.lock().loaded(key, &file, object, seconds),
            Err(error) if error.is_loss() => {
                if self.lock().damaged(key, &file) {
                    tracing::error!(target: SPILL, key = %key, "a result is lost: {}", telemetry::chain(&error));
                    self.0.changed.notify_one();
                }
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        self.0.garbage.wake.notify_one();
        Ok(match found {
            Found::Here(object) => Some(object),
            Found::OnDisk(_) | Found::Nowhere => None,
        })
    }

    /// Lets go of `key`, if it is held. Its memory is free when the last reader is done.
    pub fn remove(&self, key: &Key) -> bool {
        let was_live = self.0.lives.remove(key);
        let removed = self.lock().remove(key);
        was_live || removed.is_some()
    }

    /// Whether `key` is held.
    pub fn contains(&self, key: &Key) -> bool {
        self.lock().contains(key) || self.0.lives.get(key).is_some()
    }

    /// All keys held, in no order.
    pub fn keys(&self) -> Vec<Key> {
        let mut keys: Vec<Key> = self.lock().keys().cloned().collect();
        keys.extend(self.0.lives.keys());
        keys
    }

    /// What is held now.
    pub fn usage(&self) -> Usage {
        let (live, waste) = (self.0.lives.bytes(), self.0.arena.waste());
        let mut contents = self.lock();
        Usage { live, waste, lingering: contents.lingering(), ..contents.usage() }
    }

    /// Lets go of everything.
    pub fn clear(&self) {
        self.0.lives.clear();
        let mut contents = self.lock();
        let empty = contents.cleared();
        let old = std::mem::replace(&mut *contents, empty);
        drop(contents);
        drop(old);
    }

    /// Gives memory back that is held by a few objects in segments that were full once: moves those. Does nothing where
    /// that would not give much, and only a part of it at a time.
    ///
    /// # Errors
    /// When there is no memory to move them to.
    pub fn tidy(&self) -> Result<(), Error> {
        self.0.arena.release_empty();
        self.lock().tidy(&self.0.arena)
    }

    /// The processes use too much memory: spills until so many bytes less are held, if there is as much. False if
    /// nothing can be spilled.
    pub fn relieve(&self, bytes: u64) -> bool {
        let possible = self.lock().relieve(bytes);
        self.0.garbage.wake.notify_one();
        possible
    }

    /// Whether results come faster than they can be spilled, so that no more should be made for now.
    pub fn is_crowded(&self) -> bool {
        self.lock().is_crowded()
    }

    /// Waits until there are lost keys, or the store may be less crowded.
    pub async fn changed(&self) {
        self.0.changed.notified().await;
    }

    /// Keys whose files were damaged since this was last asked. They are held no longer.
    pub fn take_lost(&self) -> Vec<Key> {
        self.lock().take_lost()
    }

    /// Spills what is to be spilled, and removes files. Never ends.
    pub async fn keep_spilling(self) {
        let Some(files) = self.0.files.clone() else { return std::future::pending().await };
        let mut complained: [Option<Instant>; 2] = [None; 2];
        loop {
            self.0.garbage.wake.notified().await;
            self.sweep().await;
            while let Some(step) = self.next() {
                match step {
                    // the memory of a large object takes its time to become free
                    Step::Free(object) => drop(spawn_blocking(move || drop(object)).await),
                    Step::Write { leaving, room } => {
                        if let Err(error) = self.write(&files, leaving, room).await {
                            complain(&error, &mut complained[usize::from(matches!(error, Error::NoRoom))]);
                        }
                    }
                }
                self.0.changed.notify_one();
                self.sweep().await;
            }
            self.0.changed.notify_one();
        }
    }

    fn next(&self) -> Option<Step> {
        self.lock().next()
    }

    /// Writes one object to a file. If that fails, it stays in memory.
    async fn write(&self, files: &Arc<Files>, leaving: Leaving, room: u64) -> Result<(), Error> {
        let (files, object) = (files.clone(), leaving.object.clone());
        let writing = spawn_blocking(move || {
            let start = Instant::now();
            (files.write(&object, room), start.elapsed().as_secs_f64())
        });
        // as for reading
        let (written, seconds) =
            writing.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
        match written {
            Ok(file) => {
                self.lock().written(&leaving, file, seconds);
                // the last to hold it may be this; its memory takes its time to become free
                drop(spawn_blocking(move || drop(leaving)).await);
                Ok(())
            }
            Err(error) => {
                self.lock().refused(leaving, &error);
                Err(error)
            }
        }
    }

    async fn sweep(&self) {
        let paths = self.0.garbage.take();
        if !paths.is_empty() {
            // what is not removed now goes with the folder
            drop(spawn_blocking(move || spill::remove(paths)).await);
        }
    }
}

/// Says that something stays in memory, if that was not said just now.
fn complain(error: &Error, last: &mut Option<Instant>) {
    if last.is_some_and(|last| last.elapsed() < COMPLAINTS) {
        return;
    }
    *last = Some(Instant::now());
    match error {
        Error::NoRoom => {
            tracing::warn!(target: SPILL, "Spill file on disk reached capacity; keeping data in memory");
        }
        error => {
            let why = telemetry::chain(error);
            tracing::error!(target: SPILL, "Spill to disk failed; keeping data in memory: {why}");
        }
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

    fn sizes(store: &Store) -> (usize, u64, u64, u64) {
        let Usage { count, nbytes, shared, heap, .. } = store.usage();
        (count, nbytes, shared, heap)
    }

    #[test]
    fn usage_follows_every_change() {
        let store = Store::new(None);
        store.insert("a".into(), object(10));
        store.insert("b".into(), object(5));
        assert_eq!(sizes(&store), (2, 15, 0, 17));

        store.insert("a".into(), object(1));
        assert_eq!(sizes(&store), (2, 6, 0, 8));

        assert!(store.remove(&"a".into()) && !store.remove(&"a".into()));
        assert_eq!(sizes(&store), (1, 5, 0, 6));

        store.clear();
        assert_eq!(store.usage(), Usage::default());
    }

    fn payload(sizes: &[usize]) -> Payload {
        let frames = sizes.iter().enumerate().map(|(i, n)| Bytes::from(vec![i as u8 + 1; *n])).collect();
        Payload { kind: PayloadKind::Serialized, header: Bytes::new(), frames }
    }

    #[test]
    fn without_a_place_for_files_nothing_is_spilled() {
        let store = Store::new(None);
        store.insert("a".into(), object(1 << 20));
        assert!(!store.relieve(1) && !store.is_crowded());
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
        let (store, before) = (Store::new(None), descriptors());
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

        (0..count).filter(|i| i % 8 > 0).for_each(|i| _ = store.remove(&key(i)));
        let waste = store.usage().waste;
        assert!(waste > expected / 2);
        for _ in 0..count {
            store.tidy().unwrap();
        }
        let (left, allowed) = (store.usage().waste, (100 << 20).max(expected / 8 / 3));
        assert!(left < waste && left <= allowed, "{left} bytes are nobody's");
        for i in (0..count).step_by(8) {
            let Lookup::Here(object) = store.find(&key(i)) else { panic!("not there") };
            store.remove(&key(i));
            assert!(object.frames()[0].bytes().iter().all(|byte| *byte == i as u8));
        }
        store.tidy().unwrap();
        assert_eq!((store.usage().count, store.usage().shared_memory()), (0, 0));
    }

    #[test]
    fn a_reader_keeps_what_was_removed() {
        let store = Store::new(None);
        store.insert("a".into(), object(3));
        let Lookup::Here(held) = store.find(&"a".into()) else { panic!("not there") };
        store.remove(&"a".into());
        assert_eq!(held.frames()[0].bytes().len(), 3);
        assert!(matches!(store.find(&"a".into()), Lookup::Nowhere));
    }

    /// A store that spills beyond `target` bytes, the folder of its files, and the task that spills.
    struct Spilling {
        store: Store,
        storage: PathBuf,
        spilling: tokio::task::JoinHandle<()>,
        _dir: tempfile::TempDir,
    }

    impl Spilling {
        fn new(target: u64, files: Option<u64>) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let storage = dir.path().join("storage");
            let config =
                SpillConfig { directory: storage.clone(), target, crowded: target, files, codec: None };
            let store = Store::new(Some(config));
            let spilling = tokio::spawn(store.clone().keep_spilling());
            Spilling { store, storage, spilling, _dir: dir }
        }

        /// Waits for a state that comes with a change, for ten seconds at most.
        async fn until(&self, done: impl Fn(&Store) -> bool) {
            let wait = async {
                while !done(&self.store) {
                    self.store.changed().await;
                }
            };
            tokio::time::timeout(Duration::from_secs(10), wait).await.unwrap();
        }

        fn names(&self) -> Vec<PathBuf> {
            let entries = std::fs::read_dir(&self.storage).unwrap();
            entries.map(|entry| entry.unwrap().path()).collect()
        }
    }

    impl Drop for Spilling {
        fn drop(&mut self) {
            self.spilling.abort();
        }
    }

    #[tokio::test]
    async fn what_is_too_much_is_written_and_comes_back() {
        let spilling = Spilling::new(750_000, None);
        let store = &spilling.store;
        for key in ["a", "b", "c"] {
            store.insert(key.into(), object(300_000));
        }
        spilling.until(|store| store.usage().spilled.count == 1).await;
        assert!(!store.is_crowded());
        assert!(matches!(store.find(&"a".into()), Lookup::OnDisk));
        assert_eq!((sizes(store), spilling.names().len()), ((3, 900_000, 0, 600_002), 1));
        let read = store.load(&"a".into()).await.unwrap().unwrap();
        assert_eq!(read.to_payload(), object(300_000).to_payload());
        assert!(read.is_on_disk());
        // which is one too many again
        spilling.until(|store| store.usage().spilled.count == 1).await;
        assert!(matches!(store.find(&"b".into()), Lookup::OnDisk));
        assert!(store.load(&"nobody".into()).await.unwrap().is_none());
        let Usage { memory_read, disk_read, disk_write, .. } = store.usage();
        store.clear();
        // totals count from the start of the process
        let cleared = Usage { memory_read, disk_read, disk_write, ..Usage::default() };
        assert_eq!((store.usage(), store.keys().len(), disk_read.count), (cleared, 0, 1));
    }

    #[tokio::test]
    async fn files_of_what_is_gone_are_removed() {
        let spilling = Spilling::new(10, None);
        spilling.store.insert("a".into(), object(100));
        spilling.until(|store| store.usage().spilled.count == 1).await;
        spilling.store.remove(&"a".into());
        spilling.until(|_| spilling.names().is_empty()).await;
    }

    #[tokio::test]
    async fn a_full_disk_keeps_everything_in_memory() {
        let spilling = Spilling::new(10, Some(50));
        spilling.store.insert("a".into(), object(100));
        spilling.until(|store| !store.is_crowded()).await;
        assert!(matches!(spilling.store.find(&"a".into()), Lookup::Here(_)));
        assert_eq!(spilling.store.usage().files, 0);
    }

    #[tokio::test]
    async fn a_damaged_file_loses_one_key() {
        let spilling = Spilling::new(10, None);
        let store = &spilling.store;
        store.insert("a".into(), object(100));
        store.insert("b".into(), object(100));
        spilling.until(|store| store.usage().spilled.count == 2).await;
        std::fs::write(spilling.storage.join("0"), "").unwrap();
        assert!(store.load(&"a".into()).await.unwrap().is_none());
        store.changed().await;
        assert_eq!((store.take_lost(), store.contains(&"a".into())), (vec!["a".into()], false));
        assert!(store.load(&"b".into()).await.unwrap().is_some());
    }
}
