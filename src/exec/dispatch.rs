//! Which runner gets which job, and what each word of a runner means for jobs.
//!
//! Synchronous, under the pool's lock.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustc_hash::FxHashMap;

use super::ipc::{self, FromChild, Outgoing, RawFailure, Role, ToChild};
use super::live::Access;
use super::object::{Places, Segments};
use super::pool::{Shared, State};
use super::slot::{self, Attempt, Queued, RETIRED, Recalled, Runner};
use super::verdict::Cause;
use super::{Event, Failed, Finished, Job, Recall};
use crate::proto::{Key, RunId};
use crate::telemetry;
use crate::wire::payload::Exception;
use crate::wire::{Limits, decode_message};

/// Brief jobs that are put into one runner while others are idle: fewer wake-ups for all of them.
const COMPANY_MAX: usize = 4;
/// How long a job that seemed brief may hold up others.
const PATIENCE: Duration = Duration::from_millis(50);

impl State {
    /// Runners that count for the pool's width.
    pub(super) fn width(&self) -> usize {
        self.runners.values().filter(|runner| runner.is_usable()).count()
    }

    /// Finds a runner for a job.
    pub(super) fn place(&mut self, shared: &Arc<Shared>, attempt: Attempt) {
        if self.stopping {
            return;
        }
        let attempt = self.recall_crashes(attempt);
        match self.find_runner(shared, &attempt.job) {
            Ok(Some(id)) => self.hand_over(shared, id, attempt, false),
            Ok(None) => self.pending.push_back(attempt),
            Err(text) => fail(shared, &attempt.job, &Exception::builtin("RuntimeError", text)),
        }
    }

    /// An idle runner, or a new one if there may be one more. For a brief job, one that others are about to be sent to.
    fn find_runner(&mut self, shared: &Arc<Shared>, job: &Job) -> Result<Option<u64>, String> {
        if job.brief
            && let Some(id) = self.company()
        {
            return Ok(Some(id));
        }
        if let Some(id) = self.take_idle(job) {
            return Ok(Some(id));
        }
        if self.width() < shared.config.slots && self.zygote.is_there() {
            return self.fork(shared).map(Some).map_err(|error| telemetry::chain(&error));
        }
        Ok(None)
    }

    fn company(&self) -> Option<u64> {
        let id = *self.unsent.last()?;
        let runner = self.runners.get(&id).filter(|runner| runner.is_usable())?;
        let brief = runner.queue.iter().all(|queued| queued.attempt.job.brief);
        (brief && runner.queue.len() < COMPANY_MAX).then_some(id)
    }

    /// Asks the zygote for a runner, which can be handed jobs at once.
    pub(super) fn fork(&mut self, shared: &Arc<Shared>) -> Result<u64, super::Error> {
        let id = self.new_id();
        let (runner, ends) = Runner::prepare(id)?;
        if self.keep > 0 {
            runner.let_keep(self.keep);
        }
        if let Some(info) = &self.info {
            runner.configure(info);
        }
        if !self.plugins.is_empty() {
            runner.plug(&self.plugins);
        }
        self.zygote.send(&ToChild::Fork { child: id, role: Role::Runner }, ends.fds);
        tokio::spawn(slot::serve(shared.clone(), id, ends.data, runner.exited.clone()));
        tokio::spawn(slot::serve_control(shared.clone(), id, ends.control, runner.home.clone()));
        for pipe in &runner.pipes {
            let whose = move |shared: &Shared, line: &str| shared.runner_wrote(id, line);
            tokio::spawn(slot::log_output(shared.clone(), pipe.clone(), whose));
        }
        self.runners.insert(id, runner);
        Ok(id)
    }

    /// Gives a job to a runner. One that cannot be sent fails.
    pub(super) fn hand_over(&mut self, shared: &Arc<Shared>, id: u64, attempt: Attempt, prefetched: bool) {
        let Some(runner) = self.runners.get_mut(&id) else {
            self.pending.push_front(attempt);
            return;
        };
        if !attempt.job.live.is_empty() && !matches!(attempt.job.access(id), Access::Yes) {
            self.rest(id);
            self.park(shared, id, attempt);
            return;
        }
        let (key, brief) = (attempt.job.key.clone(), attempt.job.brief);
        match runner.hand_over(attempt, prefetched) {
            Ok(seq) => {
                self.places.insert(key, (id, seq));
                if !brief {
                    runner.data.flush();
                } else if !self.unsent.contains(&id) {
                    self.unsent.push(id);
                }
                if runner.has_company() && !self.watched {
                    self.watched = true;
                    tokio::spawn(watch(shared.clone()));
                }
            }
            Err((attempt, error)) => {
                let text =
                    format!("task {key} could not be sent to its process: {}", telemetry::chain(&error));
                fail(shared, &attempt.job, &Exception::builtin("RuntimeError", text));
                self.rest(id);
            }
        }
    }

    /// Sends what is queued for runners.
    pub(super) fn flush(&mut self) {
        for id in self.unsent.drain(..) {
            if let Some(runner) = self.runners.get(&id) {
                runner.data.flush();
            }
        }
    }

    /// Looks for jobs that were not as brief as expected: what waits behind one goes elsewhere, what was done before it
    /// is asked for. False when there is nothing to look after.
    fn part_company(&mut self, shared: &Arc<Shared>) -> bool {
        let ids: Vec<u64> = self.runners.keys().copied().collect();
        self.watched = false;
        for id in ids {
            let Some(runner) = self.runners.get_mut(&id).filter(|runner| runner.has_company()) else {
                continue;
            };
            self.watched = true;
            let (started, looked_at) = (runner.mailbox.started(), runner.looked_at);
            runner.looked_at = runner.last_seq();
            if runner.queue.front().is_some_and(|queued| queued.seq < started && queued.seq <= looked_at)
                && let Ok(message) = Outgoing::new(&ToChild::HandOver, Vec::new())
            {
                runner.control.send(message);
            }
            self.take_back(id, |queued| {
                queued.seq > started && queued.seq <= looked_at && !queued.prefetched
            });
        }
        self.fill(shared);
        self.flush();
        self.watched
    }

    /// Takes jobs that have not started from a runner: they wait for another one. Returns those that were prefetched,
    /// which are nobody's then.
    fn take_back(&mut self, id: u64, which: impl Fn(&Queued) -> bool) -> Vec<(Key, RunId)> {
        let mut nobodys = Vec::new();
        let Some(runner) = self.runners.get_mut(&id) else { return nobodys };
        for queued in runner.queue.iter_mut().skip(1).filter(|queued| queued.recall == Recalled::No) {
            if !which(queued) {
                continue;
            }
            if !runner.mailbox.revoke(queued.seq) {
                queued.recall = Recalled::Asked;
                continue;
            }
            queued.recall = Recalled::Yes;
            forget_place(&mut self.places, id, queued);
            if queued.prefetched {
                nobodys.push((queued.key().clone(), queued.attempt.job.run_id));
            } else {
                self.pending.push_back(queued.attempt.clone());
            }
        }
        nobodys
    }

    /// Notes that a runner has nothing to do, if that is so.
    fn rest(&mut self, id: u64) {
        let Some(runner) = self.runners.get(&id) else { return };
        if runner.is_usable() && runner.current().is_none() && !self.idle.contains(&id) {
            self.idle.push(id);
        }
    }

    /// Gives waiting jobs to runners that can take them.
    pub(super) fn fill(&mut self, shared: &Arc<Shared>) {
        while let Some(attempt) = self.pending.pop_front() {
            match self.find_runner(shared, &attempt.job) {
                Ok(Some(id)) => self.hand_over(shared, id, attempt, false),
                Ok(None) => {
                    self.pending.push_front(attempt);
                    return;
                }
                Err(text) => fail(shared, &attempt.job, &Exception::builtin("RuntimeError", text)),
            }
        }
    }

    pub(super) fn prefetch(&mut self, shared: &Arc<Shared>, job: Job) -> Result<(), Job> {
        let room = shared.config.prefetch;
        let candidates = self.runners.iter().filter(|(_, runner)| {
            runner.is_usable() && runner.current().is_some() && runner.waiting() < room
        });
        let candidates = candidates.filter(|(id, _)| matches!(job.access(**id), Access::Yes));
        let Some((&id, runner)) = candidates.min_by_key(|(_, runner)| runner.waiting()) else {
            job.bring_together();
            return Err(job);
        };
        let queued = runner.queue.len();
        let attempt = self.recall_crashes(Attempt { crashes: 0, job: Arc::new(job) });
        match self.idle.last() {
            // brief jobs that the state machine has started keep each other company: there is enough for another runner
            Some(_) if attempt.job.brief && queued >= COMPANY_MAX => {
                let (key, run_id) = (attempt.job.key.clone(), attempt.job.run_id);
                let idle = self.idle.pop().unwrap_or(id);
                self.hand_over(shared, idle, attempt, false);
                shared.emit(Event::Started { key, run_id });
            }
            _ => self.hand_over(shared, id, attempt, true),
        }
        Ok(())
    }

    pub(super) fn prefetch_room(&self, room: usize) -> usize {
        let busy = self.runners.values().filter(|runner| runner.is_usable() && runner.current().is_some());
        busy.map(|runner| room.saturating_sub(runner.waiting())).sum()
    }

    pub(super) fn try_recall(&mut self, key: &Key) -> Recall {
        if let Some(at) = self.pending.iter().position(|attempt| attempt.job.key == *key) {
            self.pending.remove(at);
            return Recall::Recalled;
        }
        if let Some(at) = self.parked.iter().position(|attempt| attempt.job.key == *key) {
            self.parked.remove(at);
            return Recall::Recalled;
        }
        let Some((runner, at)) = self.locate(key) else { return Recall::Unknown };
        let queued = &mut runner.queue[at];
        if !queued.prefetched {
            return Recall::Started;
        }
        if runner.mailbox.revoke(queued.seq) {
            queued.recall = Recalled::Yes;
            self.places.remove(key);
            Recall::Recalled
        } else {
            queued.recall = Recalled::Asked;
            Recall::Started
        }
    }

    /// The runner that has a job, and its place in the queue.
    fn locate(&mut self, key: &Key) -> Option<(&mut Runner, usize)> {
        let (id, seq) = *self.places.get(key)?;
        let runner = self.runners.get_mut(&id)?;
        let at = runner.queue.iter().position(|queued| queued.seq == seq)?;
        Some((runner, at))
    }

    /// Kills the runner that runs `key`.
    pub(super) fn kill_running(&mut self, key: &Key, cause: Cause) -> bool {
        match self.locate(key) {
            Some((runner, _)) if runner.current().is_some_and(|queued| queued.key() == key) => {
                runner.kill(cause);
                true
            }
            _ => false,
        }
    }

    /// Takes the job a runner speaks of off its queue. `None` when it is not the one it should speak of.
    pub(super) fn conclude(&mut self, shared: &Shared, id: u64, seq: u64) -> Option<Queued> {
        let runner = self.runners.get_mut(&id)?;
        if runner.queue.front()?.seq != seq {
            return None;
        }
        runner.drain_output(shared);
        let done = runner.queue.pop_front()?;
        runner.proven = true;
        runner.tail.clear();
        self.barren = 0;
        if done.recall != Recalled::Yes {
            forget_place(&mut self.places, id, &done);
        }
        if let Some(next) = runner.queue.iter_mut().find(|queued| queued.recall != Recalled::Yes)
            && next.prefetched
            && next.recall == Recalled::No
        {
            // the runner goes on with it by itself
            next.prefetched = false;
            shared.emit(Event::Started { key: next.key().clone(), run_id: next.attempt.job.run_id });
        }
        Some(done)
    }

    /// What a runner does after a job: its next, a waiting one, or nothing.
    fn after(&mut self, shared: &Arc<Shared>, id: u64) {
        let Some(runner) = self.runners.get_mut(&id) else { return };
        if runner.seceded && runner.current().is_none() {
            runner.seceded = false;
            if self.width() > shared.config.slots {
                self.retire(id);
                return;
            }
        }
        self.rest(id);
        self.fill(shared);
    }

    /// Lets a runner end that is one too many.
    pub(super) fn retire(&mut self, id: u64) {
        let publish = !self.stopping;
        if let Some(runner) = self.runners.get_mut(&id)
            && let Ok(message) = Outgoing::new(&ToChild::Exit { publish }, Vec::new())
        {
            runner.seceded = true;
            runner.doom = Some(RETIRED);
            runner.data.send(message);
        }
    }

    /// Lets the idle runner `pid` end, unless results are in it alone.
    pub(super) fn replace(&mut self, pid: u32) -> bool {
        let is = |id: &u64| {
            let runner = self.runners.get(id).filter(|runner| runner.pid == Some(pid));
            runner.is_some_and(|runner| runner.home.only_here().is_empty())
        };
        let Some(at) = self.idle.iter().position(is) else { return false };
        let id = self.idle.remove(at);
        self.retire(id);
        true
    }

    /// Lets all runners end that have nothing to do.
    pub(super) fn retire_idle(&mut self) {
        for id in std::mem::take(&mut self.idle) {
            self.retire(id);
        }
    }
}

/// A message that no runner sends at this point.
pub(super) const MISPLACED: ipc::Error = ipc::Error::Form { tag: None };

impl Shared {
    /// A runner's word about its tasks.
    pub(super) fn runner_says(
        self: &Arc<Self>,
        id: u64,
        message: FromChild,
        fds: Vec<OwnedFd>,
    ) -> Result<(), ipc::Error> {
        let segments = Segments::map(fds)?;
        let mut state = self.state();
        match message {
            FromChild::Finished { seq, object, done } => {
                let mailbox = state.runners.get(&id).map(|runner| runner.mailbox.clone());
                let places = Places { mailbox: mailbox.as_deref(), ..self.places(&segments) };
                let object = places.object(object, done.nbytes)?;
                let queued = state.conclude(self, id, seq).ok_or(MISPLACED)?;
                let job = &queued.attempt.job;
                if job.actor {
                    state.holds_actor(id, &job.key);
                }
                self.emit(Event::Finished(Box::new(Finished {
                    key: job.key.clone(),
                    run_id: job.run_id,
                    object,
                    type_pickled: done.type_pickled,
                    typename: done.typename.into(),
                    start: self.scheduler_time(done.start),
                    stop: self.scheduler_time(done.stop),
                    thread: done.thread,
                    cpu: done.cpu,
                })));
            }
            FromChild::Kept { seq, done } => self.kept(&mut state, id, seq, done)?,
            FromChild::Published { token, object } => {
                let home = state.runners.get(&id).map(|runner| runner.home.clone()).ok_or(MISPLACED)?;
                drop(state);
                return self.published(&home, token, object, &segments);
            }
            FromChild::Failed { seq, failure } => {
                let failed = self.failed(&segments, *failure)?;
                let queued = state.conclude(self, id, seq).ok_or(MISPLACED)?;
                let job = &queued.attempt.job;
                let (key, run_id) = (job.key.clone(), job.run_id);
                self.emit(Event::Failed(Box::new(Failed { key, run_id, ..failed })));
            }
            FromChild::Reschedule { seq } => {
                let queued = state.conclude(self, id, seq).ok_or(MISPLACED)?;
                let job = &queued.attempt.job;
                self.emit(Event::Reschedule { key: job.key.clone(), run_id: job.run_id });
            }
            FromChild::Skipped { seq } => {
                let queued = state.conclude(self, id, seq).ok_or(MISPLACED)?;
                let job = &queued.attempt.job;
                if queued.recall != Recalled::Yes {
                    self.emit(Event::Skipped { key: job.key.clone(), run_id: job.run_id });
                }
            }
            FromChild::Seceded { seq, duration } => {
                // one that comes after its task's end says nothing
                state.secede(self, id, seq, duration);
            }
            other => return self.user_says(other, &segments),
        }
        state.after(self, id);
        state.flush();
        Ok(())
    }

    /// What user code sends past its task, from any process.
    pub(super) fn user_says(&self, message: FromChild, segments: &Segments) -> Result<(), ipc::Error> {
        match message {
            FromChild::Event { frames } => {
                self.emit(Event::ToScheduler(decode_message(frames, &Limits::default())?));
            }
            FromChild::Scattered { key, object, description } => {
                let object = self.places(segments).object(object, description.nbytes)?;
                self.emit(Event::Scattered { key, object, description });
            }
            _ => return Err(MISPLACED),
        }
        Ok(())
    }

    /// For objects of a message that left nothing in a mailbox.
    fn places<'a>(&'a self, segments: &'a Segments) -> Places<'a> {
        Places { segments, mailbox: None, arena: &self.arena }
    }

    fn failed(&self, segments: &Segments, raw: RawFailure) -> Result<Failed, ipc::Error> {
        Ok(Failed {
            key: Key::Int(0),
            run_id: crate::proto::RunId::NONE,
            exception: segments.payload(raw.exception)?,
            traceback: raw.traceback.map(|traceback| segments.payload(traceback)).transpose()?,
            task_text: raw.task_text.into(),
            exception_text: raw.exception_text.into(),
            traceback_text: raw.traceback_text.into(),
            start: raw.start.map(|time| self.scheduler_time(time)),
            stop: raw.stop.map(|time| self.scheduler_time(time)),
            thread: Some(raw.thread),
        })
    }

    /// Whose a line is that a runner wrote.
    fn runner_wrote(&self, id: u64, line: &str) -> Option<(Option<u32>, Option<Key>)> {
        let mut state = self.state();
        let runner = state.runners.get_mut(&id)?;
        runner.tail.push(line);
        Some((runner.pid, runner.current().map(|queued| queued.key().clone())))
    }

    pub(super) fn cancel(self: &Arc<Self>, key: &Key) {
        let mut state = self.state();
        if let Some(at) = state.pending.iter().position(|attempt| attempt.job.key == *key) {
            if let Some(attempt) = state.pending.remove(at) {
                self.emit(Event::Skipped { key: key.clone(), run_id: attempt.job.run_id });
            }
            return;
        }
        if let Some(at) = state.parked.iter().position(|attempt| attempt.job.key == *key) {
            let run_id = state.parked.remove(at).job.run_id;
            self.emit(Event::Skipped { key: key.clone(), run_id });
            return;
        }
        let Some((runner, at)) = state.locate(key) else { return };
        let Queued { seq, recall, .. } = &mut runner.queue[at];
        let seq = *seq;
        *recall = Recalled::Asked;
        if runner.mailbox.revoke(seq) {
            return;
        }
        if let Ok(message) = Outgoing::new(&ToChild::Interrupt { seq }, Vec::new()) {
            runner.control.send(message);
        }
        let (shared, key) = (self.clone(), key.clone());
        tokio::spawn(async move {
            tokio::time::sleep(shared.config.cancel_grace).await;
            let mut state = shared.state();
            if state.places.get(&key).is_some_and(|&(_, still)| still == seq) {
                state.kill_running(&key, Cause::Cancelled);
            }
        });
    }
}

/// Looks after jobs that share a runner until none do.
async fn watch(shared: Arc<Shared>) {
    loop {
        tokio::time::sleep(PATIENCE).await;
        if !shared.state().part_company(&shared) {
            return;
        }
    }
}

impl State {
    /// A runner's task leaves the pool: its slot is free, what waits behind it goes elsewhere.
    fn secede(&mut self, shared: &Arc<Shared>, id: u64, seq: u64, duration: f64) -> Option<()> {
        let runner = self.runners.get_mut(&id)?;
        let current = runner.queue.front().filter(|queued| queued.seq == seq && !runner.seceded)?;
        shared.emit(Event::Seceded { key: current.key().clone(), compute_duration: duration });
        runner.seceded = true;
        // none can start while the other runs
        for (key, run_id) in self.take_back(id, |_| true) {
            shared.emit(Event::Skipped { key, run_id });
        }
        self.fill(shared);
        Some(())
    }
}

/// Forgets where a job was, unless a newer one of the same key is somewhere by now.
pub(super) fn forget_place(places: &mut FxHashMap<Key, (u64, u64)>, id: u64, queued: &Queued) {
    if places.get(queued.key()) == Some(&(id, queued.seq)) {
        places.remove(queued.key());
    }
}

/// Ends a job with an exception that Python did not raise.
pub(super) fn fail(shared: &Shared, job: &Job, exception: &Exception) {
    shared.emit(Event::Failed(Box::new(Failed {
        key: job.key.clone(),
        run_id: job.run_id,
        exception: exception.payload(),
        traceback: None,
        task_text: "".into(),
        exception_text: exception.text().into(),
        traceback_text: "".into(),
        start: None,
        stop: None,
        thread: None,
    })));
}
