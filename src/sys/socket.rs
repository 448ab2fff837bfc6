//! Unix sockets that carry descriptors next to their bytes.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair};
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

/// Has the runtime watch a descriptor of somebody else, by a copy. Must be called in one.
///
/// # Errors
/// What `fcntl` or `epoll_ctl` said.
pub fn watch_again(fd: impl AsFd, interest: Interest) -> Result<AsyncFd<OwnedFd>, Error> {
    watch(fd.as_fd().try_clone_to_owned().map_err(Error::call("fcntl(F_DUPFD)"))?, interest)
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
/// What `recvmsg` said. A message with more descriptors than `max_fds` (at most [`MAX_DESCRIPTORS`]), or more than this
/// process may have, is `EMFILE`, and none of them stays open.
pub fn receive(
    socket: impl AsFd,
    buffer: &mut [u8],
    fds: &mut Vec<OwnedFd>,
    max_fds: usize,
) -> Result<Received, Error> {
    let mut control = [0u64; CONTROL_WORDS];
    let mut slice = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: zero is a valid value of every field (no name, no slices, no control data).
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut slice;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control) as _;
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    let count = loop {
        // SAFETY: the header points at `slice`, which is `buffer`, and at `control`, both writable and of the lengths
        // given, and both outlive the call.
        let count = unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &mut message, flags) };
        match Errno::result(count) {
            Ok(count) => break count as usize,
            Err(Errno::EAGAIN) => return Ok(Received::WouldBlock),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(Error::Call { call: "recvmsg", source: errno.into() }),
        }
    };
    let known = fds.len();
    take_descriptors(&message, fds);
    if message.msg_flags & libc::MSG_CTRUNC != 0 || fds.len() - known > max_fds {
        fds.truncate(known);
        return Err(Error::Call { call: "recvmsg", source: Errno::EMFILE.into() });
    }
    Ok(if count == 0 { Received::End } else { Received::Bytes(count) })
}

/// Room for a control message with [`MAX_DESCRIPTORS`] descriptors, aligned as its header must be.
const CONTROL_WORDS: usize =
    // SAFETY: arithmetic on its argument only.
    unsafe { libc::CMSG_SPACE((MAX_DESCRIPTORS * size_of::<RawFd>()) as u32) as usize }.div_ceil(8);

/// Takes the descriptors out of what `recvmsg` has just filled in, also when it could not fill in all.
fn take_descriptors(message: &libc::msghdr, fds: &mut Vec<OwnedFd>) {
    // SAFETY: `message` was filled in by `recvmsg`, and its control buffer is alive: the headers found by these macros
    // lie in it, and the kernel has set their lengths.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(message) };
    // SAFETY: as above; null is the end.
    while let Some(header) = unsafe { next.as_ref() } {
        if header.cmsg_level == libc::SOL_SOCKET && header.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: arithmetic on its argument only.
            let head = unsafe { libc::CMSG_LEN(0) } as usize;
            let count = header.cmsg_len.saturating_sub(head) / size_of::<RawFd>();
            // SAFETY: the data of this header, of the length the kernel wrote.
            let data = unsafe { libc::CMSG_DATA(header) }.cast::<RawFd>();
            for index in 0..count {
                // SAFETY: in bounds, as above; the kernel has just made this descriptor for this process, and nothing
                // else knows it.
                fds.push(unsafe { OwnedFd::from_raw_fd(data.add(index).read_unaligned()) });
            }
        }
        // SAFETY: `header` is one of this message's.
        next = unsafe { libc::CMSG_NXTHDR(message, header) };
    }
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
    fn as_many_descriptors_as_the_kernel_takes_arrive() {
        let (a, b) = socket_pair().unwrap();
        send(&a, &[IoSlice::new(b"x")], &[a.as_fd(); MAX_DESCRIPTORS]).unwrap();
        let (mut buffer, mut got) = ([0; 10], Vec::new());
        assert_eq!(receive(&b, &mut buffer, &mut got, MAX_DESCRIPTORS).unwrap(), Received::Bytes(1));
        assert_eq!(got.len(), MAX_DESCRIPTORS);
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
