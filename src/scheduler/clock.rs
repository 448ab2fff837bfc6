//! The scheduler's clock seen from here, and how far away it is.
//!
//! Source: `Worker.scheduler_delay`, `Worker._update_latency` of `distributed/worker.py`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{SystemTime, UNIX_EPOCH};

/// Unix time in seconds, as Python's `time.time()`.
pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// Offset and distance of the scheduler's clock; clones share them.
#[derive(Clone, Debug)]
pub struct Clock(Arc<State>);

#[derive(Debug)]
struct State {
    /// Bits of an `f64`.
    delay: AtomicU64,
    /// Bits of an `f64`.
    latency: AtomicU64,
}

impl Default for Clock {
    fn default() -> Self {
        let state = State { delay: AtomicU64::new(0), latency: AtomicU64::new(0.001_f64.to_bits()) };
        Clock(Arc::new(state))
    }
}

impl Clock {
    /// Seconds to add to a time of ours that is told to others (`scheduler_delay`).
    pub fn delay(&self) -> f64 {
        f64::from_bits(self.0.delay.load(Relaxed))
    }

    /// Smoothed round trip in seconds.
    pub fn latency(&self) -> f64 {
        f64::from_bits(self.0.latency.load(Relaxed))
    }

    /// Takes in one exchange: sent at `start`, answered at `end` by our clock, and at `theirs` by the scheduler's.
    pub(super) fn observe(&self, start: f64, end: f64, theirs: Option<f64>) {
        let latency = (end - start) * 0.05 + self.latency() * 0.95;
        self.0.latency.store(latency.to_bits(), Relaxed);
        if let Some(theirs) = theirs {
            self.0.delay.store((theirs - (start + end) / 2.0).to_bits(), Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delay_is_the_last_latency_is_smoothed() {
        let clock = Clock::default();
        clock.observe(10.0, 12.0, Some(111.0));
        assert_eq!(clock.delay(), 100.0);
        assert!((clock.latency() - (2.0 * 0.05 + 0.001 * 0.95)).abs() < 1e-12);
        clock.observe(10.0, 12.0, None);
        assert_eq!(clock.delay(), 100.0);
    }
}
