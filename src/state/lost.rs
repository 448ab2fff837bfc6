//! A stored result was lost here: the one event that Dask lacks, since there a result dies only with its worker.
//!
//! The scheduler hears of it at once. Tasks here that still wait for the value, or were about to use it, wait for it
//! again while it is fetched from another holder, or looked for. Tasks that run are left alone: they have their inputs
//! already, or will end in an error of their own. If nobody else holds it, the scheduler takes the waiting tasks back
//! and computes it again, as it does when it hears `release-worker-data` for any reason.

use crate::proto::Key;

use super::collections::Id;
use super::error::Error;
use super::instruction::Report;
use super::log::LogEntry;
use super::task::{State, StateName, Task};
use super::transition::Finish;
use super::{Recommendations, Step, WorkerState};

impl WorkerState {
    pub(super) fn on_data_lost(
        &mut self,
        keys: &[Key],
        step: &mut Step<'_>,
        recs: &mut Recommendations,
    ) -> Result<(), Error> {
        let mut homeless = Vec::new();
        for key in keys {
            let Some(id) = self.id(key).filter(|id| matches!(self.tasks[*id].state, State::Memory)) else {
                continue;
            };
            self.record(step, LogEntry::DataLost { key: key.clone() });
            if self.lose(id, step, recs)? && self.tasks[id].who_has.is_empty() {
                homeless.push(key.clone());
            }
        }
        if !homeless.is_empty() {
            step.send(Report::RequestRefreshWhoHas { keys: homeless });
        }
        Ok(())
    }

    /// Takes a value out of memory; true if a task here needs it back.
    fn lose(&mut self, id: Id<Task>, step: &mut Step<'_>, recs: &mut Recommendations) -> Result<bool, Error> {
        let task = &self.tasks[id];
        let (holders, nbytes) = (task.who_has.clone(), task.nbytes);
        let needs = |id: &&Id<Task>| {
            let state = self.tasks[**id].state.name();
            state.is_ready() || state == StateName::Waiting
        };
        let needers: Vec<Id<Task>> = task.dependents.iter().filter(needs).copied().collect();

        self.touch(id);
        let mut released = Vec::new();
        self.transition(id, Finish::Released, step, &mut released)?;
        recs.extend(released);
        if needers.is_empty() {
            return Ok(false);
        }

        self.set_who_has(id, holders);
        for &needer in &needers {
            let task = &mut self.tasks[needer];
            let priority = task.priority.clone();
            let mut is_waiter = true;
            if let Some(link) = task.dependencies.get_mut(&id) {
                link.waiting = true;
                // it may be one still: coming into memory does not end that
                is_waiter = std::mem::replace(&mut link.waiter, true);
            }
            task.waiting_for_data += 1;
            if task.state.name().is_ready() {
                recs.insert(needer, Finish::Waiting);
            }
            // scattered data has no priority of its own
            let task = &mut self.tasks[id];
            task.priority = task.priority.take().or(priority);
            task.waiters += usize::from(!is_waiter);
        }
        self.tasks[id].nbytes = nbytes;
        recs.insert(id, Finish::Fetch);
        Ok(true)
    }

    /// A dependency was lost under a task that could have run.
    pub(super) fn ready_waiting(&mut self, id: Id<Task>) {
        self.ready.discard(id);
        self.constrained.discard(id);
        self.promoted.shift_remove(&id);
        self.tasks[id].state = State::Waiting;
        self.waiting.insert(id);
    }
}
