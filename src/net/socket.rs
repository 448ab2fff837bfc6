//! Options of one TCP socket, and which of this machine's addresses faces a host.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpStream, UdpSocket};

/// Probes before a silent connection counts as dead.
const PROBES: u32 = 10;

/// Sends small messages at once and notices dead peers within `timeout`, as `distributed/comm/tcp.py:
/// set_tcp_timeout` and `TCP.__init__` do.
///
/// # Errors
/// What the operating system says, which for a connected socket means that it is gone.
pub(super) fn configure(stream: &TcpStream, timeout: Duration) -> io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    // The kernel counts in whole seconds, and needs one for each probe.
    let timeout = timeout.as_secs().max(u64::from(PROBES) + 1);
    let interval = (timeout - (timeout / 4).max(2)) / u64::from(PROBES);
    let interval = interval.max(1);
    let idle = timeout - interval * u64::from(PROBES);
    let keepalive = TcpKeepalive::new()
        .with_retries(PROBES)
        .with_time(Duration::from_secs(idle))
        .with_interval(Duration::from_secs(interval));
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(Duration::from_secs(timeout)))
}

/// The address of this machine from which `host` is reached (`distributed.utils.get_ip`).
///
/// Nothing is sent: a UDP socket is connected, which only chooses a route.
///
/// # Errors
/// When `host` does not resolve or no route leads there.
pub async fn local_ip_towards(host: &str) -> io::Result<IpAddr> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "host has no address");
    for target in tokio::net::lookup_host((host, 80)).await? {
        let any: SocketAddr = match target {
            SocketAddr::V4(_) => ([0, 0, 0, 0], 0).into(),
            SocketAddr::V6(_) => ([0u16; 8], 0).into(),
        };
        let socket = UdpSocket::bind(any).await?;
        match socket.connect(target).await {
            Ok(()) => return Ok(socket.local_addr()?.ip()),
            Err(error) => last = error,
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[tokio::test]
    async fn loopback_faces_itself() {
        assert_eq!(local_ip_towards("127.0.0.1").await.unwrap(), IpAddr::from([127, 0, 0, 1]));
    }

    #[tokio::test]
    async fn options_are_those_of_dask() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        configure(&stream, Duration::from_secs(30)).unwrap();
        let socket = SockRef::from(&stream);
        assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
        // 30 s: idle 10 s and ten probes 2 s apart
        assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(10));
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), Duration::from_secs(2));
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), PROBES);
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(Duration::from_secs(30)));
    }
}
