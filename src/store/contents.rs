//! What is held where, what it takes, and which result is spilled next. Does no IO and waits for nothing.
//!
//! Source: `distributed/spill.py: SpillBuffer`, `zict/lru.py: LRU`.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;

use super::arena::Arena;
use super::object::{Object, WeakObject};
use super::spill::SpillFile;
use super::{Error, Usage};
use crate::proto::Key;

/// Time until a disk that refused a file is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// Bytes that one tidying moves, about: it holds its caller up.
const MOVED_MAX: u64 = 64 * 1024 * 1024;
/// In a rank: it is not to be spilled before all others.
const ORDINARY: u64 = 1 << 63;
/// Outdated entries of the order that are put up with.
const OUTDATED: usize = 1024;

/// When results are spilled, in bytes by `sizeof`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Thresholds {
    /// Results beyond it are spilled.
    pub(super) target: u64,
    /// Results beyond it are more than spilling keeps up with.
    pub(super) crowded: u64,
    /// Bytes that all files may take.
    pub(super) files: u64,
}

/// Results and where they are.
#[derive(Debug, Default)]
pub(super) struct Contents {
    entries: FxHashMap<Key, Entry>,
    usage: Usage,
    /// None: nothing is spilled.
    thresholds: Option<Thresholds>,
    /// Those in memory, and outdated ranks of them and of others.
    order: BinaryHeap<Ranked>,
    clock: u64,
    /// Bytes of memory that are to become free besides, as the processes use too much.
    relief: u64,
    /// No more can be written, for now.
    refused: Option<Refused>,
    lost: Vec<Key>,
    /// Waste that the last tidying left, in bytes.
    left: u64,
    /// Objects that somebody still used when they went, and their bytes of shared memory.
    lingering: Vec<(WeakObject, u64)>,
    /// Those that were passed over, as spilling them would make no memory free.
    passed_over: Vec<Ranked>,
}

/// Why nothing can be written.
#[derive(Clone, Copy, Debug)]
enum Refused {
    /// The files take what they may.
    Full,
    /// The system said no, then.
    Failed(Instant),
}

#[derive(Debug)]
struct Entry {
    place: Place,
    nbytes: u64,
    /// When it was put here, by the clock.
    born: u64,
    /// When it was last asked for.
    used: u64,
}

#[derive(Debug)]
enum Place {
    /// In memory; with its file if it was spilled before, so that it need not be written again.
    Memory { object: Object, file: Option<Arc<SpillFile>> },
    /// On disk; in memory, too, for as long as somebody uses it.
    Disk { file: Arc<SpillFile>, last: WeakObject },
}

/// A key by when it is to be spilled.
#[derive(Debug)]
struct Ranked {
    rank: u64,
    key: Key,
}

impl Place {
    fn is_on_disk(&self) -> bool {
        matches!(self, Place::Disk { .. })
    }

    /// Whether spilling it would make memory free.
    fn takes_memory(&self) -> bool {
        matches!(self, Place::Memory { object, .. } if !object.is_on_disk())
    }

    fn file(&self) -> Option<&Arc<SpillFile>> {
        match self {
            Place::Memory { file, .. } => file.as_ref(),
            Place::Disk { file, .. } => Some(file),
        }
    }
}

fn rank_of(entry: &Entry, thresholds: Option<Thresholds>) -> u64 {
    // what does not fit beside anything else goes first
    let heavy = thresholds.is_some_and(|thresholds| entry.nbytes > thresholds.target);
    if heavy { entry.used } else { entry.used | ORDINARY }
}

impl Usage {
    fn add(&mut self, entry: &Entry) {
        self.count += 1;
        self.nbytes += entry.nbytes;
        self.files += entry.place.file().map_or(0, |file| file.len);
        match &entry.place {
            Place::Memory { object, .. } => {
                self.shared += object.shared_bytes();
                self.heap += object.heap_bytes();
            }
            Place::Disk { file, .. } => {
                self.spilled.count += 1;
                self.spilled.memory += entry.nbytes;
                self.spilled.disk += file.len;
            }
        }
    }

    fn subtract(&mut self, entry: &Entry) {
        self.count -= 1;
        self.nbytes -= entry.nbytes;
        self.files -= entry.place.file().map_or(0, |file| file.len);
        match &entry.place {
            Place::Memory { object, .. } => {
                self.shared -= object.shared_bytes();
                self.heap -= object.heap_bytes();
            }
            Place::Disk { file, .. } => {
                self.spilled.count -= 1;
                self.spilled.memory -= entry.nbytes;
                self.spilled.disk -= file.len;
            }
        }
    }
}

impl Ord for Ranked {
    /// The least rank is the greatest: a heap gives it first.
    fn cmp(&self, other: &Self) -> Ordering {
        other.rank.cmp(&self.rank)
    }
}

impl PartialOrd for Ranked {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Ranked {
    fn eq(&self, other: &Self) -> bool {
        self.rank == other.rank
    }
}

impl Eq for Ranked {}

/// Where a result is.
#[derive(Debug)]
pub(super) enum Found {
    Here(Object),
    OnDisk(Arc<SpillFile>),
    Nowhere,
}

/// What is to be done to spill a result.
#[derive(Debug)]
pub(super) enum Step {
    /// It was on disk already; its memory is free once this is dropped.
    Free(Object),
    /// It is to be written, to a file of at most so many bytes.
    Write { leaving: Leaving, room: u64 },
}

/// A result that is being written.
#[derive(Clone, Debug)]
pub(super) struct Leaving {
    key: Key,
    born: u64,
    pub(super) object: Object,
}

impl Contents {
    pub(super) fn new(thresholds: Option<Thresholds>) -> Self {
        Contents { thresholds, ..Contents::default() }
    }

    /// Nothing, with clock and totals going on: a file that is being written must not be taken for a later result's.
    pub(super) fn cleared(&self) -> Self {
        let Usage { memory_read, disk_read, disk_write, .. } = self.usage;
        let usage = Usage { memory_read, disk_read, disk_write, ..Usage::default() };
        Contents { usage, clock: self.clock, ..Contents::new(self.thresholds) }
    }

    pub(super) fn usage(&self) -> Usage {
        self.usage
    }

    /// Bytes of shared memory that are held no longer, but used.
    pub(super) fn lingering(&mut self) -> u64 {
        self.lingering.retain(|(object, _)| object.is_used());
        self.lingering.iter().map(|(_, bytes)| bytes).sum()
    }

    /// An object goes from memory.
    fn goes(&mut self, object: &Object) {
        let bytes = object.shared_bytes();
        if bytes == 0 {
            return;
        }
        if self.lingering.len() == self.lingering.capacity() {
            self.lingering.retain(|(object, _)| object.is_used());
        }
        self.lingering.push((object.downgrade(), bytes));
    }

    pub(super) fn contains(&self, key: &Key) -> bool {
        self.entries.contains_key(key)
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &Key> {
        self.entries.keys()
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Holds an object, in place of what was there, which is given back.
    pub(super) fn insert(&mut self, key: Key, object: Object) -> Option<impl Sized + use<>> {
        let old = self.remove(&key);
        let now = self.tick();
        let nbytes = object.nbytes();
        let entry = Entry { place: Place::Memory { object, file: None }, nbytes, born: now, used: now };
        self.usage.add(&entry);
        self.rank(&key, &entry);
        self.entries.insert(key, entry);
        self.try_again();
        old
    }

    /// Lets go of a key. What it had is given back, to be dropped where that may take its time.
    pub(super) fn remove(&mut self, key: &Key) -> Option<impl Sized + use<>> {
        let entry = self.entries.remove(key)?;
        self.usage.subtract(&entry);
        if let Place::Memory { object, .. } = &entry.place
            && object.is_used_elsewhere()
        {
            self.goes(object);
        }
        if matches!(self.refused, Some(Refused::Full)) && entry.place.file().is_some() {
            self.refused = None;
        }
        Some(entry)
    }

    /// Looks a key up, which makes it the last to be spilled.
    pub(super) fn find(&mut self, key: &Key) -> Found {
        let now = self.tick();
        let Some(entry) = self.entries.get_mut(key) else { return Found::Nowhere };
        entry.used = now;
        match &entry.place {
            Place::Memory { object, .. } => {
                self.usage.memory_read.count += 1;
                self.usage.memory_read.bytes += entry.nbytes;
                Found::Here(object.clone())
            }
            Place::Disk { file, last } => match last.upgrade() {
                Some(object) => {
                    self.restore(key, &object);
                    Found::Here(object)
                }
                None => Found::OnDisk(file.clone()),
            },
        }
    }

    /// An object was read back from its file, which took some seconds. Gives what is under the key now.
    pub(super) fn loaded(&mut self, key: &Key, file: &Arc<SpillFile>, object: Object, seconds: f64) -> Found {
        let read = &mut self.usage.disk_read;
        (read.count, read.bytes, read.seconds) =
            (read.count + 1, read.bytes + file.len, read.seconds + seconds);
        if self.is_in(key, file) {
            self.restore(key, &object);
            return Found::Here(object);
        }
        self.find(key)
    }

    /// The file of a key is not what it was. True if it was still needed: then the key is lost.
    pub(super) fn damaged(&mut self, key: &Key, file: &Arc<SpillFile>) -> bool {
        let needed = self.is_in(key, file);
        if needed {
            self.remove(key);
            self.lost.push(key.clone());
        }
        needed
    }

    /// Keys that were lost since this was last asked.
    pub(super) fn take_lost(&mut self) -> Vec<Key> {
        std::mem::take(&mut self.lost)
    }

    fn is_in(&self, key: &Key, file: &Arc<SpillFile>) -> bool {
        let place = self.entries.get(key).map(|entry| &entry.place);
        matches!(place, Some(Place::Disk { file: there, .. }) if Arc::ptr_eq(there, file))
    }

    /// A spilled object is in memory again, unless it is too large to stay there.
    fn restore(&mut self, key: &Key, object: &Object) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        let Place::Disk { file, last } = &mut entry.place else { return };
        if self.thresholds.is_some_and(|thresholds| entry.nbytes > thresholds.target) {
            *last = object.downgrade();
            return;
        }
        let file = Some(file.clone());
        self.usage.subtract(entry);
        entry.place = Place::Memory { object: object.clone(), file };
        self.lingering.retain(|(other, _)| !other.is(object));
        self.usage.add(entry);
        let ranked = Ranked { rank: entry.used | ORDINARY, key: key.clone() };
        self.order.push(ranked);
        self.try_again();
    }

    /// Moves objects out of segments that are mostly empty, some at a time.
    pub(super) fn tidy(&mut self, arena: &Arena) -> Result<(), Error> {
        // what jobs hold cannot be moved: that is not looked for again until something changes
        if !arena.is_wasteful() || arena.waste() == self.left {
            return Ok(());
        }
        let mut bytes = 0;
        for entry in self.entries.values_mut() {
            if bytes >= MOVED_MAX {
                self.left = 0;
                return Ok(());
            }
            let Place::Memory { object, .. } = &mut entry.place else { continue };
            let moved = object.moved(arena);
            let share = |source| Error::Share { bytes: object.shared_bytes(), source };
            if let Some(moved) = moved.map_err(share)? {
                bytes += moved.shared_bytes();
                *object = moved;
            }
        }
        self.left = arena.waste();
        Ok(())
    }

    /// So many bytes of memory are to become free; false if there is nothing to spill.
    pub(super) fn relieve(&mut self, bytes: u64) -> bool {
        let possible = self.thresholds.is_some() && self.usage.shared + self.usage.heap > 0;
        self.relief = if possible { bytes } else { 0 };
        self.try_again();
        possible
    }

    /// Forgets that the disk refused something, if that was some time ago. Where all room is taken, it stays so until a
    /// file goes.
    fn try_again(&mut self) {
        if matches!(self.refused, Some(Refused::Failed(then)) if then.elapsed() >= RETRY) {
            self.refused = None;
        }
    }

    fn is_over(&self) -> bool {
        self.thresholds.is_some_and(|thresholds| self.usage.in_memory() > thresholds.target)
    }

    /// Whether something is to be spilled.
    pub(super) fn wants_room(&self) -> bool {
        self.is_over() || self.relief > 0
    }

    /// Whether there is more than spilling keeps up with.
    pub(super) fn is_crowded(&self) -> bool {
        let over = |thresholds: Thresholds| self.usage.in_memory() > thresholds.crowded;
        self.refused.is_none() && self.thresholds.is_some_and(over)
    }

    /// The next step towards what is wanted; `None` when that is reached, or cannot be.
    pub(super) fn next(&mut self) -> Option<Step> {
        let step = self.thresholds.and_then(|thresholds| self.step(thresholds));
        if step.is_none() {
            self.relief = 0;
            self.order.extend(self.passed_over.drain(..));
        }
        step
    }

    fn step(&mut self, thresholds: Thresholds) -> Option<Step> {
        if !self.wants_room() {
            return None;
        }
        let key = if self.refused.is_some() { self.oldest_with_file() } else { self.oldest() }?;
        let entry = self.entries.get(&key)?;
        let Place::Memory { object, file } = &entry.place else { return None };
        let (object, born) = (object.clone(), entry.born);
        let Some(file) = file.clone() else {
            let room = thresholds.files.saturating_sub(self.usage.files);
            return Some(Step::Write { leaving: Leaving { key, born, object }, room });
        };
        self.leave(&key, &object, file);
        Some(Step::Free(object))
    }

    /// A result was written, which took some seconds.
    pub(super) fn written(&mut self, leaving: &Leaving, file: SpillFile, seconds: f64) {
        let write = &mut self.usage.disk_write;
        (write.count, write.bytes, write.seconds) =
            (write.count + 1, write.bytes + file.len, write.seconds + seconds);
        let entry = self.entries.get(&leaving.key);
        if entry.is_some_and(|entry| entry.born == leaving.born) {
            self.leave(&leaving.key, &leaving.object, Arc::new(file));
        }
    }

    /// A result could not be written: it stays, and so do all that would have to be written.
    pub(super) fn refused(&mut self, leaving: Leaving, error: &Error) {
        self.refused = Some(match error {
            Error::NoRoom => Refused::Full,
            _ => Refused::Failed(Instant::now()),
        });
        if let Some(entry) = self.entries.get(&leaving.key) {
            let rank = rank_of(entry, self.thresholds);
            self.order.push(Ranked { rank, key: leaving.key });
        }
    }

    /// A result is on disk, and in memory only as long as somebody uses it.
    fn leave(&mut self, key: &Key, object: &Object, file: Arc<SpillFile>) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        self.usage.subtract(entry);
        entry.place = Place::Disk { file, last: object.downgrade() };
        self.usage.add(entry);
        self.relief = self.relief.saturating_sub(object.shared_bytes() + object.heap_bytes());
        self.goes(object);
    }

    fn rank(&mut self, key: &Key, entry: &Entry) {
        if self.thresholds.is_none() {
            return;
        }
        if self.order.len() > 2 * self.entries.len() + OUTDATED {
            let thresholds = self.thresholds;
            let in_memory = self.entries.iter().filter(|(_, entry)| !entry.place.is_on_disk());
            let ranked =
                in_memory.map(|(key, entry)| Ranked { rank: rank_of(entry, thresholds), key: key.clone() });
            self.order = ranked.collect();
            self.passed_over.clear();
        }
        self.order.push(Ranked { rank: rank_of(entry, self.thresholds), key: key.clone() });
    }

    /// Takes the one of those in memory that is to be spilled first.
    fn oldest(&mut self) -> Option<Key> {
        while let Some(Ranked { rank, key }) = self.order.pop() {
            let Some(entry) = self.entries.get(&key).filter(|entry| !entry.place.is_on_disk()) else {
                continue;
            };
            let now = rank_of(entry, self.thresholds);
            if now != rank {
                self.order.push(Ranked { rank: now, key });
            } else if entry.place.takes_memory() || self.is_over() {
                return Some(key);
            } else {
                self.passed_over.push(Ranked { rank, key });
            }
        }
        None
    }

    /// The oldest that need not be written.
    fn oldest_with_file(&self) -> Option<Key> {
        let with_file = |entry: &Entry| matches!(entry.place, Place::Memory { file: Some(_), .. });
        let found = self.entries.iter().filter(|(_, entry)| with_file(entry));
        found.min_by_key(|(_, entry)| entry.used).map(|(key, _)| key.clone())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::proto::{Payload, PayloadKind};
    use crate::store::spill::Files;
    use crate::store::{Frame, Spilled};

    const LIMITS: Thresholds = Thresholds { target: 100, crowded: 120, files: u64::MAX };

    /// Contents of which whatever is to be spilled is written at once.
    struct Shelf {
        contents: Contents,
        files: Files,
        _dir: tempfile::TempDir,
    }

    impl Shelf {
        fn new(thresholds: Thresholds) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let files = Files::new(dir.path().join("storage"), None, Arc::default());
            Shelf { contents: Contents::new(Some(thresholds)), files, _dir: dir }
        }

        fn put(&mut self, key: &str, nbytes: u64) {
            drop(self.contents.insert(key.into(), object(nbytes)));
        }

        /// Spills what is to be spilled. Says what was written, and `free` for what needed no writing.
        fn spill(&mut self) -> Vec<String> {
            let mut done = Vec::new();
            while let Some(step) = self.contents.next() {
                match step {
                    Step::Free(_) => done.push("free".to_owned()),
                    Step::Write { leaving, room } => match self.files.write(&leaving.object, room) {
                        Ok(file) => {
                            self.contents.written(&leaving, file, 0.5);
                            done.push(leaving.key.to_string());
                        }
                        Err(error) => self.contents.refused(leaving, &error),
                    },
                }
            }
            done
        }

        /// Asks for a key, and reads its file if need be. Says whether it did.
        fn get(&mut self, key: &str) -> bool {
            match self.contents.find(&key.into()) {
                Found::Here(_) => false,
                Found::OnDisk(file) => {
                    let object = file.read(&Arena::new()).unwrap();
                    assert!(matches!(self.contents.loaded(&key.into(), &file, object, 0.5), Found::Here(_)));
                    true
                }
                Found::Nowhere => panic!("{key} is not held"),
            }
        }

        fn spilled(&self) -> (usize, u64, u64) {
            let Spilled { count, memory, disk } = self.contents.usage().spilled;
            (count, memory, disk)
        }
    }

    /// An object of that size by `sizeof`, and of ten bytes in memory.
    fn object(nbytes: u64) -> Object {
        let frame = Frame::heap(Bytes::from_static(b"123456789"));
        Object::new(PayloadKind::Serialized, Bytes::from_static(b"h"), vec![frame], nbytes)
    }

    /// An object of 300,000 bytes in shared memory.
    fn large() -> Object {
        let frames = vec![Bytes::from(vec![1; 300_000])];
        let payload = Payload { kind: PayloadKind::Serialized, header: Bytes::from_static(b"h"), frames };
        Object::from_payload(payload, 300_000, &Arena::new()).unwrap()
    }

    /// Bytes of such an object's file.
    const FILE: u64 = 64 + 9;

    #[test]
    fn the_least_recently_used_goes_first() {
        let mut shelf = Shelf::new(LIMITS);
        for key in ["a", "b", "c"] {
            shelf.put(key, 30);
        }
        assert!(shelf.spill().is_empty() && !shelf.contents.wants_room());
        assert!(!shelf.get("a"));
        shelf.put("d", 30);
        assert!(!shelf.contents.is_crowded());
        assert_eq!(shelf.spill(), ["b"]);
        assert_eq!((shelf.spilled(), shelf.contents.usage().in_memory()), ((1, 30, FILE), 90));
        shelf.put("e", 60);
        assert!(shelf.contents.is_crowded());
        assert_eq!(shelf.spill(), ["c", "a"]);
        assert_eq!((shelf.contents.usage().nbytes, shelf.contents.usage().count), (180, 5));
    }

    #[test]
    fn what_is_read_back_counts_as_in_memory_and_need_not_be_written_again() {
        let mut shelf = Shelf::new(LIMITS);
        shelf.put("a", 60);
        shelf.put("b", 60);
        assert_eq!(shelf.spill(), ["a"]);
        assert!(shelf.get("a"));
        assert_eq!((shelf.spilled(), shelf.contents.usage().in_memory()), ((0, 0, 0), 120));
        assert_eq!(shelf.spill(), ["b"]);
        assert!(shelf.get("b"));
        assert_eq!(shelf.spill(), ["free"]);
        assert_eq!((shelf.spilled(), shelf.contents.usage().files), ((1, 60, FILE), 2 * FILE));
        let usage = shelf.contents.usage();
        assert_eq!(
            (usage.disk_write.count, usage.disk_write.bytes, usage.disk_write.seconds),
            (2, 2 * FILE, 1.0)
        );
        assert_eq!((usage.disk_read.count, usage.disk_read.bytes), (2, 2 * FILE));
        assert_eq!(usage.memory_read, crate::store::Activity::default());
    }

    #[test]
    fn what_is_larger_than_the_target_goes_at_once_and_does_not_come_back() {
        let mut shelf = Shelf::new(LIMITS);
        shelf.put("a", 90);
        shelf.put("large", 101);
        assert_eq!(shelf.spill(), ["large"]);
        assert!(shelf.get("large"));
        assert_eq!(shelf.spilled(), (1, 101, FILE));
        assert!(shelf.spill().is_empty());
    }

    #[test]
    fn what_somebody_still_uses_is_not_read_again() {
        let mut shelf = Shelf::new(LIMITS);
        shelf.put("a", 60);
        let Found::Here(used) = shelf.contents.find(&"a".into()) else { panic!("not there") };
        shelf.put("b", 60);
        assert_eq!(shelf.spill(), ["a"]);
        assert!(!shelf.get("a"));
        assert_eq!((shelf.spilled().0, shelf.contents.usage().disk_read.count), (0, 0));
        drop(used);
        assert_eq!(shelf.spill(), ["b"]);
    }

    #[test]
    fn memory_in_use_leads_to_as_much_relief_as_it_needs() {
        let mut shelf = Shelf::new(LIMITS);
        assert!(!shelf.contents.relieve(10));
        for key in ["a", "b", "c"] {
            shelf.put(key, 1);
        }
        // each takes ten bytes of memory, whatever its `sizeof`
        assert!(shelf.contents.relieve(11));
        assert_eq!(shelf.spill(), ["a", "b"]);
        assert!(shelf.contents.relieve(1000));
        assert_eq!(shelf.spill(), ["c"]);
        assert!(!shelf.contents.relieve(1000));
    }

    #[test]
    fn what_is_mapped_from_its_file_gives_no_relief() {
        let mut shelf = Shelf::new(Thresholds { target: 700_000, ..LIMITS });
        for key in ["a", "b", "c"] {
            drop(shelf.contents.insert(key.into(), large()));
        }
        assert_eq!(shelf.spill(), ["a"]);
        assert!(shelf.get("a"));
        assert_eq!(shelf.spill(), ["b"]);
        // `a` is older than `c` then
        assert!(!shelf.get("c"));
        assert!(shelf.contents.relieve(1));
        assert_eq!(shelf.spill(), ["c"]);
        assert_eq!(shelf.spilled().0, 2);
        // the header of `a` is all that is left
        assert!(shelf.contents.relieve(1_000_000));
        assert!(shelf.spill().is_empty());
        // but it is spilled where results are too many
        drop(shelf.contents.insert("d".into(), large()));
        drop(shelf.contents.insert("e".into(), large()));
        assert_eq!(shelf.spill(), ["free"]);
    }

    #[test]
    fn what_is_gone_and_used_takes_memory_until_it_is_not_used() {
        let mut shelf = Shelf::new(Thresholds { target: 400_000, ..LIMITS });
        let (a, b) = (large(), large());
        let size = a.shared_bytes();
        drop(shelf.contents.insert("a".into(), a.clone()));
        drop(shelf.contents.insert("b".into(), b.clone()));
        assert_eq!(shelf.contents.lingering(), 0);
        assert_eq!(shelf.spill(), ["a"]);
        assert_eq!((shelf.contents.usage().shared, shelf.contents.lingering()), (size, size));
        // found again by its use
        assert!(!shelf.get("a"));
        assert_eq!((shelf.contents.usage().shared, shelf.contents.lingering()), (2 * size, 0));
        drop(shelf.contents.remove(&"a".into()));
        drop(shelf.contents.remove(&"b".into()));
        assert_eq!((shelf.contents.usage().shared, shelf.contents.lingering()), (0, 2 * size));
        drop((a, b));
        assert_eq!(shelf.contents.lingering(), 0);
    }

    #[test]
    fn without_room_on_disk_things_stay_in_memory() {
        let mut shelf = Shelf::new(Thresholds { files: 2 * FILE, ..LIMITS });
        for key in ["a", "b", "c", "d"] {
            shelf.put(key, 60);
        }
        assert_eq!(shelf.spill(), ["a", "b"]);
        assert_eq!(shelf.spilled(), (2, 120, 2 * FILE));
        assert!(shelf.contents.wants_room() && !shelf.contents.is_crowded());
        // what has a file can still go
        assert!(shelf.get("a"));
        assert_eq!(shelf.spill(), ["free"]);
        // and when a file goes, there is room for another
        drop(shelf.contents.remove(&"b".into()));
        shelf.put("e", 1);
        assert_eq!(shelf.spill(), ["c"]);
        assert_eq!(shelf.contents.usage().files, 2 * FILE);
    }

    #[test]
    fn a_disk_that_refuses_is_not_asked_at_once_again() {
        let mut shelf = Shelf::new(LIMITS);
        shelf.put("a", 60);
        shelf.put("b", 60);
        let Some(Step::Write { leaving, .. }) = shelf.contents.next() else { panic!("nothing to write") };
        let source = std::io::Error::from(std::io::ErrorKind::StorageFull);
        shelf.contents.refused(leaving, &Error::Write { path: "x".into(), source });
        assert!(shelf.contents.next().is_none());
        shelf.put("c", 1);
        assert!(shelf.contents.next().is_none());
        shelf.contents.refused = Instant::now().checked_sub(RETRY).map(Refused::Failed);
        shelf.put("c", 1);
        assert_eq!(shelf.spill(), ["a"]);
    }

    #[test]
    fn what_changed_while_it_was_written_stays_as_it_is() {
        let mut shelf = Shelf::new(LIMITS);
        shelf.put("a", 60);
        shelf.put("b", 60);
        let Some(Step::Write { leaving, room }) = shelf.contents.next() else { panic!("nothing to write") };
        let file = shelf.files.write(&leaving.object, room).unwrap();
        shelf.put("a", 7);
        shelf.contents.written(&leaving, file, 0.1);
        assert_eq!((shelf.spilled().0, shelf.contents.usage().in_memory()), (0, 67));
        assert_eq!(shelf.contents.usage().files, 0);
    }

    #[test]
    fn a_damaged_file_loses_its_key_once() {
        let mut shelf = Shelf::new(LIMITS);
        shelf.put("a", 101);
        shelf.spill();
        let Found::OnDisk(file) = shelf.contents.find(&"a".into()) else { panic!("not on disk") };
        assert!(shelf.contents.damaged(&"a".into(), &file));
        assert!(!shelf.contents.damaged(&"a".into(), &file));
        assert_eq!((shelf.contents.take_lost(), shelf.spilled()), (vec!["a".into()], (0, 0, 0)));
        assert!(shelf.contents.take_lost().is_empty() && !shelf.contents.contains(&"a".into()));
    }

    #[test]
    fn the_order_does_not_grow_with_what_is_gone() {
        let mut shelf = Shelf::new(LIMITS);
        for _ in 0..3 * OUTDATED {
            shelf.put("a", 1);
        }
        assert!(shelf.contents.order.len() <= OUTDATED + 3);
        shelf.put("b", 1);
        assert!(shelf.contents.relieve(1));
        assert_eq!(shelf.spill(), ["a"]);
    }
}
