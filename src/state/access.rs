//! What the driver may read, and the few things it may tell outside of events.
//!
//! Nothing here moves a task to another state.

use std::sync::Arc;

use crate::proto::{Address, Key, Value};

use super::collections::Id;
use super::event::StartStop;
use super::log::{LogEntry, LogRecord, Subject};
use super::task::{State, StateName, Task};
use super::{Config, WorkerState};

impl WorkerState {
    /// The task of that key.
    pub fn task(&self, key: &Key) -> Option<&Task> {
        self.id(key).map(|id| &self.tasks[id])
    }

    /// All tasks that are known, in no order.
    pub fn tasks(&self) -> impl Iterator<Item = &Task> {
        self.keys.values().map(|id| &self.tasks[*id])
    }

    /// How many tasks are known.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// True if no task is known.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Keys of what a task needs to run, in the order in which the scheduler named them.
    pub fn dependencies<'a>(&'a self, task: &'a Task) -> impl Iterator<Item = &'a Key> {
        task.dependencies.keys().map(|id| &self.tasks[*id].key)
    }

    /// Keys of the tasks known here that need this one.
    pub fn dependents<'a>(&'a self, task: &'a Task) -> impl Iterator<Item = &'a Key> {
        self.keys_of(&task.dependents)
    }

    /// Keys of what a task still waits for.
    pub fn waiting_for_data<'a>(&'a self, task: &'a Task) -> impl Iterator<Item = &'a Key> {
        task.dependencies.iter().filter(|(_, link)| link.waiting).map(|(id, _)| &self.tasks[*id].key)
    }

    /// Keys of what has waited for a task since it was last released: Dask's `TaskState.waiters`.
    pub fn waiters<'a>(&'a self, task: &'a Task) -> impl Iterator<Item = &'a Key> {
        let id = self.id(&task.key);
        let waits = move |dependent: &&Id<Task>| {
            let link = id.and_then(|id| self.tasks[**dependent].dependencies.get(&id));
            link.is_some_and(|link| link.waiter)
        };
        task.dependents.iter().filter(waits).map(|dependent| &self.tasks[*dependent].key)
    }

    /// Peers believed to hold a task's value.
    pub fn who_has<'a>(&'a self, task: &'a Task) -> impl Iterator<Item = &'a Address> {
        task.who_has.iter().map(|id| &self.peers[*id].address)
    }

    /// The peer a task's value comes from right now.
    pub fn coming_from(&self, task: &Task) -> Option<&Address> {
        task.state.coming_from().and_then(|id| self.peers.get(id)).map(|peer| &peer.address)
    }

    /// Whether the key is in memory here (value in the store, or an actor).
    pub fn has_data(&self, key: &Key) -> bool {
        self.task(key).is_some_and(|task| matches!(task.state, State::Memory))
    }

    /// Keys of the tasks that run and count towards `nthreads`, cancelled and resumed ones included.
    pub fn executing(&self) -> impl ExactSizeIterator<Item = &Key> {
        self.keys_of(&self.executing)
    }

    /// Keys of the tasks that run and have seceded, cancelled and resumed ones included.
    pub fn long_running(&self) -> impl ExactSizeIterator<Item = &Key> {
        self.keys_of(&self.long_running)
    }

    /// Keys of the tasks that come from peers, cancelled and resumed ones included.
    pub fn in_flight_tasks(&self) -> impl ExactSizeIterator<Item = &Key> {
        self.keys_of(&self.in_flight_tasks)
    }

    /// Peers from which something is being gathered, and the keys asked for.
    pub fn in_flight_workers(&self) -> impl Iterator<Item = (&Address, Vec<&Key>)> {
        self.peers.iter().filter_map(|(_, peer)| {
            // what was scattered here meanwhile may even be forgotten by now
            let known = |id: &Id<Task>| self.tasks.get(*id).map(|task| &task.key);
            Some((&peer.address, peer.in_flight.as_ref()?.iter().filter_map(known).collect()))
        })
    }

    /// What is to be fetched from each peer that holds some of it, most urgent first.
    pub fn data_needed(&self) -> impl Iterator<Item = (&Address, Vec<&Key>)> {
        let needed = self.peers.iter().filter(|(_, peer)| !peer.data_needed.is_empty());
        needed.map(|(_, peer)| (&peer.address, self.ordered(&peer.data_needed)))
    }

    /// Keys known here that each peer is believed to hold.
    pub fn has_what(&self) -> impl Iterator<Item = (&Address, Vec<&Key>)> {
        let holders = self.peers.iter().filter(|(_, peer)| !peer.has_what.is_empty());
        holders.map(|(_, peer)| (&peer.address, self.keys_of(&peer.has_what).collect()))
    }

    /// Keys of the ready tasks without resource restrictions, in order of priority.
    pub fn ready(&self) -> Vec<&Key> {
        self.ordered(&self.ready)
    }

    /// Keys of the ready tasks with resource restrictions, in order of priority.
    pub fn constrained(&self) -> Vec<&Key> {
        self.ordered(&self.constrained)
    }

    fn ordered(&self, set: &super::HeapSet<Task>) -> Vec<&Key> {
        set.sorted().map(|id| &self.tasks[id].key).collect()
    }

    /// Peers that said lately that they are busy.
    pub fn busy_workers(&self) -> impl Iterator<Item = &Address> {
        self.peers.iter().filter(|(_, peer)| peer.busy).map(|(_, peer)| &peer.address)
    }

    /// Keys of the tasks for which no holder is known.
    pub fn missing(&self) -> impl ExactSizeIterator<Item = &Key> {
        self.keys_of(&self.missing)
    }

    /// How many tasks are ready to run, resource-constrained ones included.
    pub fn ready_count(&self) -> usize {
        self.ready.len() + self.constrained.len()
    }

    /// How many tasks wait for data.
    pub fn waiting_count(&self) -> usize {
        self.waiting.len()
    }

    fn keys_of<'a>(
        &'a self,
        ids: &'a super::collections::IdSet<Task>,
    ) -> impl ExactSizeIterator<Item = &'a Key> {
        ids.iter().map(|id| &self.tasks[*id].key)
    }

    /// Up to `n` ready tasks without resource restrictions, in the order in which they would be started.
    pub fn peek_ready(&self, n: usize) -> Vec<Key> {
        let rest = self.ready.sorted().filter(|id| !self.promoted.contains(id));
        let ids = self.promoted.iter().copied().chain(rest).take(n);
        ids.map(|id| self.tasks[id].key.clone()).collect()
    }

    /// A runner that was handed this ready task ahead of time has begun it: it is the next to become `executing`,
    /// before all others but those promoted earlier. False if it is not in the ready queue.
    pub fn promote(&mut self, key: &Key) -> bool {
        let Some(id) = self.id(key).filter(|id| self.ready.contains(*id)) else { return false };
        self.promoted.insert(id);
        true
    }

    /// Number of tasks in each state that has any. Dask's `TaskCounter.current_count(by_prefix=False)`.
    pub fn task_counts(&self) -> Vec<(StateName, u64)> {
        self.task_counter.by_state()
    }

    /// Number of tasks for each prefix and state that has any. Dask's `TaskCounter.current_count()`.
    pub fn task_counts_by_prefix(&self) -> Vec<(Arc<str>, StateName, u64)> {
        self.task_counter.by_prefix()
    }

    /// Task-seconds spent in each state, by prefix, up to `now` (unix seconds). Dask's `TaskCounter.cumulative_elapsed()`.
    pub fn cumulative_elapsed(&self, now: f64) -> Vec<(Arc<str>, StateName, f64)> {
        self.task_counter.elapsed(now)
    }

    /// Bytes of all values held, by Dask's `sizeof`: `managed_bytes`.
    pub fn nbytes(&self) -> u64 {
        self.nbytes
    }

    /// Bytes of the transfers from peers that go on now.
    pub fn transfer_incoming_bytes(&self) -> u64 {
        self.transfer_incoming_bytes
    }

    /// Number of transfers from peers that go on now.
    pub fn transfer_incoming_count(&self) -> usize {
        self.in_flight_workers
    }

    /// Number of transfers from peers ever begun.
    pub fn transfer_incoming_count_total(&self) -> u64 {
        self.transfer_incoming_count_total
    }

    /// Number of tasks that ran here and ended, in whichever way.
    pub fn executed_count(&self) -> u64 {
        self.executed_count
    }

    /// Number of transitions so far.
    pub fn transition_counter(&self) -> u64 {
        self.transition_counter
    }

    /// False while paused.
    pub fn is_running(&self) -> bool {
        self.running
    }

    /// The configuration it was made with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// How peers call this worker.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Abstract resources and how much there is of each.
    pub fn total_resources(&self) -> &[(Arc<str>, f64)] {
        &self.total_resources
    }

    /// Abstract resources and how much of each no running task holds.
    pub fn available_resources(&self) -> &[(Arc<str>, f64)] {
        &self.available_resources
    }

    /// What the transition log says about the subjects, oldest first. Dask's `WorkerState.story`.
    pub fn story(&self, subjects: &[Subject]) -> Vec<LogRecord> {
        self.log.story(subjects)
    }

    /// Adds a record of the driver's to the transition log.
    pub fn log(&mut self, now: f64, stimulus_id: Arc<str>, entry: LogEntry) {
        self.log.push(LogRecord { entry, stimulus_id, time: now });
    }

    /// Whether transitions are to be kept for [`WorkerState::watched`].
    pub fn watch(&mut self, on: bool) {
        match on {
            true => _ = self.watched.get_or_insert_default(),
            false => self.watched = None,
        }
    }

    /// Transitions since this was last asked, as lists of key, old and new state (`WorkerPlugin.transition`).
    pub fn watched(&mut self) -> Option<Value> {
        let watched = self.watched.as_mut().filter(|watched| !watched.is_empty())?;
        let transitions = watched
            .drain(..)
            .map(|(key, start, finish)| vec![(&key).into(), start.as_str().into(), finish.as_str().into()]);
        Some(Value::List(transitions.map(Value::List).collect()))
    }

    /// User code of a task begins at `now` (unix seconds).
    pub fn set_start_time(&mut self, key: &Key, now: f64) {
        if let Some(id) = self.id(key) {
            self.tasks[id].start_time = Some(now);
        }
    }

    /// Books a time on a task.
    pub fn add_startstop(&mut self, key: &Key, startstop: StartStop) {
        if let Some(id) = self.id(key) {
            self.tasks[id].startstops.push(startstop);
        }
    }

    /// Books the time of a transfer on one of the tasks it was made for (`Worker._get_cause`).
    pub fn add_transfer(&mut self, keys: &[Key], transfer: StartStop) {
        let mut cause = None;
        for key in keys {
            let Some(id) = self.id(key) else { continue };
            if let Some(dependent) = self.tasks[id].dependents.first() {
                cause = Some(*dependent);
                break;
            }
            cause = Some(id);
        }
        if let Some(id) = cause {
            self.tasks[id].startstops.push(transfer);
        }
    }
}
