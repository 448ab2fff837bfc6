//! What the configuration comes to: every setting resolved, typed and checked, for all workers of this daemon.
//!
//! No source is read here and nothing is bound; a bad value names the place it comes from.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::proto::Address;
use crate::scheduler::{Location, MonitorConfig, Name};
use crate::telemetry;
use crate::wire::Compression;

use super::interpreter::Python;

/// Everything the daemon needs to know before it starts.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The scheduler to join.
    pub scheduler: Location,
    /// The workers of this daemon; more than one with `--nworkers`.
    pub workers: Vec<Worker>,
    /// Host name or address to listen on, without brackets. `None`: as a stock worker, the worker listens on all
    /// addresses and the nanny on the one that reaches the scheduler.
    pub host: Option<String>,
    /// Address told to the scheduler and peers, where it is not the one listened on.
    pub contact_address: Option<Address>,
    /// Whether each worker has a nanny's address too.
    pub nanny: bool,
    /// Abstract resources of each worker.
    pub resources: Vec<(Arc<str>, f64)>,
    /// How long to look for a scheduler, at start and after a loss; `None` for ever.
    pub death_timeout: Option<Duration>,
    /// When to leave by itself.
    pub lifetime: Option<Lifetime>,
    /// The HTTP endpoints; `None` with `--no-dashboard`.
    pub dashboard: Option<telemetry::http::Config>,
    /// File to write the daemon's process number to.
    pub pid_file: Option<PathBuf>,
    /// Folder of the work directories, `dask-scratch-space` included.
    pub scratch: PathBuf,
    /// Whether work directories are locked, and stale ones purged.
    pub use_file_locking: bool,
    /// Where tasks run.
    pub runner: Runner,
    /// Memory thresholds.
    pub memory: Memory,
    /// Limits of transfers between workers.
    pub transfer: Transfer,
    /// Connections.
    pub comm: Comm,
    /// The state machine and the handlers around it.
    pub tuning: Tuning,
    /// System metrics.
    pub monitor: MonitorConfig,
}

/// One worker of the daemon.
#[derive(Clone, Debug, PartialEq)]
pub struct Worker {
    /// Its name; its address where there is none.
    pub name: Option<Name>,
    /// Tasks at once.
    pub nthreads: usize,
    /// Bytes it may use; `None` without memory management.
    pub memory_limit: Option<u64>,
    /// Ports to try in this order; 0 is any free one.
    pub worker_ports: Vec<u16>,
    /// Ports for its nanny's address, as above.
    pub nanny_ports: Vec<u16>,
}

/// When a worker leaves by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifetime {
    /// Time after which it closes gracefully.
    pub duration: Duration,
    /// Shift of that time, at random in both directions.
    pub stagger: Duration,
    /// Whether a new worker takes its place.
    pub restart: bool,
}

/// Where tasks run.
#[derive(Clone, Debug)]
pub struct Runner {
    /// Their interpreter.
    pub python: Python,
    /// Environment variables on top of the daemon's own, as a stock nanny sets them.
    pub environment: Vec<(OsString, OsString)>,
    /// How often a task is tried when the process that runs it dies.
    pub attempts: u32,
}

/// Memory thresholds as fractions of the limit; `None` turns one off.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Memory {
    /// Incoming transfers are throttled above it.
    pub transfer: Option<f64>,
    /// Results spill above it.
    pub target: Option<f64>,
    /// Results spill while the processes use more than this.
    pub spill: Option<f64>,
    /// No new tasks are started above it.
    pub pause: Option<f64>,
    /// The offending runner is killed above it.
    pub terminate: Option<f64>,
    /// Bytes that may be spilled; `None` without a limit.
    pub max_spill: Option<u64>,
    /// How spilled results are compressed.
    pub spill_compression: Compression,
    /// Time between two checks.
    pub monitor_interval: Duration,
}

/// Limits of transfers between workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// Peers served at once.
    pub incoming_connections: usize,
    /// Peers fetched from at once.
    pub outgoing_connections: usize,
    /// Bytes asked of a peer in one request.
    pub message_bytes_limit: u64,
    /// Bytes a second, assumed before any was measured.
    pub bandwidth: u64,
}

/// Connections.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Comm {
    /// Compression to offer.
    pub compression: Compression,
    /// Time for a connection to come about.
    pub connect_timeout: Duration,
    /// Time after which an unresponsive connection is dead.
    pub tcp_timeout: Duration,
    /// Connections that wait to be accepted.
    pub socket_backlog: u32,
    /// Further attempts of an operation that failed.
    pub retry_count: u32,
    /// Least and greatest time between attempts.
    pub retry_delay: (Duration, Duration),
}

/// The state machine and the handlers around it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Operations that the worker refuses.
    pub blocked_handlers: Vec<String>,
    /// Operations that its nanny refuses.
    pub nanny_blocked_handlers: Vec<String>,
    /// Time for moving data away when the worker is told to stop.
    pub retire_timeout: Duration,
    /// Bytes assumed for a result whose size nobody knows.
    pub default_data_size: u64,
    /// Entries kept of what happened to tasks.
    pub story_length: usize,
    /// Whether invariants are checked at each step.
    pub validate: bool,
}
