//! Which events Dask's worker can be sent in a given state: what its scheduler would never do, and what its own code
//! calls misuse, is left out, each with its reason.

use iqoqo_dask_worker::state::StateName as S;

use crate::event::{Ev, K};
use crate::world::Worker;

impl Worker<'_> {
    pub fn is_legal(&self, event: &Ev) -> bool {
        match event {
            Ev::Compute { key, deps, .. } => self.may_compute(*key, deps.iter().map(|(dep, _, _)| *dep)),
            // The handler asserts that there are no dependents.
            Ev::Cancel(key) => !self.not_started(*key) || !self.has_dependents(*key),
            Ev::Free(keys) => keys.iter().all(|key| self.may_release(*key, keys)),
            Ev::RemoveReplicas(keys) => {
                keys.iter().all(|key| self.state_of(*key) != Some(S::Memory) || self.may_release(*key, &[]))
            }
            Ev::Acquire(items) => items
                .iter()
                .all(|(key, workers, _)| !workers.is_empty() && self.may_come_from_elsewhere(*key)),
            Ev::Steal(key) => !self.not_started(*key) || !self.is_waited_for(*key),
            Ev::RemoveWorker(worker) => *worker != 0,
            Ev::UpdateData(items) => items.iter().all(|(key, _)| self.may_scatter(*key)),
            Ev::GatherSuccess(worker, items) => self
                .gathering
                .get(worker)
                .is_some_and(|(asked, _)| items.iter().all(|(key, _)| asked.contains(key))),
            Ev::GatherBusy(worker) | Ev::GatherNetworkFailure(worker) => self.gathering.contains_key(worker),
            // Dask has a dependent wait for a task in error for ever (dask/distributed#6705), against its own invariants.
            Ev::GatherFailure(worker) => self.gathering.get(worker).is_some_and(|(asked, _)| {
                !asked.iter().any(|key| self.state_of(*key) == Some(S::Flight) && self.is_waited_for(*key))
            }),
            Ev::RetryBusyWorker(worker) => self.retries.contains(worker),
            Ev::ExecuteSuccess(key, _) => self.runs_here(*key),
            // As for GatherFailure.
            Ev::ExecuteFailure(key, _) | Ev::Reschedule(key) => {
                self.runs_here(*key) && !(self.is_processing(*key) && self.is_waited_for(*key))
            }
            // Only a running task can secede; that of an unknown one may come late.
            Ev::Secede(key) => self.runs_here(*key) || self.state_of(*key).is_none(),
            Ev::Refresh(_) | Ev::Pause | Ev::Unpause | Ev::FindMissing | Ev::DataLost(_) => true,
        }
    }

    /// The scheduler sends a task only when all its dependencies are in memory somewhere.
    fn may_compute(&self, key: K, mut deps: impl Iterator<Item = K>) -> bool {
        if self.world.actors[key] {
            let task = self.state.task(&self.world.keys[key]);
            // The worker marks the task as an actor at once; on the way from any other state through `released` the
            // mark is wiped off again, and in flight it breaks an invariant.
            let fresh = task.is_none_or(|task| task.state_name() == S::Released && task.nbytes().is_none());
            if !fresh && !self.is_processing(key) && self.state_of(key) != Some(S::Memory) {
                return false;
            }
        }
        self.is_processing(key) || deps.all(|dep| self.may_come_from_elsewhere(dep))
    }

    /// There is no replica of a task that is to be computed here, nor of an actor that runs, cancelled or not: to be told
    /// the size of one breaks Dask's sum of what is in memory.
    fn may_come_from_elsewhere(&self, key: K) -> bool {
        let task = self.state.task(&self.world.keys[key]);
        let budding = task.is_some_and(|task| task.is_actor() && task.state_name() != S::Memory);
        !self.is_processing(key) && !budding
    }

    /// Dask's invariants break when a task that runs or is in flight is to be computed: where its dependencies are is
    /// noted, but nothing fetches one that was missing until the scheduler is asked about it.
    pub fn strands_a_missing_task(&self, event: &Ev) -> bool {
        let Ev::Compute { key, deps, .. } = event else { return false };
        matches!(self.state_of(*key), Some(S::Cancelled | S::Flight | S::Resumed))
            && deps.iter().any(|(dep, _, _)| self.state_of(*dep) == Some(S::Missing))
    }

    /// Dask raises `RecommendationsConflict` when a task goes through `released` to `waiting` and has a dependency that
    /// no other task waits for: it is let go and wanted at once.
    pub fn fails_in_dask(&self, event: &Ev) -> bool {
        let Ev::Compute { key, deps, .. } = event else { return false };
        if !matches!(self.state_of(*key), Some(S::Fetch | S::Error)) {
            return self.strands_a_missing_task(event);
        }
        deps.iter().any(|(dep, _, _)| {
            let Some(task) = self.state.task(&self.world.keys[*dep]) else { return true };
            let others = self.state.waiters(task).filter(|waiter| **waiter != self.world.keys[*key]).count();
            others == 0 && !self.is_processing(*dep) && task.state_name() != S::Memory
        })
    }

    /// The scheduler frees a key only when nothing that is processed here needs it, or is freed with it.
    fn may_release(&self, key: K, also: &[K]) -> bool {
        let Some(task) = self.state.task(&self.world.keys[key]) else { return true };
        let mut dependents = self.state.dependents(task).map(|key| self.world.number(key));
        dependents.all(|dependent| also.contains(&dependent) || !self.is_processing(dependent))
    }

    /// Dask calls a scatter over a task in these states a race that is "expected to misbehave"; mostly it raises.
    fn may_scatter(&self, key: K) -> bool {
        !matches!(self.state_of(key), Some(S::Executing | S::LongRunning | S::Flight | S::Resumed))
    }

    fn runs_here(&self, key: K) -> bool {
        let key = &self.world.keys[key];
        self.state.executing().any(|k| k == key) || self.state.long_running().any(|k| k == key)
    }

    fn is_processing(&self, key: K) -> bool {
        self.not_started(key) || matches!(self.state_of(key), Some(S::Executing | S::LongRunning))
    }

    fn not_started(&self, key: K) -> bool {
        matches!(self.state_of(key), Some(S::Waiting | S::Ready | S::Constrained))
    }

    fn has_dependents(&self, key: K) -> bool {
        let task = self.state.task(&self.world.keys[key]);
        task.is_some_and(|task| self.state.dependents(task).next().is_some())
    }

    fn is_waited_for(&self, key: K) -> bool {
        let key = &self.world.keys[key];
        let Some(task) = self.state.task(key) else { return false };
        let mut dependents = self.state.dependents(task).filter_map(|k| self.state.task(k));
        dependents.any(|dependent| self.state.waiting_for_data(dependent).any(|k| k == key))
    }
}
