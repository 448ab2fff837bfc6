//! When the worker pauses for want of memory, and resumes.
//!
//! Decides from numbers it is given; kills nothing.
//!
//! Source: `distributed/worker_memory.py: WorkerMemoryManager._maybe_pause_or_unpause`.

use sysinfo::{Pid, ProcessRefreshKind, ProcessesToUpdate, System};

use crate::proto::{Key, Status};

/// Thresholds as fractions of the memory limit; `None` turns one off.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MemoryConfig {
    /// No new tasks are started above it (`distributed.worker.memory.pause`).
    pub pause: Option<f64>,
    /// The largest runner is killed above it (`distributed.worker.memory.terminate`).
    pub terminate: Option<f64>,
}

/// What to do about the memory in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing.
    Fine,
    /// Start no new tasks. Percent of the limit in use.
    Pause { percent: u64 },
    /// Start tasks again. Percent of the limit in use.
    Resume { percent: u64 },
    /// Kill the largest runner.
    Terminate { percent: u64 },
}

/// The thresholds in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pressure {
    limit: Option<u64>,
    config: MemoryConfig,
}

impl Pressure {
    /// Thresholds for a limit in bytes; without one there is no pressure.
    pub(super) fn new(config: MemoryConfig, limit: Option<u64>) -> Self {
        Pressure { limit: limit.filter(|limit| *limit > 0), config }
    }

    /// What `memory` bytes in use mean for a worker in `status`.
    pub(super) fn judge(&self, memory: u64, status: Status) -> Verdict {
        let Some(limit) = self.limit else { return Verdict::Fine };
        let share = memory as f64 / limit as f64;
        let percent = (share * 100.0) as u64;
        let above = |threshold: Option<f64>| threshold.is_some_and(|threshold| share > threshold);
        if above(self.config.terminate) {
            return Verdict::Terminate { percent };
        }
        match (above(self.config.pause), status) {
            (true, Status::Running) => Verdict::Pause { percent },
            (false, Status::Paused) if self.config.pause.is_some() => Verdict::Resume { percent },
            _ => Verdict::Fine,
        }
    }
}

/// The process of these that uses most memory, and how many bytes.
pub(super) fn largest(processes: Vec<(u32, Key)>) -> Option<(u32, Key, u64)> {
    let pids: Vec<Pid> = processes.iter().map(|(pid, _)| Pid::from_u32(*pid)).collect();
    let mut system = System::new().ok()?;
    let what = ProcessRefreshKind::nothing().with_memory();
    system.refresh_processes_specifics(ProcessesToUpdate::Some(&pids), true, what);
    let used = |pid| system.process(Pid::from_u32(pid)).map_or(0, |process| process.memory());
    processes.into_iter().map(|(pid, key)| (pid, key, used(pid))).max_by_key(|(.., bytes)| *bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: MemoryConfig = MemoryConfig { pause: Some(0.8), terminate: Some(0.95) };

    #[test]
    fn pauses_resumes_and_terminates_at_the_thresholds() {
        let pressure = Pressure::new(CONFIG, Some(1000));
        assert_eq!(pressure.judge(800, Status::Running), Verdict::Fine);
        assert_eq!(pressure.judge(801, Status::Running), Verdict::Pause { percent: 80 });
        assert_eq!(pressure.judge(900, Status::Paused), Verdict::Fine);
        assert_eq!(pressure.judge(700, Status::Paused), Verdict::Resume { percent: 70 });
        assert_eq!(pressure.judge(951, Status::Paused), Verdict::Terminate { percent: 95 });
    }

    #[test]
    fn no_limit_and_no_threshold_mean_no_pressure() {
        assert_eq!(Pressure::new(CONFIG, None).judge(u64::MAX, Status::Running), Verdict::Fine);
        assert_eq!(Pressure::new(CONFIG, Some(0)).judge(1, Status::Running), Verdict::Fine);
        let off = MemoryConfig::default();
        assert_eq!(Pressure::new(off, Some(1)).judge(99, Status::Paused), Verdict::Fine);
    }
}
