//! The pool's handle, its shared state, and the questions that are not about running a job.
//!
//! State changes under one lock, without waiting; events leave in the order of the changes.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use rustc_hash::FxHashMap;
use tokio::sync::{Notify, mpsc, oneshot};

use super::actors::Actors;
use super::ipc::{Description, Outgoing, Target, ToChild};
use super::output::Room;
use super::plugins::{NannyState, Plugins};
use super::service::Service;
use super::slot::{Attempt, Runner};
use super::verdict::Cause;
use super::zygote::{self, Zygote};
use super::{Config, Error, Event, Job, Process, ProcessKind, Recall, ServiceReply, WorkerInfo};
use crate::proto::{Key, Value};
use crate::store::{Arena, Object};
use crate::wire::{Compression, encode_message};

/// How long a runner's control thread may take to answer; one that holds the GIL in C code cannot.
const STACKS_TIMEOUT: Duration = Duration::from_secs(1);
/// How long idle runners may take to exit by themselves.
const EXIT_TIMEOUT: Duration = Duration::from_millis(200);
/// The same, where there are plugins to tear down.
const TEARDOWN_TIMEOUT: Duration = Duration::from_secs(5);

/// The pool of Python processes. Cloning gives another handle to the same pool.
#[derive(Clone, Debug)]
pub struct Pool(Arc<Shared>);

/// What the handle and the tasks that watch processes share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) config: Config,
    pub(super) room: Room,
    /// A runner was buried.
    pub(super) buried: Notify,
    /// Where results of middling size go.
    pub(super) arena: Arena,
    events: mpsc::UnboundedSender<Event>,
    /// Seconds to add to this machine's clock, as the bits of a float.
    time_delay: AtomicU64,
    state: Mutex<State>,
}

/// Everything that changes.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) runners: FxHashMap<u64, Runner>,
    /// Runners without a job; the last used is used first.
    pub(super) idle: Vec<u64>,
    /// Jobs without a runner.
    pub(super) pending: VecDeque<Attempt>,
    /// Runners with jobs that are queued and not sent yet.
    pub(super) unsent: Vec<u64>,
    /// Somebody looks for stuck jobs now and then.
    pub(super) watched: bool,
    /// Jobs that wait for inputs to be published.
    pub(super) parked: Vec<Attempt>,
    /// Jobs that crashed and were given back for want of inputs, and how often.
    pub(super) crashed: FxHashMap<Key, u32>,
    /// Bytes of results that each runner may keep to itself.
    pub(super) keep: u64,
    /// Where a job is: runner and sequence number there.
    pub(super) places: FxHashMap<Key, (u64, u64)>,
    pub(super) zygote: Zygote,
    pub(super) actors: Actors,
    pub(super) service: Service,
    pub(super) info: Option<Value>,
    pub(super) plugins: Plugins,
    /// Names of those that need not be set up before somebody uses them.
    pub(super) lazy: Vec<Value>,
    pub(super) nanny: NannyState,
    /// A plugin wants to know of transitions.
    pub(super) watching: bool,
    /// Runners in a row that ended before they ran anything.
    pub(super) barren: u32,
    pub(super) stopping: bool,
    stacks: FxHashMap<u64, oneshot::Sender<Stacks>>,
    next_id: u64,
}

/// Call stacks by key, outermost call first.
type Stacks = Vec<(Key, Vec<String>)>;

impl State {
    /// Whether a process is still there that was told to end.
    fn has_leavers(&self) -> bool {
        let service = self.service.is_there() && self.has_plugins_to_run();
        service || self.runners.values().any(Runner::is_retired)
    }

    /// A number for a process or a question.
    pub(super) fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }
}

impl Shared {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // nothing panics while it holds the lock
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the driver; without one there is nobody to tell.
    pub(super) fn emit(&self, event: Event) {
        let _ = self.events.send(event);
    }

    /// A time of this machine on the scheduler's clock.
    pub(super) fn scheduler_time(&self, time: f64) -> f64 {
        time + f64::from_bits(self.time_delay.load(Ordering::Relaxed))
    }

    /// Waits until no process is left that was told to end.
    async fn idle_ended(&self) {
        loop {
            let burial = self.buried.notified();
            if !self.state().has_leavers() {
                return;
            }
            burial.await;
        }
    }

    pub(super) fn stacks_came(&self, request: u64, stacks: Stacks) {
        if let Some(sender) = self.state().stacks.remove(&request) {
            let _ = sender.send(stacks);
        }
    }
}

impl Pool {
    /// Starts the zygote and returns at once; runners are forked when work comes. Results that are not worth a memfd
    /// are placed in `arena`. Must be called in a runtime.
    ///
    /// # Errors
    /// When the thread that watches the zygote cannot be made. An unusable interpreter is an
    /// [`Event::InterpreterFailed`].
    pub fn start(config: Config, arena: Arena, events: mpsc::UnboundedSender<Event>) -> Result<Pool, Error> {
        let nanny = config.nanny.clone();
        let shared = Arc::new(Shared {
            config,
            room: Room::new(),
            buried: Notify::new(),
            arena,
            events,
            time_delay: AtomicU64::new(0f64.to_bits()),
            state: Mutex::new(State { nanny, ..State::default() }),
        });
        zygote::start(&shared)?;
        Ok(Pool(shared))
    }

    /// Sets what user code is told about its worker, now and in processes to come.
    pub fn set_worker_info(&self, info: WorkerInfo) {
        let info = info.into_value();
        let mut state = self.0.state();
        state.runners.values().for_each(|runner| runner.configure(&info));
        state.service.configure(&info);
        state.info = Some(info);
    }

    /// Sets what is added to this machine's clock to get the scheduler's, in seconds.
    pub fn set_time_delay(&self, seconds: f64) {
        self.0.time_delay.store(seconds.to_bits(), Ordering::Relaxed);
    }

    /// Runs a job in an idle runner, or in one that is forked for it, or as soon as one is free.
    pub fn submit(&self, job: Job) {
        let mut state = self.0.state();
        state.place(&self.0, Attempt { job: Arc::new(job), crashes: 0 });
    }

    /// Hands a job to a busy runner, to run it behind what it has.
    ///
    /// # Errors
    /// The job itself, when no runner has room for it.
    pub fn prefetch(&self, job: Job) -> Result<(), Job> {
        self.0.state().prefetch(&self.0, job)
    }

    /// Sends brief jobs to their runners. Others did not wait for it.
    pub fn flush(&self) {
        self.0.state().flush();
    }

    /// Takes back a job that has not started.
    pub fn try_recall(&self, key: &Key) -> Recall {
        self.0.state().try_recall(key)
    }

    /// Stops a job: one that has not started will not, one that runs is interrupted, and its runner killed if that
    /// does not help in time. Ends in [`Event::Skipped`], or in its own event if that was faster.
    pub fn cancel(&self, key: &Key) {
        self.0.cancel(key);
    }

    /// Kills the runner that runs `key` because it used too much memory; `peak` and `limit` in bytes. The job fails
    /// with a `MemoryError`, without another attempt. False when no runner runs it.
    pub fn kill_out_of_memory(&self, key: &Key, peak: u64, limit: u64) -> bool {
        self.0.state().kill_running(key, Cause::OutOfMemory { limit, peak })
    }

    /// Lets an idle runner end, to be replaced by a fresh one when there is work. False when it is not idle, or results
    /// are in it that are nowhere else.
    pub fn replace(&self, pid: u32) -> bool {
        self.0.state().replace(pid)
    }

    /// Sets how many bytes of results each runner may keep to itself; none at first. What is kept already stays there.
    pub fn let_keep(&self, bytes: u64) {
        let mut state = self.0.state();
        if state.keep != bytes {
            state.keep = bytes;
            state.runners.values().for_each(|runner| runner.let_keep(bytes));
        }
    }

    /// Has results published that lie in runners alone: in those that had nothing to do for `rest`, or in all.
    pub fn publish(&self, rest: Option<Duration>) {
        self.0.publish(rest);
    }

    /// Jobs that can be prefetched now.
    pub fn prefetch_room(&self) -> usize {
        self.0.state().prefetch_room(self.0.config.prefetch)
    }

    /// The pool's processes.
    pub fn processes(&self) -> Vec<Process> {
        let state = self.0.state();
        let zygote = state.zygote.pid().map(|pid| Process { pid, key: None, kind: ProcessKind::Zygote });
        let service = state.service.pid().map(|pid| Process { pid, key: None, kind: ProcessKind::Service });
        let runners = state.runners.values().filter_map(|runner| {
            let key = runner.current().map(|queued| queued.key().clone());
            Some(Process { pid: runner.pid?, key, kind: ProcessKind::Runner })
        });
        zygote.into_iter().chain(service).chain(runners).collect()
    }

    /// What runs now, by key, as `Worker.get_call_stack`: of the given keys, or of all. A runner that does not answer
    /// within a second is left out.
    pub async fn call_stacks(&self, keys: Option<&[Key]>) -> Vec<(Key, Vec<String>)> {
        let answers = self.ask_stacks(keys);
        let mut stacks = Vec::new();
        let deadline = tokio::time::Instant::now() + STACKS_TIMEOUT;
        for answer in answers {
            if let Ok(Ok(answer)) = tokio::time::timeout_at(deadline, answer).await {
                stacks.extend(answer);
            }
        }
        // a runner may have gone on to another task meanwhile
        stacks.retain(|(key, _)| keys.is_none_or(|keys| keys.contains(key)));
        stacks
    }

    fn ask_stacks(&self, keys: Option<&[Key]>) -> Vec<oneshot::Receiver<Stacks>> {
        let mut state = self.0.state();
        state.stacks.retain(|_, sender| !sender.is_closed());
        let asked = state.runners.values().filter(|runner| match (runner.current(), keys) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some(queued), Some(keys)) => keys.contains(queued.key()),
        });
        let links: Vec<_> = asked.map(|runner| runner.control.clone()).collect();
        let mut answers = Vec::with_capacity(links.len());
        for link in links {
            let request = state.new_id();
            if let Ok(message) = Outgoing::new(&ToChild::Stacks { request }, Vec::new()) {
                let (sender, receiver) = oneshot::channel();
                state.stacks.insert(request, sender);
                link.send(message);
                answers.push(receiver);
            }
        }
        answers
    }

    /// Has the service process answer a comm message, given and answered as frames. If it cannot, the answer is the
    /// error message that a Dask server sends when a handler fails.
    pub async fn service_request(&self, frames: Vec<Bytes>, target: Target) -> ServiceReply {
        Shared::service_request(&self.0, frames, target).await
    }

    /// Has an actor answer a comm message, `actor_execute` or `actor_attribute`, as the service process does others.
    pub async fn actor_request(&self, key: &Key, frames: Vec<Bytes>) -> Vec<Bytes> {
        self.0.actor_request(key, frames).await
    }

    /// Ends an actor, if there is one of that key.
    pub fn drop_actor(&self, key: &Key) {
        self.0.state().drop_actor(key);
    }

    /// Takes in a worker plugin that need not be set up before somebody uses it. Any other is set up by
    /// [`Pool::service_request`].
    pub fn add_plugin_lazily(&self, name: Value, pickle: Bytes) {
        self.0.state().add_plugin_lazily(name, pickle);
    }

    /// Nanny plugins and what they want of processes to come.
    pub fn nanny(&self) -> NannyState {
        self.0.state().nanny.clone()
    }

    /// Gives the service a message of a stream whose op a plugin may know. False when there is no plugin.
    pub fn service_stream(&self, message: &Value) -> bool {
        let mut state = self.0.state();
        if state.plugins.is_empty() {
            return false;
        }
        let Ok(frames) = encode_message(message, Compression::None) else { return false };
        let service = state.service(&self.0);
        service.map(|service| service.tell(&ToChild::Stream { frames: &frames })).is_ok()
    }

    /// What plugins have for the heartbeat, if a plugin may have something: a map of `extensions` and `digests`.
    pub fn service_beat(&self) -> Option<impl Future<Output = Value> + Send + use<>> {
        let shared = self.0.clone();
        let asked = shared.state().service.is_there();
        asked.then_some(async move { shared.beat().await })
    }

    /// Tells plugins about tasks that changed their state: key, old state, new state.
    pub fn tell_transitions(&self, transitions: &Value) {
        self.0.state().service.send(&ToChild::Transitions { transitions });
    }

    /// Size and type of objects that came without (scattered data), or why Python cannot open one.
    ///
    /// # Errors
    /// When the service process ends first, or cannot be forked.
    pub async fn describe(&self, objects: &[Object]) -> Result<Vec<Result<Description, String>>, Error> {
        Shared::describe(&self.0, objects).await
    }

    /// Ends every process of the pool. Jobs are dropped without an event.
    pub async fn shutdown(&self) {
        self.end(true).await;
    }

    /// The same for a worker whose nanny stays: plugins of the nanny are not torn down.
    pub async fn shutdown_worker(&self) {
        self.end(false).await;
    }

    async fn end(&self, nanny: bool) {
        let limit = {
            let mut state = self.0.state();
            state.stopping = true;
            state.pending.clear();
            state.parked.clear();
            state.places.clear();
            state.retire_idle();
            if state.has_plugins_to_run() {
                state.service.leave(nanny);
                TEARDOWN_TIMEOUT
            } else {
                EXIT_TIMEOUT
            }
        };
        // what users registered with atexit runs in runners that have nothing else to do
        let _ = tokio::time::timeout(limit, self.0.idle_ended()).await;
        let ended = self.0.state().zygote.stop();
        if let Some(ended) = ended {
            // whoever would tell is gone with the runtime
            let _ = ended.await;
        }
    }
}

impl WorkerInfo {
    fn into_value(self) -> Value {
        Value::map([
            ("address", self.address.into()),
            ("name", self.name),
            ("id", self.id.into()),
            ("nthreads", self.nthreads.into()),
            ("local_directory", self.local_directory.into()),
            ("memory_limit", self.memory_limit.into()),
            ("scheduler_address", self.scheduler_address.into()),
            ("nanny_address", self.nanny_address.into()),
            ("nanny_id", self.nanny_id.into()),
        ])
    }
}
