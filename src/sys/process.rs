//! Processes: handles that cannot hit a stranger, and what a stub does to itself before it executes another program.

use std::convert::Infallible;
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid, setsid};

use super::Error;

/// A process, named by a descriptor: a signal through it never reaches another process with the same number.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// The process `pid`, which the caller knows not to have been reaped yet.
    ///
    /// # Errors
    /// `ESRCH` when there is none.
    pub fn open(pid: u32) -> Result<Self, Error> {
        // SAFETY: no pointers; the result is checked.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) };
        let fd = Errno::result(fd).map_err(Error::call("pidfd_open"))? as RawFd;
        // SAFETY: the kernel has just made this descriptor for this process, and nothing else knows it.
        Ok(PidFd(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// A pidfd that another process opened. One that is something else makes [`PidFd::kill`] fail, no more.
    pub fn from_fd(fd: OwnedFd) -> Self {
        PidFd(fd)
    }

    /// Sends a signal. A process that is gone is no error.
    ///
    /// # Errors
    /// What `pidfd_send_signal` said.
    pub fn kill(&self, signal: Signal) -> Result<(), Error> {
        // SAFETY: a null siginfo asks for what kill(2) does; there are no other pointers.
        let sent = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.0.as_raw_fd(),
                signal as libc::c_int,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        match Errno::result(sent) {
            Ok(_) | Err(Errno::ESRCH) => Ok(()),
            Err(errno) => Err(Error::Call { call: "pidfd_send_signal", source: errno.into() }),
        }
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Asks for SIGKILL when the thread that made this process ends.
///
/// # Errors
/// `ESRCH` when the parent is no longer `parent`: it died before this could be asked for.
pub fn die_with_parent(parent: u32) -> Result<(), Error> {
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(Error::call("prctl(PR_SET_PDEATHSIG)"))?;
    if getppid() != Pid::from_raw(parent as i32) {
        return Err(Error::Call { call: "getppid", source: Errno::ESRCH.into() });
    }
    Ok(())
}

/// A session of its own: no terminal, and one group to signal.
///
/// # Errors
/// What `setsid` said.
pub fn new_session() -> Result<(), Error> {
    setsid().map(drop).map_err(Error::call("setsid"))
}

/// No core file when this process, or one it makes, crashes, unless it asks for one itself: a core holds users' data.
///
/// # Errors
/// What `setrlimit` said.
pub fn forbid_core_dumps() -> Result<(), Error> {
    let (_, hard) = getrlimit(Resource::RLIMIT_CORE).map_err(Error::call("getrlimit(RLIMIT_CORE)"))?;
    setrlimit(Resource::RLIMIT_CORE, 0, hard).map_err(Error::call("setrlimit(RLIMIT_CORE)"))
}

/// Lets this process, and those it makes, open as many files as it may (a million at most, since some programs walk
/// through all possible descriptors): each large object takes one.
///
/// # Errors
/// What `setrlimit` said.
pub fn raise_descriptor_limit() -> Result<(), Error> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(Error::call("getrlimit(RLIMIT_NOFILE)"))?;
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(1 << 20).max(soft), hard)
        .map_err(Error::call("setrlimit(RLIMIT_NOFILE)"))
}

/// Marks every descriptor from 3 on to be closed on exec, but `keep`, which is left open.
///
/// # Errors
/// What `close_range` or `fcntl` said.
pub fn close_descriptors_except(keep: &[RawFd]) -> Result<(), Error> {
    // SAFETY: no pointers; marking descriptors closes nothing that this process still uses.
    let marked = unsafe {
        libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int)
    };
    Errno::result(marked).map_err(Error::call("close_range"))?;
    for &fd in keep {
        // SAFETY: borrowed for this one call; a number that is not open fails with EBADF.
        keep_descriptor_on_exec(unsafe { BorrowedFd::borrow_raw(fd) })?;
    }
    Ok(())
}

/// Moves standard input to a descriptor of its own, left open on exec, and puts `/dev/null` in its place.
///
/// # Errors
/// What `fcntl`, `open` or `dup2` said.
pub fn detach_stdin() -> Result<RawFd, Error> {
    let moved = fcntl(std::io::stdin(), FcntlArg::F_DUPFD(3)).map_err(Error::call("fcntl(F_DUPFD)"))?;
    let null = File::open("/dev/null").map_err(Error::call("open"))?;
    nix::unistd::dup2_stdin(&null).map_err(Error::call("dup2"))?;
    Ok(moved)
}

/// Leaves one descriptor open in the program executed next.
///
/// # Errors
/// What `fcntl` said.
pub fn keep_descriptor_on_exec(fd: impl AsFd) -> Result<(), Error> {
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).map(drop).map_err(Error::call("fcntl(F_SETFD)"))
}

/// Replaces this process by `program`, looked up on PATH unless it has a slash, with the present environment.
///
/// # Errors
/// What `execvp` said; on success there is nobody to return to.
pub fn exec(program: &OsStr, arguments: &[&OsStr]) -> Result<Infallible, Error> {
    // a NUL cannot come out of argv or a file name; were there one, the program would not be found
    let c = |text: &OsStr| CString::new(text.as_bytes()).unwrap_or_default();
    let argv: Vec<CString> = std::iter::once(program).chain(arguments.iter().copied()).map(c).collect();
    nix::unistd::execvp(&argv[0], &argv).map_err(Error::call("execvp"))
}

/// This program's file, to execute it once more; it still works after the file was replaced by an upgrade.
pub fn own_executable() -> PathBuf {
    PathBuf::from("/proc/self/exe")
}

/// A pipe (read end, write end), closed on exec.
///
/// # Errors
/// What `pipe2` said.
pub fn pipe() -> Result<(OwnedFd, OwnedFd), Error> {
    nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(Error::call("pipe2"))
}

/// Makes reads and writes return at once. It holds for everyone who has the same open file.
///
/// # Errors
/// What `fcntl` said.
pub fn set_nonblocking(fd: impl AsFd) -> Result<(), Error> {
    let fd = fd.as_fd();
    let flags = fcntl(fd, FcntlArg::F_GETFL).map_err(Error::call("fcntl(F_GETFL)"))?;
    let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
    fcntl(fd, FcntlArg::F_SETFL(flags)).map(drop).map_err(Error::call("fcntl(F_SETFL)"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;

    #[test]
    fn a_pidfd_kills_its_process_and_then_nobody() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = PidFd::open(child.id()).unwrap();
        process.kill(Signal::SIGKILL).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
        process.kill(Signal::SIGKILL).unwrap();
    }

    #[test]
    fn a_pidfd_of_nobody_is_an_error() {
        assert!(PidFd::open(u32::MAX / 2 - 1).is_err());
    }
}
