//! The containers of the state machine: an arena with ids that never alias, sets with a reproducible order, a priority heap.
//!
//! No task logic. Orders matter where one event moves several tasks: every set here iterates in insertion order but for
//! removals, which put the last item into the hole, so a run can be repeated exactly.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::marker::PhantomData;
use std::ops::{Index, IndexMut};

use indexmap::{IndexMap, IndexSet};
use rustc_hash::FxBuildHasher;

use crate::proto::Priority;

/// Names an item of an [`Arena`] for as long as it lives; never names a later one.
pub(super) struct Id<T> {
    /// Slot in the low half, generation in the high half.
    raw: u64,
    of: PhantomData<fn() -> T>,
}

impl<T> Id<T> {
    fn new(slot: usize, generation: u32) -> Self {
        Id { raw: (u64::from(generation) << 32) | slot as u64, of: PhantomData }
    }

    fn slot(self) -> usize {
        (self.raw & 0xffff_ffff) as usize
    }

    fn generation(self) -> u32 {
        (self.raw >> 32) as u32
    }
}

impl<T> Clone for Id<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Id<T> {}
impl<T> PartialEq for Id<T> {
    fn eq(&self, other: &Self) -> bool {
        self.raw == other.raw
    }
}
impl<T> Eq for Id<T> {}
impl<T> PartialOrd for Id<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl<T> Ord for Id<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.raw.cmp(&other.raw)
    }
}
impl<T> Hash for Id<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.raw);
    }
}
impl<T> fmt::Debug for Id<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}.{}", self.slot(), self.generation())
    }
}

/// Set of ids.
pub(super) type IdSet<T> = IndexSet<Id<T>, FxBuildHasher>;
/// Map from ids.
pub(super) type IdMap<T, V> = IndexMap<Id<T>, V, FxBuildHasher>;

/// Owns items under stable ids; slots are used again, ids are not.
#[derive(Clone, Debug)]
pub(super) struct Arena<T> {
    slots: Vec<(u32, Option<T>)>,
    free: Vec<usize>,
}

impl<T> Default for Arena<T> {
    fn default() -> Self {
        Arena { slots: Vec::new(), free: Vec::new() }
    }
}

impl<T> Arena<T> {
    pub(super) fn insert(&mut self, item: T) -> Id<T> {
        match self.free.pop() {
            Some(slot) => {
                self.slots[slot].1 = Some(item);
                Id::new(slot, self.slots[slot].0)
            }
            None => {
                self.slots.push((0, Some(item)));
                Id::new(self.slots.len() - 1, 0)
            }
        }
    }

    pub(super) fn remove(&mut self, id: Id<T>) -> Option<T> {
        let (generation, item) = self.slots.get_mut(id.slot())?;
        if *generation != id.generation() {
            return None;
        }
        let item = item.take()?;
        *generation = generation.wrapping_add(1);
        self.free.push(id.slot());
        Some(item)
    }

    pub(super) fn get(&self, id: Id<T>) -> Option<&T> {
        match self.slots.get(id.slot()) {
            Some((generation, item)) if *generation == id.generation() => item.as_ref(),
            _ => None,
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Id<T>, &T)> {
        self.slots
            .iter()
            .enumerate()
            .filter_map(|(slot, (generation, item))| Some((Id::new(slot, *generation), item.as_ref()?)))
    }
}

/// Ids are handed out by this arena and every link to an item is cut before the item goes: a dangling one is our own bug.
impl<T> Index<Id<T>> for Arena<T> {
    type Output = T;
    fn index(&self, id: Id<T>) -> &T {
        match self.get(id) {
            Some(item) => item,
            None => panic!("dangling id {id:?}"),
        }
    }
}

impl<T> IndexMut<Id<T>> for Arena<T> {
    fn index_mut(&mut self, id: Id<T>) -> &mut T {
        match self.slots.get_mut(id.slot()) {
            Some((generation, Some(item))) if *generation == id.generation() => item,
            _ => panic!("dangling id {id:?}"),
        }
    }
}

/// A set whose smallest item is found fast. Ties go to the oldest. Source: `distributed.collections.HeapSet`,
/// whose habit of keeping the place of an item that is taken out and put back is kept.
#[derive(Clone, Debug)]
pub(super) struct HeapSet<T> {
    members: IdSet<T>,
    /// May name items that are no members any more; those are skipped when they come up.
    heap: BinaryHeap<Entry<T>>,
    next: u64,
}

#[derive(Debug)]
struct Entry<T> {
    priority: Priority,
    inserted: u64,
    id: Id<T>,
}

impl<T> Clone for Entry<T> {
    fn clone(&self) -> Self {
        Entry { priority: self.priority.clone(), inserted: self.inserted, id: self.id }
    }
}

/// The greatest, for [`BinaryHeap`], is the one with the smallest priority.
impl<T> Ord for Entry<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        other.priority.cmp(&self.priority).then(other.inserted.cmp(&self.inserted))
    }
}
impl<T> PartialOrd for Entry<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl<T> PartialEq for Entry<T> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl<T> Eq for Entry<T> {}

impl<T> Default for HeapSet<T> {
    fn default() -> Self {
        HeapSet { members: IdSet::default(), heap: BinaryHeap::new(), next: 0 }
    }
}

impl<T> HeapSet<T> {
    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    pub(super) fn contains(&self, id: Id<T>) -> bool {
        self.members.contains(&id)
    }

    /// Members in no order that means anything.
    pub(super) fn iter(&self) -> impl Iterator<Item = Id<T>> {
        self.members.iter().copied()
    }

    /// Adds an item; the priority counts from now on, even if the item's own changes.
    pub(super) fn add(&mut self, id: Id<T>, priority: Priority) {
        if self.members.insert(id) {
            self.heap.push(Entry { priority, inserted: self.next, id });
            self.next += 1;
        }
    }

    pub(super) fn discard(&mut self, id: Id<T>) -> bool {
        let was_member = self.members.swap_remove(&id);
        if self.members.is_empty() {
            self.heap.clear();
        }
        was_member
    }

    /// The smallest member.
    pub(super) fn peek(&mut self) -> Option<Id<T>> {
        loop {
            let id = self.heap.peek()?.id;
            if self.members.contains(&id) {
                return Some(id);
            }
            self.heap.pop();
        }
    }

    /// Takes the smallest member out.
    pub(super) fn pop(&mut self) -> Option<Id<T>> {
        let id = self.peek()?;
        self.heap.pop();
        self.discard(id);
        Some(id)
    }

    /// Members from the smallest on, without taking them out; each further one costs O(log n).
    pub(super) fn sorted(&self) -> Sorted<'_, T> {
        let mut frontier = BinaryHeap::new();
        if let Some(top) = self.heap.as_slice().first() {
            frontier.push((top, 0));
        }
        let may_repeat = self.heap.len() > self.members.len();
        Sorted { set: self, frontier, seen: may_repeat.then(IdSet::default) }
    }
}

/// Iterator of [`HeapSet::sorted`]: walks down the heap, always on from the smallest node reached.
pub(super) struct Sorted<'a, T> {
    set: &'a HeapSet<T>,
    frontier: BinaryHeap<(&'a Entry<T>, usize)>,
    /// An item taken out and put back may be in the heap twice; none, if there are no leftovers in the heap.
    seen: Option<IdSet<T>>,
}

impl<T> Iterator for Sorted<'_, T> {
    type Item = Id<T>;

    fn next(&mut self) -> Option<Id<T>> {
        let nodes = self.set.heap.as_slice();
        while let Some((entry, at)) = self.frontier.pop() {
            for child in [2 * at + 1, 2 * at + 2] {
                if let Some(node) = nodes.get(child) {
                    self.frontier.push((node, child));
                }
            }
            let first_time = match &mut self.seen {
                Some(seen) => self.set.contains(entry.id) && seen.insert(entry.id),
                None => true,
            };
            if first_time {
                return Some(entry.id);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn priority(p: f64) -> Priority {
        Priority([p].into_iter().collect())
    }

    #[test]
    fn ids_of_removed_items_never_name_later_ones() {
        let mut arena = Arena::default();
        let a = arena.insert("a");
        assert_eq!(arena.remove(a), Some("a"));
        let b = arena.insert("b");
        assert_eq!(arena.get(a), None);
        assert_eq!(arena.remove(a), None);
        assert_eq!(arena[b], "b");
        assert_eq!(arena.iter().count(), 1);
    }

    #[test]
    fn heap_pops_by_priority_then_age() {
        let mut arena = Arena::default();
        let ids: Vec<_> = (0..4).map(|i| arena.insert(i)).collect();
        let mut heap = HeapSet::default();
        for (id, p) in ids.iter().zip([2.0, 1.0, 1.0, 0.0]) {
            heap.add(*id, priority(p));
        }
        heap.discard(ids[3]);
        assert_eq!(heap.sorted().collect::<Vec<_>>(), [ids[1], ids[2], ids[0]]);
        assert_eq!(std::iter::from_fn(|| heap.pop()).collect::<Vec<_>>(), [ids[1], ids[2], ids[0]]);
        assert!(heap.is_empty() && heap.peek().is_none());
    }

    #[test]
    fn an_item_put_back_keeps_its_old_place_and_shows_once() {
        let mut arena = Arena::default();
        let (a, b) = (arena.insert(0), arena.insert(1));
        let mut heap = HeapSet::default();
        heap.add(a, priority(5.0));
        heap.add(b, priority(1.0));
        heap.discard(b);
        heap.add(b, priority(9.0));
        assert_eq!(heap.sorted().collect::<Vec<_>>(), [b, a]);
        assert_eq!(heap.pop(), Some(b));
        assert_eq!(heap.pop(), Some(a));
        assert_eq!(heap.pop(), None);
    }
}
