//! Transitions of tasks whose value is to come from a peer: fetch, flight, missing; and where keys are.
//!
//! Which peer is asked for what is decided in `gather`.
//! Source: the methods of the same names in `distributed/worker_state_machine.py`.

use smallvec::SmallVec;

use crate::proto::{Address, Key};

use super::collections::Id;
use super::event::Stored;
use super::peer::Peer;
use super::task::{Previous, State, Task};
use super::transition::{Finish, Recs};
use super::{Step, WorkerState};

impl WorkerState {
    /// `_transition_generic_fetch`
    pub(super) fn generic_fetch(&mut self, id: Id<Task>, recs: &mut Recs) {
        let task = &mut self.tasks[id];
        if task.who_has.is_empty() {
            recs.push((id, Finish::Missing));
            return;
        }
        task.state = State::Fetch;
        task.done = false;
        self.fetch_count += 1;
        for peer in task.who_has.clone() {
            self.need_from(peer, id);
        }
    }

    /// Puts a task into the peer's `data_needed`.
    fn need_from(&mut self, peer: Id<Peer>, id: Id<Task>) {
        let priority = self.tasks[id].priority.clone().unwrap_or_default();
        self.peers[peer].data_needed.add(id, priority);
        self.needy_peers.insert(peer);
    }

    /// `_transition_missing_waiting`
    pub(super) fn missing_waiting(&mut self, id: Id<Task>, step: &mut Step<'_>, recs: &mut Recs) {
        self.purge(id, step);
        self.released_waiting(id, recs);
    }

    /// `_transition_missing_fetch`
    pub(super) fn missing_fetch(&mut self, id: Id<Task>, recs: &mut Recs) {
        if !self.tasks[id].who_has.is_empty() {
            self.missing.swap_remove(&id);
            self.generic_fetch(id, recs);
        }
    }

    /// `_transition_missing_released`
    pub(super) fn missing_released(&mut self, id: Id<Task>, step: &mut Step<'_>, recs: &mut Recs) {
        self.missing.swap_remove(&id);
        self.generic_released(id, step, recs);
    }

    /// `_transition_generic_missing`
    pub(super) fn generic_missing(&mut self, id: Id<Task>) {
        let task = &mut self.tasks[id];
        task.state = State::Missing;
        task.done = false;
        self.missing.insert(id);
    }

    /// `_transition_fetch_flight`; `gather` has taken it out of all `data_needed`.
    pub(super) fn fetch_flight(&mut self, id: Id<Task>, from: Id<Peer>) {
        let task = &mut self.tasks[id];
        task.done = false;
        task.state = State::Flight { from };
        self.in_flight_tasks.insert(id);
        self.fetch_count -= 1;
    }

    /// `_transition_fetch_missing`
    pub(super) fn fetch_missing(&mut self, id: Id<Task>) {
        self.fetch_count -= 1;
        self.generic_missing(id);
    }

    /// `_transition_fetch_released`
    pub(super) fn fetch_released(&mut self, id: Id<Task>, step: &mut Step<'_>, recs: &mut Recs) {
        self.fetch_count -= 1;
        self.generic_released(id, step, recs);
    }

    /// `_transition_flight_fetch`: nothing to do while the transfer lasts.
    pub(super) fn flight_fetch(&mut self, id: Id<Task>, recs: &mut Recs) {
        if self.tasks[id].done {
            self.generic_fetch(id, recs);
        }
    }

    /// `_transition_flight_released`: a transfer can't be stopped; its end is awaited.
    pub(super) fn flight_released(&mut self, id: Id<Task>, step: &mut Step<'_>, recs: &mut Recs) {
        let task = &mut self.tasks[id];
        let State::Flight { from } = task.state else { return };
        if task.done {
            // It has ended in this same event, but a dependent's release prevailed. Dask raises.
            self.repaired(id, "released as it ended", step);
            self.generic_released(id, step, recs);
        } else {
            task.state = State::Cancelled(Previous::Flight { from });
        }
    }

    /// `_transition_flight_memory`
    pub(super) fn flight_memory(
        &mut self,
        id: Id<Task>,
        stored: Stored,
        step: &mut Step<'_>,
        recs: &mut Recs,
    ) {
        // It may have been scattered here meanwhile: what the transfer brings then matters no more.
        self.in_flight_tasks.swap_remove(&id);
        self.put_in_memory(id, stored, step, recs);
        self.send_add_keys(id, step);
    }

    /// `_update_who_has`: keys that are not known, or no longer, are passed over.
    pub(super) fn update_who_has(&mut self, who_has: &[(Key, Vec<Address>)]) {
        for (key, workers) in who_has {
            let Some(id) = self.id(key) else { continue };
            let mut peers: SmallVec<[Id<Peer>; 2]> = SmallVec::new();
            for worker in workers {
                // Ourselves among them: the scheduler has yet to read that we released it.
                if *worker != self.address {
                    peers.push(self.peer(worker));
                }
            }
            peers.sort_unstable();
            peers.dedup();
            self.set_who_has(id, peers);
        }
    }

    /// `peers` must be sorted and without repetition.
    pub(super) fn set_who_has(&mut self, id: Id<Task>, peers: SmallVec<[Id<Peer>; 2]>) {
        let task = &mut self.tasks[id];
        if task.who_has == peers {
            return;
        }
        let fetch = matches!(task.state, State::Fetch);
        let before = std::mem::replace(&mut task.who_has, peers.clone());
        for &peer in before.iter().filter(|peer| peers.binary_search(peer).is_err()) {
            let known = &mut self.peers[peer];
            known.has_what.swap_remove(&id);
            known.data_needed.discard(id);
        }
        for &peer in peers.iter().filter(|peer| before.binary_search(peer).is_err()) {
            self.peers[peer].has_what.insert(id);
            if fetch {
                self.need_from(peer, id);
            }
        }
    }

    /// The peer of that address, made if it is not known.
    fn peer(&mut self, address: &Address) -> Id<Peer> {
        if let Some(peer) = self.addresses.get(address) {
            return *peer;
        }
        let local = address.host() == self.address.host();
        let peer = self.peers.insert(Peer::new(address.clone(), local));
        self.addresses.insert(address.clone(), peer);
        peer
    }

    /// Forgets a peer about which there is nothing left to know.
    pub(super) fn forget_idle_peer(&mut self, peer: Id<Peer>) {
        if self.peers.get(peer).is_some_and(Peer::is_idle)
            && let Some(known) = self.peers.remove(peer)
        {
            self.addresses.remove(&known.address);
            self.needy_peers.swap_remove(&peer);
        }
    }
}
