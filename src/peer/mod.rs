//! The worker among its peers: serving data, fetching data, and the ops at the worker's and the nanny's address.
//!
//! Policy that is purely the network's lives here (limits, busy answers, retries, whom to ask next). What needs the
//! state machine or Python goes through [`Backend`] and [`NannyBackend`]; nothing here opens a payload.
//!
//! Source: `distributed/core.py: Server`, `distributed/worker.py`, `distributed/nanny.py`, `distributed/utils_comm.py`.

mod backend;
mod data;
mod fetch;
mod gather;
mod nanny;
mod request;
mod rpc;
mod server;
mod transfers;

use std::sync::Arc;

use crate::net::{Listener, Pool};
use crate::proto::Address;
use crate::store::Store;

pub use backend::{Backend, Failure, NannyBackend, Relay, Restarted, Terminate};
pub use fetch::{FetchError, FetchResult, Request, Retry, fetch};
pub use transfers::{DigestName, OutgoingCounts, Received, Transfers};

/// How this worker serves its peers.
#[derive(Clone, Debug)]
pub struct Config {
    /// Transfers to peers at once, twice as many to this host (`distributed.worker.connections.incoming`); `None` for
    /// no limit.
    pub transfer_outgoing_count_limit: Option<u64>,
    /// Ops that are refused (`distributed.worker.blocked-handlers`).
    pub blocked_handlers: Vec<String>,
    /// For `gather` (`distributed.comm.retry`).
    pub retry: Retry,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            transfer_outgoing_count_limit: Some(10),
            blocked_handlers: Vec::new(),
            retry: Retry::default(),
        }
    }
}

/// What the data server works with.
pub struct Peer<B> {
    /// Everything that is not the network's.
    pub backend: B,
    /// What is served.
    pub store: Store,
    /// Where transfers are counted.
    pub transfers: Transfers,
    /// Connections for `gather`.
    pub pool: Pool,
    /// Our own address, as others know it.
    pub address: Address,
    /// How we serve.
    pub config: Config,
}

/// Serves at the worker's address until it is dropped; then all its connections are closed.
pub async fn serve<B: Backend>(listener: Listener, peer: Arc<Peer<B>>) {
    server::serve(listener, peer).await;
}

/// Serves at the nanny's address until it is dropped. `blocked_handlers` are those of `distributed.nanny`.
pub async fn serve_nanny<B: NannyBackend>(listener: Listener, backend: B, blocked_handlers: Vec<String>) {
    server::serve(listener, Arc::new(nanny::Nanny { backend, blocked_handlers })).await;
}
