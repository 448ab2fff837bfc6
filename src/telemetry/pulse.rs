//! The driver's pulse: when it last turned, how late it was, and whether the worker is ready.
//!
//! Written by the driver, read by the HTTP thread and by heartbeats; atomics only, so neither waits for the other.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Time between ticks that a stock worker aims for (`distributed.admin.tick.interval`).
const DASK_TICK: Duration = Duration::from_millis(20);

#[derive(Debug)]
struct State {
    started: Instant,
    interval: Duration,
    /// Nanoseconds after `started`.
    last: AtomicU64,
    count: AtomicU64,
    /// Longest time between two ticks since it was last read, in nanoseconds.
    longest: AtomicU64,
    /// Average lateness of a tick in nanoseconds, decaying over about ten ticks.
    lateness: AtomicU64,
    ready: AtomicBool,
}

/// Shared handle on the driver's pulse.
#[derive(Clone, Debug)]
pub struct Pulse(Arc<State>);

impl Pulse {
    /// A pulse whose driver promises a tick each `interval`.
    pub fn new(interval: Duration) -> Self {
        Pulse(Arc::new(State {
            started: Instant::now(),
            interval,
            last: AtomicU64::new(0),
            count: AtomicU64::new(0),
            longest: AtomicU64::new(0),
            lateness: AtomicU64::new(0),
            ready: AtomicBool::new(false),
        }))
    }

    /// A pulse that last ticked ten seconds ago.
    #[cfg(test)]
    pub(super) fn stalled_for_test() -> Self {
        let mut pulse = Pulse::new(Duration::ZERO);
        if let Some(state) = Arc::get_mut(&mut pulse.0) {
            state.started -= Duration::from_secs(10);
        }
        pulse
    }

    /// Time between two ticks that the driver promised.
    pub fn interval(&self) -> Duration {
        self.0.interval
    }

    fn nanos(&self) -> u64 {
        // 64 bits of nanoseconds are 584 years
        self.0.started.elapsed().as_nanos() as u64
    }

    /// The driver turned. Only the driver calls this.
    pub fn tick(&self) {
        let now = self.nanos();
        let took = now.saturating_sub(self.0.last.swap(now, Relaxed));
        self.0.longest.fetch_max(took, Relaxed);
        if self.0.count.fetch_add(1, Relaxed) == 0 {
            return; // the first interval is the boot, not the driver's
        }
        let late = took.saturating_sub(self.0.interval.as_nanos() as u64);
        let average = self.0.lateness.load(Relaxed);
        self.0.lateness.store(average - average / 10 + late / 10, Relaxed);
    }

    /// Age of the last tick.
    pub fn age(&self) -> Duration {
        Duration::from_nanos(self.nanos().saturating_sub(self.0.last.load(Relaxed)))
    }

    /// Whether the driver has missed so many ticks that something holds it.
    pub fn stalled(&self) -> bool {
        self.age() > self.0.interval * 4 + Duration::from_secs(3)
    }

    /// Ticks since the start.
    pub fn count(&self) -> u64 {
        self.0.count.load(Relaxed)
    }

    /// Longest time between two ticks since this was last called.
    pub fn take_longest(&self) -> Duration {
        Duration::from_nanos(self.0.longest.swap(0, Relaxed)).max(self.age())
    }

    /// `event_loop_interval` for the scheduler, in seconds: what a stock worker's 20 ms tick would measure on a loop as late as ours.
    ///
    /// Our driver wakes far less often than each 20 ms, so its own interval would look like a blocked loop on the dashboard.
    pub fn event_loop_interval(&self) -> f64 {
        (DASK_TICK + Duration::from_nanos(self.0.lateness.load(Relaxed))).as_secs_f64()
    }

    /// Says whether the worker is registered and takes tasks.
    pub fn set_ready(&self, ready: bool) {
        self.0.ready.store(ready, Relaxed);
    }

    /// Whether the worker is registered and takes tasks.
    pub fn ready(&self) -> bool {
        self.0.ready.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_counted_and_lateness_decays() {
        let pulse = Pulse::new(Duration::from_secs(60));
        assert!(!pulse.ready());
        pulse.tick();
        pulse.tick();
        assert_eq!(pulse.count(), 2);
        assert!(pulse.age() < Duration::from_secs(30));
        assert_eq!(pulse.event_loop_interval(), 0.02);
        assert!(!pulse.stalled());

        let late = Pulse::new(Duration::ZERO);
        late.tick();
        late.0.last.store(0, Relaxed);
        late.tick();
        assert!(late.event_loop_interval() > 0.02);
        let longest = late.take_longest();
        assert!(longest > Duration::ZERO && late.take_longest() <= longest + Duration::from_secs(30));
    }
}
