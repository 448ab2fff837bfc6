//! The table of transitions, and the way through `released` for what is not in it.
//!
//! Only who leads where; what happens on the way is in `compute`, `fetch` and `memory`.
//! Source: `WorkerState._TRANSITIONS_TABLE` and `WorkerState._transition`.

use std::sync::Arc;

use smallvec::SmallVec;

use crate::proto::{Key, RunId};

use super::collections::Id;
use super::error::{Error, Story};
use super::event::{ErrorMessage, Stored};
use super::log::{LogEntry, Subject};
use super::peer::Peer;
use super::task::{StateName, Task};
use super::{Recommendations, Step, WorkerState};

/// The state a task is to go to, with what is needed to get there.
#[derive(Clone, Debug)]
pub(super) enum Finish {
    Constrained,
    Error { error: Arc<ErrorMessage>, run_id: RunId },
    Executing,
    Fetch,
    Flight { from: Id<Peer> },
    Forgotten,
    LongRunning { compute_duration: f64 },
    Memory { stored: Stored, run_id: RunId },
    Missing,
    Ready,
    Released,
    Rescheduled,
    Waiting,
}

impl Finish {
    pub(super) fn name(&self) -> StateName {
        match self {
            Finish::Constrained => StateName::Constrained,
            Finish::Error { .. } => StateName::Error,
            Finish::Executing => StateName::Executing,
            Finish::Fetch => StateName::Fetch,
            Finish::Flight { .. } => StateName::Flight,
            Finish::Forgotten => StateName::Forgotten,
            Finish::LongRunning { .. } => StateName::LongRunning,
            Finish::Memory { .. } => StateName::Memory,
            Finish::Missing => StateName::Missing,
            Finish::Ready => StateName::Ready,
            Finish::Released => StateName::Released,
            Finish::Rescheduled => StateName::Rescheduled,
            Finish::Waiting => StateName::Waiting,
        }
    }
}

/// What one transition recommends.
pub(super) type Recs = Vec<(Id<Task>, Finish)>;

impl WorkerState {
    /// Brings a task to a state, directly or through `released`.
    pub(super) fn transition(
        &mut self,
        id: Id<Task>,
        finish: Finish,
        step: &mut Step<'_>,
        recs: &mut Recs,
    ) -> Result<(), Error> {
        let start = self.tasks[id].state.name();
        let goal = finish.name();
        if start == goal {
            return Ok(());
        }
        self.transition_counter += 1;
        let before = recs.len();
        if let Some(finish) = self.direct(id, start, finish, step, recs) {
            if start == StateName::Released || goal == StateName::Released {
                return Err(self.invalid_transition(id, start, goal));
            }
            self.through_released(id, start, finish, step, recs)?;
        } else if let Some(watched) = &mut self.watched {
            watched.push((self.tasks[id].key.clone(), start, goal));
        }
        let recommendations: SmallVec<[(Key, StateName); 1]> =
            recs[before..].iter().map(|(id, f)| (self.tasks[*id].key.clone(), f.name())).collect();
        let task = &self.tasks[id];
        let (key, finish) = (task.key.clone(), task.state.name());
        self.record(step, LogEntry::Transition { key, start, recommended: goal, finish, recommendations });
        Ok(())
    }

    /// The table. Gives `finish` back where there is no direct way.
    fn direct(
        &mut self,
        id: Id<Task>,
        start: StateName,
        finish: Finish,
        step: &mut Step<'_>,
        recs: &mut Recs,
    ) -> Option<Finish> {
        use Finish as F;
        use StateName as S;
        match (start, finish) {
            (
                S::Cancelled,
                F::Error { .. } | F::Memory { .. } | F::Missing | F::Released | F::Rescheduled,
            ) => self.cancelled_released(id, step, recs),
            (S::Cancelled, F::Fetch) => self.cancelled_fetch(id, step, recs),
            (S::Cancelled, F::Waiting) => self.cancelled_waiting(id, step),
            (S::Cancelled | S::Resumed, F::LongRunning { .. }) => {
                self.cancelled_or_resumed_long_running(id, recs);
            }
            (S::Resumed, F::Error { .. }) => self.resumed_error(id, recs),
            (S::Resumed, F::Fetch) => self.resumed_fetch(id, recs),
            (S::Resumed, F::Memory { stored, run_id }) => {
                self.resumed_memory(id, stored, run_id, step, recs);
            }
            (S::Resumed, F::Released) => self.resumed_released(id, step, recs),
            (S::Resumed, F::Rescheduled) => self.resumed_rescheduled(id, recs),
            (S::Constrained | S::Ready, F::Executing) => self.ready_executing(id, step),
            (S::Constrained | S::Error | S::Ready | S::Waiting, F::Released) => {
                self.generic_released(id, step, recs);
            }
            (S::Executing | S::LongRunning, F::Memory { stored, run_id }) => {
                self.executing_memory(id, stored, run_id, step, recs);
            }
            (S::Executing, F::LongRunning { compute_duration }) => {
                self.executing_long_running(id, compute_duration, step, recs);
            }
            (S::Executing | S::LongRunning, F::Released) => self.executing_released(id),
            (S::Executing | S::LongRunning, F::Rescheduled) => self.executing_rescheduled(id, step, recs),
            (
                S::Executing | S::Flight | S::LongRunning | S::Missing | S::Released,
                F::Error { error, run_id },
            ) => self.generic_error(id, error, run_id, step),
            (S::Fetch, F::Flight { from }) => self.fetch_flight(id, from),
            (S::Fetch, F::Missing) => self.fetch_missing(id),
            (S::Fetch, F::Released) => self.fetch_released(id, step, recs),
            (S::Flight, F::Fetch) => self.flight_fetch(id, recs),
            (S::Flight, F::Memory { stored, .. }) => self.flight_memory(id, stored, step, recs),
            (S::Flight | S::Released, F::Missing) => self.generic_missing(id),
            (S::Flight, F::Released) => self.flight_released(id, step, recs),
            (S::Memory, F::Released) => self.memory_released(id, step, recs),
            (S::Missing, F::Fetch) => self.missing_fetch(id, recs),
            (S::Missing, F::Released) => self.missing_released(id, step, recs),
            (S::Missing, F::Waiting) => self.missing_waiting(id, step, recs),
            // not in Dask's table: a dependency was lost (see `lost`)
            (S::Ready | S::Constrained, F::Waiting) => self.ready_waiting(id),
            (S::Released, F::Fetch) => self.generic_fetch(id, recs),
            (S::Released, F::Forgotten) => self.released_forgotten(id, step, recs),
            (S::Released, F::Memory { stored, .. }) => self.released_memory(id, stored, step, recs),
            (S::Released, F::Waiting) => self.released_waiting(id, recs),
            (S::Waiting, F::Constrained) => self.waiting_constrained(id, recs),
            (S::Waiting, F::Ready) => self.waiting_ready(id, recs),
            (_, finish) => return Some(finish),
        }
        None
    }

    /// start -> released -> finish; whatever `released` recommends for the task itself comes in between, but `forgotten`.
    fn through_released(
        &mut self,
        id: Id<Task>,
        start: StateName,
        finish: Finish,
        step: &mut Step<'_>,
        recs: &mut Recs,
    ) -> Result<(), Error> {
        let goal = finish.name();
        let mut part = Recs::new();
        self.transition(id, Finish::Released, step, &mut part)?;
        let state = self.tasks[id].state.name();
        if state == start {
            // released did not take it anywhere: the same question would be asked for ever
            return Err(self.invalid_transition(id, start, goal));
        }
        let mut merged = Recommendations::default();
        self.merge(&mut merged, &mut part, step);
        while let Some(next) = merged.shift_remove(&id) {
            if matches!(next, Finish::Forgotten) {
                continue;
            }
            self.transition(id, next, step, &mut part)?;
            self.merge(&mut merged, &mut part, step);
        }
        self.transition(id, finish, step, &mut part)?;
        self.merge(&mut merged, &mut part, step);
        recs.extend(merged);
        Ok(())
    }

    /// `merge_recs_instructions`, but that the later of two recommendations for one task prevails, where Dask raises:
    /// a task in `fetch` lets go of its dependencies on its way to `waiting`, which then wants them.
    fn merge(&mut self, into: &mut Recommendations, part: &mut Recs, step: &Step<'_>) {
        for (id, finish) in part.drain(..) {
            let recommended = finish.name();
            if into.insert(id, finish).is_some_and(|before| before.name() != recommended) {
                self.repaired(id, "conflicting recommendations", step);
            }
        }
    }

    /// Tells in the log that Dask would not have come through here.
    pub(super) fn repaired(&mut self, id: Id<Task>, trouble: &'static str, step: &Step<'_>) {
        self.record(step, LogEntry::Repaired { key: self.tasks[id].key.clone(), trouble });
    }

    fn invalid_transition(&self, id: Id<Task>, start: StateName, finish: StateName) -> Error {
        Error::InvalidTransition { key: self.tasks[id].key.clone(), start, finish, story: self.story_of(id) }
    }

    pub(super) fn story_of(&self, id: Id<Task>) -> Story {
        Story(self.log.story(&[Subject::Key(self.tasks[id].key.clone())]))
    }
}
