//! Transitions into memory, out of it, and out of the worker's mind.
//!
//! Source: `_transition_to_memory`, `_transition_generic_released`, `_transition_released_forgotten`, `_purge_state`.

use crate::proto::RunId;

use super::collections::Id;
use super::event::{Stored, TypeInfo};
use super::instruction::{Instruction, Report};
use super::log::LogEntry;
use super::task::{State, StateName, Task};
use super::transition::{Finish, Recs};
use super::{Step, WorkerState};

impl WorkerState {
    /// `_transition_to_memory`, but for the message: the one place where a task gets its value.
    pub(super) fn put_in_memory(
        &mut self,
        id: Id<Task>,
        stored: Stored,
        step: &mut Step<'_>,
        recs: &mut Recs,
    ) {
        let task = &mut self.tasks[id];
        if !task.actor {
            task.in_data = true;
        }
        task.state = State::Memory;
        self.nbytes += *task.nbytes.get_or_insert(stored.nbytes);
        task.type_ = stored.type_;
        let key = task.key.clone();
        let dependents = std::mem::take(&mut task.dependents);
        for &dependent in &dependents {
            let task = &mut self.tasks[dependent];
            if let Some(link) = task.dependencies.get_mut(&id)
                && std::mem::replace(&mut link.waiting, false)
            {
                task.waiting_for_data -= 1;
            }
            if task.waiting_for_data == 0 && task.state.name() == StateName::Waiting {
                recs.push((dependent, Finish::Ready));
            }
        }
        self.tasks[id].dependents = dependents;
        self.record(step, LogEntry::PutInMemory { key });
    }

    /// `_get_task_finished_msg`
    pub(super) fn send_task_finished(&mut self, id: Id<Task>, run_id: RunId, step: &mut Step<'_>) {
        let task = &self.tasks[id];
        step.send(Report::TaskFinished {
            key: task.key.clone(),
            run_id,
            nbytes: task.nbytes.unwrap_or(0),
            type_: task.type_.clone().unwrap_or_else(TypeInfo::unknown),
            metadata: task.metadata.clone(),
            thread: task.thread,
            startstops: task.startstops.clone(),
        });
    }

    pub(super) fn send_add_keys(&mut self, id: Id<Task>, step: &mut Step<'_>) {
        step.send(Report::AddKeys { keys: vec![self.tasks[id].key.clone()] });
    }

    /// `_transition_released_memory`: scattered; the scheduler learns of it from who scattered it.
    pub(super) fn released_memory(
        &mut self,
        id: Id<Task>,
        stored: Stored,
        step: &mut Step<'_>,
        recs: &mut Recs,
    ) {
        self.put_in_memory(id, stored, step, recs);
    }

    /// `_transition_memory_released`
    pub(super) fn memory_released(&mut self, id: Id<Task>, step: &mut Step<'_>, recs: &mut Recs) {
        let task = &self.tasks[id];
        let key = task.key.clone();
        self.nbytes = self.nbytes.saturating_sub(task.nbytes.unwrap_or(0));
        self.generic_released(id, step, recs);
        step.send(Report::ReleaseWorkerData { key });
    }

    /// `_transition_generic_released`
    pub(super) fn generic_released(&mut self, id: Id<Task>, step: &mut Step<'_>, recs: &mut Recs) {
        self.purge(id, step);
        self.tasks[id].state = State::Released;
        let task = &self.tasks[id];
        for &dep in task.dependencies.keys() {
            let dependency = &self.tasks[dep];
            let state = dependency.state.name();
            if dependency.waiters == 0 && !state.is_processing() && state != StateName::Memory {
                recs.push((dep, Finish::Released));
            }
        }
        if task.dependents.is_empty() {
            recs.push((id, Finish::Forgotten));
        }
    }

    /// `_transition_released_forgotten`
    pub(super) fn released_forgotten(&mut self, id: Id<Task>, step: &mut Step<'_>, recs: &mut Recs) {
        debug_assert!(self.tasks[id].dependents.is_empty());
        self.purge(id, step);
        let task = &mut self.tasks[id];
        task.state = State::Forgotten;
        self.keys.remove(&task.key);
        let dependencies = std::mem::take(&mut task.dependencies);
        for &dep in dependencies.keys() {
            let dependency = &mut self.tasks[dep];
            dependency.dependents.swap_remove(&id);
            if matches!(dependency.state, State::Released) && dependency.dependents.is_empty() {
                recs.push((dep, Finish::Forgotten));
            }
        }
        self.forgotten.push(id);
    }

    /// `_purge_state`: everything about a task that its state brought along is undone; the caller sets the new state.
    pub(super) fn purge(&mut self, id: Id<Task>, step: &mut Step<'_>) {
        let task = &mut self.tasks[id];
        if matches!(task.state, State::Memory) {
            step.out.push(Instruction::DropData { key: task.key.clone() });
        }
        task.in_data = false;
        task.actor = false;
        task.thread = None;
        task.nbytes = None;
        task.done = false;
        task.waiting_for_data = 0;
        for peer in std::mem::take(&mut task.who_has) {
            let peer = &mut self.peers[peer];
            peer.has_what.swap_remove(&id);
            peer.data_needed.discard(id);
        }
        let mut dependencies = std::mem::take(&mut self.tasks[id].dependencies);
        for (dep, link) in &mut dependencies {
            link.waiting = false;
            if std::mem::replace(&mut link.waiter, false) {
                self.tasks[*dep].waiters -= 1;
            }
        }
        self.tasks[id].dependencies = dependencies;
        self.missing.swap_remove(&id);
        self.ready.discard(id);
        self.constrained.discard(id);
        self.promoted.shift_remove(&id);
        self.executing.swap_remove(&id);
        self.long_running.swap_remove(&id);
        self.in_flight_tasks.swap_remove(&id);
        self.waiting.swap_remove(&id);
    }
}
