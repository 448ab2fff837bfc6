//! What can go wrong between two processes, told apart by who has to do something about it.

use std::io;
use std::time::Duration;

use crate::proto::{Address, Value};
use crate::telemetry;
use crate::wire;

/// Why a connection, or one exchange over it, failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address asks for encryption.
    #[error("cannot use {address}: tls is not supported yet, use a tcp:// address")]
    Tls { address: Address },
    /// Nobody answered within `timeout`.
    #[error("timed out trying to connect to {address} after {timeout:?}")]
    Connect {
        address: Address,
        timeout: Duration,
        #[source]
        source: Option<io::Error>,
    },
    /// No port of the range was free, or the host is not one of this machine's.
    #[error("cannot listen on {host:?} port {ports}")]
    Bind {
        host: String,
        ports: String,
        #[source]
        source: io::Error,
    },
    /// The connection ended between two messages.
    #[error("{peer} closed the connection")]
    Closed { peer: Address },
    /// The operating system gave the connection up.
    #[error("connection to {peer} lost")]
    Lost {
        peer: Address,
        #[source]
        source: io::Error,
    },
    /// The connection ended inside a message.
    #[error("{peer} closed the connection in the middle of a message")]
    Truncated { peer: Address },
    /// What came is no Dask message, or is larger than the limits allow.
    #[error("bad message from {peer}")]
    Garbage {
        peer: Address,
        #[source]
        source: wire::Error,
    },
    /// There is no memory for a frame of the announced length.
    #[error("no memory for a frame of {length} bytes from {peer}")]
    Memory { peer: Address, length: u64 },
    /// A message of ours breaks our own limits.
    #[error("cannot encode a message to {peer}")]
    Encode {
        peer: Address,
        #[source]
        source: wire::Error,
    },
    /// The peer connected and then said nothing.
    #[error("no handshake from {peer} within {timeout:?}")]
    Handshake { peer: Address, timeout: Duration },
    /// [`Pool::remove`](super::Pool::remove) or [`Pool::close`](super::Pool::close) was called meanwhile.
    #[error("connections to {address} were given up: {reason}")]
    Removed { address: Address, reason: &'static str },
    /// The peer takes messages more slowly than they are sent.
    #[error("{bytes} bytes wait to be sent to {peer}")]
    Backlog { peer: Address, bytes: u64 },
    /// The peer ran the request and answered with an exception (`status: uncaught-error`).
    #[error("{address} failed: {text}")]
    Remote { address: Address, text: String, reply: Box<Value> },
}

impl Error {
    /// Whether Python would see an `OSError`: the peer is away, or the connection is; asking elsewhere helps.
    pub fn is_connection_loss(&self) -> bool {
        match self {
            Error::Tls { .. } | Error::Encode { .. } | Error::Remote { .. } => false,
            Error::Connect { .. }
            | Error::Bind { .. }
            | Error::Closed { .. }
            | Error::Lost { .. }
            | Error::Truncated { .. }
            | Error::Garbage { .. }
            | Error::Memory { .. }
            | Error::Handshake { .. }
            | Error::Removed { .. }
            | Error::Backlog { .. } => true,
        }
    }

    /// Whether the peer broke the protocol, which is worth a line in the log; a mere end of the connection is not.
    pub fn is_misbehaviour(&self) -> bool {
        matches!(
            self,
            Error::Truncated { .. } | Error::Garbage { .. } | Error::Memory { .. } | Error::Handshake { .. }
        )
    }

    /// This error and its causes in one line, for the log.
    pub fn chain(&self) -> String {
        telemetry::chain(self)
    }
}
