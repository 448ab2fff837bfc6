//! The life of tasks told event by event. What Dask does is in `tests/oracle.rs`; here is what only we do, and the
//! shape of what goes out.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use bytes::Bytes;
use smallvec::smallvec;

use super::*;
use crate::proto::{ComputeTask, Payload, PayloadKind, Priority, RunId, Value};

struct Worker {
    state: WorkerState,
    now: f64,
}

impl Worker {
    fn new(nthreads: usize) -> Self {
        Self::with(Config { nthreads, ..Config::default() })
    }

    fn with(config: Config) -> Self {
        let config = Config { validate: true, ..config };
        Worker { state: WorkerState::new(config, peer(0)), now: 1000.0 }
    }

    /// Handles an event, checks all invariants, and gives the instructions in a few words each.
    fn on(&mut self, kind: EventKind) -> Vec<String> {
        self.try_on(kind).unwrap().iter().map(words).collect()
    }

    fn try_on(&mut self, kind: EventKind) -> Result<Vec<Instruction>, Error> {
        self.now += 1.0;
        let mut out = Vec::new();
        self.state.handle(self.now, Event::new("s", kind), &mut out)?;
        self.state.validate_state()?;
        Ok(out)
    }

    fn compute(&mut self, key: &str, deps: &[(&str, u16)], priority: f64) -> Vec<String> {
        self.on(order(key, deps, priority))
    }

    fn succeed(&mut self, key: &str) -> Vec<String> {
        let run_id = self.state.task(&key.into()).unwrap().run_id();
        self.on(success(key, run_id))
    }

    fn states(&self) -> String {
        let mut states: Vec<_> =
            self.state.tasks().map(|t| format!("{}:{}", t.key(), t.state_name())).collect();
        states.sort();
        states.join(" ")
    }
}

fn peer(n: u16) -> Address {
    Address::parse(&format!("tcp://10.0.0.{n}:8000")).unwrap()
}

fn order(key: &str, deps: &[(&str, u16)], priority: f64) -> EventKind {
    EventKind::ComputeTask(Box::new(ComputeTask {
        key: key.into(),
        run_id: RunId(7),
        who_has: deps.iter().map(|(k, p)| ((*k).into(), vec![peer(*p)])).collect(),
        nbytes: deps.iter().map(|(k, _)| ((*k).into(), 10)).collect(),
        priority: Priority(smallvec![priority]),
        run_spec: Some(Arc::new(payload())),
        resource_restrictions: Vec::new(),
        actor: false,
        annotations: Arc::new(Value::Map(Vec::new())),
        span_id: None,
    }))
}

fn payload() -> Payload {
    Payload { kind: PayloadKind::Pickled, header: Bytes::from_static(b"h"), frames: Vec::new() }
}

fn success(key: &str, run_id: RunId) -> EventKind {
    EventKind::ExecuteSuccess {
        key: key.into(),
        run_id,
        start: 1.0,
        stop: 2.0,
        nbytes: 5,
        type_: Some(TypeInfo { pickled: Bytes::from_static(b"p"), name: "int".into() }),
        thread: Some(42),
        startstops: Vec::new(),
        metadata: None,
    }
}

fn gathered(from: u16, total_nbytes: u64, keys: &[&str]) -> EventKind {
    let data = keys.iter().map(|k| ((*k).into(), Stored { nbytes: 10, type_: None })).collect();
    EventKind::GatherDepSuccess { worker: peer(from), total_nbytes, data }
}

fn keys(names: &[&str]) -> Vec<Key> {
    names.iter().map(|n| (*n).into()).collect()
}

fn words(instruction: &Instruction) -> String {
    match instruction {
        Instruction::GatherDep { worker, to_gather, .. } => {
            format!("gather {to_gather:?} from {}", worker.host())
        }
        Instruction::Execute { key, .. } => format!("execute {key}"),
        Instruction::RetryBusyWorkerLater { worker, .. } => format!("retry {}", worker.host()),
        Instruction::DropData { key } => format!("drop {key}"),
        Instruction::Send(message) => {
            let value = message.to_value();
            let about = value.field("key").or(value.field("keys")).unwrap();
            match about {
                Value::Str(key) => format!("{} {key}", message.op()),
                keys => format!("{} {:?}", message.op(), keys.as_list().unwrap().len()),
            }
        }
    }
}

#[test]
fn a_task_with_a_dependency_runs_and_is_freed() {
    let mut w = Worker::new(1);
    assert_eq!(w.compute("y", &[("x", 1)], 0.0), ["gather ['x'] from 10.0.0.1"]);
    assert_eq!(w.states(), "x:flight y:waiting");
    assert_eq!(w.on(gathered(1, 10, &["x"])), ["add-keys 1", "execute y"]);
    assert_eq!(w.succeed("y"), ["task-finished y"]);
    assert_eq!(w.state.nbytes(), 15);
    assert_eq!(w.state.task_counts(), [(StateName::Memory, 2)]);
    let freed = w.on(EventKind::FreeKeys { keys: keys(&["y", "x"]) });
    assert_eq!(freed, ["drop x", "release-worker-data x", "drop y", "release-worker-data y"]);
    assert!(w.state.is_empty() && w.state.nbytes() == 0 && w.state.task_counts().is_empty());
}

#[test]
fn messages_are_the_dicts_of_dask() {
    let mut w = Worker::new(1);
    w.compute("x", &[], 0.0);
    let out = w.try_on(success("x", RunId(7))).unwrap();
    let Instruction::Send(message) = &out[0] else { panic!("{out:?}") };
    let startstop = Value::map([("action", "compute".into()), ("start", 1.0.into()), ("stop", 2.0.into())]);
    let expected = Value::map([
        ("key", "x".into()),
        ("run_id", 7i64.into()),
        ("nbytes", 5u64.into()),
        ("type", Bytes::from_static(b"p").into()),
        ("typename", "int".into()),
        ("metadata", Value::Map(Vec::new())),
        ("thread", 42i64.into()),
        ("startstops", Value::List(vec![startstop])),
        ("status", "OK".into()),
        ("op", "task-finished".into()),
        ("stimulus_id", "s".into()),
    ]);
    assert_eq!(message.to_value(), expected);

    let out = w.try_on(EventKind::StealRequest { key: "z".into() }).unwrap();
    let Instruction::Send(message) = &out[0] else { panic!("{out:?}") };
    let expected = [("key", "z".into()), ("state", Value::Nil), ("op", "steal-response".into())];
    let expected = expected.into_iter().chain([("stimulus_id", "s".into())]);
    assert_eq!(message.to_value(), Value::map(expected));
}

#[test]
fn a_failure_carries_the_exception() {
    let mut w = Worker::new(1);
    w.compute("x", &[], 0.0);
    let error = ErrorMessage {
        exception: Arc::new(payload()),
        traceback: None,
        exception_text: "boom".into(),
        traceback_text: "line 1".into(),
    };
    let failure = EventKind::ExecuteFailure {
        key: "x".into(),
        run_id: RunId(7),
        start: None,
        stop: None,
        error,
        thread: None,
    };
    let out = w.try_on(failure).unwrap();
    let Instruction::Send(message) = &out[0] else { panic!("{out:?}") };
    let value = message.to_value();
    assert_eq!(value.field("status"), Some(&"error".into()));
    assert_eq!(value.field("exception"), Some(&payload().into()));
    assert_eq!(value.field("traceback"), Some(&Value::Nil));
    assert_eq!(w.state.task(&"x".into()).unwrap().error().unwrap().exception_text.as_ref(), "boom");
}

#[test]
fn values_nobody_wants_are_dropped() {
    let mut w = Worker::new(1);
    w.compute("x", &[], 0.0);
    assert!(w.on(EventKind::FreeKeys { keys: keys(&["x"]) }).is_empty());
    assert_eq!(w.states(), "x:cancelled");
    assert_eq!(w.succeed_unknown("x"), ["drop x"]);
    assert!(w.state.is_empty());
    // scattered over a computation: the computed value will come
    w.compute("x", &[], 0.0);
    let data = vec![("x".into(), Stored { nbytes: 1, type_: None })];
    assert_eq!(w.on(EventKind::UpdateData { data }), ["drop x"]);
    assert_eq!(w.succeed("x"), ["task-finished x"]);
}

impl Worker {
    fn succeed_unknown(&mut self, key: &str) -> Vec<String> {
        self.on(success(key, RunId(7)))
    }
}

#[test]
fn data_scattered_over_a_transfer_stays() {
    let mut w = Worker::new(1);
    w.compute("y", &[("x", 1)], 0.0);
    let data = vec![("x".into(), Stored { nbytes: 10, type_: None })];
    assert_eq!(w.on(EventKind::UpdateData { data }), ["add-keys 1", "execute y"]);
    w.on(EventKind::GatherDepNetworkFailure { worker: peer(1), total_nbytes: 10 });
    assert_eq!(w.states(), "x:memory y:executing");
    assert_eq!(w.state.transfer_incoming_bytes(), 0);
}

#[test]
fn impossible_ends_are_errors_and_change_nothing() {
    let mut w = Worker::new(1);
    assert!(matches!(w.try_on(success("x", RunId(1))), Err(Error::UnknownTask { .. })));
    assert!(matches!(w.try_on(gathered(1, 0, &["x"])), Err(Error::NotInFlight { .. })));
    w.compute("y", &[("x", 1)], 0.0);
    w.on(gathered(1, 10, &["x"]));
    let removal = w.try_on(EventKind::RemoveReplicas { keys: keys(&["x"]) });
    assert!(matches!(removal, Err(Error::ReplicaInUse { .. })));
    assert_eq!(w.states(), "x:memory y:executing");
}

#[test]
fn a_task_in_error_cannot_be_made_ready_by_hand_and_the_story_says_what_was() {
    let mut w = Worker::new(1);
    w.compute("x", &[], 0.0);
    let id = w.state.id(&"x".into()).unwrap();
    let (stimulus, mut out) = ("t".into(), Vec::new());
    let mut step = Step { now: 0.0, stimulus_id: &stimulus, out: &mut out };
    let from = w.state.peers.insert(Peer::new(peer(1), true));
    let error = w.state.transition(id, Finish::Flight { from }, &mut step, &mut Vec::new());
    let Err(Error::InvalidTransition { start, finish, story, .. }) = error else { panic!("{error:?}") };
    assert_eq!((start, finish), (StateName::Cancelled, StateName::Flight));
    assert!(story.0.len() >= 4, "{story}");
}

fn acquire(keys: &[&str], from: u16) -> EventKind {
    EventKind::AcquireReplicas {
        who_has: keys.iter().map(|k| ((*k).into(), vec![peer(from)])).collect(),
        nbytes: keys.iter().map(|k| ((*k).into(), 10)).collect(),
    }
}

#[test]
fn what_is_wanted_again_as_its_cancelled_transfer_ends_is_fetched_again() {
    let mut w = Worker::new(1);
    assert_eq!(w.on(acquire(&["y", "x"], 1)).len(), 1);
    w.on(EventKind::FreeKeys { keys: keys(&["x"]) });
    w.compute("y", &[("x", 2)], 0.0);
    assert_eq!(w.states(), "x:cancelled y:resumed");
    let out = w.on(EventKind::GatherDepNetworkFailure { worker: peer(1), total_nbytes: 20 });
    assert_eq!(out, ["gather ['x'] from 10.0.0.2"]);
    assert_eq!(w.states(), "x:flight y:waiting");
    assert_eq!(w.on(gathered(2, 10, &["x"])), ["add-keys 1", "execute y"]);
}

#[test]
fn a_task_that_began_to_run_waits_for_nothing_any_more() {
    let mut w = Worker::new(1);
    w.compute("y", &[("x", 1)], 0.0);
    w.on(gathered(1, 10, &["x"]));
    w.on(EventKind::FreeKeys { keys: keys(&["y", "x"]) });
    w.on(acquire(&["x"], 1));
    w.on(EventKind::FreeKeys { keys: keys(&["x"]) });
    assert_eq!(w.states(), "x:cancelled y:cancelled");
    w.on(EventKind::GatherDepBusy { worker: peer(1), total_nbytes: 10 });
    assert_eq!(w.states(), "x:released y:cancelled");
}

#[test]
fn a_task_in_fetch_can_be_computed_though_its_dependency_is_let_go_on_the_way() {
    let mut w = Worker::new(1);
    w.on(EventKind::Pause);
    w.on(acquire(&["y"], 1));
    w.compute("y", &[("x", 2)], 0.0);
    assert_eq!(w.states(), "x:fetch y:waiting");
    let told = w.state.story(&[Subject::Key("x".into())]);
    assert!(told.iter().any(|record| matches!(record.entry, LogEntry::Repaired { .. })));
    assert_eq!(w.on(EventKind::Unpause), ["gather ['x'] from 10.0.0.2"]);
}

#[test]
fn ready_tasks_are_told_in_the_order_of_their_start() {
    let mut w = Worker::new(1);
    for (key, priority) in [("a", 0.0), ("d", 4.0), ("b", 2.0), ("c", 3.0), ("e", 5.0)] {
        w.compute(key, &[], priority);
    }
    assert_eq!(w.state.peek_ready(3), keys(&["b", "c", "d"]));
    assert_eq!(w.state.peek_ready(9), keys(&["b", "c", "d", "e"]));
    assert_eq!(w.succeed("a"), ["task-finished a", "execute b"]);
    assert_eq!(w.state.peek_ready(1), keys(&["c"]));
}

#[test]
fn a_promoted_task_goes_first_but_for_earlier_ones() {
    let mut w = Worker::new(1);
    for (key, priority) in [("a", 0.0), ("b", 2.0), ("c", 3.0), ("d", 4.0)] {
        w.compute(key, &[], priority);
    }
    assert!(w.state.promote(&"d".into()));
    assert!(w.state.promote(&"c".into()));
    assert!(!w.state.promote(&"a".into()), "it runs already");
    assert!(!w.state.promote(&"nobody".into()));
    w.state.validate_state().unwrap();
    assert_eq!(w.state.peek_ready(4), keys(&["d", "c", "b"]));
    assert_eq!(w.succeed("a"), ["task-finished a", "execute d"]);
    // stolen before its turn: its promotion goes with it
    assert_eq!(w.on(EventKind::StealRequest { key: "c".into() }), ["steal-response c"]);
    assert_eq!(w.state.peek_ready(4), keys(&["b"]));
    assert_eq!(w.succeed("d"), ["task-finished d", "execute b"]);
    assert!(!w.state.promote(&"b".into()));
}

#[test]
fn lost_data_that_nobody_needs_is_told_and_forgotten() {
    let mut w = Worker::new(1);
    w.compute("x", &[], 0.0);
    w.succeed("x");
    assert_eq!(w.on(EventKind::DataLost { keys: keys(&["x"]) }), ["drop x", "release-worker-data x"]);
    assert!(w.state.is_empty() && w.state.nbytes() == 0);
    assert!(w.on(EventKind::DataLost { keys: keys(&["x"]) }).is_empty(), "once is enough");
}

#[test]
fn lost_data_is_fetched_again_from_another_holder() {
    let mut w = Worker::new(1);
    w.compute("busy", &[], -1.0);
    w.compute("y", &[("x", 1)], 0.0);
    w.on(gathered(1, 10, &["x"]));
    assert_eq!(w.states(), "busy:executing x:memory y:ready");
    w.state.promote(&"y".into());
    let out = w.on(EventKind::DataLost { keys: keys(&["x"]) });
    assert_eq!(out, ["drop x", "release-worker-data x", "gather ['x'] from 10.0.0.1"]);
    assert_eq!(w.states(), "busy:executing x:flight y:waiting");
    assert!(w.state.peek_ready(9).is_empty());
    assert_eq!(w.on(gathered(1, 10, &["x"])), ["add-keys 1"]);
    assert_eq!(w.states(), "busy:executing x:memory y:ready");
    assert_eq!(w.succeed("busy"), ["task-finished busy", "execute y"]);
}

#[test]
fn lost_data_with_no_other_holder_is_asked_for_until_the_scheduler_decides() {
    let mut w = Worker::new(1);
    w.compute("x", &[], 0.0);
    w.succeed("x");
    w.compute("busy", &[], -1.0);
    w.compute("y", &[("x", 0), ("w", 1)], 0.0);
    w.compute("z", &[("x", 0)], 0.0);
    assert_eq!(w.states(), "busy:executing w:flight x:memory y:waiting z:ready");
    let out = w.on(EventKind::DataLost { keys: keys(&["x"]) });
    assert_eq!(out, ["drop x", "release-worker-data x", "request-refresh-who-has 1"]);
    assert_eq!(w.states(), "busy:executing w:flight x:missing y:waiting z:waiting");
    // someone computes it again elsewhere
    let who_has = vec![("x".into(), vec![peer(2)])];
    assert_eq!(w.on(EventKind::RefreshWhoHas { who_has }), ["gather ['x'] from 10.0.0.2"]);
    assert_eq!(w.on(gathered(2, 10, &["x"])), ["add-keys 1"]);
    assert_eq!(w.on(gathered(1, 10, &["w"])), ["add-keys 1"]);
    assert_eq!(w.states(), "busy:executing w:memory x:memory y:ready z:ready");
    // or the scheduler takes everything back
    w.on(EventKind::DataLost { keys: keys(&["x", "w"]) });
    w.on(EventKind::FreeKeys { keys: keys(&["y", "z"]) });
    assert_eq!(w.states(), "busy:executing w:cancelled x:cancelled");
}

#[test]
fn lost_inputs_of_a_running_task_are_its_own_affair() {
    let mut w = Worker::new(1);
    w.compute("y", &[("x", 1)], 0.0);
    w.on(gathered(1, 10, &["x"]));
    assert_eq!(w.on(EventKind::DataLost { keys: keys(&["x"]) }), ["drop x", "release-worker-data x"]);
    assert_eq!(w.states(), "x:released y:executing");
    assert_eq!(w.succeed("y"), ["task-finished y"]);
    assert_eq!(w.on(EventKind::FreeKeys { keys: keys(&["y"]) }), ["drop y", "release-worker-data y"]);
    assert!(w.state.is_empty());
}

#[test]
fn resources_can_be_changed_and_unknown_ones_are_never_there() {
    let mut w =
        Worker::with(Config { nthreads: 4, resources: vec![("GPU".into(), 1.0)], ..Config::default() });
    let gpu = |key: &str, name: &str| {
        let EventKind::ComputeTask(mut order) = order(key, &[], 0.0) else { unreachable!() };
        order.resource_restrictions = vec![(name.into(), 1.0)];
        EventKind::ComputeTask(order)
    };
    assert_eq!(w.on(gpu("a", "GPU")), ["execute a"]);
    assert!(w.on(gpu("b", "GPU")).is_empty());
    w.state.set_resources(&[("GPU".into(), 2.0), ("FPGA".into(), 1.0)]);
    assert_eq!(w.on(gpu("c", "FPGA")), ["execute b", "execute c"]);
    assert!(w.on(gpu("d", "TPU")).is_empty());
    assert_eq!(w.succeed("a"), ["task-finished a"]);
    assert_eq!(w.states(), "a:memory b:executing c:executing d:constrained");
}

#[test]
fn a_dump_tells_the_state() {
    let mut w = Worker::new(1);
    w.compute("y", &[("x", 1)], 0.0);
    let dump = w.state.dump(w.now);
    let tasks = dump.field("tasks").unwrap();
    let y = tasks.field("y").unwrap();
    assert_eq!(y.field("state"), Some(&"waiting".into()));
    assert_eq!(y.field("waiting_for_data"), Some(&Value::List(vec!["<TaskState 'x' flight>".into()])));
    assert_eq!(tasks.field("x").unwrap().field("coming_from"), Some(&peer(1).as_str().into()));
    assert_eq!(
        dump.field("log").unwrap().as_list().unwrap().len(),
        w.state.story(&[Subject::Stimulus("s".into())]).len()
    );
    assert_eq!(dump.field("stimulus_log").unwrap().as_list().unwrap().len(), 1);
}

#[test]
fn a_peer_that_left_is_forgotten() {
    let mut w = Worker::new(1);
    w.compute("y", &[("x", 1)], 0.0);
    w.on(EventKind::RemoveWorker { worker: peer(1) });
    assert_eq!(w.on(EventKind::GatherDepBusy { worker: peer(1), total_nbytes: 10 }).len(), 2);
    assert_eq!(w.states(), "x:missing y:waiting");
    assert_eq!(w.state.busy_workers().count(), 1);
    w.on(EventKind::RetryBusyWorker { worker: peer(1) });
    assert!(w.state.addresses.is_empty());
    assert_eq!(w.on(EventKind::FindMissing), ["request-refresh-who-has 1"]);
}
