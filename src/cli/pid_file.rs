//! The file of `--pid-file`: this process's number while it lives.

use std::io;
use std::path::{Path, PathBuf};

/// The file; removed when dropped.
#[derive(Debug)]
pub struct PidFile(PathBuf);

impl PidFile {
    /// Writes the number, over whatever was there.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(path: &Path) -> io::Result<Self> {
        std::fs::write(path, std::process::id().to_string())?;
        Ok(PidFile(path.to_owned()))
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // somebody may have removed it already
        let _ = std::fs::remove_file(&self.0);
    }
}
