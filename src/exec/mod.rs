//! Runs tasks: a pool of Python processes forked from one zygote, and the service process for worker-wide state.
//!
//! The front door is [`Pool`]: jobs go in, [`Event`]s come out. Nothing here knows the scheduler, the network or the
//! state machine; results are handed over as objects of the store, nothing here keeps them.

mod actors;
mod burial;
mod dispatch;
mod ipc;
mod link;
mod live;
mod mailbox;
mod object;
mod output;
mod plugins;
mod pool;
mod service;
mod slot;
mod verdict;
mod zygote;

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;

use crate::proto::{Key, Payload, RunId, Value};
use crate::store::{Live, Object};
use crate::sys;

pub use ipc::{Description, Target};
pub use output::Stream;
pub use plugins::NannyState;
pub use pool::Pool;
pub use verdict::Cause;
pub use zygote::nanny_environment;

/// How to run tasks.
#[derive(Clone, Debug)]
pub struct Config {
    /// The interpreter, looked up on PATH unless it has a slash. It needs `distributed`.
    pub python: PathBuf,
    /// The binary that has the sandbox's stub: this one.
    pub stub: PathBuf,
    /// Runners that take tasks at once.
    pub slots: usize,
    /// Variables set on top of the daemon's environment; see [`nanny_environment`].
    pub environment: Vec<(OsString, OsString)>,
    /// Variables of the daemon's environment that Python must not see.
    pub secrets: Vec<OsString>,
    /// The worker's scratch directory, first on `sys.path` as with Dask's worker.
    pub local_directory: PathBuf,
    /// `sys.argv` of the Python processes.
    pub argv: Vec<String>,
    /// How often a task is tried when the process that runs it dies. At least 1.
    pub attempts: u32,
    /// Jobs that may wait in a runner behind the one it runs.
    pub prefetch: usize,
    /// How long a cancelled task may go on before its runner is killed.
    pub cancel_grace: Duration,
    /// What nanny plugins have done so far.
    pub nanny: NannyState,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            python: "python3".into(),
            stub: sys::own_executable(),
            slots: 1,
            environment: Vec::new(),
            secrets: Vec::new(),
            local_directory: std::env::temp_dir(),
            argv: vec!["iqoqo-dask-worker".into()],
            attempts: 2,
            prefetch: 2,
            cancel_grace: Duration::from_secs(5),
            nanny: NannyState::default(),
        }
    }
}

/// A task to run.
#[derive(Clone, Debug)]
pub struct Job {
    /// Task.
    pub key: Key,
    /// Attempt of the scheduler's, echoed in events.
    pub run_id: RunId,
    /// The pickled `dask._task_spec.GraphNode`.
    pub run_spec: Arc<Payload>,
    /// Its dependencies' results.
    pub inputs: Vec<(Key, Object)>,
    /// Those that are in runners.
    pub live: Vec<Live>,
    /// The task's annotations.
    pub annotations: Arc<Value>,
    /// It probably takes less time than waking a process does. Such jobs wait for [`Pool::flush`] and then go to few
    /// runners together, and their results may come together.
    pub brief: bool,
    /// Its result stays in the runner, which then serves no other task; what others get is a handle.
    pub actor: bool,
}

/// What the worker is, for `get_worker()` and `dask_worker` in user code.
#[derive(Clone, Debug, Default)]
pub struct WorkerInfo {
    /// Contact address.
    pub address: String,
    /// As given or made up.
    pub name: Value,
    /// `Worker-<uuid>`
    pub id: String,
    /// Tasks at once.
    pub nthreads: usize,
    /// Scratch directory.
    pub local_directory: String,
    /// Bytes; none is no limit.
    pub memory_limit: Option<u64>,
    /// The scheduler's address.
    pub scheduler_address: String,
    /// The nanny's address; empty without one.
    pub nanny_address: String,
    /// `Nanny-<uuid>`
    pub nanny_id: String,
}

/// The service process's answer to a comm message.
#[derive(Clone, Debug, Default)]
pub struct ServiceReply {
    /// The reply, a comm message.
    pub frames: Vec<Bytes>,
    /// Why the nanny is to restart its worker, if a plugin of its wants that.
    pub restart: Option<String>,
}

/// What became of jobs and processes, in order.
#[derive(Debug)]
pub enum Event {
    /// A job's result.
    Finished(Box<Finished>),
    /// A job's result, which is in its runner for now.
    Kept(Box<Kept>),
    /// A result that was kept is published: [`Live::object`] has it.
    Published {
        /// It.
        live: Live,
    },
    /// Results that were kept are lost: their runner is gone, or could not publish them.
    Lost {
        /// They.
        results: Vec<Live>,
    },
    /// A job raised, or could not be run.
    Failed(Box<Failed>),
    /// A job raised `distributed.Reschedule`.
    Reschedule {
        /// Task.
        key: Key,
        /// Attempt.
        run_id: RunId,
    },
    /// A runner starts a prefetched job. Comes before the event of the job that it ran until now.
    Started {
        /// Task.
        key: Key,
        /// Attempt.
        run_id: RunId,
    },
    /// A job was not run: it was recalled when it was about to start ([`Recall::Started`]), or cancelled.
    Skipped {
        /// Task.
        key: Key,
        /// Attempt.
        run_id: RunId,
    },
    /// The running job left the pool (`distributed.secede`): its slot is free, its own event comes later.
    Seceded {
        /// Task.
        key: Key,
        /// Seconds it ran until then.
        compute_duration: f64,
    },
    /// A runner ended that should not have. Its job is tried again, or its own event says that it failed.
    RunnerDied {
        /// Process.
        pid: Option<u32>,
        /// Why.
        cause: Cause,
        /// The job it ran.
        key: Option<Key>,
        /// Prefetched jobs it never started; they are no longer in the pool.
        requeued: Vec<(Key, RunId)>,
    },
    /// The interpreter cannot be used: it was started and ended before it was ready.
    InterpreterFailed {
        /// What it wrote last, or why it could not be executed.
        text: String,
        /// How often in a row.
        attempts: u32,
    },
    /// The interpreter is ready.
    InterpreterReady {
        /// Version of Python.
        python: String,
        /// Version of `distributed`.
        distributed: String,
    },
    /// A line that a Python process wrote.
    Output(Line),
    /// A message that user code sends to the scheduler (`log_event`).
    ToScheduler(Value),
    /// Whether a plugin wants to be told of tasks that change their state.
    WatchTransitions(bool),
    /// The service process ended with what cannot be made again, such as a part of a shuffle.
    ServiceLost,
    /// Data that user code puts on this worker (`Client.scatter` in a task); it tells the scheduler itself.
    Scattered {
        /// Under this key.
        key: Key,
        /// The data.
        object: Object,
        /// Its type.
        description: Description,
    },
}

/// A job's result.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Task.
    pub key: Key,
    /// Attempt.
    pub run_id: RunId,
    /// The result.
    pub object: Object,
    /// Its type, pickled.
    pub type_pickled: Bytes,
    /// Its type's name (`dask.utils.typename`).
    pub typename: Arc<str>,
    /// When it started, in seconds of the scheduler's clock.
    pub start: f64,
    /// When it ended.
    pub stop: f64,
    /// Identifies the runner, as a thread does in Dask's worker.
    pub thread: i64,
    /// CPU seconds of the call.
    pub cpu: f64,
}

/// A job's result that its runner keeps until somebody else needs it.
#[derive(Clone, Debug)]
pub struct Kept {
    /// Attempt.
    pub run_id: RunId,
    /// The result.
    pub live: Live,
    /// As in [`Finished`].
    pub type_pickled: Bytes,
    /// Its type's name.
    pub typename: Arc<str>,
    /// When it started.
    pub start: f64,
    /// When it ended.
    pub stop: f64,
    /// Identifies the runner.
    pub thread: i64,
    /// CPU seconds of the call.
    pub cpu: f64,
}

/// A job that raised, or could not be run.
#[derive(Clone, Debug)]
pub struct Failed {
    /// Task.
    pub key: Key,
    /// Attempt.
    pub run_id: RunId,
    /// The pickled exception, as `distributed.core.error_message` makes it.
    pub exception: Payload,
    /// Likewise; none when it is too long, or nothing was raised.
    pub traceback: Option<Payload>,
    /// `repr` of the task, at most 1000 characters; empty when it could not be opened.
    pub task_text: Arc<str>,
    /// `repr` of the exception.
    pub exception_text: Arc<str>,
    /// The traceback, formatted.
    pub traceback_text: Arc<str>,
    /// When it started; none when it could not be run.
    pub start: Option<f64>,
    /// When it ended.
    pub stop: Option<f64>,
    /// Identifies the runner; none when it died.
    pub thread: Option<i64>,
}

/// A line that a Python process wrote. Keep it no longer than needed: writers wait for it to be dropped.
#[derive(Debug)]
pub struct Line {
    /// The task that ran then.
    pub key: Option<Key>,
    /// Process; none is the zygote.
    pub pid: Option<u32>,
    /// Where it was written to.
    pub stream: Stream,
    /// Without its end.
    pub line: String,
    /// Room for the next.
    _room: Option<Arc<OwnedSemaphorePermit>>,
}

/// Whether a job could be taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recall {
    /// It will not run. No event about it follows.
    Recalled,
    /// It has started, or is just about to: its event tells ([`Event::Skipped`] if it did not after all).
    Started,
    /// The pool does not have it; its last event may be on the way.
    Unknown,
}

/// A process of the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Process id.
    pub pid: u32,
    /// The task it runs, if it is a runner that runs one.
    pub key: Option<Key>,
    /// What it is.
    pub kind: ProcessKind,
}

/// What a process of the pool is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessKind {
    /// Forks the others.
    Zygote,
    /// Runs tasks.
    Runner,
    /// Holds worker-wide state.
    Service,
}

/// Why the pool cannot do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused something.
    #[error("could not {what}")]
    System {
        /// What was to be done.
        what: &'static str,
        /// Why it could not.
        #[source]
        source: io::Error,
    },
    /// The system refused something.
    #[error("could not {what}")]
    Sys {
        /// What was to be done.
        what: &'static str,
        /// Why it could not.
        #[source]
        source: sys::Error,
    },
    /// The service process ended before it answered.
    #[error("the service process {cause}")]
    ServiceDied {
        /// Why.
        cause: Cause,
    },
    /// The pool is shutting down.
    #[error("the pool of runners is shutting down")]
    Stopping,
}
