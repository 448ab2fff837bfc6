//! Shared memory that this process alone writes, from its beginning to its end and each byte once.
//!
//! What was written is final, so it can be read while more is added behind it; others can map it and not write to it.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};

use super::{Error, memfd};

/// The writing end: there is one, as it cannot be cloned.
#[derive(Debug)]
pub struct Appender {
    memory: Arc<Memory>,
    end: usize,
}

#[derive(Debug)]
struct Memory {
    map: MmapRaw,
    fd: Arc<OwnedFd>,
}

impl Appender {
    /// Room for `len` bytes; pages are taken as they are written. `name` shows in `/proc/PID/maps`.
    ///
    /// # Errors
    /// What the kernel said: too many descriptors, no memory.
    pub fn create(name: &str, len: usize) -> Result<Self, Error> {
        let fd = memfd::create(name, len as u64)?;
        let map = MmapOptions::new().len(len).map_raw(fd.as_raw_fd()).map_err(Error::call("mmap"))?;
        // from here on nobody can write to it but by the mapping just made
        let seals = SealFlag::F_SEAL_FUTURE_WRITE
            | SealFlag::F_SEAL_SHRINK
            | SealFlag::F_SEAL_GROW
            | SealFlag::F_SEAL_SEAL;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(seals)).map_err(Error::call("fcntl(F_ADD_SEALS)"))?;
        Ok(Appender { memory: Arc::new(Memory { map, fd: Arc::new(fd) }), end: 0 })
    }

    /// Bytes that can still be written.
    pub fn room(&self) -> usize {
        self.memory.map.len() - self.end
    }

    /// Bytes written.
    pub fn end(&self) -> usize {
        self.end
    }

    /// Leaves bytes out, so that the next ones begin at a multiple of `alignment`.
    pub fn align(&mut self, alignment: usize) {
        self.end = self.end.next_multiple_of(alignment).min(self.memory.map.len());
    }

    /// Adds `len` bytes, which `fill` writes; panics when there is no room for them. After an error they are lost.
    ///
    /// # Errors
    /// Those of `fill`.
    pub fn append<E>(
        &mut self,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<Appended, E> {
        assert!(len <= self.room(), "{len} bytes do not fit");
        let offset = self.end;
        self.end += len;
        // SAFETY: in bounds (asserted). The region is this call's alone: `end` never goes back and `self` is the only
        // writer, so no slice of it was or will be handed out but the read-only ones of the `Appended` made below, after
        // this one is gone. The memory is initialised (zeros of the kernel).
        let place = unsafe { std::slice::from_raw_parts_mut(self.memory.map.as_mut_ptr().add(offset), len) };
        fill(place)?;
        Ok(Appended { memory: self.memory.clone(), offset, len })
    }
}

/// Bytes written, for reading; keeps the memory alive. `bytes::Bytes::from_owner` takes it.
#[derive(Debug)]
pub struct Appended {
    memory: Arc<Memory>,
    offset: usize,
    len: usize,
}

impl Appended {
    /// The memfd, for other processes.
    pub fn fd(&self) -> &Arc<OwnedFd> {
        &self.memory.fd
    }

    /// Bytes before these in the memfd.
    pub fn offset(&self) -> usize {
        self.offset
    }
}

impl AsRef<[u8]> for Appended {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: in bounds, as checked when it was written, and the mapping lives as long as `memory`. Nobody writes
        // here again: this process does not (see `append`), others cannot (the seal), nor can they shrink the memory.
        unsafe { std::slice::from_raw_parts(self.memory.map.as_ptr().add(self.offset), self.len) }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    use super::*;

    fn append(memory: &mut Appender, bytes: &[u8]) -> Appended {
        let fill = |place: &mut [u8]| {
            place.copy_from_slice(bytes);
            Ok::<_, Error>(())
        };
        memory.append(bytes.len(), fill).unwrap()
    }

    #[test]
    fn bytes_lie_behind_each_other_and_others_read_them() {
        let mut memory = Appender::create("test", 1000).unwrap();
        let first = append(&mut memory, b"abc");
        memory.align(64);
        let second = append(&mut memory, b"de");
        assert_eq!((first.as_ref(), second.as_ref()), (&b"abc"[..], &b"de"[..]));
        assert_eq!((second.offset(), memory.end(), memory.room()), (64, 66, 934));
        let file = File::from(second.fd().try_clone().unwrap());
        drop((memory, first, second));
        let mut seen = [0; 3];
        file.read_exact_at(&mut seen, 63).unwrap();
        assert_eq!(&seen, b"\0de");
    }

    #[test]
    fn nobody_else_writes() {
        let mut memory = Appender::create("test", 8192).unwrap();
        let bytes = append(&mut memory, b"abc");
        let mut file = File::from(bytes.fd().try_clone().unwrap());
        assert!(file.write_all(b"x").is_err());
        assert!(file.set_len(1).is_err());
        assert!(MmapOptions::new().len(8192).map_raw(&file).is_err());
        let again = File::options().write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd()));
        assert!(again.and_then(|mut file| file.write_all(b"x")).is_err());
        assert_eq!(append(&mut memory, b"d").as_ref(), b"d");
    }

    #[test]
    #[should_panic(expected = "do not fit")]
    fn more_than_there_is_room_for_panics() {
        let mut memory = Appender::create("test", 10).unwrap();
        append(&mut memory, b"12345678");
        append(&mut memory, b"901");
    }
}
