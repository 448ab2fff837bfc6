//! What the servers ask of the rest of the worker: everything that needs the state machine, the runners or the
//! scheduler.

use std::sync::Arc;

use bytes::Bytes;

use crate::net;
use crate::proto::{Address, Key, Payload, Status, Stimulus, Value};
use crate::telemetry::log::Line;
use crate::wire::payload::Exception;

use super::FetchError;

/// Why a handler has no answer.
#[derive(Debug)]
pub enum Failure {
    /// A Python exception of our own making.
    Exception(Exception),
    /// A Python exception that a runner or another worker made.
    Remote(Box<FetchError>),
    /// The connection to whoever asked is over.
    Connection(net::Error),
}

impl From<Exception> for Failure {
    fn from(exception: Exception) -> Self {
        Failure::Exception(exception)
    }
}

impl From<net::Error> for Failure {
    fn from(error: net::Error) -> Self {
        Failure::Connection(error)
    }
}

impl From<FetchError> for Failure {
    fn from(error: FetchError) -> Self {
        Failure::Remote(Box::new(error))
    }
}

/// A message that the Python service process answers.
#[derive(Debug)]
pub struct Relay {
    /// Its op, for the log; `None` if that is no string.
    pub op: Option<String>,
    /// The whole message as it came.
    pub frames: Vec<Bytes>,
    /// Who asks.
    pub peer: Address,
}

/// Arguments of `terminate` (`Worker.close`).
#[derive(Clone, Debug, PartialEq)]
pub struct Terminate {
    /// Seconds for closing each part.
    pub timeout: f64,
    /// Whether to wait for running tasks.
    pub executor_wait: bool,
    /// Whether the nanny shall leave as well.
    pub nanny: bool,
    /// For the log.
    pub reason: String,
}

/// The worker behind the worker's address. All methods may be called from many connections at once.
pub trait Backend: Send + Sync + 'static {
    /// The worker's status now; a paused one serves one transfer at a time.
    fn status(&self) -> Status;

    /// The reply to `identity`.
    fn identity(&self) -> Value;

    /// The reply to `versions`, with further `packages` as the request has them.
    fn versions(&self, packages: Option<Value>) -> impl Future<Output = Result<Value, Failure>> + Send;

    /// Takes data in (`UpdateDataEvent`); their sizes in bytes by `sizeof`. Returns when they can be served.
    fn update_data(
        &self,
        data: Vec<(Key, Payload)>,
        stimulus_id: Arc<str>,
    ) -> impl Future<Output = Result<Vec<(Key, u64)>, Failure>> + Send;

    /// Lets go of keys (`FreeKeysEvent`). Returns when the state machine has seen it.
    fn free_keys(&self, keys: Vec<Key>, stimulus_id: Arc<str>) -> impl Future<Output = ()> + Send;

    /// Asks the scheduler who has these keys.
    fn who_has(
        &self,
        keys: Vec<Key>,
    ) -> impl Future<Output = Result<Vec<(Key, Vec<Address>)>, net::Error>> + Send;

    /// Handles of those `keys` that are actors of this worker (`distributed.actor.Actor`, serialized).
    fn actors(&self, keys: Vec<Key>) -> impl Future<Output = Vec<(Key, Payload)>> + Send;

    /// Log records, newest first, none before `start` (seconds since 1970), at most `n`.
    fn logs(&self, start: f64, n: Option<usize>) -> Vec<Line>;

    /// The reply to `get_monitor_info`.
    fn monitor_info(&self, recent: bool, start: u64) -> Value;

    /// The reply to `call_stack`: the stacks of running tasks, of these or of all.
    fn call_stacks(&self, keys: Option<Vec<Key>>) -> impl Future<Output = Result<Value, Failure>> + Send;

    /// The reply to `get_story`.
    fn story(&self, keys_or_stimuli: Vec<Key>) -> impl Future<Output = Value> + Send;

    /// The reply to `dump_state`, without the fields in `exclude`.
    fn dump(&self, exclude: Vec<Key>) -> impl Future<Output = Value> + Send;

    /// A message of a `connection_stream`, to be treated as if the scheduler had sent it.
    fn stream(&self, stimulus: Stimulus) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Begins to close the worker.
    fn terminate(&self, how: Terminate) -> impl Future<Output = ()> + Send;

    /// Has the Python service process answer, for ops that only Python understands or nobody knows: the frames of
    /// the reply. An op nobody knows is answered `None`, as by a stock worker.
    fn relay(&self, request: Relay) -> impl Future<Output = Result<Vec<Bytes>, Failure>> + Send;
}

/// How a `restart` of a nanny ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restarted {
    /// A new worker is up.
    Done,
    /// It takes longer than it may.
    TimedOut,
}

/// The nanny behind the nanny's address.
pub trait NannyBackend: Send + Sync + 'static {
    /// The reply to `identity`.
    fn identity(&self) -> Value;

    /// The reply to `dump_state`, without the fields in `exclude`.
    fn dump(&self, exclude: Vec<Key>) -> impl Future<Output = Value> + Send;

    /// Log records of the nanny, as [`Backend::logs`].
    fn logs(&self, start: f64, n: Option<usize>) -> Vec<Line>;

    /// Starts the worker unless it runs; its status.
    fn instantiate(&self) -> impl Future<Output = Result<Status, Failure>> + Send;

    /// Ends the worker, all its processes, within `timeout` seconds.
    fn kill(&self, timeout: f64, reason: String) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Ends the worker and starts a new one, within `timeout` seconds.
    fn restart(
        &self,
        timeout: f64,
        reason: String,
    ) -> impl Future<Output = Result<Restarted, Failure>> + Send;

    /// The worker will leave; do not start another.
    fn close_gracefully(&self, reason: String) -> impl Future<Output = ()> + Send;

    /// Begins to close nanny and worker.
    fn terminate(&self, timeout: f64, reason: String) -> impl Future<Output = ()> + Send;

    /// Has Python answer, as [`Backend::relay`]: `run` and the plugins of the nanny.
    fn relay(&self, request: Relay) -> impl Future<Output = Result<Vec<Bytes>, Failure>> + Send;
}
