//! CPU time and memory of the daemon and its children, sampled cheaply.
//!
//! `sysinfo` gives CPU time, `statm` the private size; the proportional size (PSS), which does not count what forked runners share
//! several times over, comes from /proc and is dear, so it is read only for processes that moved, and not often.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use sysinfo::{Pid, ProcessRefreshKind, ProcessesToUpdate, System};

/// Time between two readings of one process's PSS, at least: usually, and where the exact size is asked for.
const PSS_INTERVAL: Duration = Duration::from_secs(2);
const PSS_INTERVAL_EXACT: Duration = Duration::from_millis(50);

/// A PSS reading may take this part of the time until the next one.
const PSS_SHARE: u32 = 500;
const PSS_SHARE_EXACT: u32 = 20;

/// What one process was seen with last.
#[derive(Debug)]
struct Seen {
    /// CPU time since its start, in milliseconds; none before its first sample.
    cpu: Option<u64>,
    /// Private bytes now.
    private: u64,
    measured: Option<Measured>,
}

/// A reading of a process's PSS.
#[derive(Clone, Copy, Debug)]
struct Measured {
    /// Private bytes then, and proportional bytes.
    private: u64,
    proportional: u64,
    /// CPU time then; none when it must be read again.
    cpu: Option<u64>,
    at: Instant,
    took: Duration,
}

/// The processes that count as this worker.
#[derive(Debug)]
pub(super) struct Processes {
    system: Option<System>,
    own: u32,
    seen: HashMap<u32, Seen>,
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
            tracing::warn!(%error, "CPU time of this worker cannot be measured");
        });
        Processes { system: system.ok(), own: std::process::id(), seen: HashMap::new() }
    }

    /// Samples this process and `children`. One that is new or gone since the last sample adds no CPU time.
    pub(super) fn sample(&mut self, children: &[u32]) -> Usage {
        Usage { cpu: self.cpu(children), memory: self.memory(children, false) }
    }

    fn cpu(&mut self, children: &[u32]) -> Duration {
        let Some(system) = &mut self.system else { return Duration::ZERO };
        let pids: Vec<Pid> =
            std::iter::once(&self.own).chain(children).map(|pid| Pid::from_u32(*pid)).collect();
        let what = ProcessRefreshKind::nothing().with_cpu().without_tasks();
        system.refresh_processes_specifics(ProcessesToUpdate::Some(&pids), true, what);
        let mut total = Duration::ZERO;
        for (pid, process) in pids.iter().filter_map(|pid| Some((*pid, system.process(*pid)?))) {
            let cpu = process.accumulated_cpu_time();
            let seen = self.seen.entry(pid.as_u32()).or_insert_with(Seen::new);
            let before = seen.cpu.replace(cpu).unwrap_or(cpu);
            total += Duration::from_millis(cpu.saturating_sub(before));
        }
        total
    }

    /// Bytes that this process and `children` use, shared memory left out: that is the store's, which counts it itself.
    /// An estimate, unless it is to be `exact`.
    pub(super) fn memory(&mut self, children: &[u32], exact: bool) -> u64 {
        let pids = || std::iter::once(&self.own).chain(children);
        if pids().count() != self.seen.len() || !pids().all(|pid| self.seen.contains_key(pid)) {
            // who is gone, or new, changes how much of their memory the others share
            self.seen.retain(|pid, _| *pid == self.own || children.contains(pid));
            let measured = self.seen.values_mut().filter_map(|seen| seen.measured.as_mut());
            measured.for_each(|measured| measured.cpu = None);
        }
        let mut total = 0;
        for pid in std::iter::once(&self.own).chain(children) {
            if let Some(private) = read_private(*pid) {
                total += self.seen.entry(*pid).or_insert_with(Seen::new).memory(*pid, private, exact);
            }
        }
        total
    }

    /// Bytes of a process that no file or shared memory stands behind, at the last look at it.
    pub(super) fn private(&self, pid: u32) -> u64 {
        self.seen.get(&pid).map_or(0, |seen| seen.private)
    }
}

impl Seen {
    fn new() -> Self {
        Seen { cpu: None, private: 0, measured: None }
    }

    /// Proportional bytes: as measured, plus what the private size has grown since.
    fn memory(&mut self, pid: u32, private: u64, exact: bool) -> u64 {
        self.private = private;
        if let Some(measured) = &self.measured {
            let idle = measured.private == private && measured.cpu.is_some() && measured.cpu == self.cpu;
            if idle && !exact || !measured.is_due(exact) {
                return (measured.proportional + private).saturating_sub(measured.private);
            }
        }
        let at = Instant::now();
        // another user's process, or one that made itself unreadable, shows only its sizes
        let proportional = read_pss(pid).unwrap_or(private);
        self.measured = Some(Measured { private, proportional, cpu: self.cpu, at, took: at.elapsed() });
        proportional
    }
}

impl Measured {
    fn is_due(&self, exact: bool) -> bool {
        let (interval, share) =
            if exact { (PSS_INTERVAL_EXACT, PSS_SHARE_EXACT) } else { (PSS_INTERVAL, PSS_SHARE) };
        self.at.elapsed() >= interval.max(self.took * share)
    }
}

/// `Pss` of /proc/PID/smaps_rollup in bytes, without shared memory.
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
        assert_eq!(processes.private(processes.own), 0);
        let before = processes.sample(&[]).memory;
        let private = processes.private(processes.own);
        let grown = vec![1_u8; 64 << 20];
        let after = processes.sample(&[]).memory;
        assert!(after >= before + (48 << 20), "{before} {after}");
        assert!(processes.private(processes.own) >= private + (48 << 20));
        assert_eq!(grown.iter().map(|b| u64::from(*b)).sum::<u64>(), 64 << 20);
    }

    #[test]
    fn sizes_of_a_process_that_is_gone() {
        assert_eq!((read_pss(u32::MAX), read_private(u32::MAX)), (None, None));
        assert!(read_private(std::process::id()).unwrap() > 0);
        assert_eq!(Processes::new().sample(&[u32::MAX >> 2]).cpu, Duration::ZERO);
    }
}
