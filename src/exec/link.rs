//! The daemon's end of a socket to a child: sends without waiting, receives message by message.
//!
//! Knows bytes and descriptors, not what they mean.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Buf, Bytes, BytesMut};
use nix::sys::socket::{Shutdown, shutdown};
use smallvec::SmallVec;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::ipc::{self, HEAD, Outgoing};
use crate::sys::{self, MAX_DESCRIPTORS, Received};

/// Messages sent in one call, at most.
const TOGETHER: usize = 16;
/// Bytes read at once.
const CHUNK: usize = 16 * 1024;

/// A sending end; clones share it.
#[derive(Clone, Debug)]
pub(super) struct Link(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    fd: AsyncFd<OwnedFd>,
    outbox: Mutex<Outbox>,
}

/// What did not fit into the socket yet.
#[derive(Debug, Default)]
struct Outbox {
    waiting: VecDeque<Outgoing>,
    /// Bytes of the first message that are sent, and its descriptors.
    sent: usize,
    sent_fds: usize,
    flushing: bool,
}

impl Link {
    /// Must be called in a runtime, which then drives the socket.
    pub(super) fn new(fd: OwnedFd) -> Result<Self, sys::Error> {
        let inner = Inner { fd: sys::watch(fd, Interest::READABLE)?, outbox: Mutex::default() };
        Ok(Link(Arc::new(inner)))
    }

    /// Sends a message, now or as soon as there is room. A child that is gone shows at the receiving end.
    pub(super) fn send(&self, message: Outgoing) {
        self.queue(message);
        self.flush();
    }

    /// Takes a message that leaves with the next [`Link::flush`], in one call with the others.
    pub(super) fn queue(&self, message: Outgoing) {
        self.outbox().waiting.push_back(message);
    }

    /// Sends what is queued, now or as soon as there is room.
    pub(super) fn flush(&self) {
        let mut outbox = self.outbox();
        if outbox.flushing {
            return;
        }
        if !outbox.flush(self.0.fd.get_ref().as_fd()) {
            outbox.flushing = true;
            let link = self.clone();
            tokio::spawn(async move { link.finish().await });
        }
    }

    fn outbox(&self) -> MutexGuard<'_, Outbox> {
        // nothing panics while it holds the lock
        self.0.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what waits, as room comes. Only now the socket is watched for that: each message that the child takes
    /// makes room, and would wake the runtime.
    async fn finish(&self) {
        match sys::watch_again(self.0.fd.get_ref(), Interest::WRITABLE) {
            Ok(socket) => {
                while let Ok(mut guard) = socket.writable().await {
                    let mut outbox = self.outbox();
                    if outbox.flush(socket.get_ref().as_fd()) {
                        outbox.flushing = false;
                        return;
                    }
                    guard.clear_ready();
                }
            }
            Err(error) => {
                tracing::error!(%error, "a child cannot be reached any more");
                // it finds its connection closed, and what it had goes to others
                let _ = shutdown(self.0.fd.get_ref().as_raw_fd(), Shutdown::Both);
            }
        }
    }
}

impl Outbox {
    /// Sends what fits. True when nothing is left; what cannot ever be sent is dropped.
    fn flush(&mut self, socket: BorrowedFd<'_>) -> bool {
        while let Some(message) = self.waiting.front() {
            let fds = (message.fds.len() - self.sent_fds).min(MAX_DESCRIPTORS);
            match self.send(message, fds, socket) {
                Ok(Some(sent)) => self.advance(sent, fds),
                Ok(None) => return false,
                Err(error) => {
                    tracing::debug!(%error, "a message to a child could not be sent");
                    self.waiting.clear();
                    (self.sent, self.sent_fds) = (0, 0);
                }
            }
        }
        true
    }

    /// Sends what is left of the first message, with so many of its descriptors, and those behind it that have none.
    fn send(
        &self,
        first: &Outgoing,
        fds: usize,
        socket: BorrowedFd<'_>,
    ) -> Result<Option<usize>, sys::Error> {
        let last = self.sent_fds + fds == first.fds.len();
        let fds: Vec<_> = first.fds[self.sent_fds..][..fds].iter().map(AsFd::as_fd).collect();
        // more descriptors than one call takes: a byte for each batch but the last
        let end = if last { first.bytes.len() } else { self.sent + 1 };
        let mut slices = SmallVec::<[IoSlice<'_>; TOGETHER]>::new();
        slices.push(IoSlice::new(&first.bytes[self.sent..end]));
        if last {
            let others = self.waiting.iter().skip(1).take_while(|other| other.fds.is_empty());
            slices.extend(others.take(TOGETHER - 1).map(|other| IoSlice::new(&other.bytes)));
        }
        sys::send(socket, &slices, &fds)
    }

    /// Forgets messages that are sent, and notes how much is of the first of the others.
    fn advance(&mut self, bytes: usize, fds: usize) {
        self.sent += bytes;
        self.sent_fds += fds;
        while let Some(message) = self.waiting.front()
            && self.sent >= message.bytes.len()
        {
            self.sent -= message.bytes.len();
            self.sent_fds = 0;
            self.waiting.pop_front();
        }
    }
}

/// A message as it came.
#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) bytes: Bytes,
    pub(super) fds: Vec<OwnedFd>,
}

/// Why nothing more comes.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// The socket failed.
    #[error("reading from a child failed")]
    Io(#[from] io::Error),
    /// Descriptors could not be taken.
    #[error("reading from a child failed")]
    Sys(#[from] sys::Error),
    /// The child sends nonsense.
    #[error("a child sent nonsense")]
    Nonsense(#[from] ipc::Error),
}

/// The receiving end of a link.
#[derive(Debug)]
pub(super) struct Inbox {
    link: Link,
    chunk: Box<[u8]>,
    buffer: BytesMut,
    fds: Vec<OwnedFd>,
}

impl Inbox {
    pub(super) fn new(link: &Link) -> Self {
        Inbox { link: link.clone(), chunk: vec![0; CHUNK].into(), buffer: BytesMut::new(), fds: Vec::new() }
    }

    /// The next message; `None` when the other end is closed.
    pub(super) async fn receive(&mut self) -> Result<Option<Incoming>, Error> {
        loop {
            if let Some(message) = self.take()? {
                return Ok(Some(message));
            }
            let link = self.link.clone();
            let mut guard = link.0.fd.readable().await?;
            match self.fill()? {
                Fill::End => return Ok(None),
                Fill::Drained => guard.clear_ready(),
                Fill::More => {}
            }
        }
    }

    /// The next message that has arrived, without waiting.
    pub(super) fn try_receive(&mut self) -> Result<Option<Incoming>, Error> {
        loop {
            if let Some(message) = self.take()? {
                return Ok(Some(message));
            }
            // a short read may have left something: ask until the kernel says that there is nothing
            let before = self.buffer.len();
            let filled = self.fill()?;
            if filled == Fill::End || (filled == Fill::Drained && self.buffer.len() == before) {
                return Ok(None);
            }
        }
    }

    fn take(&mut self) -> Result<Option<Incoming>, Error> {
        let Some(head) = self.buffer.first_chunk::<HEAD>() else { return Ok(None) };
        let (bytes, fds) = ipc::parse_head(*head)?;
        if self.buffer.len() < HEAD + bytes {
            return Ok(None);
        }
        if self.fds.len() < fds {
            return Err(ipc::Error::NoDescriptor { index: self.fds.len() }.into());
        }
        let message = Bytes::copy_from_slice(&self.buffer[HEAD..HEAD + bytes]);
        self.buffer.advance(HEAD + bytes);
        if self.buffer.is_empty() && bytes > CHUNK {
            // a large message's room is not kept
            self.buffer = BytesMut::new();
        }
        Ok(Some(Incoming { bytes: message, fds: self.fds.drain(..fds).collect() }))
    }

    fn fill(&mut self) -> Result<Fill, Error> {
        let socket = self.link.0.fd.get_ref();
        let known = self.fds.len();
        match sys::receive(socket, &mut self.chunk, &mut self.fds, MAX_DESCRIPTORS) {
            Ok(Received::Bytes(len)) => {
                self.buffer.extend_from_slice(&self.chunk[..len]);
                // a read stops behind a message with descriptors, with more waiting
                let short = len < CHUNK && self.fds.len() == known;
                Ok(if short { Fill::Drained } else { Fill::More })
            }
            Ok(Received::WouldBlock) => Ok(Fill::Drained),
            Ok(Received::End) => Ok(Fill::End),
            // a child that was killed with messages unread
            Err(error) if error.io().map(io::Error::kind) == Some(io::ErrorKind::ConnectionReset) => {
                Ok(Fill::End)
            }
            Err(error) => Err(error.into()),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fill {
    /// Nothing more for now.
    Drained,
    /// Ask again.
    More,
    /// Nothing ever again.
    End,
}
