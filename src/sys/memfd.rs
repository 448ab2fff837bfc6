//! Anonymous shared memory that can be sealed, and read-only mappings of it.
//!
//! Only sealed memory is ever mapped for reading, so what a `&[u8]` points at can neither change nor go away.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use memmap2::{Mmap, MmapMut, MmapOptions};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{Resource, getrlimit};

use super::Error;

/// The seals that make a memfd's contents and size final.
const FINAL: SealFlag = SealFlag::F_SEAL_WRITE.union(SealFlag::F_SEAL_SHRINK).union(SealFlag::F_SEAL_GROW);

/// How often sealing is tried again; each attempt waits for up to 0.15 s.
const SEAL_ATTEMPTS: u32 = 30;

/// `MFD_NOEXEC_SEAL`: not executable and never to be. Kernels before 6.3 refuse it.
const NOEXEC_SEAL: MFdFlags = MFdFlags::from_bits_retain(0x8);

/// A memfd whose contents and size are final. Cloning is a reference count.
#[derive(Clone, Debug)]
pub struct Memfd {
    fd: Arc<OwnedFd>,
    len: u64,
}

impl Memfd {
    /// Takes a memfd from another process, which need not be honest.
    ///
    /// # Errors
    /// [`Error::NotSealed`] unless it is a memfd sealed against writing, shrinking and growing.
    pub fn from_untrusted(fd: OwnedFd) -> Result<Self, Error> {
        // only memfds (and hugetlbfs files, as good) know seals: anything else answers EINVAL
        let seals = fcntl(&fd, FcntlArg::F_GET_SEALS).map_err(|_| Error::NotSealed)?;
        if !SealFlag::from_bits_retain(seals).contains(FINAL) {
            return Err(Error::NotSealed);
        }
        let file = File::from(fd);
        let len = file.metadata().map_err(Error::call("fstat"))?.len();
        Ok(Memfd { fd: Arc::new(file.into()), len })
    }

    /// Bytes in it.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The descriptor, to be shared.
    pub fn fd(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    /// Maps a region for reading. The mapping outlives the descriptor.
    ///
    /// # Errors
    /// [`Error::OutOfRange`], or what `mmap` said.
    pub fn map(&self, offset: u64, len: u64) -> Result<Mapping, Error> {
        let end = offset.checked_add(len).filter(|end| *end <= self.len);
        let (Some(_), Ok(bytes)) = (end, usize::try_from(len)) else {
            return Err(Error::OutOfRange { offset, len, size: self.len });
        };
        if bytes == 0 {
            return Ok(Mapping::empty());
        }
        // SAFETY: the memfd is sealed against writing and shrinking (the invariant of this type), so the mapped
        // bytes never change and never go away; the region was checked against its size, which is final too.
        let map = unsafe { MmapOptions::new().offset(offset).len(bytes).map(self.fd.as_raw_fd()) }
            .map_err(Error::call("mmap"))?;
        Ok(Mapping::new(map))
    }
}

impl AsFd for Memfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A memfd being filled by this process, which no other process has yet.
#[derive(Debug)]
pub struct MemfdMut {
    fd: OwnedFd,
    map: Option<MmapMut>,
    len: u64,
}

impl MemfdMut {
    /// `len` bytes of zeros; `name` shows in `/proc/PID/maps`.
    ///
    /// # Errors
    /// What the kernel said: too many descriptors, no memory.
    pub fn create(name: &str, len: u64) -> Result<Self, Error> {
        let fd = create(name, len)?;
        let bytes = usize::try_from(len).map_err(|_| Error::OutOfRange { offset: 0, len, size: len })?;
        let map = if bytes == 0 {
            None
        } else {
            // SAFETY: the memfd was made here and its descriptor is private to this value, so nothing else writes,
            // shrinks or maps it while the mapping lives.
            Some(
                unsafe { MmapOptions::new().len(bytes).map_mut(fd.as_raw_fd()) }
                    .map_err(Error::call("mmap"))?,
            )
        };
        Ok(MemfdMut { fd, map, len })
    }

    /// Unmaps it and makes contents and size final.
    ///
    /// # Errors
    /// What `fcntl` said.
    pub fn seal(self) -> Result<Memfd, Error> {
        let MemfdMut { fd, map, len } = self;
        drop(map);
        // the kernel waits while it holds on to one of the pages, as when it moves them, but not long
        let mut sealed = fcntl(&fd, FcntlArg::F_ADD_SEALS(FINAL));
        for _ in 0..SEAL_ATTEMPTS {
            if sealed != Err(Errno::EBUSY) {
                break;
            }
            sealed = fcntl(&fd, FcntlArg::F_ADD_SEALS(FINAL));
        }
        sealed.map_err(Error::call("fcntl(F_ADD_SEALS)"))?;
        Ok(Memfd { fd: Arc::new(fd), len })
    }
}

impl AsMut<[u8]> for MemfdMut {
    fn as_mut(&mut self) -> &mut [u8] {
        self.map.as_deref_mut().unwrap_or_default()
    }
}

/// A new memfd of `len` bytes that can be sealed.
pub(super) fn create(name: &str, len: u64) -> Result<OwnedFd, Error> {
    let name = CString::new(name.replace('\0', "")).unwrap_or_default();
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let fd = match memfd_create(name.as_c_str(), flags | NOEXEC_SEAL) {
        Err(Errno::EINVAL) => memfd_create(name.as_c_str(), flags),
        made => made,
    }
    .map_err(Error::call("memfd_create"))?;
    let file = File::from(fd);
    file.set_len(len).map_err(Error::call("ftruncate"))?;
    Ok(file.into())
}

/// Mappings alive in this process. Each usually stands for a descriptor too.
static MAPPINGS: AtomicUsize = AtomicUsize::new(0);

/// Whether this process has used up half of the mappings or descriptors that it may have: then small objects should
/// not take one each.
pub fn memory_is_crowded() -> bool {
    static ROOM: OnceLock<usize> = OnceLock::new();
    let room = *ROOM.get_or_init(|| {
        let maps = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap_or_default();
        let maps: u64 = maps.trim().parse().unwrap_or(u64::MAX);
        let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft);
        usize::try_from(maps.min(descriptors) / 2).unwrap_or(usize::MAX)
    });
    MAPPINGS.load(Ordering::Relaxed) >= room
}

/// A read-only view of sealed memory or a final file; `bytes::Bytes::from_owner` takes it.
#[derive(Debug)]
pub struct Mapping(Option<Mmap>);

impl Mapping {
    /// A view of memory that stays as it is.
    pub(super) fn new(map: Mmap) -> Self {
        MAPPINGS.fetch_add(1, Ordering::Relaxed);
        Mapping(Some(map))
    }

    /// A view of nothing, which cannot be mapped.
    pub(super) fn empty() -> Self {
        Mapping(None)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.0.is_some() {
            MAPPINGS.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl AsRef<[u8]> for Mapping {
    fn as_ref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn what_was_written_is_read_through_the_mapping() {
        let mut segment = MemfdMut::create("test", 10_000).unwrap();
        segment.as_mut()[5000..5003].copy_from_slice(b"abc");
        let memfd = segment.seal().unwrap();
        let bytes = Bytes::from_owner(memfd.map(4999, 5).unwrap());
        drop(memfd);
        assert_eq!(&bytes[..], b"\0abc\0");
    }

    #[test]
    fn regions_past_the_end_are_refused() {
        let memfd = MemfdMut::create("test", 10).unwrap().seal().unwrap();
        assert!(matches!(memfd.map(8, 3), Err(Error::OutOfRange { .. })));
        assert!(matches!(memfd.map(u64::MAX, 2), Err(Error::OutOfRange { .. })));
        assert_eq!(memfd.map(10, 0).unwrap().as_ref(), b"");
    }

    #[test]
    fn only_final_memory_is_taken_from_others() {
        let open = create("test", 10).unwrap();
        assert!(matches!(Memfd::from_untrusted(open.try_clone().unwrap()), Err(Error::NotSealed)));
        fcntl(&open, FcntlArg::F_ADD_SEALS(FINAL)).unwrap();
        assert_eq!(Memfd::from_untrusted(open).unwrap().len(), 10);

        let file = File::open("/dev/null").unwrap();
        assert!(matches!(Memfd::from_untrusted(file.into()), Err(Error::NotSealed)));
    }

    #[test]
    fn nobody_writes_to_sealed_memory() {
        use std::io::Write;
        let memfd = MemfdMut::create("test", 10).unwrap().seal().unwrap();
        let mut file = File::from(memfd.fd().try_clone().unwrap());
        assert!(file.write_all(b"x").is_err());
        assert!(file.set_len(1).is_err());
    }

    #[test]
    fn empty_memory_works() {
        let mut empty = MemfdMut::create("test", 0).unwrap();
        assert!(empty.as_mut().is_empty());
        assert!(empty.seal().unwrap().is_empty());
    }
}
