//! What the state machine wants done: instructions to the driver and messages to the scheduler.
//!
//! Plain data. Source: the subclasses of `Instruction` in `distributed/worker_state_machine.py`.

use std::sync::Arc;

use crate::proto::{Address, Key, RunId, Value};

use super::event::{ErrorMessage, StartStop, TypeInfo};
use super::task::StateName;

/// Something the driver is to do. Each `GatherDep`, `Execute` and `RetryBusyWorkerLater` must end in exactly one event.
#[derive(Clone, Debug, PartialEq)]
pub enum Instruction {
    /// Fetch keys from a peer; ends in one of the `GatherDep*` events, with the same `total_nbytes`.
    GatherDep { worker: Address, to_gather: Vec<Key>, total_nbytes: u64, stimulus_id: Arc<str> },
    /// Run a task; ends in `ExecuteSuccess`, `ExecuteFailure` or `Reschedule`.
    Execute { key: Key, stimulus_id: Arc<str> },
    /// Send `RetryBusyWorker` after a pause (Dask: 150 ms).
    RetryBusyWorkerLater { worker: Address, stimulus_id: Arc<str> },
    /// Forget the value or actor stored under this key, if there is one. Said of values that were held and are
    /// released, and of values that came with this event and that nobody wants any more.
    DropData { key: Key },
    /// Tell the scheduler.
    Send(SchedulerMessage),
}

/// A message for the scheduler's stream.
#[derive(Clone, Debug, PartialEq)]
pub struct SchedulerMessage {
    /// The event that caused it.
    pub stimulus_id: Arc<str>,
    /// What is told.
    pub report: Report,
}

/// The ops a worker sends on its stream.
#[derive(Clone, Debug, PartialEq)]
pub enum Report {
    /// `task-finished`
    TaskFinished {
        key: Key,
        run_id: RunId,
        /// Bytes.
        nbytes: u64,
        type_: TypeInfo,
        metadata: Option<Box<Value>>,
        thread: Option<i64>,
        startstops: Vec<StartStop>,
    },
    /// `task-erred`
    TaskErred {
        key: Key,
        run_id: RunId,
        error: ErrorMessage,
        thread: Option<i64>,
        startstops: Vec<StartStop>,
    },
    /// `release-worker-data`
    ReleaseWorkerData { key: Key },
    /// `reschedule`
    Reschedule { key: Key },
    /// `long-running`; the duration (seconds) is known only when the task secedes right now.
    LongRunning { key: Key, run_id: RunId, compute_duration: Option<f64> },
    /// `add-keys`
    AddKeys { keys: Vec<Key> },
    /// `request-refresh-who-has`
    RequestRefreshWhoHas { keys: Vec<Key> },
    /// `steal-response`; the state the task was in, `None` for an unknown one.
    StealResponse { key: Key, state: Option<StateName> },
}

impl SchedulerMessage {
    /// Dask's `op`.
    pub fn op(&self) -> &'static str {
        match self.report {
            Report::TaskFinished { .. } => "task-finished",
            Report::TaskErred { .. } => "task-erred",
            Report::ReleaseWorkerData { .. } => "release-worker-data",
            Report::Reschedule { .. } => "reschedule",
            Report::LongRunning { .. } => "long-running",
            Report::AddKeys { .. } => "add-keys",
            Report::RequestRefreshWhoHas { .. } => "request-refresh-who-has",
            Report::StealResponse { .. } => "steal-response",
        }
    }

    /// The dict that Dask's `SendMessageToScheduler.to_dict` gives.
    pub fn to_value(&self) -> Value {
        let mut items = match &self.report {
            Report::TaskFinished { key, run_id, nbytes, type_, metadata, thread, startstops } => vec![
                ("key", Value::from(key)),
                ("run_id", run_id.0.into()),
                ("nbytes", (*nbytes).into()),
                ("type", type_.pickled.clone().into()),
                ("typename", type_.name.clone().into()),
                ("metadata", metadata.as_deref().cloned().unwrap_or(Value::Map(Vec::new()))),
                ("thread", (*thread).into()),
                ("startstops", startstops_value(startstops)),
                ("status", "OK".into()),
            ],
            Report::TaskErred { key, run_id, error, thread, startstops } => vec![
                ("key", Value::from(key)),
                ("run_id", run_id.0.into()),
                ("exception", (*error.exception).clone().into()),
                ("traceback", error.traceback.as_deref().cloned().into()),
                ("exception_text", error.exception_text.clone().into()),
                ("traceback_text", error.traceback_text.clone().into()),
                ("thread", (*thread).into()),
                ("startstops", startstops_value(startstops)),
                ("status", "error".into()),
            ],
            Report::ReleaseWorkerData { key } | Report::Reschedule { key } => vec![("key", Value::from(key))],
            Report::LongRunning { key, run_id, compute_duration } => vec![
                ("key", Value::from(key)),
                ("run_id", run_id.0.into()),
                ("compute_duration", (*compute_duration).into()),
            ],
            Report::AddKeys { keys } | Report::RequestRefreshWhoHas { keys } => {
                vec![("keys", Value::List(keys.iter().map(Value::from).collect()))]
            }
            Report::StealResponse { key, state } => {
                vec![("key", Value::from(key)), ("state", state.map(StateName::as_str).into())]
            }
        };
        items.push(("op", self.op().into()));
        items.push(("stimulus_id", self.stimulus_id.clone().into()));
        Value::map(items)
    }
}

fn startstops_value(startstops: &[StartStop]) -> Value {
    Value::List(startstops.iter().map(StartStop::to_value).collect())
}
