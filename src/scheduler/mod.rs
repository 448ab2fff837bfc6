//! The scheduler as this worker meets it: registration, the stream of messages, heartbeats, requests; and what they tell of us.
//!
//! Knows nothing of tasks: messages pass through, and each heartbeat asks the driver for its metrics. One [`Session`] lives as
//! long as its connection; who registers again, with which state, is the driver's business.
//!
//! Source: `distributed/worker.py` (`_register_with_scheduler`, `heartbeat`, `handle_scheduler`), `distributed/nanny.py`.

mod clock;
mod heartbeat;
mod hostio;
mod identity;
mod locate;
mod metrics;
mod monitor;
mod processes;
mod register;
mod rpc;
mod session;
mod versions;

use std::path::PathBuf;
use std::time::Duration;

use crate::net;
use crate::proto::Address;

pub use clock::{Clock, now};
pub use heartbeat::Beat;
pub use identity::{Identity, Name};
pub use locate::Location;
pub use metrics::{Bandwidth, DigestName, Digests, Metrics, Transfers};
pub use monitor::{MonitorConfig, ProcessUsage, SystemMonitor};
pub use register::{Attempt, Scheduler};
pub use rpc::{NannyRegistration, log_event, status_change};
pub use session::{Incoming, Lost, Sender, Session};
pub use versions::Interpreter;

/// Settings of the connection to the scheduler.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where it is.
    pub location: Location,
    /// How long registering may take before the worker gives up (`--death-timeout`); `None` for ever.
    pub death_timeout: Option<Duration>,
    /// Time between heartbeats until the scheduler asks for another.
    pub heartbeat_interval: Duration,
    /// Time between messages that keep an idle stream open.
    pub keep_alive: Duration,
    /// Least time between two batches on the stream.
    pub batch_interval: Duration,
    /// Bytes that may wait for a scheduler that does not read.
    pub backlog: u64,
}

impl Config {
    /// A stock worker's settings for a scheduler at `location`.
    pub fn new(location: Location) -> Self {
        Config {
            location,
            death_timeout: None,
            heartbeat_interval: Duration::from_secs(1),
            keep_alive: Duration::from_secs(60),
            batch_interval: Duration::from_millis(2),
            backlog: 1 << 30,
        }
    }
}

/// What can go wrong between this worker and its scheduler, for good.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another worker has this name.
    #[error("unable to connect to scheduler {scheduler}: name taken, {name}")]
    NameTaken { scheduler: Address, name: Name },
    /// The scheduler's handler failed, which it does not say; the one reason that is not our fault is an address it still knows.
    #[error(
        "the scheduler {scheduler} did not accept {address}: most likely a worker with this address is still registered; \
         its log has the reason"
    )]
    NotAccepted { scheduler: Address, address: Address },
    /// The scheduler refused, for a reason of its own.
    #[error("unable to connect to scheduler {scheduler}: {message}")]
    Refused { scheduler: Address, message: String },
    /// No scheduler took us in within the death timeout.
    #[error("no scheduler within the death timeout of {timeout:?} ({location})")]
    DeathTimeout { timeout: Duration, location: String },
    /// A connection that retrying will not help, or a request that failed.
    #[error("cannot talk to the scheduler at {scheduler}")]
    Net {
        scheduler: Address,
        #[source]
        source: net::Error,
    },
    /// An answer that is not what the protocol says.
    #[error("unexpected answer of the scheduler {scheduler} to {op}: {answer}")]
    Answer { scheduler: Address, op: &'static str, answer: String },
    /// A request before the first registration.
    #[error("no scheduler is known yet")]
    Unknown,
    /// The interpreter for runners is not one.
    #[error("python interpreter {}: {reason}", python.display())]
    Python { python: PathBuf, reason: String },
}
