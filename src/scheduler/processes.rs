//! CPU time and memory of the daemon and its children, sampled cheaply.
//!
//! `sysinfo` gives CPU time and resident size; the proportional size (PSS), which does not count what forked runners share
//! several times over, comes from /proc and is dear, so it is read only for processes that moved, and not often.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use sysinfo::{Pid, Process, ProcessRefreshKind, ProcessesToUpdate, System};

/// Time between two readings of one process's PSS, at least.
const PSS_INTERVAL: Duration = Duration::from_secs(2);

/// A PSS reading may take this part of the time until the next one.
const PSS_SHARE: u32 = 500;

/// What one process was seen with last.
#[derive(Debug)]
struct Seen {
    /// CPU time since its start, in milliseconds.
    cpu: u64,
    /// Resident bytes and proportional bytes, read together.
    measured: Option<(u64, u64)>,
    /// CPU time at that reading; what no process has when it must be read again.
    measured_cpu: u64,
    due: Instant,
}

/// The processes that count as this worker.
#[derive(Debug)]
pub(super) struct Processes {
    system: Option<System>,
    own: Pid,
    seen: HashMap<Pid, Seen>,
}

/// One sample of all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Usage {
    /// CPU time used since the last sample.
    pub cpu: Duration,
    /// Bytes of memory now.
    pub memory: u64,
}

impl Processes {
    pub(super) fn new() -> Self {
        let system = System::new().inspect_err(|error| {
            tracing::warn!(%error, "CPU and memory of this worker cannot be measured");
        });
        Processes { system: system.ok(), own: Pid::from_u32(std::process::id()), seen: HashMap::new() }
    }

    /// Samples this process and `children`. One that is new or gone since the last sample adds no CPU time.
    pub(super) fn sample(&mut self, children: &[u32]) -> Usage {
        let Some(system) = &mut self.system else { return Usage::default() };
        let mut pids = Vec::with_capacity(children.len() + 1);
        pids.push(self.own);
        pids.extend(children.iter().map(|pid| Pid::from_u32(*pid)));
        let what = ProcessRefreshKind::nothing().with_cpu().with_memory().without_tasks();
        system.refresh_processes_specifics(ProcessesToUpdate::Some(&pids), true, what);
        if pids.len() != self.seen.len() || !pids.iter().all(|pid| self.seen.contains_key(pid)) {
            // who is gone, or new, changes how much of their memory the others share
            self.seen.retain(|pid, _| pids.contains(pid));
            self.seen.values_mut().for_each(|seen| seen.measured_cpu = u64::MAX);
        }

        let mut total = Usage::default();
        for (pid, process) in pids.iter().filter_map(|pid| Some((*pid, system.process(*pid)?))) {
            let cpu = process.accumulated_cpu_time();
            let seen = self.seen.entry(pid).or_insert_with(|| Seen::new(cpu));
            total.cpu += Duration::from_millis(cpu.saturating_sub(seen.cpu));
            seen.cpu = cpu;
            total.memory += seen.memory(process, Instant::now());
        }
        total
    }
}

impl Seen {
    fn new(cpu: u64) -> Self {
        Seen { cpu, measured: None, measured_cpu: 0, due: Instant::now() }
    }

    /// Proportional bytes: as measured, plus what the resident size has grown since.
    fn memory(&mut self, process: &Process, now: Instant) -> u64 {
        let resident = process.memory();
        if let Some((then, proportional)) = self.measured {
            let idle = self.cpu == self.measured_cpu && resident == then;
            if idle || now < self.due {
                return (proportional + resident).saturating_sub(then);
            }
        }
        let pid = process.pid().as_u32();
        // another user's process, or one that made itself unreadable, shows only its sizes
        let proportional = read_pss(pid).or_else(|| read_private(pid)).unwrap_or(resident);
        self.due = now + PSS_INTERVAL.max(now.elapsed() * PSS_SHARE);
        self.measured = Some((resident, proportional));
        self.measured_cpu = self.cpu;
        proportional
    }
}

/// `Pss` of /proc/PID/smaps_rollup in bytes, without shared memory: that is the store's, which counts it itself.
fn read_pss(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    };
    let shared = field("Pss_Shmem:").unwrap_or(0);
    Some(field("Pss:")?.saturating_sub(shared) * 1024)
}

/// Resident bytes that no file or shared memory stands behind, from /proc/PID/statm.
fn read_private(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let mut pages = text.split_ascii_whitespace().skip(1).map_while(|n| n.parse::<u64>().ok());
    let (resident, shared) = (pages.next()?, pages.next()?);
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok()??;
    Some(resident.saturating_sub(shared) * page as u64)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    struct Killed(Child);

    impl Drop for Killed {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    /// Samples until `done` says so, for ten seconds at most.
    fn until(processes: &mut Processes, children: &[u32], mut done: impl FnMut(Usage) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !done(processes.sample(children)) {
            assert!(Instant::now() < deadline, "not seen within ten seconds");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_busy_child_counts() {
        let child = Killed(Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap());
        let mut processes = Processes::new();
        let mut cpu = Duration::ZERO;
        until(&mut processes, &[child.0.id()], |usage| {
            cpu += usage.cpu;
            cpu > Duration::from_millis(50)
        });
        let both = processes.sample(&[child.0.id()]).memory;
        let alone = processes.sample(&[]).memory;
        assert!(both > alone && alone > 1 << 20, "{both} {alone}");
    }

    #[test]
    fn memory_that_was_written_shows_before_the_next_full_reading() {
        let mut processes = Processes::new();
        let before = processes.sample(&[]).memory;
        let grown = vec![1_u8; 64 << 20];
        let after = processes.sample(&[]).memory;
        assert!(after >= before + (48 << 20), "{before} {after}");
        assert_eq!(grown.iter().map(|b| u64::from(*b)).sum::<u64>(), 64 << 20);
    }

    #[test]
    fn sizes_of_a_process_that_is_gone() {
        assert_eq!((read_pss(u32::MAX), read_private(u32::MAX)), (None, None));
        assert!(read_private(std::process::id()).unwrap() > 0);
        assert_eq!(Processes::new().sample(&[u32::MAX >> 2]).cpu, Duration::ZERO);
    }
}
