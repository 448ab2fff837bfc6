//! What follows when a task's computation ends.
//!
//! Source: `_execute_done_common`, `_handle_execute_success`, `_handle_execute_failure`, `_handle_reschedule`.

use std::sync::Arc;

use crate::proto::Key;

use super::collections::Id;
use super::error::{Error, Story};
use super::event::{Action, EventKind, StartStop, Stored};
use super::log::Subject;
use super::task::Task;
use super::transition::Finish;
use super::{Recommendations, WorkerState};

impl WorkerState {
    /// Any of the three ways in which an `Execute` ends.
    pub(super) fn on_execute_done(
        &mut self,
        kind: &mut EventKind,
        recs: &mut Recommendations,
    ) -> Result<(), Error> {
        match kind {
            EventKind::ExecuteSuccess {
                key,
                run_id,
                start,
                stop,
                nbytes,
                type_,
                thread,
                startstops,
                metadata,
            } => {
                let id = self.end_execution(key, "ExecuteSuccess", recs)?;
                let task = &mut self.tasks[id];
                task.thread = thread.or(task.thread);
                task.startstops.append(startstops);
                task.startstops.push(compute(*start, *stop));
                task.nbytes = Some(*nbytes);
                if let Some(metadata) = metadata.take() {
                    task.metadata = Some(metadata);
                }
                let stored = Stored { nbytes: *nbytes, type_: type_.clone() };
                recs.insert(id, Finish::Memory { stored, run_id: *run_id });
            }
            EventKind::ExecuteFailure { key, run_id, start, stop, error, thread } => {
                let id = self.end_execution(key, "ExecuteFailure", recs)?;
                let task = &mut self.tasks[id];
                task.thread = thread.or(task.thread);
                if let (Some(start), Some(stop)) = (start, stop) {
                    task.startstops.push(compute(*start, *stop));
                }
                recs.insert(id, Finish::Error { error: Arc::new(error.clone()), run_id: *run_id });
            }
            EventKind::Reschedule { key } => {
                let id = self.end_execution(key, "Reschedule", recs)?;
                recs.insert(id, Finish::Rescheduled);
            }
            _ => {}
        }
        Ok(())
    }

    /// `_execute_done_common`. A task that runs is never forgotten, thanks to the cancelled state.
    fn end_execution(
        &mut self,
        key: &Key,
        event: &'static str,
        recs: &mut Recommendations,
    ) -> Result<Id<Task>, Error> {
        let running = |id: &Id<Task>| self.executing.contains(id) || self.long_running.contains(id);
        let Some(id) = self.id(key).filter(running) else {
            let story = Story(self.log.story(&[Subject::Key(key.clone())]));
            return Err(Error::UnknownTask { key: key.clone(), event, story });
        };
        self.tasks[id].done = true;
        self.executed_count += 1;
        self.release_resources(id);
        self.executing.swap_remove(&id);
        self.long_running.swap_remove(&id);
        self.ensure_computing(recs);
        Ok(id)
    }
}

fn compute(start: f64, stop: f64) -> StartStop {
    StartStop { action: Action::Compute, start, stop, source: None }
}
