//! `SystemMonitor`: CPU, memory, host network and disk, sampled and kept, as `distributed/system_monitor.py` does.
//!
//! CPU and memory are those of the daemon and the processes its caller names (runners count). Decides nothing by them.

use std::collections::VecDeque;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::hostio::{self, CPU_TIMES, Disks, Network, Processors};
use super::processes::Processes;
use crate::proto::Value;

/// Settings of the monitor (`distributed.admin.system-monitor`).
#[derive(Clone, Debug, PartialEq)]
pub struct MonitorConfig {
    /// Time between samples.
    pub interval: Duration,
    /// Samples kept; `None` for all.
    pub log_length: Option<usize>,
    /// Whether to watch the disks of the host.
    pub disk: bool,
    /// Whether to watch the processors of the host, by kind of time.
    pub host_cpu: bool,
}

impl Default for MonitorConfig {
    /// Dask's defaults.
    fn default() -> Self {
        let interval = Duration::from_millis(500);
        MonitorConfig { interval, log_length: Some(7200), disk: true, host_cpu: false }
    }
}

/// One quantity and its kept samples, the newest last.
#[derive(Debug)]
struct Series {
    /// Name, with a dot between group and part: `host_net_io.read_bps`.
    name: String,
    /// Whether Python has an `int` here.
    whole: bool,
    samples: VecDeque<f64>,
}

impl Series {
    fn new(name: impl Into<String>, whole: bool) -> Self {
        Series { name: name.into(), whole, samples: VecDeque::new() }
    }

    fn value(&self, sample: f64) -> Value {
        if self.whole { Value::from(sample as i128) } else { Value::Float(sample) }
    }

    fn newest(&self) -> Value {
        self.samples.back().map_or(Value::Nil, |sample| self.value(*sample))
    }
}

/// What the last sample said of this worker alone.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ProcessUsage {
    /// Percent of one processor since the sample before.
    pub cpu: f64,
    /// Bytes, of all processes together.
    pub memory: u64,
}

/// Samples this worker and its host.
#[derive(Debug)]
pub struct SystemMonitor {
    started: Instant,
    last: Instant,
    count: u64,
    log_length: usize,
    series: Vec<Series>,
    processes: Processes,
    usage: ProcessUsage,
    network: Option<(Network, hostio::Bytes)>,
    disks: Option<(Disks, hostio::Bytes)>,
    processors: Option<(Processors, [f64; CPU_TIMES.len()])>,
}

impl SystemMonitor {
    /// A monitor with one sample, so that there is always a last one.
    pub fn new(config: &MonitorConfig) -> Self {
        let network = Network::open().and_then(|mut n| n.read().map(|bytes| (n, bytes)));
        let disks = config.disk.then(Disks::open).flatten();
        let disks = disks.and_then(|mut d| d.read().map(|bytes| (d, bytes)));
        let processors = config.host_cpu.then(Processors::open).flatten();
        let processors = processors.and_then(|mut p| p.read().map(|times| (p, times)));

        let mut series =
            vec![Series::new("cpu", false), Series::new("memory", true), Series::new("time", false)];
        if network.is_some() {
            series.extend(["host_net_io.read_bps", "host_net_io.write_bps"].map(|n| Series::new(n, false)));
        }
        if disks.is_some() {
            series.extend(["host_disk_io.read_bps", "host_disk_io.write_bps"].map(|n| Series::new(n, false)));
        }
        if processors.is_some() {
            series.extend(CPU_TIMES.map(|kind| Series::new(format!("host_cpu.{kind}"), false)));
        }
        series.push(Series::new("num_fds", true));

        let now = Instant::now();
        let mut monitor = SystemMonitor {
            started: now,
            last: now,
            count: 0,
            log_length: config.log_length.unwrap_or(usize::MAX).max(1),
            series,
            processes: Processes::new(),
            usage: ProcessUsage::default(),
            network,
            disks,
            processors,
        };
        monitor.update(&[], 0);
        monitor
    }

    /// Takes one sample. `children` are the processes that count besides this one; `unmapped` is memory in bytes that
    /// is ours although no process has it mapped (shared segments of results).
    pub fn update(&mut self, children: &[u32], unmapped: u64) {
        let now = Instant::now();
        // Dask's guard against dividing by the time between two calls in a row
        let seconds = now.duration_since(self.last).as_secs_f64().max(0.001);
        self.last = now;
        self.count += 1;

        let used = self.processes.sample(children);
        self.usage = ProcessUsage {
            cpu: (used.cpu.as_secs_f64() / seconds * 1000.0).round() / 10.0,
            memory: used.memory + unmapped,
        };
        let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
        let mut sample = vec![self.usage.cpu, self.usage.memory as f64, time];
        if let Some((network, last)) = &mut self.network {
            sample.extend(rates(last, network.read(), seconds));
        }
        if let Some((disks, last)) = &mut self.disks {
            sample.extend(rates(last, disks.read(), seconds));
        }
        if let Some((processors, last)) = &mut self.processors {
            let times = processors.read().unwrap_or(*last);
            let shares = times.iter().zip(&*last).map(|(new, old)| (new - old) / seconds);
            sample.extend(shares.map(|share| (share * 100.0).round() / 100.0));
            *last = times;
        }
        sample.push(hostio::open_descriptors() as f64);

        for (series, value) in self.series.iter_mut().zip(sample) {
            if series.samples.len() >= self.log_length {
                series.samples.pop_front();
            }
            series.samples.push_back(value);
        }
    }

    /// Bytes that this worker uses now, without taking a sample; for `children` and `unmapped` see
    /// [`SystemMonitor::update`]. An estimate that costs little, or `exact`.
    pub fn memory(&mut self, children: &[u32], unmapped: u64, exact: bool) -> u64 {
        self.processes.memory(children, exact) + unmapped
    }

    /// Bytes of one of these processes that no file or shared memory stands behind, at the last look at it.
    pub fn private(&self, pid: u32) -> u64 {
        self.processes.private(pid)
    }

    /// CPU and memory of this worker at the last sample.
    pub fn usage(&self) -> ProcessUsage {
        self.usage
    }

    /// The last sample as `get_metrics` has it: `{foo.bar: 1}` becomes `{foo: {bar: 1}}`.
    pub fn nested(&self) -> Vec<(Value, Value)> {
        let mut out: Vec<(Value, Value)> = Vec::new();
        for series in &self.series {
            let Some((group, part)) = series.name.split_once('.') else {
                out.push((series.name.as_str().into(), series.newest()));
                continue;
            };
            let entry = (Value::from(part), series.newest());
            match out.iter_mut().find(|(name, _)| name.as_str() == Some(group)) {
                Some((_, Value::Map(parts))) => parts.push(entry),
                _ => out.push((group.into(), Value::Map(vec![entry]))),
            }
        }
        out
    }

    /// `get_monitor_info`: the last sample, or all since number `start`, with the count of samples.
    ///
    /// Mirrors `distributed/worker.py: Worker.get_monitor_info`.
    pub fn info(&self, recent: bool, start: u64) -> Value {
        let range = if recent {
            self.series.iter().map(|s| (Value::from(s.name.as_str()), s.newest())).collect()
        } else {
            self.since(start)
        };
        Value::map([
            ("range_query", Value::Map(range)),
            ("count", self.count.into()),
            ("last_time", self.last.duration_since(self.started).as_secs_f64().into()),
        ])
    }

    /// `SystemMonitor.range_query`: lists of samples, those taken after the first `start`.
    fn since(&self, start: u64) -> Vec<(Value, Value)> {
        let wanted = usize::try_from(self.count.saturating_sub(start)).unwrap_or(usize::MAX);
        let lists = self.series.iter().map(|series| {
            let skipped = series.samples.len().saturating_sub(wanted);
            let list = series.samples.iter().skip(skipped).map(|sample| series.value(*sample));
            (Value::from(series.name.as_str()), Value::List(list.collect()))
        });
        lists.collect()
    }
}

/// Bytes a second since `last`, which moves on; none when the counters cannot be read just now.
fn rates(last: &mut hostio::Bytes, now: Option<hostio::Bytes>, seconds: f64) -> [f64; 2] {
    let now = now.unwrap_or(*last);
    let rate = |new: u64, old: u64| (new as f64 - old as f64) / seconds;
    let rates = [rate(now.read, last.read), rate(now.written, last.written)];
    *last = now;
    rates
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn lengths(info: &Value) -> Vec<usize> {
        let range = info.field("range_query").unwrap().as_map().unwrap();
        range.iter().map(|(_, list)| list.as_list().unwrap().len()).collect()
    }

    #[test]
    fn history_is_bounded_and_can_be_asked_from_a_number_on() {
        let mut monitor =
            SystemMonitor::new(&MonitorConfig { log_length: Some(3), host_cpu: true, ..Default::default() });
        for _ in 0..4 {
            monitor.update(&[], 0);
        }
        let all = monitor.info(false, 0);
        assert_eq!(all.field("count"), Some(&Value::from(5)));
        assert!(lengths(&all).iter().all(|n| *n == 3), "{all:?}");
        assert!(lengths(&monitor.info(false, 4)).iter().all(|n| *n == 1));
        assert!(lengths(&monitor.info(false, 5)).iter().all(|n| *n == 0));
        assert!(lengths(&monitor.info(false, 99)).iter().all(|n| *n == 0));
        let recent = monitor.info(true, 0);
        let recent = recent.field("range_query").unwrap();
        assert!(recent.field("host_net_io.read_bps").unwrap().as_f64().is_some());
        assert!(recent.field("host_cpu.guest_nice").is_some());
    }

    #[test]
    fn groups_are_nested_for_the_scheduler() {
        let mut monitor = SystemMonitor::new(&MonitorConfig::default());
        let before = monitor.usage().memory;
        monitor.update(&[], 1 << 40);
        let nested = Value::Map(monitor.nested());
        assert!(nested.field("host_net_io").unwrap().field("write_bps").is_some());
        assert!(matches!(nested.field("memory"), Some(Value::Int(n)) if n.get() > 1 << 40));
        assert!(matches!(nested.field("num_fds"), Some(Value::Int(n)) if n.get() > 2));
        assert!(before > 0 && nested.field("host_cpu").is_none());
    }
}
