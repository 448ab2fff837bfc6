//! Unix sockets that carry descriptors next to their bytes.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::Error;

/// Descriptors the kernel takes in one message (`SCM_MAX_FD`).
pub const MAX_DESCRIPTORS: usize = 253;

/// Two connected stream sockets, closed on exec.
///
/// # Errors
/// What `socketpair` said.
pub fn socket_pair() -> Result<(OwnedFd, OwnedFd), Error> {
    socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)
        .map_err(Error::call("socketpair"))
}

/// Has the runtime watch a descriptor. Must be called in one.
///
/// # Errors
/// What `epoll_ctl` said.
pub fn watch(fd: OwnedFd, interest: Interest) -> Result<AsyncFd<OwnedFd>, Error> {
    // SAFETY: the `AsyncFd` owns the descriptor, whose number is the same for as long as it is open.
    unsafe { AsyncFd::register_with_interest(fd, interest) }
        .map_err(|error| Error::Call { call: "epoll_ctl", source: error.into() })
}

/// Sends what fits without waiting; the descriptors travel with the first byte. `None`: nothing fits now.
///
/// # Errors
/// What `sendmsg` said; a closed peer is `EPIPE`, never a signal.
pub fn send(
    socket: impl AsFd,
    bytes: &[IoSlice<'_>],
    fds: &[BorrowedFd<'_>],
) -> Result<Option<usize>, Error> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[_] = if raw.is_empty() { &[] } else { &rights };
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    loop {
        return match sendmsg::<()>(socket.as_fd().as_raw_fd(), bytes, control, flags, None) {
            Ok(sent) => Ok(Some(sent)),
            Err(Errno::EAGAIN) => Ok(None),
            Err(Errno::EINTR) => continue,
            Err(errno) => Err(Error::Call { call: "sendmsg", source: errno.into() }),
        };
    }
}

/// What [`receive`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// This many bytes; never zero.
    Bytes(usize),
    /// Nothing now.
    WouldBlock,
    /// The other end is closed.
    End,
}

/// Reads into `buffer` without waiting, and appends the descriptors that came along, closed on exec.
///
/// # Errors
/// What `recvmsg` said; a message with more descriptors than `max_fds` (at most [`MAX_DESCRIPTORS`]) is `EMFILE`,
/// with none of them kept.
pub fn receive(
    socket: impl AsFd,
    buffer: &mut [u8],
    fds: &mut Vec<OwnedFd>,
    max_fds: usize,
) -> Result<Received, Error> {
    let mut space = (max_fds > 0).then(|| cmsg_space!([RawFd; MAX_DESCRIPTORS]));
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let mut slices = [IoSliceMut::new(buffer)];
    let message = loop {
        match recvmsg::<()>(socket.as_fd().as_raw_fd(), &mut slices, space.as_deref_mut(), flags) {
            Ok(message) => break message,
            Err(Errno::EAGAIN) => return Ok(Received::WouldBlock),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(Error::Call { call: "recvmsg", source: errno.into() }),
        }
    };
    let mut came = Vec::new();
    let truncated = message.flags.contains(MsgFlags::MSG_CTRUNC);
    if let Ok(control) = message.cmsgs() {
        for part in control {
            if let ControlMessageOwned::ScmRights(raw) = part {
                // SAFETY: the kernel has just made these descriptors for this process, and nothing else knows them.
                came.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
    }
    if truncated || came.len() > max_fds {
        return Err(Error::Call { call: "recvmsg", source: Errno::EMFILE.into() });
    }
    fds.append(&mut came);
    Ok(if message.bytes == 0 { Received::End } else { Received::Bytes(message.bytes) })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs::File;
    use std::io::Read;

    use super::*;

    #[test]
    fn descriptors_travel_with_bytes() {
        let (a, b) = socket_pair().unwrap();
        let (read, write) = nix::unistd::pipe().unwrap();
        assert_eq!(send(&a, &[IoSlice::new(b"hi")], &[read.as_fd()]).unwrap(), Some(2));
        drop(read);

        let (mut buffer, mut fds) = ([0; 10], Vec::new());
        assert_eq!(receive(&b, &mut buffer, &mut fds, 4).unwrap(), Received::Bytes(2));
        assert_eq!((&buffer[..2], fds.len()), (&b"hi"[..], 1));
        nix::unistd::write(&write, b"through").unwrap();
        drop(write);
        let mut text = String::new();
        File::from(fds.pop().unwrap()).read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
    }

    #[test]
    fn nothing_to_read_and_the_end_are_told_apart() {
        let (a, b) = socket_pair().unwrap();
        let (mut buffer, mut fds) = ([0; 10], Vec::new());
        assert_eq!(receive(&b, &mut buffer, &mut fds, 0).unwrap(), Received::WouldBlock);
        drop(a);
        assert_eq!(receive(&b, &mut buffer, &mut fds, 0).unwrap(), Received::End);
        assert!(send(&b, &[IoSlice::new(b"x")], &[]).is_err());
    }

    #[test]
    fn a_full_socket_refuses_without_waiting() {
        let (a, _b) = socket_pair().unwrap();
        let chunk = [0; 65536];
        while send(&a, &[IoSlice::new(&chunk)], &[]).unwrap().is_some() {}
    }

    #[test]
    fn too_many_descriptors_are_refused_and_closed() {
        let (a, b) = socket_pair().unwrap();
        let fds = [a.as_fd(); 3];
        send(&a, &[IoSlice::new(b"x")], &fds).unwrap();
        let (mut buffer, mut got) = ([0; 10], Vec::new());
        assert!(receive(&b, &mut buffer, &mut got, 2).is_err());
        assert!(got.is_empty());
    }
}
