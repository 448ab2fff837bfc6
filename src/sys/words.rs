//! A few 64 bit words that two processes read and write at once.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};

use super::{Error, memfd};

/// `MEMBARRIER_CMD_GLOBAL_EXPEDITED` of `linux/membarrier.h`.
const MEMBARRIER_CMD_GLOBAL_EXPEDITED: libc::c_int = 1 << 1;

/// Where the room begins, in bytes.
pub const ROOM_OFFSET: usize = 4096;

/// Shared words: this process's writable mapping and the memfd another process maps.
#[derive(Debug)]
pub struct SharedWords {
    map: MmapRaw,
    fd: File,
}

impl SharedWords {
    /// `count` words, all zero.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn create(name: &str, count: usize) -> Result<Self, Error> {
        Self::create_with_room(name, count, 0)
    }

    /// `count` words, at most [`ROOM_OFFSET`] bytes of them, and `room` bytes from there on for the other process to
    /// leave something in.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn create_with_room(name: &str, count: usize, room: usize) -> Result<Self, Error> {
        let len = count * size_of::<u64>();
        let size = if room == 0 { len } else { ROOM_OFFSET + room };
        let fd = memfd::create(name, size as u64)?;
        // the other process may write, but must not take pages away under this mapping
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(seals)).map_err(Error::call("fcntl(F_ADD_SEALS)"))?;
        let map = MmapOptions::new().len(len).map_raw(fd.as_raw_fd()).map_err(Error::call("mmap"))?;
        Ok(SharedWords { map, fd: fd.into() })
    }

    /// Copies from the room, beginning at `offset` in it. The other process may be writing there.
    ///
    /// # Errors
    /// What `pread` said, or that the region is outside the room.
    pub fn copy_from_room(&self, offset: u64, place: &mut [u8]) -> Result<(), Error> {
        let offset = offset.saturating_add(ROOM_OFFSET as u64);
        self.fd.read_exact_at(place, offset).map_err(Error::call("pread"))
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
    fn the_room_is_read_within_its_bounds() {
        let words = SharedWords::create_with_room("test", 4, 100).unwrap();
        let mut file = words.fd.try_clone().unwrap();
        std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(ROOM_OFFSET as u64 + 97)).unwrap();
        std::io::Write::write_all(&mut file, b"abc").unwrap();
        let mut place = [0; 3];
        words.copy_from_room(97, &mut place).unwrap();
        assert_eq!(&place, b"abc");
        for offset in [98, 100, u64::MAX] {
            assert!(words.copy_from_room(offset, &mut place).is_err());
        }
    }

    #[test]
    #[should_panic(expected = "outside the mapping")]
    fn words_outside_panic() {
        SharedWords::create("test", 4).unwrap().word(4);
    }
}
