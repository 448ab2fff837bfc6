//! The file that `dask scheduler --scheduler-file` writes: waited for, and read once it is whole.

use std::path::Path;
use std::time::Duration;

use serde::Deserialize;
use tokio::time::{Instant, sleep};

use crate::proto::Address;

use super::keys::NO_TLS;

/// Time between two looks, as `distributed.utils.json_load_robust`.
const INTERVAL: Duration = Duration::from_millis(100);

/// Why the file gives no scheduler.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It was not there, or not whole, for the whole death timeout.
    #[error("no scheduler file {path} after {seconds} s", path = path.display(), seconds = timeout.as_secs_f64())]
    Timeout { path: std::path::PathBuf, timeout: Duration },
    /// Its address is not one this worker can use.
    #[error("bad scheduler address {address:?} in {path}: {reason}", path = path.display())]
    Address { path: std::path::PathBuf, address: String, reason: String },
}

#[derive(Deserialize)]
struct Identity {
    address: String,
}

/// Waits for the file and reads the scheduler's address out of it; for ever without a timeout.
///
/// # Errors
/// See [`Error`]. A file that is half written is waited for, as one that is not there.
pub async fn wait(path: &Path, timeout: Option<Duration>) -> Result<Address, Error> {
    let start = Instant::now();
    let mut told = false;
    loop {
        if let Ok(text) = std::fs::read(path)
            && let Ok(identity) = serde_json::from_slice::<Identity>(&text)
        {
            return address(path, identity.address);
        }
        if let Some(timeout) = timeout.filter(|timeout| start.elapsed() >= *timeout) {
            return Err(Error::Timeout { path: path.to_owned(), timeout });
        }
        if !std::mem::replace(&mut told, true) {
            tracing::info!("Waiting for the scheduler file {}", path.display());
        }
        sleep(INTERVAL).await;
    }
}

fn address(path: &Path, address: String) -> Result<Address, Error> {
    let wrong = |reason: String| Error::Address { path: path.to_owned(), address: address.clone(), reason };
    let parsed = Address::parse(&address).map_err(|error| wrong(error.to_string()))?;
    if parsed.scheme() == "tls" { Err(wrong(NO_TLS.to_owned())) } else { Ok(parsed) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_file_that_grows_is_read_once_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("scheduler.json");
        let waiting = tokio::spawn({
            let path = path.clone();
            async move { wait(&path, None).await }
        });
        sleep(INTERVAL * 2).await;
        std::fs::write(&path, r#"{"type": "Scheduler", "addr"#).unwrap();
        sleep(INTERVAL * 2).await;
        assert!(!waiting.is_finished());
        std::fs::write(&path, r#"{"type": "Scheduler", "address": "tcp://10.0.0.1:8786"}"#).unwrap();
        assert_eq!(waiting.await.unwrap().unwrap().as_str(), "tcp://10.0.0.1:8786");
    }

    #[tokio::test(start_paused = true)]
    async fn the_death_timeout_ends_the_wait() {
        let gone = wait(Path::new("/nonexistent/s.json"), Some(Duration::from_secs(5))).await;
        assert!(matches!(gone, Err(Error::Timeout { .. })));
    }
}
