//! Connections kept for reuse: as many to one address as there are requests at once, a bound on all of them together.
//!
//! Source: `distributed/core.py: ConnectionPool`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tracing::info;

use super::{Config, Connection, Error, connect};
use crate::proto::{Address, Value};

/// A handle to the pool; clones share it.
#[derive(Clone)]
pub struct Pool(Arc<Inner>);

struct Inner {
    config: Arc<Config>,
    permits: Arc<Semaphore>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    peers: HashMap<Address, Peer>,
    /// Requests that wait for a permit or a connection.
    pending: usize,
    closed: bool,
}

/// All connections to one address.
struct Peer {
    idle: Vec<(Connection, OwnedSemaphorePermit)>,
    /// Set to the reason when the address is removed; whoever uses a connection listens.
    removed: watch::Sender<Option<&'static str>>,
}

/// Connections of a pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Open or being opened.
    pub open: usize,
    /// Of those, in use.
    pub active: usize,
}

impl Pool {
    /// An empty pool of at most `config.max_outgoing` connections.
    pub fn new(config: Arc<Config>) -> Self {
        let permits = Arc::new(Semaphore::new(config.max_outgoing.clamp(1, Semaphore::MAX_PERMITS)));
        Pool(Arc::new(Inner { config, permits, state: Mutex::default() }))
    }

    /// How connections are made.
    pub fn config(&self) -> &Arc<Config> {
        &self.0.config
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection to `address`, a kept one if there is one.
    ///
    /// At the bound on open connections idle ones are closed; if there is none, waits until one is given back.
    ///
    /// # Errors
    /// As [`connect`], and [`Error::Removed`] when the address is removed or the pool closed meanwhile.
    pub async fn get(&self, address: &Address) -> Result<Pooled, Error> {
        let mut removed = {
            let mut state = self.lock();
            if state.closed {
                return Err(Error::Removed { address: address.clone(), reason: CLOSING });
            }
            let peer = state.peers.entry(address.clone()).or_insert_with(Peer::new);
            while let Some((mut connection, permit)) = peer.idle.pop() {
                if connection.is_healthy() {
                    return Ok(self.pooled(address, connection, permit, peer.removed.subscribe()));
                }
            }
            let removed = peer.removed.subscribe();
            state.pending += 1;
            if self.0.permits.available_permits() == 0 {
                state.collect();
            }
            removed
        };
        let pending = Pending { pool: self, address };
        let opened = tokio::select! {
            opened = self.open(address) => opened,
            reason = reason(&mut removed) => Err(Error::Removed { address: address.clone(), reason }),
        };
        drop(pending);
        let (connection, permit) = opened?;
        Ok(self.pooled(address, connection, permit, removed))
    }

    async fn open(&self, address: &Address) -> Result<(Connection, OwnedSemaphorePermit), Error> {
        let Ok(permit) = self.0.permits.clone().acquire_owned().await else {
            return Err(Error::Removed { address: address.clone(), reason: CLOSING });
        };
        Ok((connect(address, &self.0.config).await?, permit))
    }

    fn pooled(
        &self,
        address: &Address,
        connection: Connection,
        permit: OwnedSemaphorePermit,
        removed: watch::Receiver<Option<&'static str>>,
    ) -> Pooled {
        Pooled { pool: self.clone(), address: address.clone(), connection, permit, removed }
    }

    /// One request and its reply over a pooled connection (`PooledRPCCall`).
    ///
    /// # Errors
    /// [`Error::Remote`] when the peer answers with an exception; else as [`Pool::get`] and [`Connection::request`].
    pub async fn rpc(&self, address: &Address, message: &Value) -> Result<Value, Error> {
        let mut connection = self.get(address).await?;
        let reply = connection.request(message).await?;
        connection.reuse();
        if reply.field("status").and_then(Value::as_str) == Some("uncaught-error") {
            let text = reply.field("exception_text").and_then(Value::as_str).unwrap_or("no details given");
            let text = text.to_owned();
            return Err(Error::Remote { address: address.clone(), text, reply: Box::new(reply) });
        }
        Ok(reply)
    }

    /// Closes all connections to `address`, those in use too; requests under way fail.
    pub fn remove(&self, address: &Address) {
        let peer = self.lock().peers.remove(address);
        if let Some(peer) = peer {
            peer.removed.send_replace(Some("address removed"));
        }
    }

    /// Closes all connections for good.
    pub fn close(&self) {
        let peers = {
            let mut state = self.lock();
            state.closed = true;
            std::mem::take(&mut state.peers)
        };
        self.0.permits.close();
        for peer in peers.into_values() {
            peer.removed.send_replace(Some(CLOSING));
        }
    }

    /// How many connections there are.
    pub fn counts(&self) -> Counts {
        let limit = self.0.config.max_outgoing.clamp(1, Semaphore::MAX_PERMITS);
        let open = limit - self.0.permits.available_permits();
        let idle: usize = self.lock().peers.values().map(|p| p.idle.len()).sum();
        Counts { open, active: open.saturating_sub(idle) }
    }
}

const CLOSING: &str = "connection pool is closing";

impl Peer {
    fn new() -> Self {
        Peer { idle: Vec::new(), removed: watch::Sender::new(None) }
    }
}

impl State {
    /// Closes all idle connections, to make room for others.
    fn collect(&mut self) {
        let idle: usize = self.peers.values().map(|p| p.idle.len()).sum();
        info!("closing {idle} unused connections, {} requests wait for one", self.pending);
        for peer in self.peers.values_mut() {
            peer.idle.clear();
        }
    }

    /// Forgets an address that nobody uses.
    fn tidy(&mut self, address: &Address) {
        if self.peers.get(address).is_some_and(|p| p.idle.is_empty() && p.removed.receiver_count() == 0) {
            self.peers.remove(address);
        }
    }
}

/// Counts a request as waiting while it lives.
struct Pending<'a> {
    pool: &'a Pool,
    address: &'a Address,
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        let mut state = self.pool.lock();
        state.pending -= 1;
        state.tidy(self.address);
    }
}

/// Resolves when the address is removed.
async fn reason(removed: &mut watch::Receiver<Option<&'static str>>) -> &'static str {
    // The sender is dropped only after it has sent a reason, or with the whole pool.
    removed.wait_for(Option::is_some).await.ok().and_then(|r| *r).unwrap_or(CLOSING)
}

/// A connection in use. Dropped it is closed, since nobody knows what it still owes; [`Pooled::reuse`] gives it back.
pub struct Pooled {
    pool: Pool,
    address: Address,
    connection: Connection,
    permit: OwnedSemaphorePermit,
    removed: watch::Receiver<Option<&'static str>>,
}

impl Pooled {
    /// As [`Connection::read`]; fails when the address is removed meanwhile.
    ///
    /// # Errors
    /// As [`Connection::read`], and [`Error::Removed`].
    pub async fn read(&mut self) -> Result<Value, Error> {
        tokio::select! {
            value = self.connection.read() => value,
            reason = reason(&mut self.removed) => Err(removed(&self.address, reason)),
        }
    }

    /// As [`Connection::write`]; fails when the address is removed meanwhile.
    ///
    /// # Errors
    /// As [`Connection::write`], and [`Error::Removed`].
    pub async fn write(&mut self, message: &Value) -> Result<u64, Error> {
        tokio::select! {
            written = self.connection.write(message) => written,
            reason = reason(&mut self.removed) => Err(removed(&self.address, reason)),
        }
    }

    /// As [`Connection::write_frames`]; fails when the address is removed meanwhile.
    ///
    /// # Errors
    /// As [`Connection::write_frames`], and [`Error::Removed`].
    pub async fn write_frames(&mut self, frames: &[Bytes]) -> Result<u64, Error> {
        tokio::select! {
            written = self.connection.write_frames(frames) => written,
            reason = reason(&mut self.removed) => Err(removed(&self.address, reason)),
        }
    }

    /// One request and its reply.
    ///
    /// # Errors
    /// As [`Pooled::write`] and [`Pooled::read`].
    pub async fn request(&mut self, message: &Value) -> Result<Value, Error> {
        self.write(message).await?;
        self.read().await
    }

    /// The connection itself.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Gives the connection back, for the next request to the same address.
    pub fn reuse(self) {
        let Pooled { pool, address, connection, permit, removed } = self;
        let mut state = pool.lock();
        if removed.borrow().is_some() || state.closed {
            return;
        }
        if let Some(peer) = state.peers.get_mut(&address) {
            peer.idle.push((connection, permit));
        }
        drop(removed);
        if state.pending > 0 && pool.0.permits.available_permits() == 0 {
            state.collect();
        }
    }
}

fn removed(address: &Address, reason: &'static str) -> Error {
    Error::Removed { address: address.clone(), reason }
}
