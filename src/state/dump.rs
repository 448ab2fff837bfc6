//! The whole state as one value, for cluster dumps (`Client.dump_cluster_state`, `Worker.get_state`...).
//!
//! Reads only. Source: `WorkerState._to_dict`, `TaskState._to_dict_no_nest`, `StateMachineEvent._to_dict`.

use crate::proto::{Address, Key, Value};

use super::WorkerState;
use super::event::{ErrorMessage, Event, EventKind, StartStop, Stored};
use super::task::{Previous, State, Task};

impl WorkerState {
    /// Dask's `WorkerState._to_dict`; `now` in unix seconds.
    pub fn dump(&self, now: f64) -> Value {
        let counts = self.task_counts_by_prefix().into_iter();
        let elapsed = self.cumulative_elapsed(now).into_iter();
        Value::map([
            ("address", self.address.as_str().into()),
            ("nthreads", self.config.nthreads.into()),
            ("running", self.running.into()),
            ("ready", keys(self.ready())),
            ("constrained", keys(self.constrained())),
            ("data", self.dump_data()),
            ("data_needed", by_peer(self.data_needed())),
            ("executing", keys(self.executing())),
            ("has_what", by_peer(self.has_what())),
            ("long_running", keys(self.long_running())),
            ("in_flight_tasks", keys(self.in_flight_tasks())),
            ("in_flight_workers", by_peer(self.in_flight_workers())),
            ("missing_dep_flight", keys(self.missing())),
            ("busy_workers", Value::List(self.busy_workers().map(text).collect())),
            ("log", Value::List(self.log.iter().map(|record| record.to_value()).collect())),
            (
                "stimulus_log",
                Value::List(self.stimulus_log.iter().map(|(at, event)| dump_event(*at, event)).collect()),
            ),
            ("transition_counter", self.transition_counter.into()),
            (
                "tasks",
                Value::Map(self.tasks().map(|task| (Value::from(&task.key), self.dump_task(task))).collect()),
            ),
            (
                "task_counts",
                Value::Map(counts.map(|(p, s, n)| (prefix_state(p, s.as_str()), n.into())).collect()),
            ),
            (
                "task_cumulative_elapsed",
                Value::Map(elapsed.map(|(p, s, t)| (prefix_state(p, s.as_str()), t.into())).collect()),
            ),
        ])
    }

    fn dump_data(&self) -> Value {
        let held = self.tasks().filter(|task| task.in_data);
        Value::Map(held.map(|task| (Value::from(&task.key), Value::Nil)).collect())
    }

    /// One task, without what is empty.
    pub fn dump_task(&self, task: &Task) -> Value {
        let previous = task.state.previous();
        let resumed = matches!(task.state, State::Resumed(_));
        let (exception_text, traceback_text) = match &task.state {
            State::Error(error) => (Some(error.exception_text.clone()), Some(error.traceback_text.clone())),
            _ => (None, None),
        };
        let names = |keys: &mut dyn Iterator<Item = &Key>| {
            nonempty(Value::List(keys.filter_map(|key| Some(self.task(key)?.to_string().into())).collect()))
        };
        let restrictions = task.resource_restrictions.iter().map(|(n, q)| (n.clone().into(), (*q).into()));
        let fields = [
            ("key", Some(Value::from(&task.key))),
            ("run_id", Some(task.run_id.0.into())),
            ("run_spec", task.run_spec.as_ref().map(|_| "<run_spec>".into())),
            ("dependencies", names(&mut self.dependencies(task))),
            ("dependents", names(&mut self.dependents(task))),
            ("waiting_for_data", names(&mut self.waiting_for_data(task))),
            ("waiters", names(&mut self.waiters(task))),
            ("state", Some(task.state.name().as_str().into())),
            ("previous", previous.map(|p| p.name().as_str().into())),
            ("next", previous.filter(|_| resumed).map(|p: Previous| p.next().as_str().into())),
            (
                "priority",
                task.priority.as_ref().map(|p| Value::List(p.0.iter().map(|x| (*x).into()).collect())),
            ),
            ("who_has", nonempty(Value::List(self.who_has(task).map(text).collect()))),
            ("coming_from", self.coming_from(task).map(text)),
            ("resource_restrictions", nonempty(Value::Map(restrictions.collect()))),
            ("exception_text", exception_text.map(Value::from)),
            ("traceback_text", traceback_text.map(Value::from)),
            ("type", task.type_.as_ref().map(|t| t.name.clone().into())),
            ("startstops", nonempty(Value::List(task.startstops.iter().map(StartStop::to_value).collect()))),
            ("start_time", task.start_time.map(Value::from)),
            ("metadata", task.metadata.as_deref().cloned().and_then(nonempty)),
            ("nbytes", task.nbytes.map(Value::from)),
            ("annotations", task.annotations.as_deref().cloned().and_then(nonempty)),
            ("span_id", task.span_id.clone().map(Value::from)),
            ("done", task.done.then(|| true.into())),
        ];
        Value::map(fields.into_iter().filter_map(|(name, value)| Some((name, value?))))
    }
}

/// Dask's dict of an event, its values and run_spec left out.
fn dump_event(handled: f64, event: &Event) -> Value {
    let (cls, mut fields) = event_fields(&event.kind);
    fields.extend([
        ("cls", Value::from(cls)),
        ("stimulus_id", event.stimulus_id.clone().into()),
        ("handled", handled.into()),
    ]);
    Value::map(fields)
}

fn event_fields(kind: &EventKind) -> (&'static str, Vec<(&'static str, Value)>) {
    match kind {
        EventKind::ComputeTask(order) => (
            "ComputeTaskEvent",
            vec![
                ("key", Value::from(&order.key)),
                ("run_id", order.run_id.0.into()),
                ("who_has", who_has(&order.who_has)),
                ("nbytes", sizes(&order.nbytes)),
                ("priority", Value::List(order.priority.0.iter().map(|p| (*p).into()).collect())),
                ("actor", order.actor.into()),
                ("annotations", (*order.annotations).clone()),
            ],
        ),
        EventKind::CancelCompute { key } => ("CancelComputeEvent", of_key(key)),
        EventKind::FreeKeys { keys: k } => ("FreeKeysEvent", vec![("keys", keys(k))]),
        EventKind::RemoveReplicas { keys: k } => ("RemoveReplicasEvent", vec![("keys", keys(k))]),
        EventKind::AcquireReplicas { who_has: w, nbytes } => {
            ("AcquireReplicasEvent", vec![("who_has", who_has(w)), ("nbytes", sizes(nbytes))])
        }
        EventKind::StealRequest { key } => ("StealRequestEvent", of_key(key)),
        EventKind::RefreshWhoHas { who_has: w } => ("RefreshWhoHasEvent", vec![("who_has", who_has(w))]),
        EventKind::RemoveWorker { worker } => ("RemoveWorkerEvent", vec![("worker", text(worker))]),
        EventKind::Pause => ("PauseEvent", Vec::new()),
        EventKind::Unpause => ("UnpauseEvent", Vec::new()),
        EventKind::UpdateData { data } => ("UpdateDataEvent", vec![("data", stored(data))]),
        EventKind::RetryBusyWorker { worker } => ("RetryBusyWorkerEvent", vec![("worker", text(worker))]),
        EventKind::FindMissing => ("FindMissingEvent", Vec::new()),
        EventKind::Reschedule { key } => ("RescheduleEvent", of_key(key)),
        EventKind::Secede { key, compute_duration } => {
            ("SecedeEvent", vec![("key", Value::from(key)), ("compute_duration", (*compute_duration).into())])
        }
        EventKind::DataLost { keys: k } => ("DataLostEvent", vec![("keys", keys(k))]),
        end => end_fields(end),
    }
}

/// The events that end a transfer or a computation.
fn end_fields(kind: &EventKind) -> (&'static str, Vec<(&'static str, Value)>) {
    match kind {
        EventKind::GatherDepSuccess { worker, total_nbytes, data } => {
            let mut fields = of_peer(worker, *total_nbytes);
            fields.push(("data", stored(data)));
            ("GatherDepSuccessEvent", fields)
        }
        EventKind::GatherDepBusy { worker, total_nbytes } => {
            ("GatherDepBusyEvent", of_peer(worker, *total_nbytes))
        }
        EventKind::GatherDepNetworkFailure { worker, total_nbytes } => {
            ("GatherDepNetworkFailureEvent", of_peer(worker, *total_nbytes))
        }
        EventKind::GatherDepFailure { worker, total_nbytes, error } => {
            let mut fields = of_peer(worker, *total_nbytes);
            fields.extend(error_texts(error));
            ("GatherDepFailureEvent", fields)
        }
        EventKind::ExecuteSuccess { key, run_id, start, stop, nbytes, .. } => {
            let mut fields = of_key(key);
            fields.extend([
                ("run_id", run_id.0.into()),
                ("start", (*start).into()),
                ("stop", (*stop).into()),
                ("nbytes", (*nbytes).into()),
            ]);
            ("ExecuteSuccessEvent", fields)
        }
        EventKind::ExecuteFailure { key, run_id, start, stop, error, .. } => {
            let mut fields = of_key(key);
            fields.extend([
                ("run_id", run_id.0.into()),
                ("start", (*start).into()),
                ("stop", (*stop).into()),
            ]);
            fields.extend(error_texts(error));
            ("ExecuteFailureEvent", fields)
        }
        _ => ("StateMachineEvent", Vec::new()),
    }
}

fn of_key(key: &Key) -> Vec<(&'static str, Value)> {
    vec![("key", Value::from(key))]
}

fn of_peer(worker: &Address, total_nbytes: u64) -> Vec<(&'static str, Value)> {
    vec![("worker", text(worker)), ("total_nbytes", total_nbytes.into())]
}

fn error_texts(error: &ErrorMessage) -> [(&'static str, Value); 2] {
    [
        ("exception_text", error.exception_text.clone().into()),
        ("traceback_text", error.traceback_text.clone().into()),
    ]
}

fn stored(data: &[(Key, Stored)]) -> Value {
    Value::Map(data.iter().map(|(key, _)| (Value::from(key), Value::Nil)).collect())
}

fn sizes(nbytes: &[(Key, u64)]) -> Value {
    Value::Map(nbytes.iter().map(|(key, n)| (Value::from(key), (*n).into())).collect())
}

fn who_has(who_has: &[(Key, Vec<Address>)]) -> Value {
    let each = |workers: &[Address]| Value::List(workers.iter().map(text).collect());
    Value::Map(who_has.iter().map(|(key, workers)| (Value::from(key), each(workers))).collect())
}

fn keys<'a>(keys: impl IntoIterator<Item = &'a Key>) -> Value {
    Value::List(keys.into_iter().map(Value::from).collect())
}

fn by_peer<'a, K: AsRef<[&'a Key]>>(each: impl Iterator<Item = (&'a Address, K)>) -> Value {
    Value::Map(each.map(|(peer, known)| (text(peer), keys(known.as_ref().iter().copied()))).collect())
}

fn text(address: &Address) -> Value {
    address.as_str().into()
}

fn prefix_state(prefix: std::sync::Arc<str>, state: &str) -> Value {
    Value::List(vec![prefix.into(), state.into()])
}

fn nonempty(value: Value) -> Option<Value> {
    match &value {
        Value::List(items) if items.is_empty() => None,
        Value::Map(items) if items.is_empty() => None,
        _ => Some(value),
    }
}
