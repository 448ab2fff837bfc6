//! Heartbeats: at the interval the scheduler asks for, over a connection of their own, with what the driver has to tell.
//!
//! The driver is asked for each beat, so a worker whose driver is stuck falls silent, as it should. What a lost beat told is
//! told again by the next.
//!
//! Source: `distributed/worker.py: Worker.heartbeat`, `distributed/scheduler.py: Scheduler.heartbeat_worker`.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{error, warn};

use super::clock::now;
use super::register::Scheduler;
use super::session::{Incoming, Lost};
use super::{Bandwidth, Digests, Metrics};
use crate::net;
use crate::proto::{Address, Key, Value};

/// How long the scheduler's own `close` may still be on its way when it no longer knows us.
const CLOSE_GRACE: Duration = Duration::from_secs(1);

/// No scheduler asks for heartbeats in a tighter loop than this.
const INTERVAL_MIN: Duration = Duration::from_millis(10);

/// What one heartbeat tells.
#[derive(Clone, Debug)]
pub struct Beat {
    /// `Worker.get_metrics`, with bandwidths and digests taken out of their accumulators.
    pub metrics: Metrics,
    /// Seconds each running task has been running.
    pub executing: Vec<(Key, f64)>,
    /// Extensions' parts (`shuffle`); `spans` is made of the metrics' digests.
    pub extensions: Vec<(Arc<str>, Value)>,
}

impl Beat {
    fn message(&self, worker: &Address, start: f64) -> Value {
        let executing = self.executing.iter().map(|(key, seconds)| (key.into(), (*seconds).into()));
        let mut extensions: Vec<_> =
            self.extensions.iter().map(|(name, data)| (name.clone().into(), data.clone())).collect();
        // a scheduler without the extension fails on its name, so it is not sent for nothing
        let spans = self.metrics.digests.by_span();
        if spans.as_map().is_some_and(|spans| !spans.is_empty()) {
            extensions.push(("spans".into(), spans));
        }
        Value::map([
            ("op", "heartbeat_worker".into()),
            ("address", worker.as_str().into()),
            ("now", start.into()),
            ("metrics", self.metrics.to_value()),
            ("executing", Value::Map(executing.collect())),
            ("extensions", Value::Map(extensions)),
            ("reply", true.into()),
        ])
    }
}

/// What a beat led to.
enum Answer {
    /// The scheduler wants the next one after so long.
    Next(Duration),
    /// The scheduler does not know us.
    Missing,
    /// The driver had nothing to tell.
    Skipped,
}

/// The heartbeats of one session.
pub(super) struct Heart {
    scheduler: Scheduler,
    address: Address,
    worker: Address,
    events: mpsc::Sender<Incoming>,
    /// What a beat that got lost had to tell.
    untold: Option<(Bandwidth, Digests)>,
}

impl Heart {
    pub(super) fn new(
        scheduler: Scheduler,
        address: Address,
        worker: Address,
        events: mpsc::Sender<Incoming>,
    ) -> Self {
        Heart { scheduler, address, worker, events, untold: None }
    }

    /// Beats until the scheduler does not know us any more.
    pub(super) async fn run(&mut self) -> Lost {
        let mut interval = self.scheduler.config().heartbeat_interval;
        let mut due = Instant::now() + interval;
        loop {
            sleep_until(due).await;
            due = Instant::now();
            match self.beat().await {
                Ok(Answer::Next(asked)) => interval = asked.max(INTERVAL_MIN),
                Ok(Answer::Skipped) => {}
                Ok(Answer::Missing) => {
                    warn!(target: "distributed.worker", "Scheduler was unaware of this worker.");
                    // a worker that is told to go learns it by the stream, but heartbeats overtake it
                    sleep(CLOSE_GRACE).await;
                    return Lost::Unaware;
                }
                Err(failure) => {
                    self.scheduler.metrics().heartbeat_failures.inc();
                    error!(target: "distributed.worker", "Failed to communicate with scheduler during heartbeat: {}", failure.chain());
                }
            }
            due = (due + interval).max(Instant::now());
        }
    }

    async fn beat(&mut self) -> Result<Answer, net::Error> {
        let (ask, told) = oneshot::channel();
        if self.events.send(Incoming::Heartbeat(ask)).await.is_err() {
            return Ok(Answer::Skipped);
        }
        let Ok(mut beat) = told.await else { return Ok(Answer::Skipped) };
        if let Some(lost) = self.untold.take() {
            beat.metrics.merge_lost(lost);
        }
        let start = now();
        let request = beat.message(&self.worker, start);
        let answer = match self.scheduler.pool().rpc(&self.address, &request).await {
            Ok(answer) => answer,
            Err(error) => {
                // what the scheduler itself fails on must not come back with every beat
                if error.is_connection_loss() {
                    self.untold = Some((beat.metrics.bandwidth, beat.metrics.digests));
                }
                return Err(error);
            }
        };
        if answer.field("status").and_then(Value::as_str) == Some("missing") {
            return Ok(Answer::Missing);
        }
        let clock = self.scheduler.clock();
        clock.observe(start, now(), answer.field("time").and_then(Value::as_f64));
        self.scheduler.metrics().latency.set(clock.latency());
        let asked = answer.field("heartbeat-interval").and_then(Value::as_f64);
        let asked = asked.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        Ok(asked.map_or(Answer::Skipped, Answer::Next))
    }
}
