//! Which peer is asked for what, and what follows when a transfer ends or a peer goes.
//!
//! Source: `_ensure_communicating`, `_select_workers_for_gather`, `_select_keys_for_gather`, `_handle_gather_dep_*`.
//! Among peers that are equal in everything Dask looks at, it rolls a die; here the smallest address is taken.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

use rustc_hash::FxHashMap;

use crate::proto::{Address, Key, Priority};

use super::collections::Id;
use super::error::Error;
use super::event::{EventKind, Stored};
use super::instruction::{Instruction, Report};
use super::log::LogEntry;
use super::peer::Peer;
use super::task::{State, Task};
use super::transition::Finish;
use super::{Recommendations, Step, WorkerState};

/// A peer that could be asked, in the order in which peers are: most urgent task, same host, most tasks, address.
type Candidate = Reverse<(Option<Priority>, bool, Reverse<usize>, Address, Id2)>;

/// An [`Id`] that takes no part in comparisons, which the address has decided before.
#[derive(Clone, Copy)]
struct Id2(Id<Peer>);

impl PartialEq for Id2 {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}
impl Eq for Id2 {}
impl PartialOrd for Id2 {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Id2 {
    fn cmp(&self, _: &Self) -> std::cmp::Ordering {
        std::cmp::Ordering::Equal
    }
}

impl WorkerState {
    /// Asks peers for tasks in `fetch`, until there are none or a limit is reached.
    pub(super) fn ensure_communicating(&mut self, step: &mut Step<'_>, recs: &mut Recommendations) {
        if !self.running || self.needy_peers.is_empty() || self.throttled() {
            return;
        }
        let mut candidates = self.gather_candidates();
        while let Some(peer) = self.next_candidate(&mut candidates) {
            let (ids, total_nbytes) = self.select_keys(peer);
            // the peer's most urgent task may not fit any more
            if ids.is_empty() {
                break;
            }
            let to_gather: Vec<Key> = ids.iter().map(|id| self.tasks[*id].key.clone()).collect();
            let worker = self.peers[peer].address.clone();
            self.record(
                step,
                LogEntry::GatherDependencies { worker: worker.clone(), keys: to_gather.clone() },
            );
            for &id in &ids {
                recs.insert(id, Finish::Flight { from: peer });
            }
            step.out.push(Instruction::GatherDep {
                worker,
                to_gather,
                total_nbytes,
                stimulus_id: step.stimulus_id.clone(),
            });
            // A peer is not asked again before this transfer has ended.
            self.peers[peer].in_flight = Some(ids);
            self.in_flight_workers += 1;
            self.transfer_incoming_count_total += 1;
            self.transfer_incoming_bytes += total_nbytes;
            if self.throttled() {
                break;
            }
        }
    }

    /// `_should_throttle_incoming_transfers`
    fn throttled(&self) -> bool {
        let bytes = self.transfer_incoming_bytes;
        let many = self.in_flight_workers >= self.config.transfer_incoming_count_limit
            && bytes >= self.config.transfer_incoming_bytes_throttle_threshold;
        many || self.config.transfer_incoming_bytes_limit.is_some_and(|limit| bytes >= limit)
    }

    /// Peers with tasks to fetch that are neither busy nor asked already.
    fn gather_candidates(&mut self) -> BinaryHeap<Candidate> {
        let WorkerState { needy_peers, peers, tasks, .. } = self;
        needy_peers.retain(|peer| peers.get(*peer).is_some_and(|peer| !peer.data_needed.is_empty()));
        let free = needy_peers.iter().filter(|peer| {
            let peer = &peers[**peer];
            peer.in_flight.is_none() && !peer.busy
        });
        let free: Vec<Id<Peer>> = free.copied().collect();
        free.into_iter().filter_map(|peer| candidate(peer, &mut peers[peer], tasks)).collect()
    }

    /// The peer to ask next. What was there of its tasks may have been taken from other peers meanwhile.
    fn next_candidate(&mut self, candidates: &mut BinaryHeap<Candidate>) -> Option<Id<Peer>> {
        loop {
            let Reverse((_, _, Reverse(seen), _, Id2(peer))) = candidates.pop()?;
            let known = &mut self.peers[peer];
            if known.data_needed.len() == seen {
                return Some(peer);
            }
            candidates.extend(candidate(peer, known, &self.tasks));
        }
    }

    /// `_select_keys_for_gather`: the most urgent tasks of one peer, as many as one message and all limits allow.
    fn select_keys(&mut self, peer: Id<Peer>) -> (Vec<Id<Task>>, u64) {
        let mut ids = Vec::new();
        let mut message_nbytes = 0;
        while let Some(id) = self.peers[peer].data_needed.peek() {
            let task = &self.tasks[id];
            let nbytes = task.nbytes.unwrap_or(self.config.default_data_size);
            if self.exceeds_transfer_limits(nbytes, message_nbytes) {
                break;
            }
            for &holder in &task.who_has {
                self.peers[holder].data_needed.discard(id);
            }
            ids.push(id);
            message_nbytes += nbytes;
        }
        (ids, message_nbytes)
    }

    /// `_task_exceeds_transfer_limits`
    fn exceeds_transfer_limits(&self, nbytes: u64, message_nbytes: u64) -> bool {
        // Alone, even the largest goes.
        if self.transfer_incoming_bytes == 0 && message_nbytes == 0 {
            return false;
        }
        let after = u128::from(message_nbytes) + u128::from(nbytes);
        let over_all = u128::from(self.transfer_incoming_bytes) + after;
        let too_many = self.config.transfer_incoming_bytes_limit.is_some_and(|limit| over_all > limit.into());
        // The first task of a message goes whatever its size.
        too_many || (message_nbytes != 0 && after > self.config.transfer_message_bytes_limit.into())
    }

    /// Any of the four ways in which a `GatherDep` ends.
    pub(super) fn on_gather_dep_done(
        &mut self,
        kind: &EventKind,
        step: &mut Step<'_>,
        recs: &mut Recommendations,
    ) -> Result<(), Error> {
        match kind {
            EventKind::GatherDepSuccess { worker, total_nbytes, data } => {
                let (peer, ids) = self.end_transfer(worker, *total_nbytes)?;
                self.gathered(peer, ids, data, step, recs);
            }
            EventKind::GatherDepBusy { worker, total_nbytes } => {
                let (peer, ids) = self.end_transfer(worker, *total_nbytes)?;
                self.gather_busy(peer, ids, step, recs);
            }
            EventKind::GatherDepNetworkFailure { worker, total_nbytes } => {
                let (_, ids) = self.end_transfer(worker, *total_nbytes)?;
                for id in ids {
                    self.record(step, LogEntry::MissingDep { key: self.tasks[id].key.clone() });
                    recs.insert(id, Finish::Fetch);
                }
                // As though it had died: this leads to the quickest recovery.
                self.on_remove_worker(worker, recs);
            }
            EventKind::GatherDepFailure { worker, total_nbytes, error } => {
                let (peer, ids) = self.end_transfer(worker, *total_nbytes)?;
                let error = Arc::new(error.clone());
                for id in ids {
                    let run_id = self.tasks[id].run_id;
                    recs.insert(id, Finish::Error { error: error.clone(), run_id });
                }
                self.forget_idle_peer(peer);
            }
            _ => {}
        }
        Ok(())
    }

    /// `_gather_dep_done_common`: the tasks whose transfer has ended.
    fn end_transfer(
        &mut self,
        worker: &Address,
        total_nbytes: u64,
    ) -> Result<(Id<Peer>, Vec<Id<Task>>), Error> {
        let peer = self.addresses.get(worker).copied();
        let ids = peer.and_then(|peer| self.peers[peer].in_flight.take());
        let (Some(peer), Some(mut ids)) = (peer, ids) else {
            return Err(Error::NotInFlight { worker: worker.clone() });
        };
        self.in_flight_workers -= 1;
        self.transfer_incoming_bytes = self.transfer_incoming_bytes.saturating_sub(total_nbytes);
        // All but those that were scattered here meanwhile.
        ids.retain(|id| self.in_flight_tasks.swap_remove(id));
        for id in &ids {
            self.tasks[*id].done = true;
        }
        Ok((peer, ids))
    }

    fn gathered(
        &mut self,
        peer: Id<Peer>,
        ids: Vec<Id<Task>>,
        data: &[(Key, Stored)],
        step: &mut Step<'_>,
        recs: &mut Recommendations,
    ) {
        let mut data: FxHashMap<&Key, &Stored> = data.iter().map(|(key, stored)| (key, stored)).collect();
        for id in ids {
            let task = &mut self.tasks[id];
            if let Some(stored) = data.remove(&task.key) {
                recs.insert(id, Finish::Memory { stored: stored.clone(), run_id: task.run_id });
                continue;
            }
            task.who_has.retain(|holder| *holder != peer);
            let key = task.key.clone();
            self.peers[peer].has_what.swap_remove(&id);
            self.record(step, LogEntry::MissingDep { key });
            recs.insert(id, Finish::Fetch);
        }
    }

    fn gather_busy(
        &mut self,
        peer: Id<Peer>,
        ids: Vec<Id<Task>>,
        step: &mut Step<'_>,
        recs: &mut Recommendations,
    ) {
        let worker = self.peers[peer].address.clone();
        self.peers[peer].busy = true;
        step.out.push(Instruction::RetryBusyWorkerLater { worker, stimulus_id: step.stimulus_id.clone() });
        // Where all known holders are busy, the scheduler may know others.
        let mut keys = Vec::new();
        for id in ids {
            recs.insert(id, Finish::Fetch);
            let task = &self.tasks[id];
            if task.who_has.iter().all(|holder| self.peers[*holder].busy) {
                keys.push(task.key.clone());
            }
        }
        if !keys.is_empty() {
            step.send(Report::RequestRefreshWhoHas { keys });
        }
    }

    /// `_handle_remove_worker`
    pub(super) fn on_remove_worker(&mut self, worker: &Address, recs: &mut Recommendations) {
        let Some(&peer) = self.addresses.get(worker) else { return };
        let known = &mut self.peers[peer];
        let needed = std::mem::take(&mut known.data_needed);
        let held = std::mem::take(&mut known.has_what);
        for id in needed.iter() {
            if self.tasks[id].who_has[..] == [peer] {
                recs.insert(id, Finish::Missing);
            }
        }
        for id in held {
            self.tasks[id].who_has.retain(|holder| *holder != peer);
        }
        self.forget_idle_peer(peer);
    }

    pub(super) fn on_retry_busy_worker(&mut self, worker: &Address) {
        if let Some(&peer) = self.addresses.get(worker) {
            self.peers[peer].busy = false;
            self.forget_idle_peer(peer);
        }
    }

    pub(super) fn on_find_missing(&mut self, step: &mut Step<'_>) {
        if !self.missing.is_empty() {
            let keys = self.missing.iter().map(|id| self.tasks[*id].key.clone()).collect();
            step.send(Report::RequestRefreshWhoHas { keys });
        }
    }

    /// `_handle_refresh_who_has`
    pub(super) fn on_refresh_who_has(&mut self, who_has: &[(Key, Vec<Address>)], recs: &mut Recommendations) {
        self.update_who_has(who_has);
        for (key, _) in who_has {
            let Some(id) = self.id(key) else { continue };
            let task = &self.tasks[id];
            match task.state {
                State::Missing if !task.who_has.is_empty() => recs.insert(id, Finish::Fetch),
                State::Fetch if task.who_has.is_empty() => recs.insert(id, Finish::Missing),
                _ => None,
            };
        }
    }
}

fn candidate(id: Id<Peer>, peer: &mut Peer, tasks: &super::collections::Arena<Task>) -> Option<Candidate> {
    let first = peer.data_needed.peek()?;
    let priority = tasks[first].priority.clone();
    Some(Reverse((priority, !peer.local, Reverse(peer.data_needed.len()), peer.address.clone(), Id2(id))))
}
