//! A few 64 bit words that two processes read and write at once.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering, fence};

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};

use super::{Error, memfd};

/// `MEMBARRIER_CMD_GLOBAL_EXPEDITED` of `linux/membarrier.h`.
const MEMBARRIER_CMD_GLOBAL_EXPEDITED: libc::c_int = 1 << 1;

/// Shared words: this process's writable mapping and the memfd another process maps.
#[derive(Debug)]
pub struct SharedWords {
    map: MmapRaw,
    fd: OwnedFd,
}

impl SharedWords {
    /// `count` words, all zero.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn create(name: &str, count: usize) -> Result<Self, Error> {
        let len = count * size_of::<u64>();
        let fd = memfd::create(name, len as u64)?;
        // the other process may write, but must not take pages away under this mapping
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(seals)).map_err(Error::call("fcntl(F_ADD_SEALS)"))?;
        let map = MmapOptions::new().len(len).map_raw(fd.as_raw_fd()).map_err(Error::call("mmap"))?;
        Ok(SharedWords { map, fd })
    }

    /// Word `index`; panics when there are not that many.
    pub fn word(&self, index: usize) -> &AtomicU64 {
        assert!((index + 1) * size_of::<u64>() <= self.map.len(), "word {index} is outside the mapping");
        // SAFETY: in bounds (asserted), aligned (a mapping begins at a page), valid as long as `self` (the size is
        // sealed), and only ever used as an atomic here; the other process writes it with single aligned stores.
        unsafe { AtomicU64::from_ptr(self.map.as_mut_ptr().cast::<u64>().add(index)) }
    }
}

impl AsFd for SharedWords {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A full memory barrier in this thread and in every running thread of the processes that registered for it
/// (`MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED`), so that they need none of their own.
///
/// False when the kernel has no such call: the other side must then bring its own barrier.
pub fn barrier_between_processes() -> bool {
    fence(Ordering::SeqCst);
    // SAFETY: no pointers; an unknown command fails with EINVAL.
    let done = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL_EXPEDITED, 0, 0) };
    fence(Ordering::SeqCst);
    done == 0
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn words_are_separate_and_shared() {
        let words = SharedWords::create("test", 4).unwrap();
        words.word(3).store(7, Ordering::SeqCst);
        assert_eq!(words.word(2).load(Ordering::SeqCst), 0);

        let other = MmapOptions::new().map_raw(words.as_fd().as_raw_fd()).unwrap();
        assert_eq!(other.len(), 32);
        // SAFETY: in bounds and aligned, as above.
        let seen = unsafe { AtomicU64::from_ptr(other.as_mut_ptr().cast::<u64>().add(3)) };
        assert_eq!(seen.load(Ordering::SeqCst), 7);
    }

    #[test]
    #[should_panic(expected = "outside the mapping")]
    fn words_outside_panic() {
        SharedWords::create("test", 4).unwrap().word(4);
    }
}
