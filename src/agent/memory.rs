//! What the worker does about the memory it uses: when it spills, pauses, resumes, ends a task, replaces a runner.
//!
//! What is spilled first, and how, is the store's business.
//!
//! Source: `distributed/worker_memory.py`.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tracing::warn;

use super::driver::Driver;
use crate::exec::{Process, ProcessKind};
use crate::proto::Status;
use crate::store::{Codec, SpillConfig};
use crate::telemetry::format_bytes;
use crate::wire::{self, Compression};

/// Targets of log lines that a stock worker and nanny write too.
const MEMORY: &str = "distributed.worker.memory";
const NANNY_MEMORY: &str = "distributed.nanny.memory";

/// Folder of spill files in the worker's scratch directory, as with a stock worker.
const STORAGE: &str = "storage";
/// Part of the memory limit by which results may be above the target before no more are made until some are spilled.
const SLACK: f64 = 0.1;
/// Bytes by which a runner may have grown, at least, and part of the memory limit, before it is replaced.
const GROWTH_MIN: u64 = 64 << 20;
const GROWTH: f64 = 0.1;
/// By how much more than a replaced one the next runner may grow, and for how long: what every runner needs for its work
/// (imported packages) is not to be taken from it again and again.
const GROWTH_FACTOR: u64 = 2;
const GROWTH_FORGOTTEN: Duration = Duration::from_secs(600);
/// Part of the memory limit that results may take in the runners that made them.
const KEPT: f64 = 0.3;
/// Time between two lines about memory that is not ours to spill.
const UNMANAGED_COMPLAINTS: Duration = Duration::from_secs(300);
/// Longest time that too much memory is put up with, once it was seen.
const EXCESS_MAX: Duration = Duration::from_millis(100);
/// Time for the memory of a killed runner to become free before another one is killed.
const KILLS: Duration = Duration::from_secs(1);
/// Looks at a worker without tasks, until nothing is expected to change any more.
const IDLE_LOOKS: u32 = 5;
/// Time between two looks that new results cause.
const LOOKS: Duration = Duration::from_millis(10);

/// `distributed.worker.memory`. Thresholds are fractions of the memory limit; `None` turns one off.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MemoryConfig {
    /// Results in memory beyond it are spilled.
    pub target: Option<f64>,
    /// Results are spilled when the processes use more than this, until they use less than `target`.
    pub spill: Option<f64>,
    /// No new tasks are started above it.
    pub pause: Option<f64>,
    /// The largest runner is killed above it.
    pub terminate: Option<f64>,
    /// Time between two looks at what the processes use.
    pub interval: Duration,
    /// Bytes that spill files may take; `None` for any number.
    pub max_spill: Option<u64>,
    /// How spilled results are compressed.
    pub spill_compression: Compression,
}

impl MemoryConfig {
    /// What the store of a worker with that limit in bytes and that scratch directory spills, and where to.
    pub(super) fn spilling(&self, limit: Option<u64>, directory: &Path) -> Option<SpillConfig> {
        let limit = limit.filter(|limit| *limit > 0 && (self.target.is_some() || self.spill.is_some()))?;
        let target = self.target.map_or(u64::MAX, |target| (limit as f64 * target) as u64);
        let compression = self.spill_compression;
        let codec =
            (compression != Compression::None).then(|| Arc::new(Frames(compression)) as Arc<dyn Codec>);
        Some(SpillConfig {
            directory: directory.join(STORAGE),
            target,
            crowded: target.saturating_add((limit as f64 * SLACK) as u64),
            files: self.max_spill,
            codec,
        })
    }
}

/// Compresses the frames of spilled results as those of messages.
#[derive(Debug)]
struct Frames(Compression);

impl Codec for Frames {
    fn compress(&self, frame: &[u8]) -> Option<Bytes> {
        wire::compress::maybe_compress(frame, self.0)
    }

    fn decompress(&self, frame: &Bytes, len: u64) -> Option<Bytes> {
        wire::compress::decompress(frame, self.0, len).ok()
    }
}

/// What to do about the memory in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// Nothing.
    Fine,
    /// Start no new tasks. Percent of the limit in use.
    Pause { percent: u64 },
    /// Start tasks again. Percent of the limit in use.
    Resume { percent: u64 },
    /// Kill the largest runner.
    Terminate { percent: u64 },
}

/// The thresholds, and what was seen last.
#[derive(Debug)]
pub(super) struct Pressure {
    limit: Option<u64>,
    config: MemoryConfig,
    /// Bytes used and bytes of results in shared memory, and when that was.
    seen: Option<(u64, u64, Instant)>,
    /// Looks since a task ran or memory was tight.
    idle_looks: u32,
    /// Since when more is used than a task is ended for.
    excessive: Option<Instant>,
    complained: Option<Instant>,
    killed: Option<Instant>,
    /// Bytes by which a runner that was replaced had grown, and when that was.
    replaced: Option<(u64, Instant)>,
}

impl Pressure {
    /// Thresholds for a limit in bytes; without one there is no pressure.
    pub(super) fn new(config: MemoryConfig, limit: Option<u64>) -> Self {
        let limit = limit.filter(|limit| *limit > 0);
        Pressure {
            limit,
            config,
            seen: None,
            idle_looks: 0,
            excessive: None,
            complained: None,
            killed: None,
            replaced: None,
        }
    }

    /// Whether the memory in use can lead to anything.
    pub(super) fn is_on(&self) -> bool {
        let MemoryConfig { spill, pause, terminate, .. } = self.config;
        self.limit.is_some() && (spill.is_some() || pause.is_some() || terminate.is_some())
    }

    fn share(&self, memory: u64) -> f64 {
        self.limit.map_or(0.0, |limit| memory as f64 / limit as f64)
    }

    /// What `memory` bytes in use mean for a worker in `status`.
    fn judge(&self, memory: u64, status: Status) -> Verdict {
        let share = self.share(memory);
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

    /// Bytes to be spilled when `memory` bytes are in use: once that is above `spill`, down to `target`.
    fn excess(&self, memory: u64) -> Option<u64> {
        let (limit, spill) = (self.limit?, self.config.spill?);
        let goal = limit as f64 * self.config.target.unwrap_or(spill);
        (self.share(memory) > spill).then(|| memory.saturating_sub(goal as u64))
    }

    /// Whether an estimate of the memory in use comes near enough to a threshold to be replaced by a measurement.
    fn is_close(&self, memory: u64) -> bool {
        let MemoryConfig { spill, pause, terminate, .. } = self.config;
        let lowest = [spill, pause, terminate].into_iter().flatten().fold(f64::INFINITY, f64::min);
        self.share(memory) > lowest
    }

    /// Whether runners that have grown should give their memory back.
    fn is_tight(&self, memory: u64) -> bool {
        let threshold = self.config.target.or(self.config.spill).or(self.config.pause);
        threshold.is_some_and(|threshold| self.share(memory) > threshold)
    }

    /// Bytes by which a runner may have grown.
    fn growth(&self) -> u64 {
        let least = self.limit.map_or(u64::MAX, |limit| GROWTH_MIN.max((limit as f64 * GROWTH) as u64));
        match self.replaced {
            Some((grown, at)) if at.elapsed() < GROWTH_FORGOTTEN => {
                least.max(grown.saturating_mul(GROWTH_FACTOR))
            }
            _ => least,
        }
    }

    /// Whether results in shared memory have grown so much since the last look that another one is due.
    fn is_due(&self, shared: u64) -> bool {
        let Some((used, then, at)) = self.seen else { return true };
        self.is_close(used + shared.saturating_sub(then)) && at.elapsed() >= LOOKS
    }

    /// Whether the memory in use has been too much at each look for some time. A large result is there twice while it is
    /// handed over: that is no reason to end a task.
    fn stays_excessive(&mut self, interval: Duration) -> bool {
        self.excessive.get_or_insert_with(Instant::now).elapsed() >= interval.min(EXCESS_MAX)
    }

    /// Whether to complain about memory that cannot be spilled.
    fn complains(&mut self) -> bool {
        if self.complained.is_some_and(|last| last.elapsed() < UNMANAGED_COMPLAINTS) {
            return false;
        }
        self.complained = Some(Instant::now());
        true
    }
}

impl Driver {
    /// Time between two looks at the memory in use.
    pub(super) fn memory_interval(&self) -> Duration {
        self.shared.config.memory.interval.max(Duration::from_millis(1))
    }

    /// Whether the memory in use is expected to change.
    pub(super) fn watches_memory(&self) -> bool {
        self.pressure.is_on() && (!self.running.is_empty() || self.pressure.idle_looks < IDLE_LOOKS)
    }

    /// Something was put into the store.
    pub(super) fn stored(&mut self) {
        if self.shared.store.has_live() && self.is_above_target() {
            self.take_from_runners();
        }
        if !self.pressure.is_on() {
            return;
        }
        if self.shared.store.is_crowded() {
            self.recall_all();
        }
        self.pressure.idle_looks = 0;
        if self.pressure.is_due(self.shared.store.usage().shared_memory()) {
            self.look_at_memory();
        }
    }

    /// Looks at the memory in use, and does what follows from it.
    pub(super) fn look_at_memory(&mut self) {
        if !self.pressure.is_on() {
            return;
        }
        let processes = self.pool.processes();
        let pids: Vec<u32> = processes.iter().map(|process| process.pid).collect();
        let shared = self.shared.store.usage().shared_memory();
        let used = {
            let mut monitor = self.shared.monitor();
            let estimate = monitor.memory(&pids, shared, false);
            if self.pressure.is_close(estimate) { monitor.memory(&pids, shared, true) } else { estimate }
        };
        self.pressure.seen = Some((used, shared, Instant::now()));
        let is_tight = self.pressure.is_tight(used);
        let busy = !self.running.is_empty() || is_tight || self.shared.status() == Status::Paused;
        self.pressure.idle_looks = if busy { 0 } else { self.pressure.idle_looks + 1 };
        self.pause_or_resume(used, &processes);
        if let Some(excess) = self.pressure.excess(used)
            && !self.shared.store.relieve(excess)
            && self.pressure.complains()
        {
            warn!(
                target: MEMORY,
                "Unmanaged memory use is high. This may indicate a memory leak or the memory may not be released to the OS; see https://distributed.dask.org/en/latest/worker-memory.html#memory-not-released-back-to-the-os for more information. -- Unmanaged memory: {} -- Worker memory limit: {}",
                format_bytes(used),
                self.limit_text(),
            );
        }
        if is_tight {
            self.take_from_runners();
            self.replace_grown(&processes);
        }
    }

    /// Whether there are more results in memory than there should be, those in runners included.
    fn is_above_target(&self) -> bool {
        let usage = self.shared.store.usage();
        let share = self.pressure.share(usage.in_memory() + usage.live);
        self.pressure.config.target.is_some_and(|target| share > target)
    }

    /// Lets runners keep results again once there is memory for that.
    pub(super) fn leave_to_runners(&self) {
        let is_tight = self.pressure.seen.is_some_and(|(used, ..)| self.pressure.is_tight(used));
        if !is_tight && !self.is_above_target() {
            self.pool.let_keep(self.kept_in_runners());
        }
    }

    /// Has results published that are in runners, so that they can be spilled.
    fn take_from_runners(&self) {
        self.pool.let_keep(0);
        self.pool.publish(None);
    }

    /// Bytes of results that each runner may keep to itself.
    fn kept_in_runners(&self) -> u64 {
        let slots = self.shared.config.exec.slots.max(1) as f64;
        self.pressure.limit.map_or(u64::MAX, |limit| (limit as f64 * KEPT / slots) as u64)
    }

    fn limit_text(&self) -> String {
        self.shared.config.memory_limit.map_or_else(|| "None".into(), format_bytes)
    }

    fn pause_or_resume(&mut self, used: u64, processes: &[Process]) {
        let status = self.shared.status();
        match self.pressure.judge(used, status) {
            Verdict::Fine => {}
            Verdict::Pause { percent } => self.pause(percent, used),
            Verdict::Resume { percent } => {
                warn!(
                    target: MEMORY,
                    "Worker is at {percent}% memory usage. Resuming worker. Process memory: {} -- Worker memory limit: {}",
                    format_bytes(used),
                    self.limit_text(),
                );
                self.set_status(Status::Running, &self.own_id.clone());
            }
            Verdict::Terminate { percent } => {
                if status == Status::Running {
                    self.pause(percent, used);
                }
                if self.pressure.stays_excessive(self.memory_interval()) {
                    self.kill_largest(percent, used, processes);
                }
                return;
            }
        }
        self.pressure.excessive = None;
    }

    fn pause(&mut self, percent: u64, used: u64) {
        warn!(
            target: MEMORY,
            "Worker is at {percent}% memory usage. Pausing worker.  Process memory: {} -- Worker memory limit: {}",
            format_bytes(used),
            self.limit_text(),
        );
        self.set_status(Status::Paused, &self.own_id.clone());
    }

    /// Ends the task that uses most memory.
    fn kill_largest(&mut self, percent: u64, used: u64, processes: &[Process]) {
        if self.pressure.killed.is_some_and(|last| last.elapsed() < KILLS) {
            return;
        }
        let limit = self.shared.config.memory_limit.unwrap_or(used);
        let monitor = self.shared.monitor();
        let busy = processes.iter().filter_map(|process| Some((process.pid, process.key.as_ref()?)));
        let sized = busy.map(|(pid, key)| (pid, key, monitor.private(pid)));
        if let Some((pid, key, peak)) = sized.max_by_key(|(.., bytes)| *bytes) {
            warn!(target: NANNY_MEMORY, "Worker exceeded {percent}% memory budget. Killing runner {pid}, which runs {key}.");
            self.pool.kill_out_of_memory(key, peak, limit);
            self.pressure.killed = Some(Instant::now());
        }
    }

    /// Replaces idle runners that hold much more memory than they began with.
    fn replace_grown(&mut self, processes: &[Process]) {
        let monitor = self.shared.monitor();
        let of = |kind| move |process: &&Process| process.kind == kind;
        // what a runner had when it was forked
        let start =
            processes.iter().find(of(ProcessKind::Zygote)).map_or(0, |zygote| monitor.private(zygote.pid));
        for process in processes.iter().filter(of(ProcessKind::Runner)).filter(|runner| runner.key.is_none())
        {
            let grown = monitor.private(process.pid).saturating_sub(start);
            if grown <= self.pressure.growth() || !self.pool.replace(process.pid) {
                continue;
            }
            self.pressure.replaced = Some((grown, Instant::now()));
            let grown = format_bytes(grown);
            tracing::info!(
                "memory is tight: runner {}, which has grown by {grown}, is replaced",
                process.pid
            );
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const CONFIG: MemoryConfig = MemoryConfig {
        target: Some(0.6),
        spill: Some(0.7),
        pause: Some(0.8),
        terminate: Some(0.95),
        interval: Duration::from_millis(100),
        max_spill: None,
        spill_compression: Compression::None,
    };
    const OFF: MemoryConfig =
        MemoryConfig { target: None, spill: None, pause: None, terminate: None, ..CONFIG };

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
    fn spills_from_one_threshold_down_to_the_other() {
        let pressure = Pressure::new(CONFIG, Some(1000));
        assert_eq!(pressure.excess(700), None);
        assert_eq!(pressure.excess(710), Some(110));
        let no_target = Pressure::new(MemoryConfig { target: None, ..CONFIG }, Some(1000));
        assert_eq!(no_target.excess(710), Some(10));
        let no_spill = Pressure::new(MemoryConfig { spill: None, ..CONFIG }, Some(1000));
        assert_eq!(no_spill.excess(999), None);
    }

    #[test]
    fn no_limit_and_no_threshold_mean_no_pressure() {
        for (config, limit) in [(CONFIG, None), (CONFIG, Some(0)), (OFF, Some(1))] {
            let pressure = Pressure::new(config, limit);
            assert!(!pressure.is_on());
            assert_eq!(pressure.judge(u64::MAX, Status::Running), Verdict::Fine);
            assert!(pressure.excess(u64::MAX).is_none() && config.spilling(limit, Path::new("/")).is_none());
        }
    }

    #[test]
    fn the_store_is_told_bytes() {
        let spilling = |config: MemoryConfig| config.spilling(Some(1000), Path::new("/scratch")).unwrap();
        let config = spilling(CONFIG);
        assert_eq!((config.target, config.crowded, config.files), (600, 700, None));
        assert_eq!(config.directory, Path::new("/scratch/storage"));
        assert!(config.codec.is_none());
        let config = spilling(MemoryConfig { target: None, max_spill: Some(7), ..CONFIG });
        assert_eq!((config.target, config.crowded, config.files), (u64::MAX, u64::MAX, Some(7)));
        let config = spilling(MemoryConfig { spill_compression: Compression::Lz4, ..CONFIG });
        let (codec, frame) = (config.codec.unwrap(), vec![7; 100_000]);
        let compressed = codec.compress(&frame).unwrap();
        assert!(compressed.len() < 10_000);
        assert_eq!(codec.decompress(&compressed, 100_000).unwrap(), frame);
        assert!(codec.decompress(&compressed, 99_999).is_none());
    }

    #[test]
    fn a_task_is_ended_only_for_memory_that_stays_in_use() {
        let mut pressure = Pressure::new(CONFIG, Some(1000));
        assert!(!pressure.stays_excessive(CONFIG.interval));
        pressure.excessive = Instant::now().checked_sub(CONFIG.interval);
        assert!(pressure.stays_excessive(CONFIG.interval));
        assert!(pressure.stays_excessive(Duration::from_secs(60)));
    }

    #[test]
    fn what_every_runner_needs_is_left_to_it() {
        let mut pressure = Pressure::new(CONFIG, Some(1 << 30));
        assert_eq!(pressure.growth(), (0.1 * f64::from(1 << 30)) as u64);
        pressure.replaced = Some((200 << 20, Instant::now()));
        assert_eq!(pressure.growth(), 400 << 20);
        pressure.replaced = Instant::now().checked_sub(GROWTH_FORGOTTEN).map(|then| (200 << 20, then));
        assert!(pressure.growth() < 200 << 20);
        assert_eq!(Pressure::new(CONFIG, Some(1000)).growth(), GROWTH_MIN);
    }

    #[test]
    fn new_results_lead_to_a_look_only_when_they_might_matter() {
        let mut pressure = Pressure::new(CONFIG, Some(1000));
        assert!(pressure.is_due(0));
        let before = Instant::now().checked_sub(LOOKS).unwrap();
        pressure.seen = Some((500, 100, before));
        assert!(!pressure.is_due(250) && pressure.is_due(301));
        pressure.seen = Some((500, 100, Instant::now() + LOOKS));
        assert!(!pressure.is_due(301));
    }
}
