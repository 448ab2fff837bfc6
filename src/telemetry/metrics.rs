//! The registry of metrics: Dask's worker metrics under Dask's names, and those a stock worker has no counterpart for.
//!
//! Instruments are plain atomics that any room may hold and set; nothing here computes them.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::{Metric, Registry, Unit};

use super::Pulse;

/// `state` of a task: `executing`, `memory`, `disk`...
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct StateLabel {
    /// Name of the state.
    pub state: &'static str,
}

/// `type` of memory: `managed`, `unmanaged`, `spilled`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct MemoryLabel {
    /// Name of the part.
    pub r#type: &'static str,
}

/// `activity` of the spill buffer: `memory-read`, `disk-read`, `disk-write`...
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ActivityLabel {
    /// Name of the activity.
    pub activity: &'static str,
}

/// `cause` of a runner's end: `signal`, `exit`, `oom`...
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CauseLabel {
    /// Name of the cause.
    pub cause: &'static str,
}

/// Gauge of a whole number: bytes, tasks.
pub type Size = Gauge<u64, AtomicU64>;
/// Gauge of a fraction: seconds.
pub type Level = Gauge<f64, AtomicU64>;

/// Every instrument of the daemon. Clones share their values.
///
/// The first group has the names and meanings of `distributed/http/worker/prometheus/core.py`; its garbage collector and
/// digest metrics are left out, as this process has neither.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    /// `dask_worker_tasks`: tasks by state; `memory` counts those in memory, `disk` the spilled ones.
    pub tasks: Family<StateLabel, Size>,
    /// `dask_worker_threads`: tasks that may run at once.
    pub threads: Size,
    /// `dask_worker_latency_seconds`: smoothed round trip to the scheduler.
    pub latency: Level,
    /// `dask_worker_memory_bytes`: `managed`, `unmanaged`, `spilled`.
    pub memory: Family<MemoryLabel, Size>,
    /// `dask_worker_transfer_incoming_bytes`: size of open transfers from peers.
    pub transfer_incoming_bytes: Size,
    /// `dask_worker_transfer_incoming_count`: open transfers from peers.
    pub transfer_incoming_count: Size,
    /// `dask_worker_transfer_incoming_count_total`: transfers from peers since the start.
    pub transfer_incoming_count_total: Counter,
    /// `dask_worker_transfer_outgoing_bytes`: size of open transfers to peers.
    pub transfer_outgoing_bytes: Size,
    /// `dask_worker_transfer_outgoing_count`: open transfers to peers.
    pub transfer_outgoing_count: Size,
    /// `dask_worker_transfer_outgoing_bytes_total`: bytes sent to peers since the start.
    pub transfer_outgoing_bytes_total: Counter,
    /// `dask_worker_transfer_outgoing_count_total`: transfers to peers since the start.
    pub transfer_outgoing_count_total: Counter,
    /// `dask_worker_spill_bytes_total` by activity.
    pub spill_bytes: Family<ActivityLabel, Counter>,
    /// `dask_worker_spill_count_total` by activity.
    pub spill_count: Family<ActivityLabel, Counter>,
    /// `dask_worker_spill_time_seconds_total` by activity.
    pub spill_time: Family<ActivityLabel, Counter<f64, AtomicU64>>,

    /// `iqoqo_worker_spill_files_bytes`: all spill files, those of results that are in memory again included.
    pub spill_files: Size,
    /// `iqoqo_worker_runners`: live runner processes.
    pub runners: Size,
    /// `iqoqo_worker_runner_deaths_total`: runners that ended without being told to, by cause.
    pub runner_deaths: Family<CauseLabel, Counter>,
    /// `iqoqo_worker_registrations_total`: times the scheduler accepted this worker; above 1 it had been lost.
    pub registrations: Counter,
    /// `iqoqo_worker_heartbeat_failures_total`: heartbeats that got no answer.
    pub heartbeat_failures: Counter,
}

impl Metrics {
    /// A registry that shows these instruments and the driver's pulse.
    fn registry(&self, pulse: &Pulse) -> Registry {
        let mut registry = Registry::default();
        let mut dask = Names { registry: &mut registry, prefix: "dask_worker" };
        dask.add("tasks", "Number of tasks at worker.", &self.tasks);
        dask.add("threads", "Number of worker threads", &self.threads);
        dask.add_in("latency", "Latency of worker connection", Unit::Seconds, &self.latency);
        dask.add("memory_bytes", "Memory breakdown", &self.memory);
        let incoming = "from other workers";
        dask.add(
            "transfer_incoming_bytes",
            &format!("Total size of open data transfers {incoming}"),
            &self.transfer_incoming_bytes,
        );
        dask.add(
            "transfer_incoming_count",
            &format!("Number of open data transfers {incoming}"),
            &self.transfer_incoming_count,
        );
        dask.add(
            "transfer_incoming_count",
            &format!("Total number of data transfers {incoming} since the worker was started"),
            &self.transfer_incoming_count_total,
        );
        let outgoing = "to other workers";
        dask.add(
            "transfer_outgoing_bytes",
            &format!("Size of open data transfers {outgoing}"),
            &self.transfer_outgoing_bytes,
        );
        dask.add(
            "transfer_outgoing_count",
            &format!("Number of open data transfers {outgoing}"),
            &self.transfer_outgoing_count,
        );
        dask.add(
            "transfer_outgoing_bytes",
            &format!("Total size of data transfers {outgoing} since the worker was started"),
            &self.transfer_outgoing_bytes_total,
        );
        dask.add(
            "transfer_outgoing_count",
            &format!("Total number of data transfers {outgoing} since the worker was started"),
            &self.transfer_outgoing_count_total,
        );
        let spill = "caused by managed data since the worker was started";
        dask.add("spill_bytes", &format!("Size of memory and disk accesses {spill}"), &self.spill_bytes);
        dask.add("spill_count", &format!("Number of memory and disk accesses {spill}"), &self.spill_count);
        dask.add_in(
            "spill_time",
            &format!("Time spent on spilling {spill}"),
            Unit::Seconds,
            &self.spill_time,
        );

        let mut ours = Names { registry: &mut registry, prefix: "iqoqo_worker" };
        ours.add("spill_files_bytes", "Size of all spill files", &self.spill_files);
        ours.add("runners", "Live runner processes", &self.runners);
        ours.add("runner_deaths", "Runners that ended without being told to", &self.runner_deaths);
        ours.add("registrations", "Times the scheduler accepted this worker", &self.registrations);
        ours.add("heartbeat_failures", "Heartbeats that got no answer", &self.heartbeat_failures);
        registry.register_collector(Box::new(Ticks(pulse.clone())));
        registry
    }
}

/// Registers clones of instruments under one prefix.
struct Names<'a> {
    registry: &'a mut Registry,
    prefix: &'static str,
}

impl Names<'_> {
    fn add(&mut self, name: &str, help: &str, metric: &(impl Metric + Clone)) {
        self.registry.register(format!("{}_{name}", self.prefix), help, metric.clone());
    }

    fn add_in(&mut self, name: &str, help: &str, unit: Unit, metric: &(impl Metric + Clone)) {
        self.registry.register_with_unit(format!("{}_{name}", self.prefix), help, unit, metric.clone());
    }
}

/// Shows the pulse under the names of Dask's event loop ticks. Reading it resets the maximum, as there.
#[derive(Debug)]
struct Ticks(Pulse);

impl Collector for Ticks {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let longest = ConstGauge::new(self.0.take_longest().as_secs_f64());
        let help = "Maximum tick duration observed since metrics were last read";
        let name = "dask_worker_tick_duration_maximum";
        longest.encode(encoder.encode_descriptor(
            name,
            help,
            Some(&Unit::Seconds),
            longest.metric_type(),
        )?)?;
        let count = ConstCounter::new(self.0.count());
        let help = "Total number of ticks observed since the worker started";
        count.encode(encoder.encode_descriptor("dask_worker_tick_count", help, None, count.metric_type())?)
    }
}

/// The registry behind `/metrics`.
#[derive(Clone)]
pub(super) struct Exposition(Arc<Registry>);

impl Exposition {
    pub(super) fn new(metrics: &Metrics, pulse: &Pulse) -> Self {
        Exposition(Arc::new(metrics.registry(pulse)))
    }

    /// Media type of [`Exposition::render`].
    pub(super) const MEDIA_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

    /// All metrics in Prometheus' text format.
    pub(super) fn render(&self) -> Result<String, std::fmt::Error> {
        let mut open = String::with_capacity(4096);
        text::encode(&mut open, &self.0)?;
        Ok(to_text_format(&open))
    }
}

/// OpenMetrics to the older text format, which a stock worker serves too.
///
/// Dask has a gauge `x` beside a counter `x_total`. OpenMetrics calls both families `x`, which its readers may refuse;
/// in the text format a counter's family bears the `_total` of its sample.
fn to_text_format(open: &str) -> String {
    let mut out = String::with_capacity(open.len());
    let mut help = "";
    for line in open.lines() {
        if line.starts_with("# HELP ") {
            help = line;
        } else if let Some(counter) = line.strip_prefix("# TYPE ").and_then(|l| l.strip_suffix(" counter")) {
            let text = help.splitn(4, ' ').nth(3).unwrap_or_default();
            out.push_str(&format!("# HELP {counter}_total {text}\n# TYPE {counter}_total counter\n"));
        } else if line.starts_with("# TYPE ") {
            out.push_str(&format!("{help}\n{line}\n"));
        } else if !line.starts_with('#') {
            out.push_str(line);
            out.push('\n');
        }
    }
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn dask_names_and_values() {
        let metrics = Metrics::default();
        let pulse = Pulse::new(Duration::from_millis(500));
        let exposition = Exposition::new(&metrics, &pulse);
        metrics.tasks.get_or_create(&StateLabel { state: "memory" }).set(3);
        metrics.memory.get_or_create(&MemoryLabel { r#type: "managed" }).set(1 << 40);
        metrics.spill_time.get_or_create(&ActivityLabel { activity: "disk-read" }).inc_by(0.5);
        metrics.latency.set(0.25);
        metrics.transfer_outgoing_bytes_total.inc_by(7);
        pulse.tick();
        let text = exposition.render().unwrap();
        for line in [
            "dask_worker_tasks{state=\"memory\"} 3",
            "dask_worker_memory_bytes{type=\"managed\"} 1099511627776",
            "dask_worker_spill_time_seconds_total{activity=\"disk-read\"} 0.5",
            "dask_worker_latency_seconds 0.25",
            "dask_worker_transfer_outgoing_bytes 0",
            "dask_worker_transfer_outgoing_bytes_total 7",
            "dask_worker_tick_count_total 1",
            "iqoqo_worker_runners 0",
            "# TYPE dask_worker_transfer_outgoing_bytes gauge",
            "# TYPE dask_worker_transfer_outgoing_bytes_total counter",
            "# HELP dask_worker_threads Number of worker threads.",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        assert!(text.contains("dask_worker_tick_duration_maximum_seconds "));
        let mut families: Vec<&str> = text.lines().filter(|l| l.starts_with("# TYPE")).collect();
        families.sort_unstable();
        families.windows(2).for_each(|pair| assert_ne!(pair[0], pair[1]));
    }
}
