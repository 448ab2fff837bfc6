//! A worker that does nothing: the floor that the scheduler and the protocol set for every worker.
//!
//! Registers, answers each task at once with the result `None` without looking at it, serves `None` to whoever asks.
//! No state machine, no runners, no heartbeats. Uses the library's connections, so that what a message costs is the
//! same as for the real worker. Not for use: an example, so that it is never installed.

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use iqoqo_dask_worker::net::{self, ANY_PORT, BatchedWriter, Connection, Listener};
use iqoqo_dask_worker::proto::{Address, ComputeTask, Stimulus, StreamMessage, Value};
use iqoqo_dask_worker::wire::payload::pickled_object;

/// `pickle.dumps(None)`
const NONE: &[u8] = b"\x80\x05N.";
/// `pickle.dumps(type(None))`
const NONE_TYPE: &[u8] =
    b"\x80\x05\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x08builtins\x94\x8c\x04type\x94\x93\x94N\x85\x94R\x94.";

/// As `distributed/worker.py`: at most one list of messages in this time.
const BATCH_INTERVAL: Duration = Duration::from_millis(2);
/// More unsent bytes than this, and the scheduler is stuck.
const BACKLOG_BYTES: u64 = 1 << 30;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let (scheduler, nthreads) = options()?;
    let config = Arc::new(net::Config::default());
    let listener = Listener::bind("127.0.0.1", ANY_PORT, config.clone()).await?;
    let address = listener.listen_address();
    let mut stream = net::connect(&scheduler, &config).await?;
    stream.write(&registration(&address, nthreads)).await?;
    stream.read().await?;
    tokio::spawn(async move { listener.run(serve).await });

    let (mut reader, writer) = stream.into_split();
    let writer = BatchedWriter::spawn(writer, BATCH_INTERVAL, BACKLOG_BYTES);
    while let Ok(message) = reader.read().await {
        let messages = match message {
            Value::List(messages) => messages,
            single => vec![single],
        };
        for message in messages {
            match Stimulus::parse(message)?.message {
                StreamMessage::ComputeTask(task) => writer.send(finished(&task))?,
                StreamMessage::Close { .. } => return Ok(()),
                _ => {}
            }
        }
    }
    Ok(())
}

/// `SCHEDULER [--nthreads N] [--OPTION VALUE]...`: any other option of the real worker is accepted and means nothing.
fn options() -> Result<(Address, u32), Box<dyn Error>> {
    let mut scheduler = None;
    let mut nthreads = 1;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        if argument.starts_with("--") {
            let value = arguments.next().ok_or("an option without a value")?;
            if argument == "--nthreads" {
                nthreads = value.parse()?;
            }
        } else {
            scheduler = Some(Address::parse(&argument)?);
        }
    }
    Ok((scheduler.ok_or("no scheduler named")?, nthreads))
}

/// What `Scheduler.add_worker` reads, and nothing more.
fn registration(address: &Address, nthreads: u32) -> Value {
    let empty = || Value::Map(Vec::new());
    let metrics = Value::map([
        ("bandwidth", Value::map([("total", 1e8.into()), ("workers", empty()), ("types", empty())])),
        ("digests_total_since_heartbeat", empty()),
        ("memory", Value::from(0)),
        ("managed_bytes", Value::from(0)),
        ("spilled_bytes", Value::map([("memory", Value::from(0)), ("disk", Value::from(0))])),
        ("task_counts", empty()),
    ]);
    Value::map([
        ("op", "register-worker".into()),
        ("reply", false.into()),
        ("address", address.as_str().into()),
        ("status", "running".into()),
        ("server_id", format!("Nothing-{}", std::process::id()).as_str().into()),
        ("nthreads", Value::from(nthreads)),
        ("name", address.as_str().into()),
        ("now", now().into()),
        ("resources", empty()),
        ("memory_limit", Value::Nil),
        ("metrics", metrics),
        ("pid", Value::from(std::process::id())),
        ("services", empty()),
        ("local_directory", "/nonexistent".into()),
        ("versions", Value::map([("packages", empty())])),
        ("nanny", Value::Nil),
        ("extra", empty()),
        ("stimulus_id", "do-nothing".into()),
    ])
}

/// `task-finished` for a task that took no time (`distributed/worker_state_machine.py: TaskFinishedMsg`).
fn finished(task: &ComputeTask) -> Value {
    let now = now();
    let compute = Value::map([("action", "compute".into()), ("start", now.into()), ("stop", now.into())]);
    Value::map([
        ("op", "task-finished".into()),
        ("status", "OK".into()),
        ("key", Value::from(&task.key)),
        ("run_id", Value::from(task.run_id.0)),
        ("nbytes", Value::from(16)),
        ("type", Value::Bytes(Bytes::from_static(NONE_TYPE))),
        ("typename", "NoneType".into()),
        ("metadata", Value::Map(Vec::new())),
        ("thread", Value::from(1)),
        ("startstops", Value::List(vec![compute])),
        ("stimulus_id", "do-nothing".into()),
    ])
}

/// Answers `get_data`; any other request gets an `OK`, for the few that the scheduler may have at its end.
async fn serve(mut connection: Connection) {
    while let Ok(mut request) = connection.read().await {
        let answer = match request.field("op").and_then(Value::as_str) {
            Some("get_data") => none_for(request.take_field("keys")),
            // The receiver's word that the data of the last answer arrived.
            None => continue,
            Some(_) => Value::from("OK"),
        };
        if connection.write(&answer).await.is_err() {
            return;
        }
    }
}

/// A `get_data` answer that holds `None` under every key.
fn none_for(keys: Option<Value>) -> Value {
    let keys = match keys {
        Some(Value::List(keys) | Value::Set(keys)) => keys,
        _ => Vec::new(),
    };
    let none = pickled_object(Bytes::from_static(NONE), Vec::new());
    let data = keys.into_iter().map(|key| (key, Value::Payload(Box::new(none.clone())))).collect();
    Value::map([("status", "OK".into()), ("data", Value::Map(data))])
}

/// Seconds since the epoch, as Python's `time.time()`.
fn now() -> f64 {
    // A clock before 1970 is the machine's fault and harms nothing here.
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
