//! The worker state machine: every task this worker knows, from the scheduler's first word to the last.
//!
//! Sans-IO: [`WorkerState::handle`] takes one event and the time, and says in instructions what is to be done. Nothing
//! here reads a clock, opens a socket, waits, or holds a task's value. A port of
//! `distributed/worker_state_machine.py: WorkerState` (2026.8.0), to which `tests/oracle` holds it step by step. It
//! departs from it in the event [`EventKind::DataLost`], which Dask lacks, and where Dask raises or leaves a task behind
//! for ever: on scatter over a computation (the scattered value is dropped, the computed one will come), and where two
//! tasks of one event want opposite things of a third ([`LogEntry::Repaired`]).
//!
//! An event gives *recommendations* (task -> state); each is carried out by one [transition](transition), which may
//! recommend more, until none is left.

mod access;
mod collections;
mod compute;
mod counter;
mod dump;
mod error;
mod event;
mod execution;
mod fetch;
mod gather;
mod instruction;
mod log;
mod lost;
mod memory;
mod orders;
mod peer;
mod task;
#[cfg(test)]
mod tests;
mod transition;
mod validate;

use std::sync::Arc;

use rustc_hash::FxHashMap;

use crate::proto::{Address, Key};

use collections::{Arena, HeapSet, Id, IdMap, IdSet};
use counter::TaskCounter;
use log::Ring;
use peer::Peer;
use transition::Finish;

pub use error::{Error, Story};
pub use event::{Action, ErrorMessage, Event, EventKind, StartStop, Stored, TypeInfo};
pub use instruction::{Instruction, Report, SchedulerMessage};
pub use log::{LogEntry, LogRecord, Subject};
pub use task::{StateName, Task};

/// Limits and sizes that do not change while the worker lives.
#[derive(Clone, Debug)]
pub struct Config {
    /// Tasks at once.
    pub nthreads: usize,
    /// Abstract resources and how much there is of each.
    pub resources: Vec<(Arc<str>, f64)>,
    /// Transfers from peers at once, once `transfer_incoming_bytes_throttle_threshold` is reached
    /// (`distributed.worker.connections.outgoing`).
    pub transfer_incoming_count_limit: usize,
    /// Bytes of transfers from peers at once; `None`: no limit (`distributed.worker.memory.transfer`).
    pub transfer_incoming_bytes_limit: Option<u64>,
    /// Bytes asked for in one message (`distributed.worker.transfer.message-bytes-limit`).
    pub transfer_message_bytes_limit: u64,
    /// Bytes in transfer below which their number is not limited.
    pub transfer_incoming_bytes_throttle_threshold: u64,
    /// Check the invariants of every task an event touched (`distributed.worker.validate`).
    pub validate: bool,
    /// Bytes taken for a size nobody told (`distributed.scheduler.default-data-size`).
    pub default_data_size: u64,
    /// Records kept in the transition log and events in the stimulus log (`distributed.admin.low-level-log-length`).
    pub log_length: usize,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            nthreads: 1,
            resources: Vec::new(),
            transfer_incoming_count_limit: 9999,
            transfer_incoming_bytes_limit: None,
            transfer_message_bytes_limit: u64::MAX,
            transfer_incoming_bytes_throttle_threshold: 10_000_000,
            validate: false,
            default_data_size: 1024,
            log_length: 1000,
        }
    }
}

/// An ordered map of what is to become of which task; the latest entry is carried out first, as Dask's `dict.popitem`.
type Recommendations = IdMap<Task, Finish>;

/// The state of the worker. Changed by [`WorkerState::handle`] only.
#[derive(Clone, Debug)]
pub struct WorkerState {
    config: Config,
    address: Address,
    tasks: Arena<Task>,
    keys: FxHashMap<Key, Id<Task>>,
    peers: Arena<Peer>,
    addresses: FxHashMap<Address, Id<Peer>>,
    running: bool,
    waiting: IdSet<Task>,
    ready: HeapSet<Task>,
    constrained: HeapSet<Task>,
    /// Ready tasks that a runner has begun already; they leave `ready` before all others.
    promoted: IdSet<Task>,
    /// Tasks that run and count towards `nthreads`, cancelled and resumed ones included.
    executing: IdSet<Task>,
    /// Tasks that run and have seceded, cancelled and resumed ones included.
    long_running: IdSet<Task>,
    /// Tasks that come from peers, cancelled and resumed ones included.
    in_flight_tasks: IdSet<Task>,
    missing: IdSet<Task>,
    /// Peers with something in `data_needed`; may name some whose heap has become empty.
    needy_peers: IdSet<Peer>,
    in_flight_workers: usize,
    fetch_count: usize,
    transfer_incoming_bytes: u64,
    transfer_incoming_count_total: u64,
    executed_count: u64,
    /// Goes down by one with each computation asked for, so that later ones go first among equals.
    generation: i64,
    total_resources: Vec<(Arc<str>, f64)>,
    available_resources: Vec<(Arc<str>, f64)>,
    /// Bytes of all values held.
    nbytes: u64,
    transition_counter: u64,
    task_counter: TaskCounter,
    log: Ring<LogRecord>,
    stimulus_log: Ring<(f64, Event)>,
    /// Transitions that nobody was told of yet, where somebody wants to be.
    watched: Option<Vec<(Key, StateName, StateName)>>,

    /// Number of events handled; marks what the current one has touched.
    step: u64,
    /// Tasks the current event has touched, and the state they were in.
    touched: Vec<(Id<Task>, StateName)>,
    /// Tasks the task counter has not seen yet.
    new_tasks: Vec<Id<Task>>,
    /// Tasks forgotten by the current event.
    forgotten: Vec<Id<Task>>,
    /// Kept for its memory.
    scratch: Vec<(Id<Task>, Finish)>,
}

/// What every part of one step needs: when and why it happens, and where its instructions go.
struct Step<'a> {
    now: f64,
    stimulus_id: &'a Arc<str>,
    out: &'a mut Vec<Instruction>,
}

impl Step<'_> {
    fn send(&mut self, report: Report) {
        self.out.push(Instruction::Send(SchedulerMessage { stimulus_id: self.stimulus_id.clone(), report }));
    }
}

impl WorkerState {
    /// A worker that knows nothing yet and is running. `address` is how peers call it.
    pub fn new(config: Config, address: Address) -> Self {
        let resources = config.resources.clone();
        let log_length = config.log_length;
        WorkerState {
            config,
            address,
            tasks: Arena::default(),
            keys: FxHashMap::default(),
            peers: Arena::default(),
            addresses: FxHashMap::default(),
            running: true,
            waiting: IdSet::default(),
            ready: HeapSet::default(),
            constrained: HeapSet::default(),
            promoted: IdSet::default(),
            executing: IdSet::default(),
            long_running: IdSet::default(),
            in_flight_tasks: IdSet::default(),
            missing: IdSet::default(),
            needy_peers: IdSet::default(),
            in_flight_workers: 0,
            fetch_count: 0,
            transfer_incoming_bytes: 0,
            transfer_incoming_count_total: 0,
            executed_count: 0,
            generation: 0,
            total_resources: resources.clone(),
            available_resources: resources,
            nbytes: 0,
            transition_counter: 0,
            task_counter: TaskCounter::default(),
            log: Ring::new(log_length),
            stimulus_log: Ring::new(log_length),
            watched: None,
            step: 0,
            touched: Vec::new(),
            new_tasks: Vec::new(),
            forgotten: Vec::new(),
            scratch: Vec::new(),
        }
    }

    /// Handles one event at `now` (unix seconds) and appends what is to be done to `out`.
    ///
    /// Instructions are to be carried out in their order.
    ///
    /// # Errors
    /// [`Error`] when the event was impossible in this state; it says what that means.
    pub fn handle(&mut self, now: f64, mut event: Event, out: &mut Vec<Instruction>) -> Result<(), Error> {
        let stimulus_id = event.stimulus_id.clone();
        let mut step = Step { now, stimulus_id: &stimulus_id, out };
        self.step += 1;
        let result = self.run(&mut event.kind, &mut step);
        self.new_tasks.clear();
        for id in self.forgotten.drain(..) {
            self.tasks.remove(id);
        }
        if !matches!(event.kind, EventKind::FindMissing) {
            self.stimulus_log.push((now, event));
        }
        result
    }

    fn run(&mut self, kind: &mut EventKind, step: &mut Step<'_>) -> Result<(), Error> {
        self.touched.clear();
        let mut recommendations = Recommendations::default();
        self.dispatch(kind, step, &mut recommendations)?;
        self.settle(&mut recommendations, step)?;
        // Only now: before, the tasks of this step are not all there yet, and nothing could be asked for in one message.
        // https://github.com/dask/distributed/issues/6497
        self.ensure_communicating(step, &mut recommendations);
        self.settle(&mut recommendations, step)?;
        self.count_touched(step.now);
        self.drop_unclaimed(kind, step);
        if self.config.validate {
            for (id, _) in &self.touched {
                self.validate_task(*id)?;
            }
        }
        Ok(())
    }

    fn dispatch(
        &mut self,
        kind: &mut EventKind,
        step: &mut Step<'_>,
        recs: &mut Recommendations,
    ) -> Result<(), Error> {
        match kind {
            EventKind::ComputeTask(task) => self.on_compute_task(task, step, recs),
            EventKind::CancelCompute { key } => self.on_cancel_compute(key, step, recs),
            EventKind::FreeKeys { keys } => self.on_free_keys(keys, step, recs),
            EventKind::RemoveReplicas { keys } => self.on_remove_replicas(keys, step, recs)?,
            EventKind::AcquireReplicas { who_has, nbytes } => {
                self.on_acquire_replicas(who_has, nbytes, step, recs);
            }
            EventKind::StealRequest { key } => self.on_steal_request(key, step, recs),
            EventKind::RefreshWhoHas { who_has } => self.on_refresh_who_has(who_has, recs),
            EventKind::RemoveWorker { worker } => self.on_remove_worker(worker, recs),
            EventKind::Pause => self.running = false,
            EventKind::Unpause => {
                self.running = true;
                self.ensure_computing(recs);
            }
            EventKind::UpdateData { data } => self.on_update_data(data, step, recs),
            EventKind::GatherDepSuccess { .. }
            | EventKind::GatherDepBusy { .. }
            | EventKind::GatherDepNetworkFailure { .. }
            | EventKind::GatherDepFailure { .. } => self.on_gather_dep_done(kind, step, recs)?,
            EventKind::RetryBusyWorker { worker } => self.on_retry_busy_worker(worker),
            EventKind::FindMissing => self.on_find_missing(step),
            EventKind::ExecuteSuccess { .. }
            | EventKind::ExecuteFailure { .. }
            | EventKind::Reschedule { .. } => self.on_execute_done(kind, recs)?,
            EventKind::Secede { key, compute_duration } => {
                if let Some(id) = self.id(key) {
                    recs.insert(id, Finish::LongRunning { compute_duration: *compute_duration });
                }
            }
            EventKind::DataLost { keys } => self.on_data_lost(keys, step, recs)?,
        }
        Ok(())
    }

    /// Carries recommendations out, and those that follow from them, until none is left.
    fn settle(&mut self, recs: &mut Recommendations, step: &mut Step<'_>) -> Result<(), Error> {
        let mut new = std::mem::take(&mut self.scratch);
        while let Some((id, finish)) = recs.pop() {
            self.touch(id);
            new.clear();
            self.transition(id, finish, step, &mut new)?;
            for (id, finish) in new.drain(..) {
                recs.insert(id, finish);
            }
        }
        self.scratch = new;
        Ok(())
    }

    /// Remembers in which state a task was before this step.
    fn touch(&mut self, id: Id<Task>) {
        let task = &mut self.tasks[id];
        if task.touched != self.step {
            task.touched = self.step;
            self.touched.push((id, task.state.name()));
        }
    }

    /// `TaskCounter.transitions`
    fn count_touched(&mut self, now: f64) {
        for &(id, before) in &self.touched {
            let task = &mut self.tasks[id];
            let state = task.state.name();
            let was_counted = std::mem::replace(&mut task.counted, true);
            if was_counted && state == before {
                continue;
            }
            if state != StateName::Forgotten {
                self.task_counter.enter(now, &task.prefix, state);
            }
            if was_counted {
                self.task_counter.leave(now, &task.prefix, before);
            }
        }
        // Dependencies of a task that went from cancelled(flight) to resumed(flight->waiting) stay released.
        for id in self.new_tasks.drain(..) {
            let task = &mut self.tasks[id];
            if !std::mem::replace(&mut task.counted, true) {
                self.task_counter.enter(now, &task.prefix, task.state.name());
            }
        }
    }

    /// Values that came with the event and that no task took: the store may forget them.
    fn drop_unclaimed(&self, kind: &EventKind, step: &mut Step<'_>) {
        let mut claim = |key: &Key| {
            if !self.has_data(key) {
                step.out.push(Instruction::DropData { key: key.clone() });
            }
        };
        match kind {
            EventKind::ExecuteSuccess { key, .. } => claim(key),
            EventKind::UpdateData { data } | EventKind::GatherDepSuccess { data, .. } => {
                data.iter().for_each(|(key, _)| claim(key));
            }
            _ => {}
        }
    }

    fn id(&self, key: &Key) -> Option<Id<Task>> {
        self.keys.get(key).copied()
    }

    /// The task of that key, made if it is not known.
    fn id_or_new(&mut self, key: &Key) -> Id<Task> {
        if let Some(id) = self.id(key) {
            return id;
        }
        let prefix = self.task_counter.intern(key.prefix());
        let id = self.tasks.insert(Task::new(key.clone(), prefix));
        self.keys.insert(key.clone(), id);
        self.new_tasks.push(id);
        id
    }

    fn record(&mut self, step: &Step<'_>, entry: LogEntry) {
        self.log.push(LogRecord { entry, stimulus_id: step.stimulus_id.clone(), time: step.now });
    }
}
