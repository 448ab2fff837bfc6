//! The ends of runners: what each means for the jobs they had.
//!
//! Synchronous, under the pool's lock.

use std::sync::Arc;

use super::Event;
use super::dispatch::{fail, forget_place};
use super::pool::{Shared, State};
use super::slot::{Queued, RETIRED, Recalled, Runner};
use super::verdict::{self, Cause};
use crate::proto::{Key, RunId};
use crate::sys::PidFd;

/// Runners in a row that may end before they ran anything; then jobs fail instead of waiting for the next.
const BARREN_MAX: u32 = 3;

impl Shared {
    /// The zygote forked a runner.
    pub(super) fn runner_forked(&self, id: u64, pid: u32, process: PidFd) {
        let mut state = self.state();
        if let Some(runner) = state.runners.get_mut(&id) {
            runner.pid = Some(pid);
            runner.process = Some(process);
            if let Some(cause) = runner.doom.clone().filter(|cause| *cause != RETIRED) {
                runner.kill(cause);
            }
        }
    }

    /// A runner ended: what it said before comes first, so its burial waits for that.
    pub(super) fn runner_ended(&self, id: u64, cause: Cause, peak: u64) {
        let mut state = self.state();
        state.idle.retain(|&idle| idle != id);
        if let Some(runner) = state.runners.get_mut(&id) {
            runner.exit.get_or_insert((cause, peak));
            runner.exited.notify_one();
        }
    }

    /// Kills a runner that cannot be trusted any more.
    pub(super) fn condemn(&self, id: u64, cause: Cause) {
        let mut state = self.state();
        state.idle.retain(|&idle| idle != id);
        if let Some(runner) = state.runners.get_mut(&id) {
            runner.kill(cause);
        }
    }

    /// Decides on the jobs of a runner that is dead and has said all.
    pub(super) fn bury(self: &Arc<Self>, id: u64) {
        let mut state = self.state();
        let Some(mut runner) = state.runners.remove(&id) else { return };
        state.idle.retain(|&idle| idle != id);
        runner.finish_output(self);
        self.buried.notify_waiters();
        if state.stopping {
            // whoever waits for a result to be published must hear that it will not be
            runner.home.lose();
            return;
        }
        let (ended, peak) = runner.exit.take().unwrap_or((Cause::ZygoteLost, 0));
        let cause = match runner.doom.take() {
            Some(Cause::OutOfMemory { limit, peak: seen }) => {
                Cause::OutOfMemory { limit, peak: peak.max(seen) }
            }
            Some(doom) => doom,
            None => ended,
        };
        let retired = cause == RETIRED && runner.queue.is_empty();
        if !runner.proven && runner.mailbox.started() == 0 {
            state.barren += 1;
        }
        if let Some(key) = runner.actor.take() {
            state.actor_died(id, key, &cause);
        }
        let (blamed, requeued) = state.share_out(self, id, &mut runner, &cause);
        if !retired {
            let pid = runner.pid;
            self.emit(Event::RunnerDied { pid, cause, key: blamed, requeued });
        }
        state.fill(self);
        state.unpark(self);
        state.flush();
    }
}

impl State {
    /// The jobs of a dead runner: the one it ran is tried again or fails, others go elsewhere. Returns the job it
    /// ran, and those that are nobody's now.
    fn share_out(
        &mut self,
        shared: &Arc<Shared>,
        id: u64,
        runner: &mut Runner,
        cause: &Cause,
    ) -> (Option<Key>, Vec<(Key, RunId)>) {
        let started = runner.mailbox.started();
        let tail = runner.tail.text();
        let (mut blamed, mut requeued, mut again) = (None, Vec::new(), Vec::new());
        let lost = runner.home.lose();
        for queued in runner.queue.drain(..).filter(|queued| queued.recall != Recalled::Yes) {
            let key = queued.key().clone();
            forget_place(&mut self.places, id, &queued);
            let Queued { seq, mut attempt, prefetched, recall, .. } = queued;
            // what started before it was done, and its result kept: it is run again without blame
            let ran = seq == started;
            if ran {
                blamed = Some(key.clone());
            }
            if recall == Recalled::Asked && (*cause == Cause::Cancelled || !ran) {
                shared.emit(Event::Skipped { key, run_id: attempt.job.run_id });
            } else if !ran && prefetched {
                requeued.push((key, attempt.job.run_id));
            } else if !ran && self.barren <= BARREN_MAX {
                again.push(attempt);
            } else {
                attempt.crashes += 1;
                if cause.may_retry() && ran && attempt.crashes < shared.config.attempts {
                    again.push(attempt);
                } else {
                    let died = verdict::exception(&format!("{key:?}"), cause, attempt.crashes, &tail);
                    fail(shared, &attempt.job, &died);
                }
            }
        }
        // after failures: what the scheduler is told of a task that waits for lost inputs again it does not believe
        if !lost.is_empty() {
            shared.emit(Event::Lost { results: lost });
        }
        // in their old order, before what came later
        for attempt in again.into_iter().rev() {
            // what a crash left in the process's surroundings must not meet it again in an old runner
            let fresh = attempt.crashes > 0 && self.width() < shared.config.slots && self.zygote.is_there();
            match fresh.then(|| self.fork(shared)) {
                Some(Ok(id)) => self.hand_over(shared, id, attempt, false),
                _ => self.pending.push_front(attempt),
            }
        }
        (blamed, requeued)
    }
}
