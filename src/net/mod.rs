//! Connections that speak Dask's protocol: dialling, listening, a pool for requests, a batched stream.
//!
//! Moves whole messages and knows nothing of what they ask for. A peer that breaks the protocol is an [`Error`] of its
//! one connection.
//!
//! Source: `distributed/comm/core.py`, `comm/tcp.py`, `core.py: ConnectionPool`, `batched.py`.

mod batched;
mod connection;
mod dial;
mod error;
mod listen;
mod pool;
mod slots;
mod socket;

use std::time::Duration;

use crate::wire::{Compression, Limits};

pub use batched::{BatchedStats, BatchedWriter};
pub use connection::{Connection, Reader, Writer};
pub use dial::connect;
pub use error::Error;
pub use listen::{ANY_PORT, Incoming, Listener};
pub use pool::{Counts, Pool, Pooled};
pub use socket::local_ip_towards;

/// How connections are made and what they may carry.
#[derive(Clone, Debug)]
pub struct Config {
    /// For connecting, and for the other side's handshake (`distributed.comm.timeouts.connect`).
    pub connect_timeout: Duration,
    /// After this long without an answer a peer is dead (`distributed.comm.timeouts.tcp`).
    pub tcp_timeout: Duration,
    /// Connections that the kernel queues for us (`distributed.comm.socket-backlog`).
    pub backlog: u32,
    /// Incoming connections open at once; beyond it idle ones are closed.
    pub max_incoming: usize,
    /// Outgoing connections of a [`Pool`] (`connection_limit` of `distributed.core.Server`).
    pub max_outgoing: usize,
    /// What a message may cost.
    pub limits: Limits,
    /// Version of the Python that opens payloads here.
    pub python_version: [u64; 3],
    /// `distributed.comm.compression`; between two ends on one host it is always none.
    pub compression: Compression,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            connect_timeout: Duration::from_secs(30),
            tcp_timeout: Duration::from_secs(30),
            backlog: 2048,
            max_incoming: 4096,
            max_outgoing: 512,
            limits: Limits::default(),
            python_version: [3, 11, 0],
            compression: Compression::None,
        }
    }
}
