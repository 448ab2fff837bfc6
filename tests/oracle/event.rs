//! The events of a sequence, by numbers instead of names, so that they can be sent, printed and cut down.

use std::sync::Arc;

use bytes::Bytes;
use iqoqo_dask_worker::proto::{ComputeTask, Payload, PayloadKind, Priority, RunId, Value};
use iqoqo_dask_worker::state::{ErrorMessage, EventKind, Stored, TypeInfo};
use serde_json::{Value as Json, json};

use crate::world::World;

/// Number of a key in [`World::keys`].
pub type K = usize;
/// Number of a worker in [`World::workers`]; 0 is the one under test.
pub type W = usize;

/// One event. What only the state machine can know (run ids, sizes of transfers) is filled in when it is applied.
#[derive(Clone, Debug)]
pub enum Ev {
    Compute {
        key: K,
        deps: Vec<(K, Vec<W>, u64)>,
        priority: Vec<i64>,
    },
    Cancel(K),
    Free(Vec<K>),
    RemoveReplicas(Vec<K>),
    Acquire(Vec<(K, Vec<W>, u64)>),
    Steal(K),
    Refresh(Vec<(K, Vec<W>)>),
    RemoveWorker(W),
    Pause,
    Unpause,
    UpdateData(Vec<(K, u64)>),
    GatherSuccess(W, Vec<(K, u64)>),
    GatherBusy(W),
    GatherNetworkFailure(W),
    GatherFailure(W),
    RetryBusyWorker(W),
    FindMissing,
    ExecuteSuccess(K, u64),
    ExecuteFailure(K, bool),
    Reschedule(K),
    Secede(K),
    /// Not for the oracle: Dask has no such event.
    DataLost(Vec<K>),
}

/// What is known of an event only when its turn comes.
pub struct Facts<'a> {
    pub world: &'a World,
    pub stimulus_id: &'a str,
    /// Of the task, for the end of a computation; a new one, for a computation to begin.
    pub run_id: i64,
    /// As the `GatherDep` said.
    pub total_nbytes: u64,
}

impl Ev {
    /// For the Python side.
    pub fn to_json(&self, facts: &Facts<'_>) -> Json {
        let (run_id, total) = (facts.run_id, facts.total_nbytes);
        match self {
            Ev::Compute { key, deps, priority } => json!(["compute", key, run_id, deps, priority]),
            Ev::Cancel(key) => json!(["cancel", key]),
            Ev::Free(keys) => json!(["free", keys]),
            Ev::RemoveReplicas(keys) => json!(["remove_replicas", keys]),
            Ev::Acquire(items) => json!(["acquire", items]),
            Ev::Steal(key) => json!(["steal", key]),
            Ev::Refresh(items) => json!(["refresh", items]),
            Ev::RemoveWorker(worker) => json!(["remove_worker", worker]),
            Ev::Pause => json!(["pause"]),
            Ev::Unpause => json!(["unpause"]),
            Ev::UpdateData(items) => json!(["update_data", items]),
            Ev::GatherSuccess(worker, items) => json!(["gather_success", worker, total, items]),
            Ev::GatherBusy(worker) => json!(["gather_busy", worker, total]),
            Ev::GatherNetworkFailure(worker) => json!(["gather_network_failure", worker, total]),
            Ev::GatherFailure(worker) => json!(["gather_failure", worker, total]),
            Ev::RetryBusyWorker(worker) => json!(["retry_busy_worker", worker]),
            Ev::FindMissing => json!(["find_missing"]),
            Ev::ExecuteSuccess(key, nbytes) => json!(["execute_success", key, run_id, nbytes]),
            Ev::ExecuteFailure(key, began) => json!(["execute_failure", key, run_id, began]),
            Ev::Reschedule(key) => json!(["reschedule", key]),
            Ev::Secede(key) => json!(["secede", key]),
            Ev::DataLost(keys) => json!(["data_lost", keys]),
        }
    }

    /// For our side.
    pub fn to_kind(&self, facts: &Facts<'_>) -> EventKind {
        let world = facts.world;
        let key = |k: &K| world.keys[*k].clone();
        let keys = |ks: &[K]| ks.iter().map(key).collect::<Vec<_>>();
        let worker = |w: &W| world.workers[*w].clone();
        let workers = |ws: &[W]| ws.iter().map(worker).collect::<Vec<_>>();
        let data = |items: &[(K, u64)]| items.iter().map(|(k, n)| (key(k), stored(*n))).collect();
        let total_nbytes = facts.total_nbytes;
        match self {
            Ev::Compute { key: k, deps, priority } => {
                let who_has = deps.iter().map(|(d, ws, _)| (key(d), workers(ws))).collect();
                let nbytes = deps.iter().map(|(d, _, n)| (key(d), *n)).collect();
                EventKind::ComputeTask(Box::new(ComputeTask {
                    key: key(k),
                    run_id: RunId(facts.run_id),
                    who_has,
                    nbytes,
                    priority: Priority(priority.iter().map(|p| *p as f64).collect()),
                    run_spec: Some(payload("spec")),
                    resource_restrictions: world.restrictions[*k].clone(),
                    actor: world.actors[*k],
                    annotations: Arc::new(Value::Map(Vec::new())),
                    span_id: None,
                }))
            }
            Ev::Cancel(k) => EventKind::CancelCompute { key: key(k) },
            Ev::Free(ks) => EventKind::FreeKeys { keys: keys(ks) },
            Ev::RemoveReplicas(ks) => EventKind::RemoveReplicas { keys: keys(ks) },
            Ev::Acquire(items) => EventKind::AcquireReplicas {
                who_has: items.iter().map(|(k, ws, _)| (key(k), workers(ws))).collect(),
                nbytes: items.iter().map(|(k, _, n)| (key(k), *n)).collect(),
            },
            Ev::Steal(k) => EventKind::StealRequest { key: key(k) },
            Ev::Refresh(items) => EventKind::RefreshWhoHas {
                who_has: items.iter().map(|(k, ws)| (key(k), workers(ws))).collect(),
            },
            Ev::RemoveWorker(w) => EventKind::RemoveWorker { worker: worker(w) },
            Ev::Pause => EventKind::Pause,
            Ev::Unpause => EventKind::Unpause,
            Ev::UpdateData(items) => EventKind::UpdateData { data: data(items) },
            Ev::GatherSuccess(w, items) => {
                EventKind::GatherDepSuccess { worker: worker(w), total_nbytes, data: data(items) }
            }
            Ev::GatherBusy(w) => EventKind::GatherDepBusy { worker: worker(w), total_nbytes },
            Ev::GatherNetworkFailure(w) => {
                EventKind::GatherDepNetworkFailure { worker: worker(w), total_nbytes }
            }
            Ev::GatherFailure(w) => EventKind::GatherDepFailure {
                worker: worker(w),
                total_nbytes,
                error: error(facts.stimulus_id),
            },
            Ev::RetryBusyWorker(w) => EventKind::RetryBusyWorker { worker: worker(w) },
            Ev::FindMissing => EventKind::FindMissing,
            Ev::ExecuteSuccess(k, nbytes) => EventKind::ExecuteSuccess {
                key: key(k),
                run_id: RunId(facts.run_id),
                start: 1.0,
                stop: 2.5,
                nbytes: *nbytes,
                type_: stored(*nbytes).type_,
                thread: Some(facts.run_id),
                startstops: Vec::new(),
                metadata: None,
            },
            Ev::ExecuteFailure(k, began) => EventKind::ExecuteFailure {
                key: key(k),
                run_id: RunId(facts.run_id),
                start: began.then_some(1.0),
                stop: began.then_some(2.5),
                error: error(facts.stimulus_id),
                thread: began.then_some(facts.run_id),
            },
            Ev::Reschedule(k) => EventKind::Reschedule { key: key(k) },
            Ev::Secede(k) => EventKind::Secede { key: key(k), compute_duration: 1.5 },
            Ev::DataLost(ks) => EventKind::DataLost { keys: keys(ks) },
        }
    }
}

fn payload(text: &str) -> Arc<Payload> {
    let header = Bytes::copy_from_slice(text.as_bytes());
    Arc::new(Payload { kind: PayloadKind::Pickled, header, frames: Vec::new() })
}

/// Odd sizes have another type than even ones, as in `reference.py: Sequence.value`.
fn stored(nbytes: u64) -> Stored {
    let name = if nbytes % 2 == 1 { "__main__.B" } else { "__main__.A" };
    Stored { nbytes, type_: Some(TypeInfo { pickled: Bytes::from_static(b"?"), name: name.into() }) }
}

fn error(stimulus_id: &str) -> ErrorMessage {
    ErrorMessage {
        exception: payload(&format!("exception {stimulus_id}")),
        traceback: Some(payload(&format!("traceback {stimulus_id}"))),
        exception_text: format!("boom {stimulus_id}").into(),
        traceback_text: format!("line {stimulus_id}").into(),
    }
}
