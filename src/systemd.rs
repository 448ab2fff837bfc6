//! What a service manager is told: ready, status, stopping, still alive.
//!
//! Everything here is silent without `NOTIFY_SOCKET`. Whether the daemon is ready or alive is for the caller to know.

use std::time::Duration;

use sd_notify::NotifyState;

/// Whether a service manager wants to be told anything.
pub fn is_listening() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// The daemon is up: its workers have registered.
pub fn ready(status: &str) {
    send(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// One line about what the daemon does, for `systemctl status`.
pub fn status(text: &str) {
    send(&[NotifyState::Status(text)]);
}

/// The daemon is closing.
pub fn stopping(status: &str) {
    send(&[NotifyState::Stopping, NotifyState::Status(status)]);
}

/// The daemon is alive; to be said each [`watchdog_interval`].
pub fn alive() {
    send(&[NotifyState::Watchdog]);
}

/// How often [`alive`] must be said: half of what the unit allows; `None` without `WatchdogSec=`.
pub fn watchdog_interval() -> Option<Duration> {
    sd_notify::watchdog_enabled().map(|limit| limit / 2)
}

fn send(states: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!("the service manager cannot be notified: {error}");
    }
}
