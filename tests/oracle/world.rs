//! What a sequence takes place in: keys and their dependencies, peers, limits; and the worker under test in it.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use fastrand::Rng;
use iqoqo_dask_worker::proto::{Address, Key};
use iqoqo_dask_worker::state::{
    Config, Event, EventKind, Instruction, LogEntry, StateName, Subject, WorkerState,
};
use serde_json::{Value as Json, json};

use crate::event::{Ev, Facts, K, W};
use crate::text;

/// The unchanging part of a sequence.
pub struct World {
    pub keys: Vec<Key>,
    /// Each key's dependencies, all of them earlier keys.
    pub dependencies: Vec<Vec<K>>,
    pub restrictions: Vec<Vec<(Arc<str>, f64)>>,
    pub actors: Vec<bool>,
    pub workers: Vec<Address>,
    pub config: Config,
    pub key_names: HashMap<Key, String>,
    pub worker_names: HashMap<Address, String>,
}

impl World {
    pub fn random(rng: &mut Rng) -> World {
        let keys = keys();
        let n = keys.len();
        let mut dependencies = Vec::new();
        for k in 0..n {
            let mut deps: Vec<K> = (0..k).collect();
            rng.shuffle(&mut deps);
            deps.truncate(if rng.u8(..10) < 7 { rng.usize(..4) } else { 0 });
            dependencies.push(deps);
        }
        let restrictions = (0..n).map(|_| restriction(rng)).collect();
        let actors = (0..n).map(|_| rng.u8(..12) == 0).collect();
        // 0 is the worker under test; two peers share its host
        let hosts = [1, 1, 1, 2, 3, 4];
        let workers: Vec<Address> = hosts
            .into_iter()
            .enumerate()
            .map(|(i, host)| Address::parse(&format!("tcp://10.0.0.{host}:{}", 9000 + i)).unwrap())
            .collect();
        let config = Config {
            nthreads: rng.usize(1..=3),
            resources: vec![("R".into(), 2.0), ("S".into(), 1.0)],
            transfer_incoming_count_limit: *pick(rng, &[1, 2, 9999]),
            transfer_incoming_bytes_limit: *pick(rng, &[None, None, Some(50), Some(300)]),
            transfer_message_bytes_limit: *pick(rng, &[60, 200, 1 << 40]),
            transfer_incoming_bytes_throttle_threshold: *pick(rng, &[1, 100, 10_000_000]),
            validate: true,
            ..Config::default()
        };
        World {
            key_names: keys.iter().enumerate().map(|(i, key)| (key.clone(), format!("k{i}"))).collect(),
            worker_names: workers.iter().enumerate().map(|(i, w)| (w.clone(), format!("w{i}"))).collect(),
            keys,
            dependencies,
            restrictions,
            actors,
            workers,
            config,
        }
    }

    /// For the Python side.
    pub fn to_json(&self) -> Json {
        let config = &self.config;
        let mut limits = json!({
            "nthreads": config.nthreads,
            "resources": config.resources.iter().map(|(n, q)| (n.to_string(), *q)).collect::<HashMap<_, _>>(),
            "transfer_incoming_count_limit": config.transfer_incoming_count_limit,
            "transfer_message_bytes_limit": config.transfer_message_bytes_limit,
            "transfer_incoming_bytes_throttle_threshold": config.transfer_incoming_bytes_throttle_threshold,
        });
        if let Some(limit) = config.transfer_incoming_bytes_limit {
            limits["transfer_incoming_bytes_limit"] = limit.into();
        }
        let restrictions =
            |r: &Vec<(Arc<str>, f64)>| r.iter().map(|(n, q)| json!([&**n, q])).collect::<Json>();
        json!({
            "keys": self.keys.iter().map(key_json).collect::<Json>(),
            "workers": self.workers.iter().map(Address::as_str).collect::<Json>(),
            "restrictions": self.restrictions.iter().map(restrictions).collect::<Json>(),
            "actors": self.actors,
            "config": limits,
        })
    }

    pub fn key_name(&self, key: &Key) -> &str {
        &self.key_names[key]
    }

    pub fn worker_name(&self, worker: &Address) -> &str {
        &self.worker_names[worker]
    }

    pub fn number(&self, key: &Key) -> K {
        self.key_name(key)[1..].parse().unwrap()
    }
}

/// Keys of every kind that Dask allows, several to a prefix.
fn keys() -> Vec<Key> {
    let tuple = |name: &str, i: i128| Key::Tuple([name.into(), Key::Int(i)].into());
    let nested = Key::Tuple([tuple("rechunk-split-0f", 0), Key::Int(1)].into());
    vec![
        "x".into(),
        "inc-1".into(),
        "inc-2".into(),
        tuple("sum-partial-abc123", 0),
        tuple("sum-partial-abc123", 1),
        Key::Int(5),
        Key::Float(2.5),
        Key::Bytes((*b"bytes-1").into()),
        "it's-3".into(),
        nested,
        "y".into(),
        "z".into(),
        "add-deadbeef".into(),
        tuple("<lambda>", -1),
    ]
}

fn key_json(key: &Key) -> Json {
    match key {
        Key::Str(s) => json!(&**s),
        Key::Bytes(b) => json!({"b": str::from_utf8(b).unwrap()}),
        Key::Int(i) => json!(i64::try_from(*i).unwrap()),
        Key::Float(f) => json!(f),
        Key::Tuple(items) => items.iter().map(key_json).collect(),
    }
}

fn restriction(rng: &mut Rng) -> Vec<(Arc<str>, f64)> {
    match rng.u8(..10) {
        0 | 1 => vec![("R".into(), 1.0)],
        2 => vec![("R".into(), 0.5), ("S".into(), 1.0)],
        _ => Vec::new(),
    }
}

pub fn pick<'a, T>(rng: &mut Rng, items: &'a [T]) -> &'a T {
    &items[rng.usize(..items.len())]
}

/// What came of an event.
pub enum Outcome {
    /// Dask's own rules forbid it now.
    Illegal,
    /// It looks legal, but Dask raises, for the reason given: the sequence is at its end.
    Dead(Json, String),
    /// The event as the other side is to get it, and what both must agree on.
    Done(Json, String),
}

/// The worker under test, and what its surroundings remember.
pub struct Worker<'w> {
    pub world: &'w World,
    pub state: WorkerState,
    pub steps: usize,
    runs: i64,
    /// Run id of each computation that goes on.
    executing: HashMap<K, i64>,
    /// Each transfer that goes on: what was asked for, and its size.
    pub gathering: HashMap<W, (Vec<K>, u64)>,
    /// Peers after which a `RetryBusyWorker` is due.
    pub retries: BTreeSet<W>,
    /// What a driver that obeys `DropData` would have in its store.
    store: BTreeSet<K>,
}

impl<'w> Worker<'w> {
    pub fn new(world: &'w World) -> Self {
        Worker {
            world,
            state: WorkerState::new(world.config.clone(), world.workers[0].clone()),
            steps: 0,
            runs: 0,
            executing: HashMap::new(),
            gathering: HashMap::new(),
            retries: BTreeSet::new(),
            store: BTreeSet::new(),
        }
    }

    pub fn state_of(&self, key: K) -> Option<StateName> {
        self.state.task(&self.world.keys[key]).map(|task| task.state_name())
    }

    /// Applies an event, if it is legal, and checks all invariants of our side.
    pub fn apply(&mut self, event: &Ev) -> Outcome {
        if !self.is_legal(event) {
            return Outcome::Illegal;
        }
        let stimulus_id = format!("s{}", self.steps);
        let facts = self.facts(event, &stimulus_id);
        let (json, kind) = (event.to_json(&facts), event.to_kind(&facts));
        match self.handle(event, kind, &stimulus_id) {
            Ok(text) => Outcome::Done(json, text),
            Err(why) => Outcome::Dead(json, why),
        }
    }

    /// Applies a [`Ev::DataLost`] or another event, without asking whether Dask could do so too.
    pub fn apply_ours(&mut self, event: &Ev) -> Result<Vec<Instruction>, String> {
        let stimulus_id = format!("s{}", self.steps);
        let kind = event.to_kind(&self.facts(event, &stimulus_id));
        self.handle_checked(event, kind, &stimulus_id)
    }

    fn facts<'a>(&'a self, event: &Ev, stimulus_id: &'a str) -> Facts<'a> {
        let run_id = match event {
            Ev::ExecuteSuccess(key, _) | Ev::ExecuteFailure(key, _) => self.executing[key],
            _ => self.runs + 1,
        };
        let total_nbytes = match event {
            Ev::GatherSuccess(w, _)
            | Ev::GatherBusy(w)
            | Ev::GatherNetworkFailure(w)
            | Ev::GatherFailure(w) => self.gathering[w].1,
            _ => 0,
        };
        Facts { world: self.world, stimulus_id, run_id, total_nbytes }
    }

    fn handle(&mut self, event: &Ev, kind: EventKind, stimulus_id: &str) -> Result<String, String> {
        let out = self.handle_checked(event, kind, stimulus_id)?;
        let story = self.state.story(&[Subject::Stimulus(stimulus_id.into())]);
        if let Some(record) = story.iter().find(|r| matches!(r.entry, LogEntry::Repaired { .. })) {
            return Err(record.to_string());
        }
        Ok(text::step(self.world, &self.state, &out, &story))
    }

    fn handle_checked(
        &mut self,
        event: &Ev,
        kind: EventKind,
        stimulus_id: &str,
    ) -> Result<Vec<Instruction>, String> {
        let mut out = Vec::new();
        self.before(event);
        let now = self.steps as f64;
        self.state.handle(now, Event::new(stimulus_id, kind), &mut out).map_err(|e| e.to_string())?;
        self.state.validate_state().map_err(|e| e.to_string())?;
        self.steps += 1;
        out.iter().for_each(|instruction| self.after(instruction));
        let held: BTreeSet<K> =
            (0..self.world.keys.len()).filter(|k| self.state.has_data(&self.world.keys[*k])).collect();
        assert_eq!(self.store, held, "the store and what the state machine holds");
        Ok(out)
    }

    /// What the surroundings do before the event is handled.
    fn before(&mut self, event: &Ev) {
        match event {
            Ev::Compute { .. } => self.runs += 1,
            Ev::UpdateData(items) => self.store.extend(items.iter().map(|(key, _)| *key)),
            Ev::GatherSuccess(worker, items) => {
                self.store.extend(items.iter().map(|(key, _)| *key));
                self.gathering.remove(worker);
            }
            Ev::GatherBusy(worker) => {
                self.gathering.remove(worker);
                self.retries.insert(*worker);
            }
            Ev::GatherNetworkFailure(worker) | Ev::GatherFailure(worker) => {
                self.gathering.remove(worker);
            }
            Ev::RetryBusyWorker(worker) => {
                self.retries.remove(worker);
            }
            Ev::ExecuteSuccess(key, _) => {
                self.executing.remove(key);
                self.store.insert(*key);
            }
            Ev::ExecuteFailure(key, _) | Ev::Reschedule(key) => {
                self.executing.remove(key);
            }
            _ => {}
        }
    }

    /// What the surroundings do with an instruction.
    fn after(&mut self, instruction: &Instruction) {
        let world = self.world;
        match instruction {
            Instruction::Execute { key, .. } => {
                let run_id = self.state.task(key).unwrap().run_id().0;
                self.executing.insert(world.number(key), run_id);
            }
            Instruction::GatherDep { worker, to_gather, total_nbytes, .. } => {
                let worker = world.workers.iter().position(|w| w == worker).unwrap();
                let keys = to_gather.iter().map(|key| world.number(key)).collect();
                self.gathering.insert(worker, (keys, *total_nbytes));
            }
            Instruction::DropData { key } => {
                self.store.remove(&world.number(key));
            }
            Instruction::RetryBusyWorkerLater { .. } | Instruction::Send(_) => {}
        }
    }
}
