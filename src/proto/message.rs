//! What the scheduler tells a worker over the stream, parsed once, so that nothing behind it meets a malformed message.
//!
//! Source: `Worker.stream_handlers` and the events of `distributed/worker_state_machine.py`.

use std::sync::Arc;

use super::ids::{Address, Key, Priority, RunId, Status};
use super::value::{Payload, Value};

/// `{"op": "compute-task"}` (`Scheduler._task_to_msg`).
#[derive(Clone, Debug)]
pub struct ComputeTask {
    /// Task to run.
    pub key: Key,
    /// Attempt, echoed in every answer.
    pub run_id: RunId,
    /// Who holds each dependency. Empty for a task without dependencies.
    pub who_has: Vec<(Key, Vec<Address>)>,
    /// Size of each dependency in bytes.
    pub nbytes: Vec<(Key, u64)>,
    /// Scheduler's priority; the state machine appends its generation.
    pub priority: Priority,
    /// The pickled `dask._task_spec.GraphNode`; `None` only in tests.
    pub run_spec: Option<Arc<Payload>>,
    /// Abstract resources needed while running.
    pub resource_restrictions: Vec<(Arc<str>, f64)>,
    /// Whether the result is an actor.
    pub actor: bool,
    /// User annotations, opaque but for what the worker reads (`executor`, `span`...).
    pub annotations: Arc<Value>,
    /// Span this task belongs to.
    pub span_id: Option<Arc<str>>,
}

/// One message of the scheduler's stream.
#[derive(Clone, Debug)]
pub enum StreamMessage {
    /// `compute-task`
    ComputeTask(Box<ComputeTask>),
    /// `cancel-compute`
    CancelCompute { key: Key },
    /// `free-keys`
    FreeKeys { keys: Vec<Key> },
    /// `remove-replicas`
    RemoveReplicas { keys: Vec<Key> },
    /// `acquire-replicas`
    AcquireReplicas { who_has: Vec<(Key, Vec<Address>)>, nbytes: Vec<(Key, u64)> },
    /// `steal-request`
    StealRequest { key: Key },
    /// `refresh-who-has`
    RefreshWhoHas { who_has: Vec<(Key, Vec<Address>)> },
    /// `worker-status-change`
    StatusChange { status: Status },
    /// `remove-worker`
    RemoveWorker { worker: Address },
    /// `close`: leave, with a reason for the log
    Close { reason: String },
    /// An op that this build does not know; a plugin may have added it (`worker.stream_handlers`).
    Unknown { op: Arc<str>, message: Value },
}

/// Why a stream message could not be understood.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MessageError {
    /// Not a map with a string `op`.
    #[error("message is not a map with an \"op\"")]
    NoOp,
    /// A field is not there or has the wrong type.
    #[error("field {field:?} of {op:?} is missing or malformed")]
    Field { op: Arc<str>, field: &'static str },
}

/// A stream message and the `stimulus_id` it came with.
#[derive(Clone, Debug)]
pub struct Stimulus {
    /// Echoed in answers, for stories that cross processes.
    pub stimulus_id: Arc<str>,
    /// What is asked.
    pub message: StreamMessage,
}

impl Stimulus {
    /// Understands one message of the stream.
    ///
    /// # Errors
    /// [`MessageError`] names the op and the field.
    pub fn parse(mut value: Value) -> Result<Self, MessageError> {
        let op: Arc<str> = match value.field("op") {
            Some(Value::Str(op)) => op.clone(),
            _ => return Err(MessageError::NoOp),
        };
        let stimulus_id = match value.field("stimulus_id") {
            Some(Value::Str(id)) => id.clone(),
            _ => op.clone(),
        };
        let mut fields = Fields { op: &op, value: &mut value };
        let message = match &*op {
            "compute-task" => StreamMessage::ComputeTask(Box::new(fields.compute_task()?)),
            "cancel-compute" => StreamMessage::CancelCompute { key: fields.key("key")? },
            "free-keys" => StreamMessage::FreeKeys { keys: fields.keys("keys")? },
            "remove-replicas" => StreamMessage::RemoveReplicas { keys: fields.keys("keys")? },
            "acquire-replicas" => StreamMessage::AcquireReplicas {
                who_has: fields.who_has("who_has")?,
                nbytes: fields.nbytes("nbytes")?,
            },
            "steal-request" => StreamMessage::StealRequest { key: fields.key("key")? },
            "refresh-who-has" => StreamMessage::RefreshWhoHas { who_has: fields.who_has("who_has")? },
            "worker-status-change" => StreamMessage::StatusChange { status: fields.status("status")? },
            "remove-worker" => StreamMessage::RemoveWorker { worker: fields.address("worker")? },
            "close" => StreamMessage::Close { reason: fields.text_or("reason", "scheduler-close") },
            _ => StreamMessage::Unknown { op: op.clone(), message: value },
        };
        Ok(Stimulus { stimulus_id, message })
    }
}

/// Typed access to the fields of one message, with errors that name op and field.
struct Fields<'a> {
    op: &'a Arc<str>,
    value: &'a mut Value,
}

impl Fields<'_> {
    fn bad(&self, field: &'static str) -> MessageError {
        MessageError::Field { op: self.op.clone(), field }
    }

    fn want<T>(
        &self,
        field: &'static str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<T, MessageError> {
        self.value.field(field).and_then(read).ok_or_else(|| self.bad(field))
    }

    fn key(&self, field: &'static str) -> Result<Key, MessageError> {
        self.want(field, Value::to_key)
    }

    fn keys(&self, field: &'static str) -> Result<Vec<Key>, MessageError> {
        self.want(field, |v| v.as_list()?.iter().map(Value::to_key).collect())
    }

    fn address(&self, field: &'static str) -> Result<Address, MessageError> {
        self.want(field, |v| Address::parse(v.as_str()?).ok())
    }

    fn status(&self, field: &'static str) -> Result<Status, MessageError> {
        self.want(field, |v| Status::from_name(v.as_str()?))
    }

    fn text_or(&self, field: &str, default: &str) -> String {
        self.value.field(field).and_then(Value::as_str).unwrap_or(default).to_owned()
    }

    fn who_has(&self, field: &'static str) -> Result<Vec<(Key, Vec<Address>)>, MessageError> {
        self.want(field, |v| {
            v.as_map()?
                .iter()
                .map(|(k, workers)| {
                    let workers = workers.as_list()?.iter();
                    Some((
                        k.to_key()?,
                        workers.map(|w| Address::parse(w.as_str()?).ok()).collect::<Option<_>>()?,
                    ))
                })
                .collect()
        })
    }

    fn nbytes(&self, field: &'static str) -> Result<Vec<(Key, u64)>, MessageError> {
        self.want(field, |v| {
            // the scheduler writes -1 for a size it does not know
            v.as_map()?.iter().map(|(k, n)| Some((k.to_key()?, n.as_f64()?.max(0.0) as u64))).collect()
        })
    }

    fn compute_task(&mut self) -> Result<ComputeTask, MessageError> {
        let run_spec = match self.value.take_field("run_spec") {
            Some(Value::Payload(p)) => Some(Arc::new(*p)),
            Some(Value::Nil) | None => None,
            Some(_) => return Err(self.bad("run_spec")),
        };
        let annotations = Arc::new(self.value.take_field("annotations").unwrap_or(Value::Map(Vec::new())));
        Ok(ComputeTask {
            key: self.key("key")?,
            run_id: RunId(self.want("run_id", Value::as_i64)?),
            who_has: self.who_has("who_has")?,
            nbytes: self.nbytes("nbytes")?,
            priority: self.want("priority", |v| {
                v.as_list()?.iter().map(Value::as_f64).collect::<Option<_>>().map(Priority)
            })?,
            run_spec,
            resource_restrictions: self.want("resource_restrictions", |v| match v {
                Value::Nil => Some(Vec::new()),
                v => v.as_map()?.iter().map(|(k, n)| Some((k.as_str()?.into(), n.as_f64()?))).collect(),
            })?,
            actor: self.value.field("actor").and_then(Value::as_bool).unwrap_or(false),
            annotations,
            span_id: self.value.field("span_id").and_then(Value::as_str).map(Into::into),
        })
    }
}
