//! Tasks on their way to runners and back: handed out when the state machine starts them, or ahead of that.

use std::sync::Arc;

use rustc_hash::FxHashMap;
use tracing::{error, info, warn};

use super::Error;
use super::driver::{Driver, End, NANNY, RESTART, WORKER};
use super::gather::raised;
use crate::exec::{self, Cause, Job, Recall, Stream};
use crate::proto::{Key, RunId, Value};
use crate::scheduler::now;
use crate::state::{ErrorMessage, EventKind, Report, SchedulerMessage, StateName, Stored, Task, TypeInfo};
use crate::store::{Live, Lookup, Object};
use crate::telemetry::CauseLabel;

/// Longest pickle of a task that may be called brief: opening it takes time too.
const BRIEF_BYTES: usize = 16 * 1024;
/// Tasks for each runner that are passed over in search of one whose inputs are in that runner.
const PASSED_OVER: usize = 8;
/// Attempts to start the interpreter before the worker gives up.
const INTERPRETER_ATTEMPTS: u32 = 3;

/// Why a task cannot be given to a runner now.
#[derive(Debug)]
pub(super) enum NoJob {
    /// These inputs have to be read from disk; the others, which are here, are kept for it.
    OnDisk { inputs: Vec<Key>, others: Vec<(Key, Object)> },
    /// An input is not held any more.
    Short,
    /// It cannot be run at all.
    Error(Box<ErrorMessage>),
}

/// A task's end, once its result is held.
struct Success {
    key: Key,
    run_id: RunId,
    nbytes: u64,
    type_: TypeInfo,
    start: f64,
    stop: f64,
    thread: i64,
    cpu: f64,
}

impl Driver {
    /// Runs a task: the state machine has started it.
    pub(super) fn execute(&mut self, key: Key) {
        let Some(task) = self.state.task(&key) else { return };
        let run_id = task.run_id();
        self.state.set_start_time(&key, now());
        self.running.insert(key.clone(), run_id);
        if let Some((handed, outcome)) = self.ahead.take(&key).filter(|(handed, _)| handed.run_id == run_id) {
            if let Some(outcome) = outcome {
                self.due.push(outcome);
                return;
            }
            // where it has not begun, another runner than the one it waits for has become free; where the pool does not
            // have it any more, what became of it is on the way
            if let Some(compute_duration) = handed.seceded {
                self.due.push(exec::Event::Seceded { key, compute_duration });
                return;
            }
            if handed.begun || self.pool.try_recall(&key) != Recall::Recalled {
                return;
            }
        }
        self.submit(key, run_id);
    }

    /// A task that cannot be given to a runner.
    pub(super) fn refuse(&mut self, key: Key, run_id: RunId, error: ErrorMessage) {
        error!(target: WORKER, "cannot run {key:?}: {}", error.exception_text);
        self.due.push(exec::Event::Failed(Box::new(exec::Failed {
            key,
            run_id,
            exception: (*error.exception).clone(),
            traceback: None,
            task_text: "".into(),
            exception_text: error.exception_text,
            traceback_text: error.traceback_text,
            start: None,
            stop: None,
            thread: None,
        })));
    }

    /// A task with its inputs, or why it cannot be run. `loaded` are inputs that were read back for it.
    pub(super) fn job(&self, key: &Key, loaded: &FxHashMap<Key, Object>) -> Result<Job, NoJob> {
        let fail = |name, text: String| Err(NoJob::Error(Box::new(raised(name, text))));
        let Some((task, run_spec)) = self.state.task(key).and_then(|t| Some((t, t.run_spec()?.clone())))
        else {
            return fail("KeyError", format!("{key:?}"));
        };
        let annotations = task.annotations().cloned().unwrap_or_else(|| Arc::new(Value::Nil));
        let (mut inputs, mut live, mut on_disk) = (Vec::new(), Vec::new(), Vec::new());
        for dependency in self.state.dependencies(task) {
            if let Some(object) = loaded.get(dependency) {
                inputs.push((dependency.clone(), object.clone()));
                continue;
            }
            if let Some(kept) = self.shared.store.live(dependency) {
                live.push(kept);
                continue;
            }
            match self.shared.store.find(dependency) {
                Lookup::Here(object) => inputs.push((dependency.clone(), object)),
                Lookup::OnDisk => on_disk.push(dependency.clone()),
                Lookup::Nowhere => return Err(NoJob::Short),
            }
        }
        if !on_disk.is_empty() {
            return Err(NoJob::OnDisk { inputs: on_disk, others: inputs });
        }
        let actor = task.is_actor();
        let brief = !actor
            && live.is_empty()
            && self.ahead.is_brief(task.prefix())
            && run_spec.frames.is_empty()
            && run_spec.header.len() < BRIEF_BYTES
            && inputs
                .iter()
                .all(|(_, object)| object.shared_bytes() == 0 && object.heap_bytes() < BRIEF_BYTES as u64);
        Ok(Job { key: key.clone(), run_id: task.run_id(), run_spec, inputs, live, annotations, brief, actor })
    }

    /// Gives busy runners what comes next, so that they need not wait for it.
    pub(super) fn hand_ahead(&mut self) {
        if !self.state.is_running() || self.state.ready_count() == 0 || self.shared.store.is_crowded() {
            return;
        }
        let first = self.state.peek_ready(1);
        let Some(task) = first.first().and_then(|key| self.state.task(key)) else { return };
        let wanted = self.state.config().nthreads * self.ahead.depth(task.prefix());
        // many at a time, as looking for the next ones costs more than handing one out
        if self.ahead.len() * 2 > wanted || self.pool.prefetch_room() == 0 {
            return;
        }
        // whose inputs are in a runner that has no room may be passed over
        let passed_over =
            if self.shared.store.has_live() { PASSED_OVER * self.state.config().nthreads } else { 0 };
        for key in self.state.peek_ready(wanted + passed_over) {
            if self.ahead.len() >= wanted {
                return;
            }
            if self.ahead.get(&key).is_some() {
                continue;
            }
            // what cannot be run says so when its turn comes, and what needs inputs from disk gets them then; an actor
            // takes a runner for itself
            let job = self.job(&key, &FxHashMap::default()).ok().filter(|job| !job.actor);
            let Some(job) = job else { continue };
            let run_id = job.run_id;
            if self.pool.prefetch(job).is_err() {
                if self.pool.prefetch_room() == 0 {
                    return;
                }
                continue;
            }
            self.ahead.hand(key, run_id);
        }
    }

    /// Takes tasks back that were handed out ahead. What has begun goes on, and nobody waits for it.
    pub(super) fn withdraw(&mut self, keys: &[Key]) {
        if self.ahead.len() == 0 {
            return;
        }
        for key in keys {
            if self.ahead.take(key).is_some() {
                self.pool.try_recall(key);
            }
        }
    }

    /// Takes back all that has not begun, as when the worker pauses.
    pub(super) fn recall_all(&mut self) {
        for key in self.ahead.keys() {
            if self.pool.try_recall(&key) == Recall::Recalled {
                self.ahead.take(&key);
            }
        }
    }

    /// Whether a runner was handed `key` ahead and has begun it, so that it cannot be taken back.
    pub(super) fn has_begun(&mut self, key: &Key) -> bool {
        match self.ahead.get(key) {
            None => false,
            Some(handed) if handed.begun => true,
            Some(_) if self.pool.try_recall(key) == Recall::Recalled => {
                self.ahead.take(key);
                false
            }
            Some(_) => true,
        }
    }

    /// Tells the scheduler that a task runs, so it cannot be had: that the state machine calls it ready is our affair.
    pub(super) fn refuse_to_give(&mut self, key: &Key, stimulus_id: &Arc<str>) {
        let report = Report::StealResponse { key: key.clone(), state: Some(StateName::Executing) };
        let message = SchedulerMessage { stimulus_id: stimulus_id.clone(), report };
        self.session.sender().send(message.to_value());
    }

    /// Something that a runner did.
    pub(super) fn outcome(&mut self, event: exec::Event) {
        match event {
            exec::Event::Started { key, run_id } => {
                if self.ahead.begin(&key, run_id) {
                    self.state.promote(&key);
                }
            }
            exec::Event::Output(line) => self.lines(&line),
            exec::Event::ToScheduler(message) => self.session.sender().send(message),
            exec::Event::WatchTransitions(on) => self.state.watch(on),
            exec::Event::ServiceLost => {
                error!(target: NANNY, "the service process held a part of a shuffle, so the worker begins anew");
                self.end = Some(RESTART);
            }
            exec::Event::Scattered { key, object, description } => {
                let exec::Description { nbytes, type_pickled, typename } = description;
                let type_ = Some(TypeInfo { pickled: type_pickled, name: typename.into() });
                self.shared.store.insert(key.clone(), object);
                self.stored();
                let data = vec![(key, Stored { nbytes, type_ })];
                self.apply_own("update-data", EventKind::UpdateData { data });
            }
            exec::Event::Seceded { key, compute_duration } => {
                if self.running.contains_key(&key) {
                    self.apply_own("secede", EventKind::Secede { key, compute_duration });
                } else {
                    self.ahead.secede(&key, compute_duration);
                }
            }
            exec::Event::Skipped { key, run_id } => self.skipped(&key, run_id),
            exec::Event::RunnerDied { pid, cause, key, requeued } => {
                self.died(pid, &cause, key.as_ref());
                for (key, run_id) in requeued {
                    self.skipped(&key, run_id);
                }
            }
            exec::Event::InterpreterReady { python, distributed } => {
                tracing::debug!("runners have Python {python} and distributed {distributed}");
            }
            exec::Event::InterpreterFailed { text, attempts } => {
                error!("the interpreter ended before it was ready (attempt {attempts}): {text}");
                if attempts >= INTERPRETER_ATTEMPTS {
                    self.end = Some(End::Failed(Error::Interpreter { text }));
                }
            }
            exec::Event::Published { live } => self.shared.store.published(&live),
            exec::Event::Lost { results } => self.lost(&results),
            exec::Event::Finished(_)
            | exec::Event::Kept(_)
            | exec::Event::Failed(_)
            | exec::Event::Reschedule { .. } => self.done(event),
        }
    }

    /// The end of a task: told to the state machine when it has started the task, else kept or dropped.
    fn done(&mut self, event: exec::Event) {
        let (key, run_id) = match &event {
            exec::Event::Finished(finished) => (&finished.key, finished.run_id),
            exec::Event::Kept(kept) => (kept.live.key(), kept.run_id),
            exec::Event::Failed(failed) => (&failed.key, failed.run_id),
            exec::Event::Reschedule { key, run_id } => (key, *run_id),
            _ => return,
        };
        if self.running.get(key) == Some(&run_id) {
            self.running.remove(key);
            self.deliver(event);
        } else if self.ahead.get(key).is_some_and(|handed| handed.run_id == run_id) {
            self.ahead.keep(key.clone(), event);
        } else {
            tracing::debug!(target: WORKER, "dropping a late result of {key:?}");
        }
    }

    fn deliver(&mut self, event: exec::Event) {
        match event {
            exec::Event::Finished(finished) => self.finished(*finished),
            exec::Event::Kept(kept) => self.kept(*kept),
            exec::Event::Failed(failed) => self.failed(*failed),
            exec::Event::Reschedule { key, .. } => {
                self.apply_own("reschedule", EventKind::Reschedule { key })
            }
            _ => {}
        }
    }

    fn finished(&mut self, finished: exec::Finished) {
        let exec::Finished { key, run_id, object, type_pickled, typename, start, stop, thread, cpu } =
            finished;
        let nbytes = object.nbytes();
        self.shared.store.insert(key.clone(), object);
        let type_ = TypeInfo { pickled: type_pickled, name: typename };
        self.succeeded(Success { key, run_id, nbytes, type_, start, stop, thread, cpu });
    }

    fn kept(&mut self, kept: exec::Kept) {
        let exec::Kept { run_id, live, type_pickled, typename, start, stop, thread, cpu } = kept;
        let (key, nbytes) = (live.key().clone(), live.nbytes());
        match (live.object(), live.is_lost()) {
            (None, true) => {
                // its runner died meanwhile
                self.apply_own("reschedule", EventKind::Reschedule { key });
                return;
            }
            (Some(object), _) => self.shared.store.insert(key.clone(), object.clone()),
            (None, false) => self.shared.store.keep(live),
        }
        let type_ = TypeInfo { pickled: type_pickled, name: typename };
        self.succeeded(Success { key, run_id, nbytes, type_, start, stop, thread, cpu });
    }

    /// Results are gone with their runner: who still waits for one is told so, and the scheduler.
    fn lost(&mut self, results: &[Live]) {
        let lost = results.iter().filter(|live| self.shared.store.lost(live));
        let keys: Vec<Key> = lost.map(|live| live.key().clone()).collect();
        if !keys.is_empty() {
            warn!(target: WORKER, "{} results are lost with the process that had made them", keys.len());
            self.apply_own("data-lost", EventKind::DataLost { keys });
        }
    }

    /// A task's result is held.
    fn succeeded(&mut self, success: Success) {
        let Success { key, run_id, nbytes, type_, start, stop, thread, cpu } = success;
        if let Some(task) = self.state.task(&key) {
            let (prefix, span) = (task.prefix().clone(), task.span_id().cloned());
            self.ahead.took(&prefix, stop - start);
            self.executed.add(prefix, span, stop - start, cpu);
        }
        self.stored();
        let type_ = Some(type_);
        let (thread, startstops, metadata) = (Some(thread), Vec::new(), None);
        let kind = EventKind::ExecuteSuccess {
            key,
            run_id,
            start,
            stop,
            nbytes,
            type_,
            thread,
            startstops,
            metadata,
        };
        self.apply_own("task-finished", kind);
    }

    fn failed(&mut self, failed: exec::Failed) {
        let exec::Failed {
            key, run_id, exception, traceback, task_text, exception_text, traceback_text, ..
        } = failed;
        let task = self.state.task(&key);
        if let Some(state) = task.map(Task::state_name).filter(|state| *state != StateName::Cancelled) {
            error!(
                target: WORKER,
                "Compute Failed\nKey:       {key}\nState:     {}\nTask:  {task_text}\nException: {exception_text:?}\nTraceback: {traceback_text:?}\n",
                state.as_str(),
            );
        }
        let error = ErrorMessage {
            exception: Arc::new(exception),
            traceback: traceback.map(Arc::new),
            exception_text,
            traceback_text,
        };
        let (start, stop, thread) = (failed.start, failed.stop, failed.thread);
        self.apply_own("task-erred", EventKind::ExecuteFailure { key, run_id, start, stop, error, thread });
    }

    /// A task that its runner never began: the runner ended, or the task was recalled too late to be sure of it.
    fn skipped(&mut self, key: &Key, run_id: RunId) {
        if self.ahead.get(key).is_some_and(|handed| handed.run_id == run_id) {
            self.ahead.take(key);
        } else if self.running.get(key) == Some(&run_id) {
            self.submit(key.clone(), run_id);
        }
    }

    fn died(&self, pid: Option<u32>, cause: &Cause, key: Option<&Key>) {
        self.shared.metrics.runner_deaths.get_or_create(&label(cause)).inc();
        let key = key.map(ToString::to_string);
        warn!(target: "distributed.nanny", key, pid, "a runner {cause}; it is replaced");
    }

    /// A line that a task or process wrote.
    fn lines(&mut self, line: &exec::Line) {
        if let Some(key) = &line.key {
            self.ahead.wrote(&key.prefix());
        }
        let key = line.key.as_ref().map(ToString::to_string);
        let stream = match line.stream {
            Stream::Stdout => "stdout",
            Stream::Stderr => "stderr",
        };
        info!(target: "iqoqo.task", key, pid = line.pid, stream, "{}", line.line);
    }
}

fn label(cause: &Cause) -> CauseLabel {
    let cause = match cause {
        Cause::Exit { .. } => "exit",
        Cause::Signal { .. } => "signal",
        Cause::OutOfMemory { .. } => "out-of-memory",
        Cause::Cancelled => "cancelled",
        Cause::Nonsense { .. } => "nonsense",
        Cause::ZygoteLost => "zygote-lost",
        Cause::NotForked { .. } => "not-forked",
    };
    CauseLabel { cause }
}
