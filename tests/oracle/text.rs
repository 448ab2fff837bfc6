//! What the two sides must agree on after a step, in words: the same words as `reference.py: Sequence.step`.

use std::fmt::Write;

use iqoqo_dask_worker::proto::{Address, Key, Value};
use iqoqo_dask_worker::state::{Instruction, LogEntry, LogRecord, StateName, Task, WorkerState};
use serde_json::{Map, Value as Json};

use crate::world::World;

/// Instructions, new log lines, and the whole state.
pub fn step(world: &World, state: &WorkerState, out: &[Instruction], story: &[LogRecord]) -> String {
    let mut lines: Vec<String> = out.iter().filter_map(|i| instruction(world, i)).collect();
    lines.sort();
    lines.push("--".into());
    lines.extend(story.iter().map(|record| log_line(world, &record.entry)));
    lines.push("--".into());
    snapshot(world, state, &mut lines);
    lines.join("\n")
}

fn instruction(world: &World, instruction: &Instruction) -> Option<String> {
    Some(match instruction {
        Instruction::GatherDep { worker, to_gather, total_nbytes, stimulus_id } => {
            let keys = sorted(world, to_gather);
            format!("gather {} {keys} {total_nbytes} {stimulus_id}", world.worker_name(worker))
        }
        Instruction::Execute { key, stimulus_id } => format!("execute {} {stimulus_id}", world.key_name(key)),
        Instruction::RetryBusyWorkerLater { worker, stimulus_id } => {
            format!("retry {} {stimulus_id}", world.worker_name(worker))
        }
        // ours: Dask deletes from its own dict, which the snapshot shows
        Instruction::DropData { .. } => return None,
        Instruction::Send(message) => message_text(world, message.to_value()),
    })
}

/// A message as sorted JSON, keys by their names.
fn message_text(world: &World, message: Value) -> String {
    let name = |value: &Value| Json::from(world.key_name(&value.to_key().unwrap()));
    let mut fields = Map::new();
    for (field, value) in message.as_map().unwrap() {
        let field = field.as_str().unwrap();
        let value = match field {
            // its pickle differs from Python to Python
            "type" => continue,
            "key" => name(value),
            "keys" => {
                let mut names: Vec<Json> = value.as_list().unwrap().iter().map(name).collect();
                names.sort_by_key(|name| name.to_string());
                names.into()
            }
            _ => to_json(value),
        };
        fields.insert(field.to_owned(), value);
    }
    Json::from(fields).to_string()
}

fn to_json(value: &Value) -> Json {
    match value {
        Value::Nil => Json::Null,
        Value::Bool(b) => (*b).into(),
        Value::Int(i) => i64::try_from(i.get()).unwrap().into(),
        Value::Float(f) => (*f).into(),
        Value::Str(s) => (&**s).into(),
        Value::List(items) => items.iter().map(to_json).collect(),
        Value::Map(items) => {
            items.iter().map(|(k, v)| (k.as_str().unwrap().to_owned(), to_json(v))).collect()
        }
        Value::Payload(payload) => str::from_utf8(&payload.header).unwrap().into(),
        Value::Bytes(_) | Value::Set(_) => panic!("not in any message: {value:?}"),
    }
}

fn log_line(world: &World, entry: &LogEntry) -> String {
    let name = |key: &Key| world.key_name(key);
    match entry {
        LogEntry::Transition { key, start, recommended, finish, recommendations } => {
            let new: Vec<String> = recommendations.iter().map(|(k, s)| format!("{}:{s}", name(k))).collect();
            format!("{} {start} {recommended} {finish} {}", name(key), new.join(","))
        }
        LogEntry::EnsureTaskExists { key, state } => format!("{} ensure-task-exists {state}", name(key)),
        LogEntry::ComputeTask { key, state } => format!("{} compute-task {state}", name(key)),
        LogEntry::ReceiveFromScatter { key, state } => format!("{} receive-from-scatter {state}", name(key)),
        LogEntry::PutInMemory { key } => format!("{} put-in-memory", name(key)),
        LogEntry::MissingDep { key } => format!("{} missing-dep", name(key)),
        LogEntry::RemoveReplica { key } => format!("{} remove-replica", name(key)),
        LogEntry::CancelCompute { key } => format!("{} cancel-compute", name(key)),
        LogEntry::FreeKeys { keys } => format!("free-keys {}", in_order(world, keys)),
        LogEntry::GatherDependencies { worker, keys } => {
            format!("gather-dependencies {} {}", world.worker_name(worker), sorted(world, keys))
        }
        other => panic!("not written by the state machine: {other:?}"),
    }
}

fn in_order<'a>(world: &World, keys: impl IntoIterator<Item = &'a Key>) -> String {
    keys.into_iter().map(|key| world.key_name(key)).collect::<Vec<_>>().join(",")
}

fn sorted<'a>(world: &World, keys: impl IntoIterator<Item = &'a Key>) -> String {
    let mut names: Vec<&str> = keys.into_iter().map(|key| world.key_name(key)).collect();
    names.sort_unstable();
    names.join(",")
}

fn peers<'a>(world: &World, workers: impl IntoIterator<Item = &'a Address>) -> String {
    let mut names: Vec<&str> = workers.into_iter().map(|worker| world.worker_name(worker)).collect();
    names.sort_unstable();
    names.join(",")
}

fn amounts<'a>(items: impl IntoIterator<Item = &'a (std::sync::Arc<str>, f64)>) -> String {
    items.into_iter().map(|(name, quantity)| format!("{name}={quantity:?}")).collect::<Vec<_>>().join(",")
}

fn task(world: &World, state: &WorkerState, task: &Task) -> String {
    let name = task.state_name();
    let previous = task.previous_state_name();
    let next = previous.filter(|_| name == StateName::Resumed).map(|previous| match previous {
        StateName::Flight => StateName::Waiting,
        _ => StateName::Fetch,
    });
    let or_none = |state: Option<StateName>| state.map_or("None", StateName::as_str);
    let priority: Vec<String> =
        task.priority().into_iter().flat_map(|p| p.0.iter()).map(|p| format!("{p:.0}")).collect();
    let kind = match (task.is_actor(), task.in_data()) {
        (true, _) => "actor",
        (false, true) => "data",
        (false, false) => "",
    };
    let mut line = String::new();
    let nbytes = task.nbytes().map_or("None".to_owned(), |n| n.to_string());
    let key = world.key_name(task.key());
    write!(
        line,
        "{key} {} {name} {} {} n={nbytes} p={} r={} h={} f={} d={} t={} w={} v={} {} {kind} {} s={} {}",
        task.prefix(),
        or_none(previous),
        or_none(next),
        priority.join(","),
        task.run_id().0,
        peers(world, state.who_has(task)),
        state.coming_from(task).map_or("", |w| world.worker_name(w)),
        in_order(world, state.dependencies(task)),
        in_order(world, state.dependents(task)),
        sorted(world, state.waiting_for_data(task)),
        sorted(world, state.waiters(task)),
        u8::from(task.is_done()),
        amounts(task.resource_restrictions()),
        task.startstops().len(),
        task.error().map_or("", |error| &error.exception_text),
    )
    .unwrap();
    line
}

fn snapshot(world: &World, state: &WorkerState, lines: &mut Vec<String>) {
    let start = lines.len();
    lines.extend(state.tasks().map(|t| task(world, state, t)));
    lines[start..].sort();
    let spaced = |mut items: Vec<String>| {
        items.sort();
        items.join(" ")
    };
    let by_prefix =
        state.task_counts_by_prefix().into_iter().map(|(p, s, n)| format!("{p}/{s}={n}")).collect();
    let by_state = state.task_counts().into_iter().map(|(s, n)| format!("{s}={n}")).collect();
    let needed = state.data_needed().map(|(w, k)| format!("{}:{}", world.worker_name(w), in_order(world, k)));
    let has_what = state.has_what().map(|(w, k)| format!("{}:{}", world.worker_name(w), sorted(world, k)));
    let in_flight =
        state.in_flight_workers().map(|(w, k)| format!("{}:{}", world.worker_name(w), in_order(world, k)));
    let data = state.tasks().filter(|task| task.in_data()).map(Task::key);
    lines.extend([
        format!(
            "running={} executed={} nbytes={} transitions={} incoming={}/{}/{}",
            u8::from(state.is_running()),
            state.executed_count(),
            state.nbytes(),
            state.transition_counter(),
            state.transfer_incoming_bytes(),
            state.transfer_incoming_count(),
            state.transfer_incoming_count_total(),
        ),
        format!("ready={}", in_order(world, state.ready())),
        format!("constrained={}", in_order(world, state.constrained())),
        format!("executing={}", in_order(world, state.executing())),
        format!("long-running={}", in_order(world, state.long_running())),
        format!("in-flight-tasks={}", in_order(world, state.in_flight_tasks())),
        format!("missing={}", in_order(world, state.missing())),
        format!("waiting={}", state.waiting_count()),
        format!("busy={}", peers(world, state.busy_workers())),
        format!("data={}", sorted(world, data)),
        format!("data-needed={}", spaced(needed.collect())),
        format!("has-what={}", spaced(has_what.collect())),
        format!("in-flight-workers={}", spaced(in_flight.collect())),
        format!("resources={}", amounts(state.available_resources())),
        format!("counts={}", spaced(by_prefix)),
        format!("by-state={}", spaced(by_state)),
    ]);
}

/// `zlib.crc32`
pub fn crc32(text: &str) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut i = 0;
        while i < 256 {
            let mut c = i as u32;
            let mut bit = 0;
            while bit < 8 {
                c = if c & 1 == 1 { 0xedb8_8320 ^ (c >> 1) } else { c >> 1 };
                bit += 1;
            }
            table[i] = c;
            i += 1;
        }
        table
    };
    !text.bytes().fold(!0, |crc, byte| TABLE[((crc ^ u32::from(byte)) & 0xff) as usize] ^ (crc >> 8))
}
