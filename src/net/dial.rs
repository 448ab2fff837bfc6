//! Opening connections: name resolution, all addresses of a name, retries with jitter.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};
use tracing::debug;

use super::{Config, Connection, Error};
use crate::proto::Address;

/// First upper bound of the random pause between two attempts; doubles with each.
const BACKOFF: Duration = Duration::from_millis(10);

/// Longest upper bound: a scheduler or peer that comes up is met within about a second, however long it was away.
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// Head start of one address of a name before the next is tried as well (as tornado's `TCPClient`).
const HEAD_START: Duration = Duration::from_millis(300);

/// Connects and exchanges handshakes (`distributed.comm.core.connect`): attempts of a fifth of the timeout at first,
/// with pauses of full jitter between them, until the timeout is over.
///
/// # Errors
/// [`Error::Connect`] with the last attempt's error, [`Error::Tls`], or a failed handshake.
pub async fn connect(address: &Address, config: &Config) -> Result<Connection, Error> {
    if address.scheme() != "tcp" {
        return Err(Error::Tls { address: address.clone() });
    }
    let start = Instant::now();
    let deadline = start + config.connect_timeout;
    let mut cap = config.connect_timeout / 5;
    let mut ceiling = BACKOFF;
    let mut last = None;
    while Instant::now() < deadline {
        let left = deadline - Instant::now();
        match timeout(cap.min(left), open(address)).await {
            Ok(Ok(stream)) => return Connection::establish(stream, address.clone(), config, None).await,
            Ok(Err(error)) => last = Some(error),
            Err(_) => last = Some(io::ErrorKind::TimedOut.into()),
        }
        cap = config.connect_timeout;
        let left = deadline.saturating_duration_since(Instant::now());
        let pause = ceiling.min(left).mul_f64(fastrand::f64());
        ceiling = (ceiling * 2).min(BACKOFF_MAX);
        debug!("could not connect to {address}, waiting for {pause:?} before retrying");
        sleep(pause).await;
    }
    Err(Error::Connect { address: address.clone(), timeout: config.connect_timeout, source: last })
}

/// One attempt at all addresses of the host, the next one a little later than the one before.
async fn open(address: &Address) -> io::Result<TcpStream> {
    let mut targets = tokio::net::lookup_host(address.host_port()).await?;
    let mut running = FuturesUnordered::new();
    let mut last = io::Error::new(io::ErrorKind::NotFound, "host has no address");
    loop {
        let next: Option<SocketAddr> = targets.next();
        let more = next.is_some();
        running.extend(next.map(TcpStream::connect));
        let finished = if more {
            match timeout(HEAD_START, running.next()).await {
                Ok(finished) => finished,
                Err(_) => continue,
            }
        } else {
            running.next().await
        };
        match finished {
            Some(Ok(stream)) => return Ok(stream),
            Some(Err(error)) => last = error,
            None => return Err(last),
        }
    }
}
