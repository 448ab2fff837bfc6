//! What a Python process writes to its standard output and error, as lines.
//!
//! Lines wait for whoever logs them only up to a limit; then the pipe fills and the writer waits, as at a terminal.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::sys;

/// Which of the two it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Longest line, in bytes; a longer one is broken up.
const LINE_MAX: usize = 16 * 1024;
/// Bytes read at once.
const CHUNK: usize = 8 * 1024;
/// Chunks that may wait to be logged, over all processes.
const CHUNKS_WAITING: usize = 256;
/// Latest lines kept for the report on a process that died.
const TAIL_LINES: usize = 20;
const TAIL_BYTES: usize = 4 * 1024;

/// Holds back writers while what they wrote before has not been logged.
#[derive(Clone, Debug)]
pub(super) struct Room(Arc<Semaphore>);

impl Room {
    pub(super) fn new() -> Self {
        Room(Arc::new(Semaphore::new(CHUNKS_WAITING)))
    }

    pub(super) async fn wait(&self) -> Option<OwnedSemaphorePermit> {
        self.0.clone().acquire_owned().await.ok()
    }
}

/// One pipe, read by its own task, or by whoever must know now what was written before.
#[derive(Debug)]
pub(super) struct Pipe {
    fd: AsyncFd<OwnedFd>,
    stream: Stream,
    partial: Mutex<Vec<u8>>,
}

impl Pipe {
    /// The reading end of a pipe, which must not block.
    pub(super) fn new(fd: OwnedFd, stream: Stream) -> Result<Self, sys::Error> {
        Ok(Pipe { fd: sys::watch(fd, Interest::READABLE)?, stream, partial: Mutex::default() })
    }

    pub(super) fn stream(&self) -> Stream {
        self.stream
    }

    /// Waits until there is something to [`read`](Pipe::read), or the end.
    pub(super) async fn readable(&self) -> bool {
        self.fd.readable().await.is_ok()
    }

    /// Gives the lines of one chunk to `line`. Asks the kernel only when there has been an event: what was written
    /// before another descriptor became readable has had its event, since those come in order.
    pub(super) fn read(&self, line: impl FnMut(String)) -> Read {
        let mut found = Read::Nothing;
        let asked = self.fd.try_io(Interest::READABLE, |fd| {
            found = self.read_from(fd, line);
            if found == Read::Nothing { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        });
        match asked {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Read::End,
            _ => found,
        }
    }

    /// As [`read`](Pipe::read), but asks the kernel in any case.
    pub(super) fn read_now(&self, line: impl FnMut(String)) -> Read {
        self.read_from(self.fd.get_ref(), line)
    }

    fn read_from(&self, fd: &OwnedFd, mut line: impl FnMut(String)) -> Read {
        let mut chunk = [0; CHUNK];
        let mut partial = self.partial.lock().unwrap_or_else(PoisonError::into_inner);
        let count = match nix::unistd::read(fd, &mut chunk) {
            Ok(0) => {
                if !partial.is_empty() {
                    line(text(&std::mem::take(&mut *partial)));
                }
                return Read::End;
            }
            Ok(count) => count,
            Err(nix::errno::Errno::EINTR) => return Read::More,
            Err(nix::errno::Errno::EAGAIN) => return Read::Nothing,
            Err(_) => return Read::End,
        };
        partial.extend_from_slice(&chunk[..count]);
        let mut rest = &partial[..];
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
            line(text(&rest[..end]));
            rest = &rest[end + 1..];
        }
        while rest.len() > LINE_MAX {
            let (long, more) = rest.split_at(LINE_MAX);
            line(text(long));
            rest = more;
        }
        *partial = rest.to_vec();
        Read::More
    }

    /// A last line without an end.
    pub(super) fn rest(&self) -> Option<String> {
        let partial = std::mem::take(&mut *self.partial.lock().unwrap_or_else(PoisonError::into_inner));
        (!partial.is_empty()).then(|| text(&partial))
    }
}

/// What [`Pipe::read`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Read {
    /// A chunk; there may be more.
    More,
    /// Nothing now.
    Nothing,
    /// Nobody has the other end.
    End,
}

fn text(line: &[u8]) -> String {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    String::from_utf8_lossy(line).into_owned()
}

/// The latest lines of a process.
#[derive(Debug, Default)]
pub(super) struct Tail {
    lines: VecDeque<String>,
    bytes: usize,
}

impl Tail {
    pub(super) fn push(&mut self, line: &str) {
        let end = line.char_indices().map(|(at, _)| at).take_while(|&at| at <= TAIL_BYTES / 4).last();
        let line = if line.len() > TAIL_BYTES / 4 { &line[..end.unwrap_or(0)] } else { line };
        self.bytes += line.len();
        self.lines.push_back(line.to_owned());
        while self.lines.len() > TAIL_LINES || self.bytes > TAIL_BYTES {
            self.bytes -= self.lines.pop_front().map_or(0, |line| line.len());
        }
    }

    pub(super) fn clear(&mut self) {
        self.lines.clear();
        self.bytes = 0;
    }

    /// The lines, oldest first.
    pub(super) fn text(&self) -> String {
        self.lines.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn lines(pipe: &Pipe) -> (Vec<String>, Read) {
        let mut lines = Vec::new();
        loop {
            match pipe.read_now(|line| lines.push(line)) {
                Read::More => {}
                end => return (lines, end),
            }
        }
    }

    #[tokio::test]
    async fn bytes_become_lines() {
        let (read, write) = sys::pipe().unwrap();
        sys::set_nonblocking(&read).unwrap();
        let pipe = Pipe::new(read, Stream::Stdout).unwrap();
        nix::unistd::write(&write, b"one\ntwo\r\nthr").unwrap();
        assert_eq!(lines(&pipe), (vec!["one".to_owned(), "two".into()], Read::Nothing));
        nix::unistd::write(&write, b"ee\xff").unwrap();
        drop(write);
        assert_eq!(lines(&pipe), (vec!["three\u{fffd}".to_owned()], Read::End));
    }

    #[tokio::test]
    async fn endless_lines_are_broken_up() {
        let (read, write) = sys::pipe().unwrap();
        sys::set_nonblocking(&read).unwrap();
        let pipe = Pipe::new(read, Stream::Stderr).unwrap();
        nix::unistd::write(&write, &[b'x'; LINE_MAX + 10]).unwrap();
        assert_eq!(lines(&pipe).0, ["x".repeat(LINE_MAX)]);
        assert_eq!(pipe.rest(), Some("x".repeat(10)));
    }

    #[test]
    fn a_tail_is_short() {
        let mut tail = Tail::default();
        for i in 0..100 {
            tail.push(&format!("{i}"));
        }
        assert!(tail.text().starts_with("80\n") && tail.text().ends_with("\n99"));
        tail.push(&"é".repeat(10_000));
        assert!(tail.text().len() <= TAIL_BYTES);
    }
}
