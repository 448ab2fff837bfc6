//! What the driver and the servers of the worker share: who we are, what we hold, and how to reach the driver.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc;

use super::Config;
use super::requests::Command;
use crate::peer::Transfers;
use crate::proto::Status;
use crate::scheduler::{Identity, Scheduler, SystemMonitor};
use crate::store::Store;
use crate::telemetry::log::Recent;
use crate::telemetry::{self, Pulse};
use crate::{exec, net};

/// Shared for the life of the daemon; what changes with a registration is behind a lock.
pub(super) struct Shared {
    pub(super) config: Config,
    pub(super) scheduler: Scheduler,
    pub(super) store: Store,
    pub(super) transfers: Transfers,
    pub(super) peers: net::Pool,
    pub(super) recent: Recent,
    pub(super) metrics: telemetry::Metrics,
    pub(super) pulse: Pulse,
    pub(super) commands: mpsc::UnboundedSender<Command>,
    monitor: Mutex<SystemMonitor>,
    current: Mutex<Current>,
}

/// What a registration or restart changes.
struct Current {
    status: Status,
    identity: Arc<Identity>,
    pool: Option<exec::Pool>,
}

/// The parts of [`Shared`] that are made before it.
pub(super) struct Parts {
    pub(super) config: Config,
    pub(super) identity: Identity,
    pub(super) scheduler: Scheduler,
    pub(super) peers: net::Pool,
    pub(super) recent: Recent,
    pub(super) metrics: telemetry::Metrics,
    pub(super) pulse: Pulse,
    pub(super) commands: mpsc::UnboundedSender<Command>,
}

impl Shared {
    pub(super) fn new(parts: Parts) -> Self {
        let Parts { config, identity, scheduler, peers, recent, metrics, pulse, commands } = parts;
        Shared {
            store: Store::new(config.memory.spilling(config.memory_limit, &config.local_directory)),
            transfers: Transfers::new(config.transfer_log_length),
            monitor: Mutex::new(SystemMonitor::new(&config.monitor)),
            current: Mutex::new(Current { status: Status::Init, identity: Arc::new(identity), pool: None }),
            config,
            scheduler,
            peers,
            recent,
            metrics,
            pulse,
            commands,
        }
    }

    fn current(&self) -> MutexGuard<'_, Current> {
        // nothing panics while it holds the lock
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn monitor(&self) -> MutexGuard<'_, SystemMonitor> {
        // a sample that panicked is missing, the others are whole
        self.monitor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn status(&self) -> Status {
        self.current().status
    }

    pub(super) fn set_status(&self, status: Status) {
        self.current().status = status;
    }

    pub(super) fn identity(&self) -> Arc<Identity> {
        self.current().identity.clone()
    }

    /// A restarted worker is another one to the scheduler.
    pub(super) fn renew_identity(&self) {
        let mut current = self.current();
        let identity = Identity { server_id: Identity::new_server_id(), ..(*current.identity).clone() };
        current.identity = Arc::new(identity);
    }

    pub(super) fn pool(&self) -> Option<exec::Pool> {
        self.current().pool.clone()
    }

    pub(super) fn set_pool(&self, pool: Option<exec::Pool>) {
        self.current().pool = pool;
    }

    /// Sends the driver a command. Without a driver the worker is about to end, and whoever waits for an answer gets none.
    pub(super) fn command(&self, command: Command) {
        let _ = self.commands.send(command);
    }
}
