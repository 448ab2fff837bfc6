//! What can happen to the worker: the only way to change [`WorkerState`](super::WorkerState).
//!
//! Plain data. Values of tasks never pass through here: they live in `store`, the events tell their size and type.
//! Source: the subclasses of `StateMachineEvent` in `distributed/worker_state_machine.py`.

use std::sync::Arc;

use bytes::Bytes;

use crate::proto::{Address, ComputeTask, Key, Payload, RunId, StreamMessage, Value};

/// One stimulus and the id it is told under, here and in every message it causes.
#[derive(Clone, Debug)]
pub struct Event {
    /// Unique id of the event.
    pub stimulus_id: Arc<str>,
    /// What happened.
    pub kind: EventKind,
}

impl Event {
    /// An event under its stimulus id.
    pub fn new(stimulus_id: impl Into<Arc<str>>, kind: EventKind) -> Self {
        Event { stimulus_id: stimulus_id.into(), kind }
    }
}

/// What happened. The first group comes from the scheduler, the second from this process.
#[derive(Clone, Debug)]
pub enum EventKind {
    /// Run a task; its dependencies are to be gathered first.
    ComputeTask(Box<ComputeTask>),
    /// Forget about computing a task, if it has not started.
    CancelCompute { key: Key },
    /// The scheduler needs these keys here no longer.
    FreeKeys { keys: Vec<Key> },
    /// Drop replicas of keys that are in memory elsewhere too; other states are left alone.
    RemoveReplicas { keys: Vec<Key> },
    /// Fetch replicas of keys, whether a task here needs them or not.
    AcquireReplicas { who_has: Vec<(Key, Vec<Address>)>, nbytes: Vec<(Key, u64)> },
    /// Give a task back, if it has not started.
    StealRequest { key: Key },
    /// Where keys are now.
    RefreshWhoHas { who_has: Vec<(Key, Vec<Address>)> },
    /// A peer has left the cluster.
    RemoveWorker { worker: Address },

    /// Start nothing more: no task, no transfer.
    Pause,
    /// Take up work again.
    Unpause,
    /// A client scattered data here. Put the values in the store before the event.
    UpdateData { data: Vec<(Key, Stored)> },
    /// A `GatherDep` ended well; fewer keys than asked for may have come. Put the values in the store before the event.
    GatherDepSuccess { worker: Address, total_nbytes: u64, data: Vec<(Key, Stored)> },
    /// A `GatherDep` was turned down: the peer is busy.
    GatherDepBusy { worker: Address, total_nbytes: u64 },
    /// A `GatherDep` ended because the peer could not be reached or the connection broke.
    GatherDepNetworkFailure { worker: Address, total_nbytes: u64 },
    /// A `GatherDep` ended in any other way.
    GatherDepFailure { worker: Address, total_nbytes: u64, error: ErrorMessage },
    /// The pause that `RetryBusyWorkerLater` asked for is over.
    RetryBusyWorker { worker: Address },
    /// Time to ask the scheduler for keys that nobody seems to hold.
    FindMissing,
    /// A task ended well. Put the value in the store before the event.
    ExecuteSuccess {
        key: Key,
        /// Attempt that ran: the task's `run_id` when `Execute` was carried out.
        run_id: RunId,
        /// Unix seconds, in the scheduler's clock.
        start: f64,
        /// Unix seconds, in the scheduler's clock.
        stop: f64,
        /// Bytes, by Dask's `sizeof`.
        nbytes: u64,
        type_: Option<TypeInfo>,
        /// Identifier of the Python thread that ran it.
        thread: Option<i64>,
        /// What else took time, in order, before the computation.
        startstops: Vec<StartStop>,
        /// What the task said about itself; a map, or `None`.
        metadata: Option<Box<Value>>,
    },
    /// A task raised.
    ExecuteFailure {
        key: Key,
        run_id: RunId,
        /// Unix seconds; `None` when user code never began.
        start: Option<f64>,
        /// Unix seconds; `None` when user code never began.
        stop: Option<f64>,
        error: ErrorMessage,
        thread: Option<i64>,
    },
    /// A task raised `distributed.Reschedule`.
    Reschedule { key: Key },
    /// A running task left its slot (`distributed.secede`) after so many seconds.
    Secede { key: Key, compute_duration: f64 },
    /// Stored results were lost here, with a runner for one. Dask has no such event: there a result dies with its worker only.
    DataLost { keys: Vec<Key> },
}

impl TryFrom<StreamMessage> for EventKind {
    type Error = StreamMessage;

    /// A message of the scheduler's stream as an event; what is not for the state machine comes back.
    fn try_from(message: StreamMessage) -> Result<Self, StreamMessage> {
        Ok(match message {
            StreamMessage::ComputeTask(task) => EventKind::ComputeTask(task),
            StreamMessage::CancelCompute { key } => EventKind::CancelCompute { key },
            StreamMessage::FreeKeys { keys } => EventKind::FreeKeys { keys },
            StreamMessage::RemoveReplicas { keys } => EventKind::RemoveReplicas { keys },
            StreamMessage::AcquireReplicas { who_has, nbytes } => {
                EventKind::AcquireReplicas { who_has, nbytes }
            }
            StreamMessage::StealRequest { key } => EventKind::StealRequest { key },
            StreamMessage::RefreshWhoHas { who_has } => EventKind::RefreshWhoHas { who_has },
            StreamMessage::RemoveWorker { worker } => EventKind::RemoveWorker { worker },
            other => return Err(other),
        })
    }
}

/// A value that is in the store now.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    /// Bytes, by Dask's `sizeof`; used where the scheduler has not told the size.
    pub nbytes: u64,
    /// Type of the value, where it is known without opening it.
    pub type_: Option<TypeInfo>,
}

/// A Python type, as `task-finished` tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TypeInfo {
    /// `pickle.dumps(type)`
    pub pickled: Bytes,
    /// `dask.utils.typename(type)`
    pub name: Arc<str>,
}

impl TypeInfo {
    /// `object`: what is told of a value whose type nobody has looked at.
    pub fn unknown() -> Self {
        TypeInfo { pickled: Bytes::from_static(b"cbuiltins\nobject\n."), name: "object".into() }
    }
}

/// `distributed.core.ErrorMessage`: a Python exception on its way to the client.
#[derive(Clone, Debug, PartialEq)]
pub struct ErrorMessage {
    /// The serialized exception.
    pub exception: Arc<Payload>,
    /// The serialized traceback, if it has one.
    pub traceback: Option<Arc<Payload>>,
    /// `str(exception)` shortened, for logs.
    pub exception_text: Arc<str>,
    /// The formatted traceback, for logs.
    pub traceback_text: Arc<str>,
}

/// One span of time in a task's life, for the scheduler's accounting.
#[derive(Clone, Debug, PartialEq)]
pub struct StartStop {
    /// What took the time.
    pub action: Action,
    /// Unix seconds, in the scheduler's clock.
    pub start: f64,
    /// Unix seconds, in the scheduler's clock.
    pub stop: f64,
    /// The peer, for a transfer.
    pub source: Option<Address>,
}

impl StartStop {
    /// Dask's dict.
    pub fn to_value(&self) -> Value {
        let mut items = vec![
            ("action", Value::from(self.action.as_str())),
            ("start", self.start.into()),
            ("stop", self.stop.into()),
        ];
        if let Some(source) = &self.source {
            items.push(("source", source.as_str().into()));
        }
        Value::map(items)
    }
}

/// Kinds of [`StartStop`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// User code ran.
    Compute,
    /// A dependency came from a peer.
    Transfer,
    /// A spilled value was read.
    DiskRead,
    /// A value was spilled.
    DiskWrite,
    /// The task was unpickled.
    Deserialize,
}

impl Action {
    /// Dask's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Action::Compute => "compute",
            Action::Transfer => "transfer",
            Action::DiskRead => "disk-read",
            Action::DiskWrite => "disk-write",
            Action::Deserialize => "deserialize",
        }
    }
}
