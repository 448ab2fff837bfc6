//! Work directories on disk: one `worker-XXXXXXXX` in `dask-scratch-space` for each worker, locked while it is in use.
//!
//! The same names, locks (`flock`) and clean-up as `distributed/diskutils.py`, since stock workers on the machine share the
//! folder. What goes into a work directory is its owner's business.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

const LOCK_EXTENSION: &str = ".dirlock";

/// Why there is no work directory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A folder cannot be made.
    #[error("cannot create {}, choose a writable --local-directory", path.display())]
    Create {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A file in it cannot be written.
    #[error("cannot write to {}, choose a writable --local-directory", path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// What the system said.
    pub fn io(&self) -> &io::Error {
        match self {
            Error::Create { source, .. } | Error::Write { source, .. } => source,
        }
    }
}

/// The folder that holds the work directories.
#[derive(Clone, Debug)]
pub struct WorkSpace {
    base: PathBuf,
    locking: bool,
}

impl WorkSpace {
    /// Makes the folder, or one beside it where another user's is in the way, as `WorkSpace._init_workspace`.
    ///
    /// Without `locking` nothing is locked and nothing left behind by others is removed.
    ///
    /// # Errors
    /// No such folder can be made or written to.
    pub fn open(base: &Path, locking: bool) -> Result<Self, Error> {
        let of_user = sibling(base, &format!("-{}", nix::unistd::getuid()));
        for candidate in [base.to_owned(), of_user] {
            if make(&candidate)? || writable(&candidate)? {
                return Ok(WorkSpace { base: candidate, locking });
            }
        }
        let base = fresh_directory(&sibling(base, "-"))?;
        Ok(WorkSpace { base, locking })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.base
    }

    /// Makes and locks a work directory, after removing those whose owners are gone.
    ///
    /// # Errors
    /// The directory or its lock cannot be made.
    pub fn work_dir(&self) -> Result<WorkDir, Error> {
        if self.locking {
            self.purge();
        }
        let path = fresh_directory(&self.base.join("worker-"))?;
        let lock = if self.locking { Some(self.lock_new(&path)?) } else { None };
        Ok(WorkDir { path, lock })
    }

    /// Locks a new directory; the global lock keeps others from taking the fresh lock file for a stale one.
    fn lock_new(&self, path: &Path) -> Result<(PathBuf, Flock<File>), Error> {
        let lock_path = sibling(path, LOCK_EXTENSION);
        let failed = |source: io::Error| Error::Write { path: lock_path.clone(), source };
        let taken = |(_, error): (File, Errno)| failed(error.into());
        let global = open_lock(&self.base.join("global.lock")).map_err(failed)?;
        let global = Flock::lock(global, FlockArg::LockExclusive).map_err(taken)?;
        let own = open_lock(&lock_path).map_err(failed)?;
        let own = Flock::lock(own, FlockArg::LockExclusiveNonblock).map_err(taken)?;
        drop(global);
        Ok((lock_path, own))
    }

    /// Removes the directories whose locks nobody holds, as `WorkSpace._purge_leftovers`. What cannot be removed stays.
    fn purge(&self) {
        let exclusively = |name: &str| {
            let file = open_lock(&self.base.join(name)).ok()?;
            Flock::lock(file, FlockArg::LockExclusiveNonblock).ok()
        };
        // somebody else is at work in here: no need to wait for that
        let Some(global) = exclusively("global.lock") else { return };
        let locks = self.locks();
        drop(global);
        let Some(_purging) = exclusively("purge.lock") else { return };
        for lock in locks {
            purge_if_stale(&lock);
        }
    }

    fn locks(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(&self.base).into_iter().flatten().flatten();
        let files = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()));
        let paths = files.map(|entry| entry.path());
        paths.filter(|path| path.to_string_lossy().ends_with(LOCK_EXTENSION)).collect()
    }
}

/// Removes the directory of a lock that nobody holds, and the lock.
fn purge_if_stale(lock_path: &Path) {
    let Ok(file) = OpenOptions::new().write(true).open(lock_path) else { return };
    let Ok(_lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { return };
    let directory = lock_path.with_extension("");
    if directory.exists() {
        tracing::info!("Found stale lock file and directory '{}', purging", directory.display());
        remove(&directory);
    }
    // somebody else may have removed it in the meantime
    let _ = std::fs::remove_file(lock_path);
}

fn remove(directory: &Path) {
    if let Err(error) = std::fs::remove_dir_all(directory)
        && error.kind() != ErrorKind::NotFound
    {
        tracing::warn!("Failed to remove '{}': {error}", directory.display());
    }
}

/// A worker's own directory; removed, with its lock, when dropped.
#[derive(Debug)]
pub struct WorkDir {
    path: PathBuf,
    lock: Option<(PathBuf, Flock<File>)>,
}

impl WorkDir {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        remove(&self.path);
        if let Some((path, lock)) = self.lock.take() {
            drop(lock);
            let _ = std::fs::remove_file(path);
        }
    }
}

/// The path with something added to its last part.
fn sibling(path: &Path, suffix: &str) -> PathBuf {
    let mut text = path.as_os_str().to_owned();
    text.push(suffix);
    PathBuf::from(text)
}

/// Makes a folder and those above it; false where there is something already.
fn make(path: &Path) -> Result<bool, Error> {
    let failed = |source| Error::Create { path: path.to_owned(), source };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(failed)?;
    }
    match std::fs::create_dir(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(failed(error)),
    }
}

/// Whether files can be made in a folder that was there before.
fn writable(path: &Path) -> Result<bool, Error> {
    let probe = path.join(format!("tmp{}", random_name()));
    match File::create_new(&probe) {
        Ok(_) => {
            // at worst an empty file stays behind
            let _ = std::fs::remove_file(&probe);
            Ok(true)
        }
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Ok(false),
        Err(source) => Err(Error::Write { path: path.to_owned(), source }),
    }
}

/// Makes a folder that only its owner may look into, its name ending at random, as `tempfile.mkdtemp`.
fn fresh_directory(prefix: &Path) -> Result<PathBuf, Error> {
    loop {
        let path = sibling(prefix, &random_name());
        match DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => return Ok(path),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(source) => return Err(Error::Create { path, source }),
        }
    }
}

fn random_name() -> String {
    std::iter::repeat_with(fastrand::alphanumeric).take(8).map(|c| c.to_ascii_lowercase()).collect()
}

fn open_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(false).open(path)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_work_directory_goes_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let space = WorkSpace::open(&dir.path().join("a/dask-scratch-space"), true).unwrap();
        let work = space.work_dir().unwrap();
        let path = work.path().to_owned();
        std::fs::write(path.join("file"), "x").unwrap();
        assert!(path.file_name().unwrap().to_str().unwrap().starts_with("worker-"));
        assert!(sibling(&path, LOCK_EXTENSION).exists());
        drop(work);
        assert!(!path.exists() && !sibling(&path, LOCK_EXTENSION).exists());
    }

    #[test]
    fn stale_directories_are_purged_and_live_ones_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let space = WorkSpace::open(dir.path(), true).unwrap();
        let live = space.work_dir().unwrap();
        let stale = dir.path().join("worker-stale");
        std::fs::create_dir_all(stale.join("storage")).unwrap();
        std::fs::write(sibling(&stale, LOCK_EXTENSION), "").unwrap();
        let next = space.work_dir().unwrap();
        assert!(live.path().exists() && next.path().exists());
        assert!(!stale.exists() && !sibling(&stale, LOCK_EXTENSION).exists());
    }

    #[test]
    fn a_place_that_cannot_be_made_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let message = WorkSpace::open(&file.join("x"), true).unwrap_err().to_string();
        assert!(message.contains("--local-directory"), "{message}");
        assert!(WorkSpace::open(&file, true).is_err());
    }
}
