//! The worker itself: the only room that knows both the state machine and IO.
//!
//! [`run`] binds the addresses, then registers with the scheduler and drives the state machine for as long as that
//! lasts, again and again, until the worker is to leave. Nothing here decides about tasks, parses bytes or opens a
//! payload.

mod ahead;
mod backend;
mod driver;
mod execute;
mod gather;
mod memory;
mod nanny;
mod plugins;
mod report;
mod requests;
mod shared;
mod spill;
mod worker;

use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::watch;

use crate::proto::Address;
use crate::{exec, net, peer, scheduler, state, telemetry};

pub use ahead::DEPTH_MAX as PREFETCH;
pub use memory::MemoryConfig;
pub use worker::run;

/// Where to listen.
#[derive(Clone, Debug)]
pub struct Listen {
    /// Host name or address without brackets; `None` for all addresses of the machine.
    pub host: Option<String>,
    /// Ports to try in this order; 0 is any free one.
    pub ports: Vec<u16>,
}

/// When the worker leaves by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifetime {
    /// Time after which it closes gracefully, stagger included.
    pub duration: Duration,
    /// Whether it registers anew afterwards.
    pub restart: bool,
}

/// Settings of one worker: those of the rooms below, and who it is.
#[derive(Clone, Debug)]
pub struct Config {
    /// Its name; its address where there is none.
    pub name: Option<scheduler::Name>,
    /// The worker's address.
    pub listen: Listen,
    /// Address to tell others, where it is not the one listened on.
    pub contact_address: Option<Address>,
    /// The nanny's address; `None` with `--no-nanny`.
    pub nanny: Option<Listen>,
    /// HTTP endpoints; `None` with `--no-dashboard`.
    pub dashboard: Option<telemetry::http::Config>,
    /// Bytes the worker may use; `None` without memory management.
    pub memory_limit: Option<u64>,
    /// Thresholds of that limit, and what is done about them.
    pub memory: MemoryConfig,
    /// Scratch directory of this worker; it exists.
    pub local_directory: PathBuf,
    /// When to leave by itself.
    pub lifetime: Option<Lifetime>,
    /// Time for moving data away when the worker is told to stop.
    pub retire_timeout: Duration,
    /// Bytes a second, assumed before any transfer was measured.
    pub bandwidth: f64,
    /// Entries kept of transfers (`distributed.admin.low-level-log-length`).
    pub transfer_log_length: usize,
    /// The interpreter that runs tasks.
    pub interpreter: scheduler::Interpreter,
    /// Ops refused at the nanny's address.
    pub nanny_blocked_handlers: Vec<String>,
    /// Finding and talking to the scheduler.
    pub scheduler: scheduler::Config,
    /// Connections.
    pub net: net::Config,
    /// Serving peers.
    pub peer: peer::Config,
    /// The state machine.
    pub state: state::Config,
    /// Python processes.
    pub exec: exec::Config,
    /// System metrics.
    pub monitor: scheduler::MonitorConfig,
    /// Shows whoever watches that the worker turns, and whether it has registered.
    pub pulse: telemetry::Pulse,
}

/// How urgently the worker is to leave; watched by [`run`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stop {
    /// Not at all.
    No,
    /// Start nothing new, let the scheduler move the data away, then leave.
    Gracefully,
    /// At once.
    Now,
}

/// Watches for the wish to stop.
pub type StopSignal = watch::Receiver<Stop>;

/// Why the worker cannot go on. What the scheduler, peers or tasks do wrong is none of these.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// None of the ports could be bound.
    #[error("could not listen on any port of {ports:?}")]
    Listen {
        /// Those tried.
        ports: Vec<u16>,
        /// What the last one failed with.
        #[source]
        source: net::Error,
    },
    /// There is no port to listen on.
    #[error("no port to listen on was given")]
    NoPorts,
    /// The address to tell others could not be found out.
    #[error(
        "could not find this machine's address towards {scheduler}; give it with --host or --contact-address"
    )]
    OwnAddress {
        /// Whom it is for.
        scheduler: Address,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// No scheduler, or none that takes us.
    #[error(transparent)]
    Scheduler(#[from] scheduler::Error),
    /// Python processes cannot be started.
    #[error("could not start the runners")]
    Exec(#[from] exec::Error),
    /// The HTTP endpoints could not be started.
    #[error("could not start the HTTP server")]
    Http(#[source] telemetry::Error),
    /// The interpreter ends before it is ready.
    #[error("the interpreter cannot run tasks: {text}")]
    Interpreter {
        /// What it wrote last.
        text: String,
    },
}
