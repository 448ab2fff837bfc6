//! Listening sockets and the accept loop: a range of ports, every address of a host, a bound on open connections.

use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tracing::{debug, error, info, warn};

use super::slots::{Slot, Slots};
use super::{Config, Connection, Error};
use crate::proto::Address;

/// Any free port.
pub const ANY_PORT: RangeInclusive<u16> = 0..=0;

/// How often a free port is asked for before giving up, as in `distributed/comm/tcp.py: BaseTCPListener.start`.
const EPHEMERAL_ATTEMPTS: usize = 5;

/// Pause after the process ran out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A bound address, on all the sockets that it takes (IPv4 and IPv6).
pub struct Listener {
    sockets: Vec<TcpListener>,
    config: Arc<Config>,
    slots: Slots,
}

impl Listener {
    /// Listens on `host` at the first free port of `ports`. An empty host means every address of the machine.
    ///
    /// # Errors
    /// [`Error::Bind`] when the host is not one of this machine or no port of the range is free.
    pub async fn bind(host: &str, ports: RangeInclusive<u16>, config: Arc<Config>) -> Result<Self, Error> {
        let failed = |source| {
            let (first, last) = (ports.start(), ports.end());
            let ports = if first == last { first.to_string() } else { format!("{first}:{last}") };
            Error::Bind { host: host.to_owned(), ports, source }
        };
        let addresses = host_addresses(host).await.map_err(failed)?;
        let mut last = io::Error::from(io::ErrorKind::AddrInUse);
        for port in ports.clone() {
            match bind_any_of(&addresses, port, config.backlog) {
                Ok(sockets) => {
                    let slots = Slots::new(config.max_incoming);
                    return Ok(Listener { sockets, config, slots });
                }
                Err(source) if source.kind() == io::ErrorKind::AddrInUse => last = source,
                Err(source) => return Err(failed(source)),
            }
        }
        Err(failed(last))
    }

    /// The bound address; the IPv4 one if there are several. May be a wildcard such as `tcp://0.0.0.0:1234`.
    pub fn listen_address(&self) -> Address {
        // Only a socket that was closed behind our back has no address.
        let unspecified = SocketAddr::from(([0, 0, 0, 0], 0));
        let mut bound = self.sockets.iter().map(|s| s.local_addr().unwrap_or(unspecified));
        let first = bound.next().unwrap_or(unspecified);
        Address::from(bound.fold(first, |best, next| if best.is_ipv4() { best } else { next }))
    }

    /// The address for others: the bound one, with `default_host` where that is a wildcard
    /// (`distributed.comm.utils.ensure_concrete_host`).
    pub fn contact_address(&self, default_host: IpAddr) -> Address {
        let bound = self.listen_address();
        match bound.host().parse::<IpAddr>() {
            Ok(ip) if ip.is_unspecified() => Address::from(SocketAddr::new(default_host, bound.port())),
            _ => bound,
        }
    }

    /// Connections accepted and still open.
    pub fn open_connections(&self) -> usize {
        self.slots.taken()
    }

    /// The next connection. Its handshake has not begun, so that a slow peer keeps nobody waiting.
    ///
    /// Waits while the bound on open connections is reached and none of them is idle. Dropped while it waits, it
    /// closes the newcomer.
    pub async fn accept(&self) -> Incoming {
        loop {
            match self.accept_any().await {
                Ok((stream, peer)) => {
                    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
                    let slot = self.slots.take().await;
                    return Incoming { stream, peer: Address::from(peer), config: self.config.clone(), slot };
                }
                // The peer left while it was queued, or the process is out of descriptors: neither ends the listener.
                Err(error) if is_peers_fault(&error) => debug!("a peer left before it was accepted: {error}"),
                Err(error) => {
                    error!("cannot accept connections: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn accept_any(&self) -> io::Result<(TcpStream, SocketAddr)> {
        poll_fn(|cx| {
            for socket in &self.sockets {
                if let Poll::Ready(accepted) = socket.poll_accept(cx) {
                    return Poll::Ready(accepted);
                }
            }
            Poll::Pending
        })
        .await
    }

    /// Accepts for ever; runs `serve` in a task of its own for each connection whose handshake succeeds.
    ///
    /// A peer that breaks the protocol costs one line in the log. Dropped, this closes all connections.
    pub async fn run<F>(&self, serve: impl Fn(Connection) -> F + Clone + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let mut connections = JoinSet::new();
        // Lives through the ends of other connections: one of them may be what a newcomer waits for.
        let mut accept = pin!(self.accept());
        loop {
            tokio::select! {
                incoming = &mut accept => {
                    connections.spawn(greet(incoming, serve.clone()));
                    accept.set(self.accept());
                }
                Some(ended) = connections.join_next() => {
                    if let Err(error) = ended {
                        // a bug of ours, which costs the connection that met it
                        error!("a connection's task failed: {error}");
                    }
                }
            }
        }
    }
}

async fn greet<F: Future<Output = ()>>(incoming: Incoming, serve: impl Fn(Connection) -> F) {
    match incoming.handshake().await {
        Ok(connection) => serve(connection).await,
        Err(error) if error.is_misbehaviour() => warn!("connection refused: {}", error.chain()),
        Err(error) => info!("connection closed before its handshake was complete: {}", error.chain()),
    }
}

/// A connection that was accepted and not yet greeted.
pub struct Incoming {
    stream: TcpStream,
    peer: Address,
    config: Arc<Config>,
    slot: Slot,
}

impl Incoming {
    /// Who connected.
    pub fn peer_address(&self) -> &Address {
        &self.peer
    }

    /// Exchanges handshakes (`distributed.comm.core.Listener.on_connection`), within the connect timeout.
    ///
    /// # Errors
    /// Whatever the peer does wrong.
    pub async fn handshake(self) -> Result<Connection, Error> {
        Connection::establish(self.stream, self.peer, &self.config, Some(self.slot)).await
    }
}

fn is_peers_fault(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

async fn host_addresses(host: &str) -> io::Result<Vec<IpAddr>> {
    if host.is_empty() {
        return Ok(vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()]);
    }
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let mut addresses = Vec::new();
    for address in tokio::net::lookup_host((host, 0)).await? {
        if !addresses.contains(&address.ip()) {
            addresses.push(address.ip());
        }
    }
    Ok(addresses)
}

/// One socket for each address, all at one port, which the first one finds if `port` is 0.
fn bind_any_of(addresses: &[IpAddr], port: u16, backlog: u32) -> io::Result<Vec<TcpListener>> {
    let mut attempt = 1;
    loop {
        match bind_all(addresses, port, backlog) {
            // the port that was free for the first address need not be for the second
            Err(error)
                if port == 0 && error.kind() == io::ErrorKind::AddrInUse && attempt < EPHEMERAL_ATTEMPTS =>
            {
                attempt += 1;
            }
            done => return done,
        }
    }
}

fn bind_all(addresses: &[IpAddr], port: u16, backlog: u32) -> io::Result<Vec<TcpListener>> {
    let mut port = port;
    let mut sockets = Vec::new();
    let mut skipped = None;
    for &ip in addresses {
        match bind_one(SocketAddr::new(ip, port), backlog) {
            Ok(socket) => {
                port = socket.local_addr()?.port();
                sockets.push(socket);
            }
            // a machine without IPv6 still resolves names to IPv6 addresses
            Err(error) if ip.is_ipv6() && lacks_family(&error) => skipped = Some(error),
            Err(error) => return Err(error),
        }
    }
    match (sockets.is_empty(), skipped) {
        (false, _) => Ok(sockets),
        (true, error) => Err(error.unwrap_or_else(|| io::ErrorKind::AddrNotAvailable.into())),
    }
}

fn lacks_family(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

fn bind_one(address: SocketAddr, backlog: u32) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        // the IPv4 wildcard has a socket of its own
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    // Many workers ask one worker at once when they shuffle; none of them must find a full queue.
    socket.listen(i32::try_from(backlog).unwrap_or(i32::MAX))?;
    TcpListener::from_std(socket.into())
}
