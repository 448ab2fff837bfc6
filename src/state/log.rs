//! The transition log and the stories told from it.
//!
//! Records only; nothing decides by them. Source: `WorkerState.log` and `distributed/_stories.py: worker_story`.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::proto::{Address, Key, Value};

use super::task::StateName;

/// One line of the log.
#[derive(Clone, Debug)]
pub struct LogRecord {
    /// What happened.
    pub entry: LogEntry,
    /// The event that caused it.
    pub stimulus_id: Arc<str>,
    /// Unix seconds.
    pub time: f64,
}

/// What can be logged. The driver adds the `RequestDep`...`GatherDepFailed` group through `WorkerState::log`.
#[derive(Clone, Debug, PartialEq)]
pub enum LogEntry {
    /// A task went from one state to another.
    Transition {
        key: Key,
        start: StateName,
        /// The state that was recommended.
        recommended: StateName,
        /// The state it came to.
        finish: StateName,
        /// What follows from it.
        recommendations: SmallVec<[(Key, StateName); 1]>,
    },
    EnsureTaskExists {
        key: Key,
        state: StateName,
    },
    ComputeTask {
        key: Key,
        state: StateName,
    },
    ReceiveFromScatter {
        key: Key,
        state: StateName,
    },
    PutInMemory {
        key: Key,
    },
    MissingDep {
        key: Key,
    },
    RemoveReplica {
        key: Key,
    },
    CancelCompute {
        key: Key,
    },
    /// Ours: we went on where Dask raises or leaves a task behind for ever.
    Repaired {
        key: Key,
        trouble: &'static str,
    },
    /// Ours: the value was lost here.
    DataLost {
        key: Key,
    },
    FreeKeys {
        keys: Vec<Key>,
    },
    GatherDependencies {
        worker: Address,
        keys: Vec<Key>,
    },
    RequestDep {
        worker: Address,
        keys: Vec<Key>,
    },
    ReceiveDep {
        worker: Address,
        keys: Vec<Key>,
    },
    GatherDepBusy {
        worker: Address,
        keys: Vec<Key>,
    },
    GatherDepFailed {
        worker: Address,
        keys: Vec<Key>,
    },
}

/// Who a story is about.
#[derive(Clone, Debug, PartialEq)]
pub enum Subject {
    /// A task.
    Key(Key),
    /// An event.
    Stimulus(Arc<str>),
}

impl LogEntry {
    fn mentions(&self, key: &Key) -> bool {
        match self {
            LogEntry::Transition { key: k, recommendations, .. } => {
                k == key || recommendations.iter().any(|(k, _)| k == key)
            }
            LogEntry::EnsureTaskExists { key: k, .. }
            | LogEntry::ComputeTask { key: k, .. }
            | LogEntry::ReceiveFromScatter { key: k, .. }
            | LogEntry::PutInMemory { key: k }
            | LogEntry::MissingDep { key: k }
            | LogEntry::RemoveReplica { key: k }
            | LogEntry::CancelCompute { key: k }
            | LogEntry::Repaired { key: k, .. }
            | LogEntry::DataLost { key: k } => k == key,
            LogEntry::FreeKeys { keys }
            | LogEntry::GatherDependencies { keys, .. }
            | LogEntry::RequestDep { keys, .. }
            | LogEntry::ReceiveDep { keys, .. }
            | LogEntry::GatherDepBusy { keys, .. }
            | LogEntry::GatherDepFailed { keys, .. } => keys.contains(key),
        }
    }

    /// The items of Dask's tuple, without stimulus id and time.
    fn to_values(&self) -> Vec<Value> {
        let of_key = |key: &Key, word: &str| vec![Value::from(key), word.into()];
        let of_state = |key: &Key, word: &str, state: &StateName| {
            vec![Value::from(key), word.into(), state.as_str().into()]
        };
        let of_peer = |word: &str, worker: &Address, keys: &[Key]| {
            vec![word.into(), worker.as_str().into(), Value::List(keys.iter().map(Value::from).collect())]
        };
        match self {
            LogEntry::Transition { key, start, recommended, finish, recommendations } => {
                let new = recommendations.iter().map(|(k, s)| (Value::from(k), s.as_str().into())).collect();
                vec![
                    Value::from(key),
                    start.as_str().into(),
                    recommended.as_str().into(),
                    finish.as_str().into(),
                    Value::Map(new),
                ]
            }
            LogEntry::EnsureTaskExists { key, state } => of_state(key, "ensure-task-exists", state),
            LogEntry::ComputeTask { key, state } => of_state(key, "compute-task", state),
            LogEntry::ReceiveFromScatter { key, state } => of_state(key, "receive-from-scatter", state),
            LogEntry::PutInMemory { key } => of_key(key, "put-in-memory"),
            LogEntry::MissingDep { key } => of_key(key, "missing-dep"),
            LogEntry::RemoveReplica { key } => of_key(key, "remove-replica"),
            LogEntry::DataLost { key } => of_key(key, "data-lost"),
            LogEntry::Repaired { key, trouble } => {
                vec![Value::from(key), "repaired".into(), (*trouble).into()]
            }
            LogEntry::CancelCompute { key } => of_key(key, "cancel-compute"),
            LogEntry::FreeKeys { keys } => {
                vec!["free-keys".into(), Value::List(keys.iter().map(Value::from).collect())]
            }
            LogEntry::GatherDependencies { worker, keys } => of_peer("gather-dependencies", worker, keys),
            LogEntry::RequestDep { worker, keys } => of_peer("request-dep", worker, keys),
            LogEntry::ReceiveDep { worker, keys } => of_peer("receive-dep", worker, keys),
            LogEntry::GatherDepBusy { worker, keys } => of_peer("gather-dep-busy", worker, keys),
            LogEntry::GatherDepFailed { worker, keys } => of_peer("gather-dep-failed", worker, keys),
        }
    }
}

impl LogRecord {
    /// Dask's tuple: what `get_story` and cluster dumps give.
    pub fn to_value(&self) -> Value {
        let mut items = self.entry.to_values();
        items.push(self.stimulus_id.clone().into());
        items.push(self.time.into());
        Value::List(items)
    }

    fn is_about(&self, subject: &Subject) -> bool {
        match subject {
            Subject::Key(key) => self.entry.mentions(key),
            Subject::Stimulus(id) => self.stimulus_id == *id,
        }
    }
}

impl fmt::Display for LogRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} ({}, {})", self.entry, self.stimulus_id, self.time)
    }
}

/// The last so many records.
#[derive(Clone, Debug)]
pub(super) struct Ring<T> {
    items: VecDeque<T>,
    limit: usize,
}

impl<T> Ring<T> {
    pub(super) fn new(limit: usize) -> Self {
        Ring { items: VecDeque::new(), limit }
    }

    pub(super) fn push(&mut self, item: T) {
        if self.limit == 0 {
            return;
        }
        if self.items.len() == self.limit {
            self.items.pop_front();
        }
        self.items.push_back(item);
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.items.iter()
    }
}

impl Ring<LogRecord> {
    /// What the log says about any of the subjects.
    pub(super) fn story(&self, subjects: &[Subject]) -> Vec<LogRecord> {
        self.iter().filter(|record| subjects.iter().any(|s| record.is_about(s))).cloned().collect()
    }
}
