//! One registration while it lasts: the stream both ways, keep-alive, heartbeats, and its end.
//!
//! Everything that happens reaches the driver as one [`Incoming`] after the other. Nothing here registers again.
//!
//! Source: `distributed/worker.py: Worker.handle_scheduler`, `distributed/core.py: Server.handle_stream`.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval_at};
use tracing::{info, warn};

use super::heartbeat::{Beat, Heart};
use super::register::Scheduler;
use crate::net::{self, BatchedWriter, Connection, Reader};
use crate::proto::{Address, MessageError, Stimulus, Value};

/// Lists of messages that wait for the driver before the scheduler has to wait.
const QUEUE: usize = 64;

/// What the session has for the driver.
#[derive(Debug)]
pub enum Incoming {
    /// Messages of the stream, in order, as many as came in one list.
    Messages(Vec<Stimulus>),
    /// A heartbeat is due: answer with what it is to tell. Dropping the sender skips it.
    Heartbeat(oneshot::Sender<Beat>),
    /// The session is over; nothing follows.
    Lost(Lost),
}

/// How a session ended, other than by [`Session::close`].
#[derive(Debug, thiserror::Error)]
pub enum Lost {
    /// The scheduler ended the stream in good order.
    #[error("the scheduler ended the stream")]
    Ended,
    /// The connection broke.
    #[error("lost the connection to the scheduler")]
    Connection(#[source] net::Error),
    /// The scheduler sent what no scheduler sends.
    #[error("the scheduler sent a malformed message")]
    Malformed(#[source] MessageError),
    /// The scheduler answers heartbeats with `missing`, and sent no `close` either.
    #[error("the scheduler was unaware of this worker")]
    Unaware,
}

/// The sending side of a session; clones share it.
#[derive(Clone)]
pub struct Sender(BatchedWriter);

impl Sender {
    /// Queues one message for the scheduler, without waiting.
    ///
    /// A message for a stream that is gone is dropped, as in `Worker.batched_send`: the loss is on its way to the driver.
    pub fn send(&self, message: Value) {
        if let Err(error @ net::Error::Backlog { .. }) = self.0.send(message) {
            warn!("giving up the stream to the scheduler: {error}");
        }
    }
}

/// A registration while it lasts. Dropping it breaks the connection.
pub struct Session {
    scheduler: Address,
    plugins: Vec<(Value, Value)>,
    sender: Sender,
    incoming: mpsc::Receiver<Incoming>,
    task: JoinHandle<()>,
}

impl Session {
    pub(super) fn start(
        scheduler: Scheduler,
        address: Address,
        worker: Address,
        connection: Connection,
        plugins: Vec<(Value, Value)>,
    ) -> Self {
        let config = scheduler.config();
        let (reader, writer) = connection.into_split();
        let writer = BatchedWriter::spawn(writer, config.batch_interval, config.backlog);
        let (events, incoming) = mpsc::channel(QUEUE);
        let sender = Sender(writer);
        let task = Task {
            heart: Heart::new(scheduler.clone(), address.clone(), worker, events.clone()),
            keep_alive: config.keep_alive,
            sender: sender.clone(),
            events,
        };
        let task = tokio::spawn(task.run(reader, scheduler, address.clone()));
        Session { scheduler: address, plugins, sender, incoming, task }
    }

    /// The scheduler that took us in.
    pub fn scheduler(&self) -> &Address {
        &self.scheduler
    }

    /// The worker plugins to set up before the first task: name and pickle.
    pub fn take_plugins(&mut self) -> Vec<(Value, Value)> {
        std::mem::take(&mut self.plugins)
    }

    /// The sending side.
    pub fn sender(&self) -> &Sender {
        &self.sender
    }

    /// What comes next. After [`Incoming::Lost`] it is [`Lost::Ended`] for ever. Cancel safe.
    pub async fn next(&mut self) -> Incoming {
        self.incoming.recv().await.unwrap_or(Incoming::Lost(Lost::Ended))
    }

    /// Leaves in good order: what is queued is sent, then `close-stream`. After `limit` the connection is broken.
    pub async fn close(self, limit: Duration) {
        self.sender.send(Value::map([("op", "close-stream".into())]));
        if tokio::time::timeout(limit, self.sender.0.close()).await.is_err() {
            warn!("the scheduler did not take our last messages within {limit:?}");
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.sender.0.abort();
        self.task.abort();
    }
}

/// What keeps a session going.
struct Task {
    heart: Heart,
    keep_alive: Duration,
    sender: Sender,
    events: mpsc::Sender<Incoming>,
}

impl Task {
    async fn run(mut self, mut reader: Reader, scheduler: Scheduler, address: Address) {
        let lost = tokio::select! {
            lost = read(&mut reader, &self.events) => lost,
            lost = self.heart.run() => lost,
            () = keep_open(&self.sender, self.keep_alive) => unreachable!("keeps on for ever"),
        };
        self.sender.0.abort();
        scheduler.pool().remove(&address);
        // nobody listens when the driver itself is ending
        let _ = self.events.send(Incoming::Lost(lost)).await;
    }
}

/// Hands on what the scheduler sends until the stream ends.
async fn read(reader: &mut Reader, events: &mpsc::Sender<Incoming>) -> Lost {
    loop {
        let message = match reader.read().await {
            Ok(message) => message,
            Err(error) => return Lost::Connection(error),
        };
        let (stimuli, end) = match parse(message) {
            Ok(parsed) => parsed,
            Err(error) => return Lost::Malformed(error),
        };
        if !stimuli.is_empty() && events.send(Incoming::Messages(stimuli)).await.is_err() {
            // the driver dropped the session, which ends this task
            std::future::pending::<()>().await;
        }
        if end {
            info!("Received 'close-stream' from the scheduler; closing.");
            return Lost::Ended;
        }
    }
}

/// The stimuli of one list of messages, and whether the list ends the stream (`Server.handle_stream`).
fn parse(message: Value) -> Result<(Vec<Stimulus>, bool), MessageError> {
    let messages = match message {
        Value::List(messages) => messages,
        single => vec![single],
    };
    let mut stimuli = Vec::with_capacity(messages.len());
    for message in messages {
        if message.as_str() == Some("OK") {
            break;
        }
        if message.field("op").and_then(Value::as_str) == Some("close-stream") {
            return Ok((stimuli, true));
        }
        stimuli.push(Stimulus::parse(message)?);
    }
    Ok((stimuli, false))
}

/// `{"op": "keep-alive"}`
pub(super) fn keep_alive() -> Value {
    Value::map([("op", "keep-alive".into())])
}

async fn keep_open(sender: &Sender, interval: Duration) {
    let mut ticks = interval_at(tokio::time::Instant::now() + interval, interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        sender.send(keep_alive());
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn op(name: &str) -> Value {
        Value::map([("op", name.into())])
    }

    #[test]
    fn lists_single_messages_and_ends() {
        let (stimuli, end) = parse(op("remove-something")).unwrap();
        assert_eq!((stimuli.len(), end), (1, false));
        let (stimuli, end) = parse(Value::List(vec![op("a"), op("close-stream"), op("b")])).unwrap();
        assert_eq!((stimuli.len(), end), (1, true));
        let (stimuli, end) = parse(Value::List(vec!["OK".into(), op("a")])).unwrap();
        assert_eq!((stimuli.len(), end), (0, false));
        assert_eq!(parse(Value::List(vec![Value::Nil])).unwrap_err(), MessageError::NoOp);
    }
}
