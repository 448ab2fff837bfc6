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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::proto::PayloadKind;

    fn payload() -> Payload {
        Payload { kind: PayloadKind::Pickled, header: "h".into(), frames: Vec::new() }
    }

    fn compute_task() -> Value {
        Value::map([
            ("op", "compute-task".into()),
            ("key", Value::List(vec!["x".into(), Value::from(1)])),
            ("run_id", Value::from(7)),
            ("priority", Value::List(vec![Value::from(0), Value::from(-1), Value::Float(2.5)])),
            ("stimulus_id", "s-1".into()),
            ("who_has", Value::Map(vec![("d".into(), Value::List(vec!["tcp://h:1".into()]))])),
            ("nbytes", Value::Map(vec![("d".into(), Value::from(-1))])),
            ("run_spec", payload().into()),
            ("resource_restrictions", Value::Nil),
            ("actor", false.into()),
            ("annotations", Value::map([("executor", "x".into())])),
            ("span_id", "span".into()),
        ])
    }

    fn set(mut message: Value, field: &str, value: Option<Value>) -> Value {
        if let Value::Map(items) = &mut message {
            items.retain(|(k, _)| k.as_str() != Some(field));
            items.extend(value.map(|v| (Value::from(field), v)));
        }
        message
    }

    #[test]
    fn a_task_is_understood() {
        let Stimulus { stimulus_id, message } = Stimulus::parse(compute_task()).unwrap();
        assert_eq!(&*stimulus_id, "s-1");
        let StreamMessage::ComputeTask(task) = message else { panic!() };
        assert_eq!(task.key, Key::Tuple([Key::from("x"), Key::Int(1)].into()));
        assert_eq!(task.run_id, RunId(7));
        assert_eq!(task.priority, Priority([0.0, -1.0, 2.5].as_slice().into()));
        assert_eq!(task.who_has, [("d".into(), vec![Address::parse("tcp://h:1").unwrap()])]);
        assert_eq!(task.nbytes, [("d".into(), 0)]);
        assert_eq!(task.run_spec.as_deref(), Some(&payload()));
        assert!(task.resource_restrictions.is_empty() && !task.actor);
        assert_eq!(task.annotations.field("executor").and_then(Value::as_str), Some("x"));
        assert_eq!(task.span_id.as_deref(), Some("span"));
    }

    #[test]
    fn a_malformed_field_is_named() {
        let bad = [
            ("key", Value::Nil),
            ("key", Value::List(vec![Value::Map(vec![])])),
            ("run_id", "1".into()),
            ("run_id", Value::from(1_i128 << 64)),
            ("priority", Value::from(1)),
            ("priority", Value::List(vec!["high".into()])),
            ("who_has", Value::List(vec![])),
            ("who_has", Value::Map(vec![("d".into(), Value::List(vec!["nowhere".into()]))])),
            ("nbytes", Value::Map(vec![("d".into(), "many".into())])),
            ("run_spec", Value::from(1)),
            ("resource_restrictions", Value::Map(vec![(Value::from(1), Value::from(1))])),
        ];
        for (field, value) in bad {
            let error = Stimulus::parse(set(compute_task(), field, Some(value.clone()))).unwrap_err();
            assert_eq!(error, MessageError::Field { op: "compute-task".into(), field }, "{value:?}");
        }
        for field in ["key", "run_id", "priority", "who_has", "nbytes", "resource_restrictions"] {
            let error = Stimulus::parse(set(compute_task(), field, None)).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("field {field:?} of \"compute-task\" is missing or malformed")
            );
        }
    }

    #[test]
    fn what_a_task_may_lack_has_a_default() {
        let mut message = compute_task();
        for field in ["run_spec", "actor", "annotations", "span_id", "stimulus_id"] {
            message = set(message, field, None);
        }
        let Stimulus { stimulus_id, message } = Stimulus::parse(message).unwrap();
        let StreamMessage::ComputeTask(task) = message else { panic!() };
        assert_eq!(&*stimulus_id, "compute-task");
        assert!(task.run_spec.is_none() && task.span_id.is_none() && !task.actor);
        assert_eq!(*task.annotations, Value::Map(vec![]));
    }

    #[test]
    fn every_other_op_is_understood_or_kept() {
        let keys = Value::Set(vec!["a".into(), "b".into()]);
        let who_has = Value::Map(vec![("a".into(), Value::List(vec![]))]);
        let nbytes = Value::Map(vec![("a".into(), Value::from(5))]);
        let message = |op: &str, fields: &[(&str, &Value)]| {
            let fields = fields.iter().map(|(k, v)| (*k, (*v).clone()));
            Stimulus::parse(Value::map(fields.chain([("op", Value::from(op))])))
                .map(|s| format!("{:?}", s.message))
        };
        let key = Value::from("a");
        for (op, fields, expected) in [
            ("cancel-compute", vec![("key", &key)], "CancelCompute { key: 'a' }"),
            ("free-keys", vec![("keys", &keys)], "FreeKeys { keys: ['a', 'b'] }"),
            ("remove-replicas", vec![("keys", &keys)], "RemoveReplicas { keys: ['a', 'b'] }"),
            (
                "acquire-replicas",
                vec![("who_has", &who_has), ("nbytes", &nbytes)],
                "AcquireReplicas { who_has: [('a', [])], nbytes: [('a', 5)] }",
            ),
            ("steal-request", vec![("key", &key)], "StealRequest { key: 'a' }"),
            ("refresh-who-has", vec![("who_has", &who_has)], "RefreshWhoHas { who_has: [('a', [])] }"),
            ("worker-status-change", vec![("status", &"paused".into())], "StatusChange { status: Paused }"),
            (
                "remove-worker",
                vec![("worker", &"tcp://h:1".into())],
                "RemoveWorker { worker: \"tcp://h:1\" }",
            ),
            ("close", vec![], "Close { reason: \"scheduler-close\" }"),
            ("close", vec![("reason", &"r".into())], "Close { reason: \"r\" }"),
        ] {
            assert_eq!(message(op, &fields).unwrap(), expected);
            if let Some((field, _)) = fields.iter().find(|_| op != "close") {
                let error = message(op, &[(field, &Value::Bool(true))]);
                assert!(op.ends_with("request") || op == "cancel-compute" || error.is_err(), "{op}");
            }
        }
        let other = Stimulus::parse(Value::map([("op", "plugin-op".into()), ("x", Value::from(1))])).unwrap();
        let StreamMessage::Unknown { op, message } = other.message else { panic!() };
        assert_eq!((&*op, message.field("x")), ("plugin-op", Some(&Value::from(1))));
        for value in [Value::Nil, Value::map([]), Value::map([("op", Value::from(1))]), Value::from("op")] {
            assert_eq!(Stimulus::parse(value).unwrap_err(), MessageError::NoOp);
        }
    }
}
