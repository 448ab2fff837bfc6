//! A stream of messages that never keeps its caller waiting: sent at once when the stream is idle, in lists under load.
//!
//! Source: `distributed/batched.py: BatchedSend`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use super::connection::weight;
use super::{Error, Writer};
use crate::proto::{Address, Value};

/// How long a closing stream may take to hand over what is queued.
const FINISH_TIMEOUT: Duration = Duration::from_secs(5);

/// The sending side of a stream. Clones share it; when the last is dropped, what is queued is sent and the stream ends.
#[derive(Clone)]
pub struct BatchedWriter(Arc<Owner>);

/// Tells the task that nobody is left to send anything.
struct Owner(Arc<Shared>);

struct Shared {
    queue: Mutex<Queue>,
    wake: Notify,
    done: watch::Sender<bool>,
    peer: Address,
    limit: u64,
}

#[derive(Default)]
struct Queue {
    messages: Vec<Value>,
    bytes: u64,
    /// Nothing more is taken.
    closing: bool,
    /// Nothing more is sent either.
    aborted: bool,
    stats: BatchedStats,
}

/// What a stream has carried and what still waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchedStats {
    /// Messages accepted.
    pub messages: u64,
    /// Lists of messages sent.
    pub batches: u64,
    /// Bytes sent.
    pub bytes: u64,
    /// Messages that wait.
    pub queued: usize,
    /// Bytes that they take, roughly.
    pub queued_bytes: u64,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Nothing panics while it holds the lock.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.lock().closing = true;
        self.0.wake.notify_one();
    }
}

impl BatchedWriter {
    /// Starts the stream's task. At most one list goes out every `interval` (the first at once); when more than
    /// `limit` bytes wait, the peer is considered stuck and the stream is given up.
    pub fn spawn(writer: Writer, interval: Duration, limit: u64) -> Self {
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            wake: Notify::new(),
            done: watch::Sender::new(false),
            peer: writer.peer_address().clone(),
            limit,
        });
        tokio::spawn(run(shared.clone(), writer, interval));
        BatchedWriter(Arc::new(Owner(shared)))
    }

    /// Queues one message, without waiting. Messages arrive in the order in which they were queued.
    ///
    /// # Errors
    /// [`Error::Closed`] when the stream is closing or broken, [`Error::Backlog`] when the peer takes nothing.
    pub fn send(&self, message: Value) -> Result<(), Error> {
        let shared = &self.0.0;
        let mut queue = shared.lock();
        if queue.closing {
            return Err(Error::Closed { peer: shared.peer.clone() });
        }
        queue.bytes += weight(&message);
        queue.messages.push(message);
        queue.stats.messages += 1;
        if queue.bytes > shared.limit {
            let bytes = queue.bytes;
            queue.abort();
            shared.wake.notify_one();
            return Err(Error::Backlog { peer: shared.peer.clone(), bytes });
        }
        drop(queue);
        shared.wake.notify_one();
        Ok(())
    }

    /// Sends what is queued and ends the stream. Returns when that is done, or when the stream has broken.
    pub async fn close(&self) {
        self.0.0.lock().closing = true;
        self.0.0.wake.notify_one();
        self.closed().await;
    }

    /// Ends the stream at once; what is queued is lost.
    pub fn abort(&self) {
        self.0.0.lock().abort();
        self.0.0.wake.notify_one();
    }

    /// Resolves when the stream has ended, for whatever reason.
    pub async fn closed(&self) {
        let mut done = self.0.0.done.subscribe();
        // The sender lives in what `self` holds.
        let _ = done.wait_for(|done| *done).await;
    }

    /// Whether the stream still takes messages.
    pub fn is_open(&self) -> bool {
        !self.0.0.lock().closing
    }

    /// Counters and what waits.
    pub fn stats(&self) -> BatchedStats {
        let queue = self.0.0.lock();
        BatchedStats { queued: queue.messages.len(), queued_bytes: queue.bytes, ..queue.stats }
    }
}

impl Queue {
    fn abort(&mut self) {
        self.closing = true;
        self.aborted = true;
        self.messages = Vec::new();
        self.bytes = 0;
    }
}

/// What the task does next.
enum Next {
    Send { at_once: bool },
    Wait,
    End { gracefully: bool },
}

fn next(shared: &Shared) -> Next {
    let queue = shared.lock();
    match (queue.messages.is_empty(), queue.closing) {
        _ if queue.aborted => Next::End { gracefully: false },
        (false, at_once) => Next::Send { at_once },
        (true, true) => Next::End { gracefully: true },
        (true, false) => Next::Wait,
    }
}

async fn run(shared: Arc<Shared>, mut writer: Writer, interval: Duration) {
    let mut earliest = Instant::now();
    let gracefully = loop {
        match next(&shared) {
            Next::Wait => shared.wake.notified().await,
            // a timer is set only when there is something to wait for: each costs a turn of the runtime
            Next::Send { at_once: false } if Instant::now() < earliest => pause(&shared, earliest).await,
            Next::Send { .. } => {
                earliest = Instant::now() + interval;
                if let Err(error) = send(&shared, &mut writer).await {
                    match error {
                        Error::Encode { .. } => warn!("stream ends: {}", error.chain()),
                        _ => info!("stream ends: {}", error.chain()),
                    }
                    break false;
                }
            }
            Next::End { gracefully } => break gracefully,
        }
    };
    if gracefully {
        writer.finish(FINISH_TIMEOUT).await;
    } else {
        drop(writer);
        shared.lock().abort();
    }
    shared.done.send_replace(true);
}

/// Sends what waits as one list; gives up when the stream is aborted while the peer takes nothing.
async fn send(shared: &Shared, writer: &mut Writer) -> Result<(), Error> {
    let batch = {
        let mut queue = shared.lock();
        queue.bytes = 0;
        Value::List(std::mem::take(&mut queue.messages))
    };
    let aborted = async {
        loop {
            if shared.lock().aborted {
                break;
            }
            shared.wake.notified().await;
        }
    };
    let bytes = tokio::select! {
        written = writer.write(&batch) => written?,
        () = aborted => return Err(Error::Closed { peer: shared.peer.clone() }),
    };
    let mut queue = shared.lock();
    queue.stats.batches += 1;
    queue.stats.bytes += bytes;
    Ok(())
}

/// Lets messages gather until `until`, unless the stream is to end.
async fn pause(shared: &Shared, until: Instant) {
    let closing = async {
        loop {
            if shared.lock().closing {
                break;
            }
            shared.wake.notified().await;
        }
    };
    tokio::select! {
        () = sleep_until(until) => {}
        () = closing => {}
    }
}
