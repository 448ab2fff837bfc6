//! Files that this process has written and that nobody writes any more: they can be mapped like sealed memory.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use memmap2::MmapOptions;
use nix::errno::Errno;
use nix::sys::signal::{SigHandler, Signal, signal};

use super::{Error, Mapping};

/// Bits of a mode that let others than the owner in.
const OTHERS: u32 = 0o077;

/// A private file whose contents are final, open for reading. Cloning is a reference count.
#[derive(Clone, Debug)]
pub struct FinalFile {
    file: Arc<File>,
    len: u64,
}

impl FinalFile {
    /// A new, empty file that only this user may open, to be filled and then opened as final.
    ///
    /// # Errors
    /// There is one of that name, or what `open` said.
    pub fn create(path: &Path) -> io::Result<File> {
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
    }

    /// Opens a file that this process has filled and closed.
    ///
    /// # Errors
    /// It is gone, cannot be read, or is not a regular file of this user's that is closed to all others.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
        let facts = file.metadata()?;
        let ours = facts.uid() == nix::unistd::geteuid().as_raw();
        if !facts.is_file() || !ours || facts.mode() & OTHERS != 0 {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "not a private file of this user's"));
        }
        Ok(FinalFile { len: facts.len(), file: Arc::new(file) })
    }

    /// Bytes in it.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The file, to be read.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// A descriptor of it that cannot be written through, to be shared.
    ///
    /// # Errors
    /// There are too many descriptors.
    pub fn share(&self) -> io::Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }

    /// Maps all of it for reading. The mapping outlives the descriptor.
    ///
    /// # Errors
    /// What `mmap` said.
    pub fn map(&self) -> Result<Mapping, Error> {
        let Ok(bytes @ 1..) = usize::try_from(self.len) else { return Ok(Mapping::empty()) };
        // SAFETY: this process made the file, has closed the one descriptor that could write to it, and gives away only
        // ones that cannot; its mode and folder keep other users out. Another process of this user could still cut it,
        // and then could as well write to this process's memory.
        let map = unsafe { MmapOptions::new().len(bytes).map(self.file.as_raw_fd()) };
        Ok(Mapping::new(map.map_err(Error::call("mmap"))?))
    }
}

/// Has writing past the limit of file sizes (`RLIMIT_FSIZE`) fail instead of ending this process.
///
/// # Errors
/// What `sigaction` said.
pub fn survive_file_size_limit() -> Result<(), Error> {
    // SAFETY: ignoring a signal installs no handler that could run anything.
    let set: Result<_, Errno> = unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) };
    set.map(|_| ()).map_err(Error::call("sigaction"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_was_written_is_mapped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        FinalFile::create(&path).unwrap().write_all(b"abc").unwrap();
        assert!(FinalFile::create(&path).is_err());
        let file = FinalFile::open(&path).unwrap();
        assert_eq!((file.len(), file.map().unwrap().as_ref()), (3, &b"abc"[..]));
        assert!(File::from(file.share().unwrap()).write_all(b"x").is_err());
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn what_others_could_have_written_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("file"), dir.path().join("link"));
        FinalFile::create(&path).unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(FinalFile::open(&link).is_err());
        assert!(FinalFile::open(dir.path()).is_err());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o622)).unwrap();
        assert!(FinalFile::open(&path).is_err());
    }

    #[test]
    fn an_empty_file_works() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        FinalFile::create(&path).unwrap();
        let file = FinalFile::open(&path).unwrap();
        assert!(file.is_empty() && file.map().unwrap().as_ref().is_empty());
    }
}
