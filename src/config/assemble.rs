//! Settings as the rooms take them: one [`agent::Config`] for each worker.
//!
//! Nothing is read or checked here.

use std::ffi::OsString;
use std::path::PathBuf;

use super::settings::{Settings, Worker};
use crate::agent::{self, Listen, MemoryConfig};
use crate::peer::Retry;
use crate::telemetry::Pulse;
use crate::{exec, net, peer, scheduler, state};

/// The service manager's words to the daemon, which are not for Python processes.
const SECRETS: &[&str] = &[
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
    "LISTEN_PID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "CREDENTIALS_DIRECTORY",
    "JOURNAL_STREAM",
];

impl Settings {
    /// The configuration of one of the workers, whose scratch directory is made; `pulse` shows how it is.
    pub fn agent(&self, worker: &Worker, local_directory: PathBuf, pulse: Pulse) -> agent::Config {
        let listen = |ports: &[u16]| Listen { host: self.host.clone(), ports: ports.to_vec() };
        let stagger = |lifetime: super::Lifetime| {
            let shift = lifetime.stagger.mul_f64(fastrand::f64());
            if fastrand::bool() { lifetime.duration + shift } else { lifetime.duration.saturating_sub(shift) }
        };
        agent::Config {
            name: worker.name.clone(),
            listen: listen(&worker.worker_ports),
            contact_address: self.contact_address.clone(),
            nanny: self.nanny.then(|| listen(&worker.nanny_ports)),
            dashboard: self.dashboard.clone(),
            memory_limit: worker.memory_limit,
            memory: MemoryConfig {
                target: self.memory.target,
                spill: self.memory.spill,
                pause: self.memory.pause,
                // ending processes is a nanny's business
                terminate: self.memory.terminate.filter(|_| self.nanny),
                interval: self.memory.monitor_interval,
                max_spill: self.memory.max_spill,
                spill_compression: self.memory.spill_compression,
            },
            lifetime: self
                .lifetime
                .map(|lifetime| agent::Lifetime { duration: stagger(lifetime), restart: lifetime.restart }),
            retire_timeout: self.tuning.retire_timeout,
            bandwidth: self.transfer.bandwidth as f64,
            transfer_log_length: self.tuning.story_length,
            interpreter: self.runner.python.interpreter.clone(),
            nanny_blocked_handlers: self.tuning.nanny_blocked_handlers.clone(),
            scheduler: scheduler::Config {
                death_timeout: self.death_timeout,
                ..scheduler::Config::new(self.scheduler.clone())
            },
            net: self.net(),
            peer: self.peer(),
            state: self.state(worker),
            exec: self.exec(worker, local_directory.clone()),
            monitor: self.monitor.clone(),
            local_directory,
            pulse,
        }
    }

    fn net(&self) -> net::Config {
        net::Config {
            connect_timeout: self.comm.connect_timeout,
            tcp_timeout: self.comm.tcp_timeout,
            backlog: self.comm.socket_backlog,
            python_version: self.runner.python.interpreter.version_triple(),
            compression: self.comm.compression,
            ..net::Config::default()
        }
    }

    fn peer(&self) -> peer::Config {
        let (delay_min, delay_max) = self.comm.retry_delay;
        peer::Config {
            transfer_outgoing_count_limit: Some(self.transfer.incoming_connections as u64),
            blocked_handlers: self.tuning.blocked_handlers.clone(),
            retry: Retry { count: self.comm.retry_count, delay_min, delay_max },
        }
    }

    fn state(&self, worker: &Worker) -> state::Config {
        let share = |limit: u64| self.memory.transfer.map(|fraction| (limit as f64 * fraction) as u64);
        state::Config {
            nthreads: worker.nthreads,
            resources: self.resources.clone(),
            transfer_incoming_count_limit: self.transfer.outgoing_connections,
            transfer_incoming_bytes_limit: worker.memory_limit.and_then(share),
            transfer_message_bytes_limit: self.transfer.message_bytes_limit,
            validate: self.tuning.validate,
            default_data_size: self.tuning.default_data_size,
            log_length: self.tuning.story_length,
            ..state::Config::default()
        }
    }

    fn exec(&self, worker: &Worker, local_directory: PathBuf) -> exec::Config {
        exec::Config {
            python: self.runner.python.interpreter.python.clone(),
            slots: worker.nthreads,
            environment: self.runner.environment.clone(),
            secrets: SECRETS.iter().map(OsString::from).collect(),
            argv: std::env::args_os().map(|text| text.to_string_lossy().into_owned()).collect(),
            attempts: self.runner.attempts,
            local_directory,
            prefetch: agent::PREFETCH,
            ..exec::Config::default()
        }
    }
}
