//! What the scheduler, or a client, asks for.
//!
//! Source: `_handle_compute_task` and its neighbours in `distributed/worker_state_machine.py`.

use std::sync::Arc;

use smallvec::smallvec;

use crate::proto::{Address, ComputeTask, Key, Priority, RunId};

use super::collections::Id;
use super::error::Error;
use super::event::Stored;
use super::instruction::Report;
use super::log::LogEntry;
use super::task::{State, StateName, Task};
use super::transition::Finish;
use super::{Recommendations, Step, WorkerState};

impl WorkerState {
    /// `_ensure_task_exists`
    fn ensure_task_exists(&mut self, key: &Key, priority: &Priority, step: &Step<'_>) -> Id<Task> {
        let id = self.id_or_new(key);
        let task = &mut self.tasks[id];
        if task.priority.as_ref().is_none_or(|p| p.0.is_empty()) {
            task.priority = Some(priority.clone());
        }
        let state = task.state.name();
        self.record(step, LogEntry::EnsureTaskExists { key: key.clone(), state });
        id
    }

    /// `_handle_compute_task`
    pub(super) fn on_compute_task(
        &mut self,
        order: &mut ComputeTask,
        step: &mut Step<'_>,
        recs: &mut Recommendations,
    ) {
        let id = self.id_or_new(&order.key);
        let state = self.tasks[id].state.name();
        self.record(step, LogEntry::ComputeTask { key: order.key.clone(), state });
        self.tasks[id].run_id = order.run_id;
        // Not to be kept in the stimulus log.
        let run_spec = order.run_spec.take();
        match state {
            StateName::Ready
            | StateName::Constrained
            | StateName::Executing
            | StateName::LongRunning
            | StateName::Waiting => {}
            StateName::Memory => self.send_task_finished(id, order.run_id, step),
            _ => {
                recs.insert(id, Finish::Waiting);
                self.tasks[id].run_spec = run_spec;
                self.accept_order(id, order, step);
            }
        }
    }

    /// Takes over what an order says about a task that is to be computed.
    fn accept_order(&mut self, id: Id<Task>, order: &ComputeTask, step: &Step<'_>) {
        let mut priority = order.priority.clone();
        priority.0.push(self.generation as f64);
        self.generation -= 1;
        let task = &mut self.tasks[id];
        task.actor |= order.actor;
        task.priority = Some(priority.clone());
        task.annotations = Some(order.annotations.clone());
        task.span_id = order.span_id.clone();
        // What it holds while it still runs must be given back in the end.
        if !task.state.previous().is_some_and(|previous| previous.is_running()) {
            task.resource_restrictions = order.resource_restrictions.clone();
        }
        for (key, nbytes) in &order.nbytes {
            let dep = self.ensure_task_exists(key, &priority, step);
            let dependency = &mut self.tasks[dep];
            if dependency.state.name() != StateName::Memory {
                dependency.nbytes = Some(*nbytes);
            }
            dependency.dependents.insert(id);
            self.tasks[id].dependencies.entry(dep).or_default();
        }
        self.update_who_has(&order.who_has);
    }

    /// `_handle_cancel_compute`: best effort.
    pub(super) fn on_cancel_compute(&mut self, key: &Key, step: &Step<'_>, recs: &mut Recommendations) {
        let Some(id) = self.id(key) else { return };
        let task = &self.tasks[id];
        let state = task.state.name();
        // With dependents here, the scheduler would not have sent it: it must have changed its mind.
        if (state.is_ready() || state == StateName::Waiting) && task.dependents.is_empty() {
            self.record(step, LogEntry::CancelCompute { key: key.clone() });
            recs.insert(id, Finish::Released);
        }
    }

    /// `_handle_free_keys`
    pub(super) fn on_free_keys(&mut self, keys: &[Key], step: &Step<'_>, recs: &mut Recommendations) {
        self.record(step, LogEntry::FreeKeys { keys: keys.to_vec() });
        for key in keys {
            if let Some(id) = self.id(key) {
                recs.insert(id, Finish::Released);
            }
        }
    }

    /// `_handle_remove_replicas`
    pub(super) fn on_remove_replicas(
        &mut self,
        keys: &[Key],
        step: &Step<'_>,
        recs: &mut Recommendations,
    ) -> Result<(), Error> {
        for key in keys {
            let Some(id) = self.id(key) else { continue };
            let task = &self.tasks[id];
            if !matches!(task.state, State::Memory) {
                continue;
            }
            // A task that runs may not have read its inputs yet.
            let user = task.dependents.iter().find(|id| self.tasks[**id].state.name().is_running());
            if let Some(user) = user {
                return Err(Error::ReplicaInUse {
                    key: key.clone(),
                    dependent: self.tasks[*user].key.clone(),
                    state: self.tasks[*user].state.name(),
                });
            }
            self.record(step, LogEntry::RemoveReplica { key: key.clone() });
            recs.insert(id, Finish::Released);
        }
        Ok(())
    }

    /// `_handle_acquire_replicas`
    pub(super) fn on_acquire_replicas(
        &mut self,
        who_has: &[(Key, Vec<Address>)],
        nbytes: &[(Key, u64)],
        step: &Step<'_>,
        recs: &mut Recommendations,
    ) {
        // After what computations of default or high user priority need, before what those of low priority do.
        let priority = Priority(smallvec![1.0]);
        for (key, nbytes) in nbytes {
            let id = self.ensure_task_exists(key, &priority, step);
            let task = &mut self.tasks[id];
            if !matches!(task.state, State::Memory) {
                task.nbytes = Some(*nbytes);
                recs.insert(id, Finish::Fetch);
            }
        }
        self.update_who_has(who_has);
    }

    /// `_handle_steal_request`
    pub(super) fn on_steal_request(&mut self, key: &Key, step: &mut Step<'_>, recs: &mut Recommendations) {
        let id = self.id(key);
        let state = id.map(|id| self.tasks[id].state.name());
        step.send(Report::StealResponse { key: key.clone(), state });
        if let (Some(id), Some(state)) = (id, state)
            && (state.is_ready() || state == StateName::Waiting)
        {
            recs.insert(id, Finish::Released);
        }
    }

    /// `_handle_update_data`
    pub(super) fn on_update_data(
        &mut self,
        data: &[(Key, Stored)],
        step: &Step<'_>,
        recs: &mut Recommendations,
    ) {
        for (key, stored) in data {
            let id = self.id_or_new(key);
            let state = &self.tasks[id].state;
            let name = state.name();
            // Where Dask raises: the value of a computation that goes on will take its place.
            let computes = name.is_running() || matches!(state, State::Resumed(_));
            if !computes {
                recs.insert(id, Finish::Memory { stored: stored.clone(), run_id: RunId::NONE });
            }
            self.record(step, LogEntry::ReceiveFromScatter { key: key.clone(), state: name });
        }
    }

    /// `Worker.set_resources`: sets how much there is of some resources.
    pub fn set_resources(&mut self, resources: &[(Arc<str>, f64)]) {
        for (name, quantity) in resources {
            let total = self.total_resources.iter_mut().find(|(n, _)| n == name);
            let available = self.available_resources.iter_mut().find(|(n, _)| n == name);
            match (total, available) {
                (Some((_, total)), Some((_, available))) => {
                    *available += quantity - *total;
                    *total = *quantity;
                }
                _ => {
                    self.total_resources.push((name.clone(), *quantity));
                    self.available_resources.push((name.clone(), *quantity));
                }
            }
        }
    }
}
