//! One connection whose handshake is done: messages in, messages out, and its two halves.

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use super::slots::{IdleGuard, Slot};
use super::{Config, Error, socket};
use crate::proto::{Address, Value};
use crate::wire::frame::{self, Deframer, Step};
use crate::wire::handshake::{Agreed, Info};
use crate::wire::{self, Compression, Limits};

/// Bytes read ahead; what is left over belongs to the next messages.
const READ_AHEAD: usize = 32 * 1024;

/// Messages from this size on, in bytes, are encoded and decoded off the runtime's threads when compression may take
/// its time, as `distributed.comm.offload` says.
const OFFLOAD: u64 = 10_000_000;

/// What a peer may say before we know that it speaks the protocol.
const GREETING_LIMITS: Limits =
    Limits { message_bytes: 64 * 1024, frames: 16, depth: 16, values: 1024, decompressed_bytes: 64 * 1024 };

/// What both halves of a connection know about it.
struct Shared {
    local: Address,
    peer: Address,
    agreed: Agreed,
    remote: Info,
    /// Held open by both halves; none for connections that we opened.
    slot: Option<Slot>,
}

/// A connection to a peer, for one request at a time (`distributed.comm.core.Comm`).
pub struct Connection {
    reader: Reader,
    writer: Writer,
}

/// The receiving half.
pub struct Reader {
    io: OwnedReadHalf,
    shared: Arc<Shared>,
    limits: Limits,
    deframer: Deframer,
    /// Read from the socket and not yet given to the deframer.
    ahead: BytesMut,
    /// The frame being read straight into its place, and its length.
    large: Option<(Vec<u8>, usize)>,
    /// It is a busy stream, which keeps its buffer between messages.
    busy: bool,
    failed: bool,
}

/// The sending half.
pub struct Writer {
    io: OwnedWriteHalf,
    shared: Arc<Shared>,
    /// A message was begun and not finished: what would follow makes no sense to the peer.
    broken: bool,
}

impl Connection {
    /// Sets the socket's options and exchanges handshakes.
    pub(super) async fn establish(
        stream: TcpStream,
        peer: Address,
        config: &Config,
        slot: Option<Slot>,
    ) -> Result<Connection, Error> {
        let lost = |source| Error::Lost { peer: peer.clone(), source };
        socket::configure(&stream, config.tcp_timeout).map_err(lost)?;
        let local = stream.local_addr().map_err(lost)?;
        let remote = stream.peer_addr().map_err(lost)?;
        let same_host = local.ip().to_canonical() == remote.ip().to_canonical();
        let compression = if same_host { Compression::None } else { config.compression };
        let ours = Info::new(compression, config.python_version);
        let timeout = config.connect_timeout;
        let greeting = greet(stream, &peer, &ours, config.limits.clone());
        let (reader, writer, theirs) = tokio::time::timeout(timeout, greeting)
            .await
            .map_err(|_| Error::Handshake { peer: peer.clone(), timeout })??;
        let local = Address::from(std::net::SocketAddr::new(local.ip().to_canonical(), local.port()));
        let shared = Arc::new(Shared { local, peer, agreed: ours.negotiate(&theirs), remote: theirs, slot });
        Ok(Connection {
            reader: Reader { shared: shared.clone(), ..reader },
            writer: Writer { shared, ..writer },
        })
    }

    /// The next message.
    ///
    /// # Errors
    /// [`Error::Closed`] at the end of the stream; otherwise whatever the peer did wrong.
    pub async fn read(&mut self) -> Result<Value, Error> {
        self.reader.read().await
    }

    /// The frames of the next message, undecoded.
    ///
    /// # Errors
    /// As [`Connection::read`].
    pub async fn read_frames(&mut self) -> Result<Vec<Bytes>, Error> {
        self.reader.read_frames().await
    }

    /// Understands frames that this connection brought.
    ///
    /// # Errors
    /// [`Error::Garbage`]; the connection is over then.
    pub async fn decode(&mut self, frames: Vec<Bytes>) -> Result<Value, Error> {
        self.reader.decode(frames).await
    }

    /// Sends one message; the number of bytes it took.
    ///
    /// # Errors
    /// [`Error::Encode`] leaves the connection usable, all others end it.
    pub async fn write(&mut self, message: &Value) -> Result<u64, Error> {
        self.writer.write(message).await
    }

    /// Sends the frames of a message that is encoded already.
    ///
    /// # Errors
    /// The connection's end.
    pub async fn write_frames(&mut self, frames: &[Bytes]) -> Result<u64, Error> {
        self.writer.write_frames(frames).await
    }

    /// One request and its reply.
    ///
    /// # Errors
    /// As [`Connection::write`] and [`Connection::read`].
    pub async fn request(&mut self, message: &Value) -> Result<Value, Error> {
        self.write(message).await?;
        self.read().await
    }

    /// The peer's end.
    pub fn peer_address(&self) -> &Address {
        &self.reader.shared.peer
    }

    /// Our end.
    pub fn local_address(&self) -> &Address {
        &self.reader.shared.local
    }

    /// Whether both ends have the same IP address (`Comm.same_host`).
    pub fn same_host(&self) -> bool {
        self.peer_address().host() == self.local_address().host()
    }

    /// What the peer said of itself.
    pub fn remote_info(&self) -> &Info {
        &self.reader.shared.remote
    }

    /// How frames are compressed on this connection.
    pub fn compression(&self) -> Compression {
        self.reader.shared.agreed.compression
    }

    /// Two halves for two tasks of a stream. The connection ends when both are dropped.
    pub fn into_split(mut self) -> (Reader, Writer) {
        self.reader.busy = true;
        (self.reader, self.writer)
    }

    /// Waits for the next request; `None` when the peer left between two of them, or when this connection has been
    /// idle and must make room for another.
    ///
    /// # Errors
    /// As [`Connection::read`].
    pub async fn next_request(&mut self) -> Result<Option<Vec<Bytes>>, Error> {
        let shared = self.reader.shared.clone();
        let idle = shared.slot.as_ref().map(Slot::idle);
        if self.reader.is_between_messages() {
            tokio::select! {
                biased;
                begun = self.reader.read_ahead() => match begun {
                    Ok(()) => {}
                    Err(Error::Closed { .. }) => return Ok(None),
                    Err(error) => return Err(error),
                },
                () = evicted(idle.as_ref()) => return Ok(None),
            }
        }
        drop(idle);
        self.read_frames().await.map(Some)
    }

    /// Whether an idle connection can still be used: nothing unexpected came, and it has not ended.
    pub(super) fn is_healthy(&mut self) -> bool {
        if self.reader.failed || self.writer.broken || !self.reader.is_between_messages() {
            return false;
        }
        matches!(self.reader.io.try_read(&mut [0]), Err(e) if e.kind() == io::ErrorKind::WouldBlock)
    }
}

async fn evicted(idle: Option<&IdleGuard<'_>>) {
    match idle {
        Some(idle) => idle.evicted().await,
        None => std::future::pending().await,
    }
}

/// Sends our greeting and reads the peer's, with limits of its own.
async fn greet(
    stream: TcpStream,
    peer: &Address,
    ours: &Info,
    limits: Limits,
) -> Result<(Reader, Writer, Info), Error> {
    let (read, write) = stream.into_split();
    let agreed = Agreed { compression: Compression::None, pickle_protocol: ours.pickle_protocol };
    // replaced as soon as both ends are known
    let shared = Arc::new(Shared {
        local: peer.clone(),
        peer: peer.clone(),
        agreed,
        remote: ours.clone(),
        slot: None,
    });
    let mut writer = Writer { io: write, shared: shared.clone(), broken: false };
    let mut reader = Reader {
        io: read,
        shared,
        limits: GREETING_LIMITS,
        deframer: Deframer::new(GREETING_LIMITS),
        ahead: BytesMut::new(),
        large: None,
        busy: false,
        failed: false,
    };
    writer.write(&ours.to_value()).await?;
    let greeting = reader.read().await?;
    let theirs =
        Info::from_value(&greeting).map_err(|source| Error::Garbage { peer: peer.clone(), source })?;
    reader.deframer = Deframer::new(limits.clone());
    reader.limits = limits;
    Ok((reader, writer, theirs))
}

impl Reader {
    /// The next message. Cancel safe: a message that was begun is continued by the next call.
    ///
    /// # Errors
    /// [`Error::Closed`] at the end of the stream; otherwise whatever the peer did wrong.
    pub async fn read(&mut self) -> Result<Value, Error> {
        let frames = self.read_frames().await?;
        self.decode(frames).await
    }

    async fn decode(&mut self, frames: Vec<Bytes>) -> Result<Value, Error> {
        let decoded = if size(&frames) > OFFLOAD {
            let limits = self.limits.clone();
            offload(move || wire::decode_message(frames, &limits)).await
        } else {
            wire::decode_message(frames, &self.limits)
        };
        decoded.map_err(|source| {
            self.failed = true;
            Error::Garbage { peer: self.shared.peer.clone(), source }
        })
    }

    /// The frames of the next message. Cancel safe.
    ///
    /// # Errors
    /// As [`Reader::read`].
    pub async fn read_frames(&mut self) -> Result<Vec<Bytes>, Error> {
        if self.failed {
            return Err(Error::Closed { peer: self.shared.peer.clone() });
        }
        let result = self.next_frames().await;
        self.failed = result.is_err();
        result
    }

    /// Limits that messages are held to.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    async fn next_frames(&mut self) -> Result<Vec<Bytes>, Error> {
        loop {
            self.finish_large().await?;
            match self.deframer.advance(&mut self.ahead).map_err(|e| self.garbage(e))? {
                Step::Message(frames) => return Ok(frames),
                Step::Large { len } => self.large = Some(self.begin_large(len)?),
                Step::More => self.read_ahead().await?,
            }
        }
    }

    fn garbage(&self, source: wire::Error) -> Error {
        Error::Garbage { peer: self.shared.peer.clone(), source }
    }

    /// A buffer of exactly `len` bytes. The system gives its pages as they are written, so that a length that was
    /// only announced costs nothing.
    fn begin_large(&self, len: u64) -> Result<(Vec<u8>, usize), Error> {
        let mut place = Vec::new();
        match usize::try_from(len) {
            Ok(size) if place.try_reserve_exact(size).is_ok() => Ok((place, size)),
            _ => Err(Error::Memory { peer: self.shared.peer.clone(), length: len }),
        }
    }

    async fn finish_large(&mut self) -> Result<(), Error> {
        let Some((place, len)) = &mut self.large else { return Ok(()) };
        let here = self.ahead.len().min(*len - place.len());
        place.extend_from_slice(&self.ahead.split_to(here));
        while place.len() < *len {
            let missing = *len - place.len();
            let count = self.io.read_buf(&mut (&mut *place).limit(missing)).await;
            match count {
                Ok(0) => return Err(Error::Truncated { peer: self.shared.peer.clone() }),
                Ok(_) => {}
                Err(source) => return Err(Error::Lost { peer: self.shared.peer.clone(), source }),
            }
        }
        let frame = Bytes::from(std::mem::take(place));
        self.large = None;
        self.deframer.supply(frame).map_err(|e| self.garbage(e))
    }

    /// Whether all that was read has been taken.
    fn is_between_messages(&self) -> bool {
        self.ahead.is_empty() && self.deframer.is_idle()
    }

    fn lost(&self, source: io::Error) -> Error {
        Error::Lost { peer: self.shared.peer.clone(), source }
    }

    /// Reads what is there. Holds a buffer only while something is, unless it is a busy stream: most connections are
    /// idle most of the time.
    async fn read_ahead(&mut self) -> Result<(), Error> {
        if !self.busy {
            self.ahead = BytesMut::new();
        }
        self.io.readable().await.map_err(|source| self.lost(source))?;
        self.ahead.reserve(READ_AHEAD);
        // unlike `try_read_buf` it takes a short read for the end of what is there, and does not ask once more
        match self.io.read_buf(&mut self.ahead).await {
            Ok(0) if self.deframer.is_idle() => Err(Error::Closed { peer: self.shared.peer.clone() }),
            Ok(0) => Err(Error::Truncated { peer: self.shared.peer.clone() }),
            Ok(_) => Ok(()),
            Err(source) => Err(self.lost(source)),
        }
    }
}

impl Writer {
    /// Sends one message; the number of bytes it took. Not cancel safe: dropped half way, the connection is over.
    ///
    /// # Errors
    /// [`Error::Encode`] leaves the connection usable, all others end it.
    pub async fn write(&mut self, message: &Value) -> Result<u64, Error> {
        let compression = self.shared.agreed.compression;
        let encoded = if compression != Compression::None && weight(message) > OFFLOAD {
            let message = message.clone();
            offload(move || wire::encode_message(&message, compression)).await
        } else {
            wire::encode_message(message, compression)
        };
        let frames = encoded.map_err(|source| Error::Encode { peer: self.shared.peer.clone(), source })?;
        self.write_frames(&frames).await
    }

    /// Sends the frames of a message that is encoded already; the number of bytes they took.
    ///
    /// # Errors
    /// The connection's end.
    pub async fn write_frames(&mut self, frames: &[Bytes]) -> Result<u64, Error> {
        if self.broken {
            return Err(Error::Closed { peer: self.shared.peer.clone() });
        }
        self.broken = true;
        let prelude = frame::prelude(frames);
        match write_all(&mut self.io, &prelude, frames).await {
            Ok(()) => {
                self.broken = false;
                Ok(prelude.len() as u64 + size(frames))
            }
            Err(source) => Err(Error::Lost { peer: self.shared.peer.clone(), source }),
        }
    }

    /// Tells the peer that nothing more will come, and waits until it has taken all that did, for at most `timeout`.
    pub async fn finish(mut self, timeout: Duration) {
        // A peer that is gone already needs no goodbye.
        let _ = tokio::time::timeout(timeout, self.io.shutdown()).await;
    }

    /// The peer's end.
    pub fn peer_address(&self) -> &Address {
        &self.shared.peer
    }
}

async fn write_all(io: &mut OwnedWriteHalf, prelude: &Bytes, frames: &[Bytes]) -> io::Result<()> {
    /// The kernel's bound on the parts of one write (`IOV_MAX`).
    const PARTS: usize = 1024;
    let mut parts: Vec<IoSlice<'_>> = Vec::with_capacity(1 + frames.len());
    parts.push(IoSlice::new(prelude));
    parts.extend(frames.iter().filter(|f| !f.is_empty()).map(|f| IoSlice::new(f)));
    let mut left = &mut parts[..];
    while !left.is_empty() {
        let count = left.len().min(PARTS);
        let written = io.write_vectored(&left[..count]).await?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        IoSlice::advance_slices(&mut left, written);
    }
    Ok(())
}

fn size(frames: &[Bytes]) -> u64 {
    frames.iter().map(|f| f.len() as u64).sum()
}

/// Bytes a message will take on the wire, roughly and cheaply.
pub(super) fn weight(message: &Value) -> u64 {
    const NODE: u64 = 8;
    NODE + match message {
        Value::Str(s) => s.len() as u64,
        Value::Bytes(b) => b.len() as u64,
        Value::List(items) | Value::Set(items) => items.iter().map(weight).sum(),
        Value::Map(items) => items.iter().map(|(k, v)| weight(k) + weight(v)).sum(),
        Value::Payload(payload) => payload.len(),
        Value::Nil | Value::Bool(_) | Value::Int(_) | Value::Float(_) => 0,
    }
}

/// Runs `work` where it may take its time.
async fn offload<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(stopped) => match stopped.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is shutting down; this task is about to be dropped as well.
            Err(_) => std::future::pending().await,
        },
    }
}
