//! What the daemon tells about itself: log records, metrics, the pulse of its driver, and the HTTP endpoints that show them.
//!
//! Other rooms only count and log; nothing here knows what a task, a message or a process is.

pub mod http;
pub mod log;
mod metrics;
mod pulse;
pub mod record;

use std::net::SocketAddr;

pub use metrics::{ActivityLabel, CauseLabel, MemoryLabel, Metrics, StateLabel};
pub use pulse::Pulse;

/// An error and its causes on one line, as it is logged.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// A size as `dask.utils.format_bytes` writes it.
pub fn format_bytes(count: u64) -> String {
    const UNITS: [(&str, u64); 5] =
        [("Pi", 1 << 50), ("Ti", 1 << 40), ("Gi", 1 << 30), ("Mi", 1 << 20), ("ki", 1 << 10)];
    for (prefix, size) in UNITS {
        // Dask changes the unit at 0.9
        if count as f64 >= size as f64 * 0.9 {
            return format!("{:.2} {prefix}B", count as f64 / size as f64);
        }
    }
    format!("{count} B")
}

/// Why telemetry could not start, or a setting of it makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A log format string names something we have no value for.
    #[error("log format {format:?}: {reason}")]
    Format { format: String, reason: String },
    /// A level that Python's `logging` does not have.
    #[error("log level {level:?} is none of debug, info, warning, error, critical")]
    Level { level: String },
    /// Logs should go to the journal and it does not take them.
    #[error("the systemd journal cannot be reached")]
    Journal {
        #[source]
        source: std::io::Error,
    },
    /// Somebody has already installed a subscriber in this process.
    #[error("logging was already started in this process")]
    AlreadyStarted,
    /// No address for the HTTP endpoints could be bound.
    #[error("cannot serve HTTP at {address}")]
    Bind {
        address: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    /// The thread of the HTTP endpoints could not be started.
    #[error("cannot start the HTTP thread")]
    Thread {
        #[source]
        source: std::io::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_in_dask() {
        assert_eq!(format_bytes(5), "5 B");
        assert_eq!(format_bytes(1000), "0.98 kiB");
        assert_eq!(format_bytes(1 << 33), "8.00 GiB");
    }
}
