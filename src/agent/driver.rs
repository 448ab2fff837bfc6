//! The loop of one registration: whatever happens becomes an event of the state machine, and what it answers is done.
//!
//! Decides nothing about tasks. How tasks reach runners and come back is in `execute`, requests of servers in
//! `requests`, what the scheduler is told at heartbeats in `report`.

use std::sync::Arc;
use std::time::Duration;

use rustc_hash::FxHashMap;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at, sleep_until};
use tracing::{debug, error, warn};

use super::ahead::Ahead;
use super::gather::{self, Outcome};
use super::memory::Pressure;
use super::report::Executed;
use super::requests::Command;
use super::shared::Shared;
use super::spill::Loaded;
use super::{Error, Stop, StopSignal};
use crate::exec;
use crate::peer::{self, Received};
use crate::proto::{Address, Key, RunId, Status, Stimulus, StreamMessage, Value};
use crate::scheduler::{Bandwidth, Incoming, Lost, Session, log_event, now};
use crate::state::{self, Action, Event, EventKind, Instruction, LogEntry, StartStop, Stored, WorkerState};
use crate::store::Object;
use crate::telemetry;

/// Targets of log lines that a stock worker and nanny write too.
pub(super) const WORKER: &str = "distributed.worker";
pub(super) const NANNY: &str = "distributed.nanny";

/// Time between two looks for keys that nobody seems to hold.
const FIND_MISSING: Duration = Duration::from_secs(1);
/// Time until a busy peer is asked again.
const RETRY_BUSY: Duration = Duration::from_millis(150);
/// Time that a runner may have nothing to do before it gives up its results.
const KEPT_IDLE: Duration = Duration::from_secs(10);
/// Outcomes handled before runners are given tasks ahead again.
const BURST: usize = 64;

/// What side jobs of the driver report: each ends in one of these.
#[derive(Debug)]
pub(super) enum Report {
    /// A transfer from a peer ended.
    Fetched { worker: Address, total_nbytes: u64, keys: Vec<Key>, outcome: Outcome },
    /// A busy peer may be asked again.
    RetryBusy { worker: Address, stimulus_id: Arc<str> },
    /// Inputs of a task were read from disk.
    Loaded(Box<Loaded>),
    /// The scheduler has moved our data elsewhere and removed us, or takes too long for it.
    Retired,
}

/// How a registration ended.
#[derive(Debug)]
pub(super) enum End {
    /// The worker is to leave.
    Leave,
    /// The worker is to come back as another one; somebody may wait until the old one is down, or the new one up.
    Restart { down: Option<oneshot::Sender<()>>, up: Option<oneshot::Sender<()>> },
    /// The scheduler is gone, or does not know us any more.
    Lost(Lost),
    /// It cannot go on.
    Failed(Error),
}

/// A restart that nobody waits for.
pub(super) const RESTART: End = End::Restart { down: None, up: None };

/// What follows once our data is elsewhere.
#[derive(Debug)]
pub(super) struct Retiring {
    pub(super) reason: String,
    pub(super) restart: bool,
}

/// What the loop listens to besides the scheduler.
pub(super) struct Inputs<'a> {
    pub(super) outcomes: mpsc::UnboundedReceiver<exec::Event>,
    pub(super) reports: mpsc::UnboundedReceiver<Report>,
    pub(super) commands: &'a mut mpsc::UnboundedReceiver<Command>,
    pub(super) stop: StopSignal,
}

/// One registration with the scheduler, from the first task to the end.
pub(super) struct Driver {
    pub(super) shared: Arc<Shared>,
    pub(super) state: WorkerState,
    pub(super) pool: exec::Pool,
    pub(super) session: Session,
    pub(super) ahead: Ahead,
    /// Tasks that the state machine has started, and the attempt their runner was given.
    pub(super) running: FxHashMap<Key, RunId>,
    /// Outcomes of tasks that ran ahead and whose turn has come.
    pub(super) due: Vec<exec::Event>,
    /// Tasks that the state machine has started, and that wait for results to be spilled.
    pub(super) held_back: Vec<(Key, RunId)>,
    pub(super) jobs: mpsc::UnboundedSender<Report>,
    pub(super) bandwidth: Bandwidth,
    pub(super) executed: Executed,
    pub(super) retiring: Option<Retiring>,
    pub(super) end: Option<End>,
    pub(super) pressure: Pressure,
    pub(super) own_id: Arc<str>,
    instructions: Vec<Instruction>,
}

impl Driver {
    /// A driver for a fresh registration. Side jobs report to `jobs`.
    pub(super) fn new(
        shared: Arc<Shared>,
        pool: exec::Pool,
        session: Session,
        jobs: mpsc::UnboundedSender<Report>,
    ) -> Self {
        let config = &shared.config;
        Driver {
            state: WorkerState::new(config.state.clone(), shared.identity().address.clone()),
            pressure: Pressure::new(config.memory, config.memory_limit),
            bandwidth: Bandwidth::new(config.bandwidth),
            own_id: "worker".into(),
            shared,
            pool,
            session,
            ahead: Ahead::default(),
            running: FxHashMap::default(),
            due: Vec::new(),
            held_back: Vec::new(),
            jobs,
            executed: Executed::default(),
            retiring: None,
            end: None,
            instructions: Vec::new(),
        }
    }

    /// Drives until the registration ends. What is left to be sent is sent.
    pub(super) async fn run(mut self, mut inputs: Inputs<'_>) -> End {
        self.set_status(Status::Running, &self.own_id.clone());
        self.leave_to_runners();
        let mut find_missing = ticks(FIND_MISSING);
        let mut sample = ticks(self.shared.config.monitor.interval);
        let mut memory = ticks(self.memory_interval());
        let lifetime = self.shared.config.lifetime;
        let expiry = lifetime.map(|lifetime| Instant::now() + lifetime.duration);
        let end = loop {
            tokio::select! {
                incoming = self.session.next() => self.incoming(incoming),
                Some(outcome) = inputs.outcomes.recv() => {
                    self.outcome(outcome);
                    for _ in 1..BURST {
                        let Ok(outcome) = inputs.outcomes.try_recv() else { break };
                        self.outcome(outcome);
                    }
                }
                Some(report) = inputs.reports.recv() => self.report(report),
                Some(command) = inputs.commands.recv() => {
                    if let Some(end) = self.command(command) {
                        break end;
                    }
                }
                _ = find_missing.tick(), if self.state.missing().len() > 0 => {
                    self.apply_own("find-missing", EventKind::FindMissing);
                }
                _ = sample.tick() => self.sample(),
                _ = memory.tick(), if self.watches_memory() => self.look_at_memory(),
                () = self.shared.store.changed() => self.report_lost(),
                () = until(expiry), if self.retiring.is_none() => {
                    let restart = lifetime.is_some_and(|lifetime| lifetime.restart);
                    self.retire("worker-lifetime-reached", restart);
                }
                stop = stopped(&mut inputs.stop, self.retiring.is_some()) => match stop {
                    Stop::Now => break self.leave("stopped"),
                    _ => self.retire("stopped", false),
                }
            }
            self.give_out();
            // here only, as one such outcome can make the next one due
            while let Some(outcome) = self.due.pop() {
                self.outcome(outcome);
            }
            if let Some(end) = self.end.take() {
                break end;
            }
            self.hand_ahead();
            self.pool.flush();
        };
        self.finish(end).await
    }

    /// Leaves the scheduler in good order, unless it is gone.
    async fn finish(self, end: End) -> End {
        self.shared.set_status(Status::Closing);
        if !matches!(end, End::Lost(_)) {
            self.session.sender().send(crate::scheduler::status_change(Status::Closing, "worker-close"));
            self.session.close(super::requests::FAREWELL).await;
        }
        end
    }

    fn incoming(&mut self, incoming: Incoming) {
        match incoming {
            Incoming::Messages(stimuli) => {
                for stimulus in stimuli {
                    if let Some(end) = self.stimulus(stimulus) {
                        self.end = Some(end);
                        return;
                    }
                }
            }
            Incoming::Heartbeat(reply) => self.heartbeat(reply),
            Incoming::Lost(lost) => {
                let leaving = self.retiring.as_ref().is_some_and(|retiring| !retiring.restart);
                self.end = Some(if leaving { End::Leave } else { End::Lost(lost) });
            }
        }
    }

    /// One message of the scheduler.
    pub(super) fn stimulus(&mut self, stimulus: Stimulus) -> Option<End> {
        let Stimulus { stimulus_id, message } = stimulus;
        match &message {
            StreamMessage::ComputeTask(task) => self.withdraw(std::slice::from_ref(&task.key)),
            StreamMessage::FreeKeys { keys } => self.withdraw(keys),
            StreamMessage::CancelCompute { key } => self.withdraw(std::slice::from_ref(key)),
            StreamMessage::StealRequest { key } if self.has_begun(key) => {
                self.refuse_to_give(key, &stimulus_id);
                return None;
            }
            StreamMessage::RemoveWorker { worker } => self.shared.peers.remove(worker),
            _ => {}
        }
        match EventKind::try_from(message) {
            Ok(kind) => self.apply(stimulus_id, kind),
            Err(StreamMessage::StatusChange { status }) => self.status_wanted(status, &stimulus_id),
            Err(StreamMessage::Close { reason }) => return Some(self.leave(&reason)),
            Err(StreamMessage::Unknown { op, message }) => {
                if !self.pool.service_stream(&message) {
                    warn!("the scheduler sent an unknown op {op:?}");
                }
            }
            Err(_) => unreachable!("every other message is an event"),
        }
        None
    }

    /// `Worker.handle_worker_status_change`
    fn status_wanted(&mut self, status: Status, stimulus_id: &Arc<str>) {
        let current = self.shared.status();
        let leaving = matches!(current, Status::Closing | Status::Closed | Status::Init);
        if status == Status::ClosingGracefully && leaving {
            error!(target: WORKER, "Invalid Worker.status transition: {} -> {}", current.as_str(), status.as_str());
            self.session.sender().send(crate::scheduler::status_change(current, stimulus_id));
        } else {
            self.set_status(status, stimulus_id);
        }
    }

    /// An event of our own making.
    pub(super) fn apply_own(&mut self, what: &str, kind: EventKind) {
        self.apply(format!("{what}-{}", now()).into(), kind);
    }

    /// Lets the state machine handle an event, and does what it says.
    pub(super) fn apply(&mut self, stimulus_id: Arc<str>, kind: EventKind) {
        let mut instructions = std::mem::take(&mut self.instructions);
        let result = self.state.handle(now(), Event { stimulus_id, kind }, &mut instructions);
        for instruction in instructions.drain(..) {
            self.carry_out(instruction);
        }
        self.instructions = instructions;
        if let Some(transitions) = self.state.watched() {
            self.pool.tell_transitions(&transitions);
        }
        if let Err(error) = result {
            self.illegal(&error);
        }
    }

    /// What the state machine says cannot be. Where it is left in doubt, all is dropped and the worker comes back anew,
    /// as a stock worker under a nanny does.
    fn illegal(&mut self, error: &state::Error) {
        error!(target: WORKER, "{error}");
        let harmless = matches!(
            error,
            state::Error::ReplicaInUse { .. }
                | state::Error::UnknownTask { .. }
                | state::Error::NotInFlight { .. }
        );
        if harmless {
            return;
        }
        let text = error.to_string();
        let message = Value::map([("action", "invalid-worker-state".into()), ("error", text.into())]);
        self.session.sender().send(log_event("invalid-worker-task-state", message));
        self.end = Some(RESTART);
    }

    fn carry_out(&mut self, instruction: Instruction) {
        match instruction {
            Instruction::Send(message) => self.session.sender().send(message.to_value()),
            Instruction::Execute { key, .. } => self.execute(key),
            Instruction::DropData { key } => {
                self.pool.drop_actor(&key);
                self.shared.store.remove(&key);
            }
            Instruction::GatherDep { worker, to_gather, total_nbytes, stimulus_id } => {
                self.gather(worker, to_gather, total_nbytes, stimulus_id);
            }
            Instruction::RetryBusyWorkerLater { worker, stimulus_id } => {
                let jobs = self.jobs.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(RETRY_BUSY).await;
                    // without a driver there is nothing to retry
                    let _ = jobs.send(Report::RetryBusy { worker, stimulus_id });
                });
            }
        }
    }

    fn gather(&mut self, worker: Address, keys: Vec<Key>, total_nbytes: u64, stimulus_id: Arc<str>) {
        let default = self.state.config().default_data_size;
        let size = |key: &Key| self.state.task(key).and_then(|task| task.nbytes()).unwrap_or(default);
        let sized = keys.iter().map(|key| (key.clone(), size(key))).collect();
        let request =
            peer::Request { worker: worker.clone(), keys: sized, who: self.state.address().clone() };
        let entry = LogEntry::RequestDep { worker: worker.clone(), keys: keys.clone() };
        self.state.log(now(), stimulus_id, entry);
        debug!(target: WORKER, "Request {} keys from {worker}", keys.len());
        let (shared, jobs) = (self.shared.clone(), self.jobs.clone());
        tokio::spawn(async move {
            let outcome =
                gather::fetch(&shared.peers, &shared.transfers, shared.store.arena(), request).await;
            // without a driver nobody wants the data
            let _ = jobs.send(Report::Fetched { worker, total_nbytes, keys, outcome });
        });
    }

    fn report(&mut self, report: Report) {
        match report {
            Report::Fetched { worker, total_nbytes, keys, outcome } => {
                self.fetched(worker, total_nbytes, &keys, outcome);
            }
            Report::Loaded(loaded) => self.loaded(*loaded),
            Report::RetryBusy { worker, stimulus_id } => {
                self.apply(stimulus_id, EventKind::RetryBusyWorker { worker });
            }
            Report::Retired => {
                if let Some(Retiring { reason, restart }) = self.retiring.take() {
                    let end = self.leave(&reason);
                    self.end = Some(if restart { RESTART } else { end });
                }
            }
        }
    }

    fn fetched(&mut self, worker: Address, total_nbytes: u64, keys: &[Key], outcome: Outcome) {
        let (what, kind) = match outcome {
            Outcome::Success { data, received } => {
                if let Some(received) = received {
                    self.received(&worker, keys, received);
                }
                let data = data.into_iter().map(|(key, object)| self.hold(key, object)).collect();
                ("gather-dep-success", EventKind::GatherDepSuccess { worker, total_nbytes, data })
            }
            Outcome::Busy => ("gather-dep-busy", EventKind::GatherDepBusy { worker, total_nbytes }),
            Outcome::NetworkFailure(error) => {
                error!(target: WORKER, "Worker stream died during communication: {worker}: {}", error.chain());
                ("gather-dep-network-failure", EventKind::GatherDepNetworkFailure { worker, total_nbytes })
            }
            Outcome::Failure(error) => {
                error!(target: WORKER, "could not use what {worker} sent: {}", error.exception_text);
                ("gather-dep-failed", EventKind::GatherDepFailure { worker, total_nbytes, error })
            }
        };
        self.apply_own(what, kind);
    }

    /// Books a transfer: on the task it was made for, and in the bandwidths.
    fn received(&mut self, worker: &Address, keys: &[Key], received: Received) {
        let Received { start, stop, nbytes, duration, type_name, .. } = received;
        let source = Some(worker.clone());
        self.state.add_transfer(keys, StartStop { action: Action::Transfer, start, stop, source });
        self.bandwidth.observe(worker.as_str(), type_name.as_deref(), nbytes, duration);
    }

    /// Puts an object into the store, for the event that tells of it.
    fn hold(&mut self, key: Key, object: Object) -> (Key, Stored) {
        let stored = Stored { nbytes: object.nbytes(), type_: None };
        self.shared.store.insert(key.clone(), object);
        self.stored();
        (key, stored)
    }

    /// Takes a sample of the machine.
    fn sample(&mut self) {
        self.leave_to_runners();
        self.pool.publish(Some(KEPT_IDLE));
        let pids: Vec<u32> = self.pool.processes().iter().map(|process| process.pid).collect();
        if let Err(error) = self.shared.store.tidy() {
            warn!("{}", telemetry::chain(&error));
        }
        let shared = self.shared.store.usage().shared_memory();
        self.shared.monitor().update(&pids, shared);
        self.shared.pulse.tick();
        self.tell_metrics(pids.len());
    }
}

fn ticks(period: Duration) -> Interval {
    let mut ticks = interval_at(Instant::now() + period, period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

async fn until(expiry: Option<Instant>) {
    match expiry {
        Some(expiry) => sleep_until(expiry).await,
        None => std::future::pending().await,
    }
}

/// Waits for a wish to stop that is more than what is under way.
async fn stopped(stop: &mut StopSignal, retiring: bool) -> Stop {
    let least = if retiring { Stop::Now } else { Stop::Gracefully };
    match stop.wait_for(|wish| *wish >= least).await {
        Ok(wish) => *wish,
        // whoever could stop us is gone
        Err(_) => Stop::Now,
    }
}
