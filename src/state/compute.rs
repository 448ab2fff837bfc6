//! Transitions of tasks that are to be computed here: waiting, ready, constrained, executing, long-running, and what
//! becomes of them when they are cancelled and resumed meanwhile.
//!
//! Source: the methods of the same names in `distributed/worker_state_machine.py`.

use std::sync::Arc;

use crate::proto::RunId;

use super::collections::Id;
use super::event::{ErrorMessage, Stored};
use super::instruction::{Instruction, Report};
use super::task::{Previous, State, StateName, Task};
use super::transition::{Finish, Recs};
use super::{Recommendations, Step, WorkerState};

/// Where recommendations of [`WorkerState::ensure_computing`] go.
pub(super) trait Recommend {
    fn recommend(&mut self, id: Id<Task>, finish: Finish);
}

impl Recommend for Recs {
    fn recommend(&mut self, id: Id<Task>, finish: Finish) {
        self.push((id, finish));
    }
}

impl Recommend for Recommendations {
    fn recommend(&mut self, id: Id<Task>, finish: Finish) {
        self.insert(id, finish);
    }
}

impl WorkerState {
    /// Starts tasks as long as there are idle threads and tasks that could run.
    pub(super) fn ensure_computing(&mut self, recs: &mut impl Recommend) {
        while self.executing.len() < self.config.nthreads {
            // what a runner has begun by itself runs, also while the worker is paused
            if !self.running && self.promoted.is_empty() {
                break;
            }
            let Some(id) = self.next_ready_task() else { break };
            debug_assert!(self.tasks[id].state.name().is_ready());
            recs.recommend(id, Finish::Executing);
            self.acquire_resources(id);
            self.executing.insert(id);
        }
    }

    /// Takes the task that is to run next out of `ready` or `constrained`.
    fn next_ready_task(&mut self) -> Option<Id<Task>> {
        if let Some(id) = self.promoted.shift_remove_index(0) {
            self.ready.discard(id);
            return Some(id);
        }
        let ready = self.ready.peek();
        let Some(constrained) = self.constrained.peek() else { return self.ready.pop() };
        let goes_first = match ready {
            Some(ready) => self.tasks[constrained].priority < self.tasks[ready].priority,
            None => true,
        };
        if goes_first && self.resources_suffice(constrained) {
            return self.constrained.pop();
        }
        self.ready.pop()
    }

    fn resources_suffice(&self, id: Id<Task>) -> bool {
        let available =
            |name| self.available_resources.iter().find(|(n, _)| n == name).map_or(0.0, |(_, q)| *q);
        self.tasks[id].resource_restrictions.iter().all(|(name, needed)| available(name) >= *needed)
    }

    fn acquire_resources(&mut self, id: Id<Task>) {
        self.change_resources(id, -1.0);
    }

    pub(super) fn release_resources(&mut self, id: Id<Task>) {
        self.change_resources(id, 1.0);
    }

    fn change_resources(&mut self, id: Id<Task>, sign: f64) {
        for (name, needed) in &self.tasks[id].resource_restrictions {
            if let Some((_, quantity)) = self.available_resources.iter_mut().find(|(n, _)| n == name) {
                *quantity += sign * needed;
            }
        }
    }

    /// `_transition_released_waiting`
    pub(super) fn released_waiting(&mut self, id: Id<Task>, recs: &mut Recs) {
        let mut dependencies = std::mem::take(&mut self.tasks[id].dependencies);
        let mut waiting_for = 0;
        for (dep, link) in &mut dependencies {
            let dependency = &mut self.tasks[*dep];
            link.waiting = dependency.state.name() != StateName::Memory;
            if link.waiting {
                waiting_for += 1;
                if !std::mem::replace(&mut link.waiter, true) {
                    dependency.waiters += 1;
                }
                recs.push((*dep, Finish::Fetch));
            }
        }
        let task = &mut self.tasks[id];
        task.dependencies = dependencies;
        task.waiting_for_data = waiting_for;
        task.state = State::Waiting;
        self.waiting.insert(id);
        if waiting_for == 0 {
            recs.push((id, Finish::Ready));
        }
    }

    /// `_transition_waiting_ready`
    pub(super) fn waiting_ready(&mut self, id: Id<Task>, recs: &mut Recs) {
        let task = &mut self.tasks[id];
        if !task.resource_restrictions.is_empty() {
            recs.push((id, Finish::Constrained));
            return;
        }
        task.state = State::Ready;
        let priority = task.priority.clone().unwrap_or_default();
        self.waiting.swap_remove(&id);
        self.ready.add(id, priority);
        self.ensure_computing(recs);
    }

    /// `_transition_waiting_constrained`
    pub(super) fn waiting_constrained(&mut self, id: Id<Task>, recs: &mut Recs) {
        let task = &mut self.tasks[id];
        task.state = State::Constrained;
        let priority = task.priority.clone().unwrap_or_default();
        self.waiting.swap_remove(&id);
        self.constrained.add(id, priority);
        self.ensure_computing(recs);
    }

    /// `_transition_ready_executing`, `_transition_constrained_executing`
    pub(super) fn ready_executing(&mut self, id: Id<Task>, step: &mut Step<'_>) {
        let task = &mut self.tasks[id];
        task.state = State::Executing;
        step.out.push(Instruction::Execute { key: task.key.clone(), stimulus_id: step.stimulus_id.clone() });
    }

    /// `_transition_executing_released`: what runs can't be stopped; its end is awaited.
    pub(super) fn executing_released(&mut self, id: Id<Task>) {
        let task = &mut self.tasks[id];
        debug_assert!(!task.done);
        task.state = State::Cancelled(match task.state {
            State::LongRunning => Previous::LongRunning,
            _ => Previous::Executing,
        });
    }

    /// `_transition_executing_rescheduled`: the task raised `Reschedule`.
    pub(super) fn executing_rescheduled(&mut self, id: Id<Task>, step: &mut Step<'_>, recs: &mut Recs) {
        step.send(Report::Reschedule { key: self.tasks[id].key.clone() });
        self.generic_released(id, step, recs);
    }

    /// `_transition_executing_long_running`
    pub(super) fn executing_long_running(
        &mut self,
        id: Id<Task>,
        compute_duration: f64,
        step: &mut Step<'_>,
        recs: &mut Recs,
    ) {
        let task = &mut self.tasks[id];
        task.state = State::LongRunning;
        step.send(Report::LongRunning {
            key: task.key.clone(),
            run_id: task.run_id,
            compute_duration: Some(compute_duration),
        });
        self.executing.swap_remove(&id);
        self.long_running.insert(id);
        self.ensure_computing(recs);
    }

    /// `_transition_executing_memory`
    pub(super) fn executing_memory(
        &mut self,
        id: Id<Task>,
        stored: Stored,
        run_id: RunId,
        step: &mut Step<'_>,
        recs: &mut Recs,
    ) {
        self.put_in_memory(id, stored, step, recs);
        self.send_task_finished(id, run_id, step);
    }

    /// `_transition_generic_error`
    pub(super) fn generic_error(
        &mut self,
        id: Id<Task>,
        error: Arc<ErrorMessage>,
        run_id: RunId,
        step: &mut Step<'_>,
    ) {
        self.missing.swap_remove(&id);
        let task = &mut self.tasks[id];
        task.state = State::Error(error.clone());
        step.send(Report::TaskErred {
            key: task.key.clone(),
            run_id,
            error: (*error).clone(),
            thread: task.thread,
            startstops: task.startstops.clone(),
        });
    }

    /// `_transition_cancelled_released`: the end of something nobody waits for any more.
    pub(super) fn cancelled_released(&mut self, id: Id<Task>, step: &mut Step<'_>, recs: &mut Recs) {
        if self.tasks[id].done {
            self.generic_released(id, step, recs);
        }
    }

    /// `_transition_cancelled_fetch`
    pub(super) fn cancelled_fetch(&mut self, id: Id<Task>, step: &Step<'_>, recs: &mut Recs) {
        let wanted_again = self.tasks[id].done && self.is_waited_for(id);
        let task = &mut self.tasks[id];
        let State::Cancelled(previous) = task.state else { return };
        match previous {
            Previous::Flight { .. } if wanted_again => {
                // Another end of this event has made a task wait for it again, but Dask lets go of it.
                task.state = State::Released;
                task.done = false;
                recs.push((id, Finish::Fetch));
                self.repaired(id, "wanted again as its cancelled transfer ended", step);
            }
            Previous::Flight { .. } if task.done => recs.push((id, Finish::Released)),
            // never mind the cancellation
            Previous::Flight { from } => task.state = State::Flight { from },
            Previous::Executing | Previous::LongRunning => task.state = State::Resumed(previous),
        }
    }

    /// Whether a dependent waits for it now; `waiters` counts those that have begun to run since, too.
    fn is_waited_for(&self, id: Id<Task>) -> bool {
        let task = &self.tasks[id];
        let waits = |dependent: &Id<Task>| {
            self.tasks[*dependent].dependencies.get(&id).is_some_and(|link| link.waiting)
        };
        task.waiters > 0 && task.dependents.iter().any(waits)
    }

    /// `_transition_cancelled_waiting`
    pub(super) fn cancelled_waiting(&mut self, id: Id<Task>, step: &mut Step<'_>) {
        let task = &mut self.tasks[id];
        let State::Cancelled(previous) = task.state else { return };
        debug_assert!(!task.done);
        match previous {
            Previous::Executing => task.state = State::Executing,
            Previous::LongRunning => {
                // The scheduler may not know that it seceded; if it does, it is told twice.
                task.state = State::LongRunning;
                let (key, run_id) = (task.key.clone(), task.run_id);
                step.send(Report::LongRunning { key, run_id, compute_duration: None });
            }
            Previous::Flight { .. } => task.state = State::Resumed(previous),
        }
    }

    /// `_transition_cancelled_or_resumed_long_running`: the scheduler is not told now, but when the task is wanted again.
    pub(super) fn cancelled_or_resumed_long_running(&mut self, id: Id<Task>, recs: &mut Recs) {
        let state = &mut self.tasks[id].state;
        match state {
            State::Cancelled(previous) | State::Resumed(previous) if previous.is_running() => {
                *previous = Previous::LongRunning;
            }
            _ => return,
        }
        self.executing.swap_remove(&id);
        self.long_running.insert(id);
        self.ensure_computing(recs);
    }

    /// `_transition_resumed_error`: forget the error and go the other way.
    pub(super) fn resumed_error(&mut self, id: Id<Task>, recs: &mut Recs) {
        let task = &mut self.tasks[id];
        let State::Resumed(previous) = task.state else { return };
        debug_assert!(task.done);
        let next = if previous.is_running() { Finish::Fetch } else { Finish::Waiting };
        task.state = State::Released;
        task.done = false;
        recs.push((id, next));
    }

    /// `_transition_resumed_rescheduled`
    pub(super) fn resumed_rescheduled(&mut self, id: Id<Task>, recs: &mut Recs) {
        self.resumed_error(id, recs);
    }

    /// `_transition_resumed_fetch`
    pub(super) fn resumed_fetch(&mut self, id: Id<Task>, recs: &mut Recs) {
        let task = &mut self.tasks[id];
        let State::Resumed(Previous::Flight { from }) = task.state else { return };
        if task.done {
            // The transfer brought nothing: compute it, as the scheduler had asked for.
            task.state = State::Released;
            task.done = false;
            recs.push((id, Finish::Waiting));
        } else {
            // Back where it began.
            task.state = State::Flight { from };
        }
    }

    /// `_transition_resumed_released`
    pub(super) fn resumed_released(&mut self, id: Id<Task>, step: &mut Step<'_>, recs: &mut Recs) {
        let task = &mut self.tasks[id];
        let State::Resumed(previous) = task.state else { return };
        if !task.done {
            task.state = State::Cancelled(previous);
            return;
        }
        // Its end has come in this same event, but a dependent's release prevailed. Dask raises.
        self.repaired(id, "released as it ended", step);
        if previous.is_running() {
            self.generic_released(id, step, recs);
        } else {
            // to be computed here, whoever else lets go of it
            self.resumed_error(id, recs);
        }
    }

    /// `_transition_resumed_memory`: the scheduler expects the news of what was asked for last, not of what was done.
    pub(super) fn resumed_memory(
        &mut self,
        id: Id<Task>,
        stored: Stored,
        run_id: RunId,
        step: &mut Step<'_>,
        recs: &mut Recs,
    ) {
        let was_running = self.tasks[id].state.previous().is_some_and(Previous::is_running);
        self.put_in_memory(id, stored, step, recs);
        if was_running {
            self.send_add_keys(id, step);
        } else {
            self.send_task_finished(id, run_id, step);
        }
    }
}
