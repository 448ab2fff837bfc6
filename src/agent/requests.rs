//! What servers ask of the driver, and how it answers.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tracing::info;

use super::driver::{Driver, End, NANNY, Report, Retiring, WORKER};
use crate::proto::{Key, Status, Stimulus, Value};
use crate::scheduler::now;
use crate::state::{EventKind, LogRecord, Stored, Subject};
use crate::store::Object;

/// A request of a server, with the end that takes the answer.
#[derive(Debug)]
pub(super) enum Command {
    /// Data that a client or the scheduler put here; answered when it can be served.
    UpdateData { data: Vec<(Key, Object, Stored)>, stimulus_id: Arc<str>, done: oneshot::Sender<()> },
    /// Keys that are not wanted any more; answered when the state machine knows.
    FreeKeys { keys: Vec<Key>, stimulus_id: Arc<str>, done: oneshot::Sender<()> },
    /// The log of these keys and stimuli.
    Story { subjects: Vec<Subject>, reply: oneshot::Sender<Value> },
    /// The state machine's part of a cluster dump.
    Dump { reply: oneshot::Sender<Value> },
    /// A message that came by another way than the scheduler's stream.
    Stream { stimulus: Stimulus },
    /// Leave.
    Close { reason: String },
    /// Let the scheduler move our data away, then leave, or come back as another worker.
    CloseGracefully { reason: String, restart: bool },
    /// End all processes, and come back as another worker; answered when it is registered.
    Restart { reason: String, done: oneshot::Sender<()> },
    /// The same, answered when the processes are gone.
    Kill { reason: String, done: oneshot::Sender<()> },
    /// Be there; answered when it is registered.
    Instantiate { done: oneshot::Sender<()> },
}

impl Driver {
    /// Carries out a request. An end of the registration is what it may lead to.
    pub(super) fn command(&mut self, command: Command) -> Option<End> {
        match command {
            Command::UpdateData { data, stimulus_id, done } => {
                let mut stored = Vec::with_capacity(data.len());
                for (key, object, facts) in data {
                    self.shared.store.insert(key.clone(), object);
                    stored.push((key, facts));
                }
                self.stored();
                self.apply(stimulus_id, EventKind::UpdateData { data: stored });
                answer(done, ());
            }
            Command::FreeKeys { keys, stimulus_id, done } => {
                self.withdraw(&keys);
                self.apply(stimulus_id, EventKind::FreeKeys { keys });
                answer(done, ());
            }
            Command::Story { subjects, reply } => {
                let records = self.state.story(&subjects);
                answer(reply, Value::List(records.iter().map(LogRecord::to_value).collect()));
            }
            Command::Dump { reply } => answer(reply, self.state.dump(now())),
            Command::Stream { stimulus } => return self.stimulus(stimulus),
            Command::Close { reason } => return Some(self.leave(&reason)),
            Command::CloseGracefully { reason, restart } => self.retire(&reason, restart),
            Command::Restart { reason, done } => {
                info!(target: NANNY, "Restarting worker. Reason: {reason}");
                return Some(End::Restart { down: None, up: Some(done) });
            }
            Command::Kill { reason, done } => {
                info!(target: NANNY, "Killing worker. Reason: {reason}");
                return Some(End::Restart { down: Some(done), up: None });
            }
            Command::Instantiate { done } => answer(done, ()),
        }
        None
    }

    /// Says good-bye in the log.
    pub(super) fn leave(&self, reason: &str) -> End {
        info!(target: WORKER, "Stopping worker at {}. Reason: {reason}", self.state.address());
        End::Leave
    }

    /// Asks the scheduler to move our data elsewhere and to remove us; the answer is a report (`Worker.close_gracefully`).
    pub(super) fn retire(&mut self, reason: &str, restart: bool) {
        if let Some(retiring) = &mut self.retiring {
            // whoever wants it to leave for good wins
            retiring.restart &= restart;
            return;
        }
        info!(target: WORKER, "Closing worker gracefully: {}. Reason: {reason}", self.state.address());
        self.retiring = Some(Retiring { reason: reason.to_owned(), restart });
        let (scheduler, address) = (self.shared.scheduler.clone(), self.state.address().clone());
        let (jobs, limit) = (self.jobs.clone(), self.shared.config.retire_timeout);
        tokio::spawn(async move {
            match tokio::time::timeout(limit, scheduler.retire(&address)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(target: WORKER, "could not be retired: {error}"),
                Err(_) => {
                    tracing::warn!(target: WORKER, "the scheduler did not move our data away within {limit:?}")
                }
            }
            // the driver may have ended for another reason meanwhile
            let _ = jobs.send(Report::Retired);
        });
    }

    /// A new status, told to the scheduler and the state machine (`Worker.status`).
    pub(super) fn set_status(&mut self, status: Status, stimulus_id: &Arc<str>) {
        let before = self.shared.status();
        self.shared.set_status(status);
        self.session.sender().send(crate::scheduler::status_change(status, stimulus_id));
        let running = |status| status == Status::Running;
        if running(before) && !running(status) {
            self.recall_all();
            self.apply(stimulus_id.clone(), EventKind::Pause);
        } else if running(status) && matches!(before, Status::Paused | Status::ClosingGracefully) {
            self.apply(stimulus_id.clone(), EventKind::Unpause);
        }
    }
}

/// Answers, if whoever asked still waits.
fn answer<T>(reply: oneshot::Sender<T>, value: T) {
    let _ = reply.send(value);
}

/// Longest time for our last messages to reach the scheduler.
pub(super) const FAREWELL: Duration = Duration::from_secs(5);
