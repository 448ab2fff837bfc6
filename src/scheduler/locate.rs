//! Where the scheduler is: an address, or the file a scheduler writes its address to.
//!
//! Source: `distributed/utils.py: json_load_robust`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::proto::Address;

/// Time between two looks at a file that is not there or not whole.
const INTERVAL: Duration = Duration::from_millis(100);

/// How the scheduler is to be found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// At a fixed address.
    Address(Address),
    /// At the address in this file (`--scheduler-file`), which may come later and change.
    File(PathBuf),
}

impl Location {
    /// The scheduler's address; waits, for ever if need be, for a file that has one.
    pub(super) async fn resolve(&self) -> Address {
        let path = match self {
            Location::Address(address) => return address.clone(),
            Location::File(path) => path,
        };
        let mut told: Option<String> = None;
        loop {
            match read(path).await {
                Ok(address) => return address,
                Err(fault) => {
                    if told.as_ref() != Some(&fault) {
                        let path = path.display();
                        tracing::info!(target: "distributed.worker", "Waiting for scheduler file {path}: {fault}");
                        told = Some(fault);
                    }
                }
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }
}

/// The `address` of a scheduler file, or what is wrong with it just now.
async fn read(path: &Path) -> Result<Address, String> {
    let path = path.to_owned();
    // a file on a shared file system may block; a runtime that is shutting down is no reason to panic
    let text = tokio::task::spawn_blocking(move || std::fs::read(path)).await.map_err(|e| e.to_string())?;
    let text = text.map_err(|error| error.to_string())?;
    // half of a file that is being written is no JSON
    let json: serde_json::Value = serde_json::from_slice(&text).map_err(|_| "not whole yet".to_owned())?;
    let address = json.get("address").and_then(|a| a.as_str()).ok_or("no \"address\" in it")?;
    Address::parse(address).map_err(|error| error.to_string())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_file_that_comes_late_and_in_halves() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("scheduler.json");
        assert!(read(&path).await.unwrap_err().contains("No such file"));
        let resolving = tokio::spawn({
            let location = Location::File(path.clone());
            async move { location.resolve().await }
        });
        std::fs::write(&path, "{\"address\": \"tcp://127").unwrap();
        assert_eq!(read(&path).await.unwrap_err(), "not whole yet");
        std::fs::write(&path, "{\"id\": \"x\"}").unwrap();
        assert!(read(&path).await.unwrap_err().contains("address"));
        std::fs::write(&path, "{\"address\": \"tcp://127.0.0.1:8786\"}").unwrap();
        let address = tokio::time::timeout(Duration::from_secs(10), resolving).await.unwrap().unwrap();
        assert_eq!(address.as_str(), "tcp://127.0.0.1:8786");
    }
}
