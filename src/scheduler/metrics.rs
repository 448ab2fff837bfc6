//! What a heartbeat tells: `Worker.get_metrics` in its exact shape, and the fine performance metrics (digests) behind it.
//!
//! Values come from whoever counts them; nothing is measured here.

use std::collections::HashMap;
use std::sync::Arc;

use crate::proto::{Key, Value};

/// Contexts whose digests are told apart by span (`distributed/spans.py: CONTEXTS_WITH_SPAN_ID`).
const SPANNED: [&str; 2] = ["execute", "p2p"];

/// One digest: its name without the span, and the span where it has one.
type Digest = (Key, Option<Arc<str>>);

/// Fine performance metrics since the last heartbeat: sums by `(context, ..., activity, unit)`.
///
/// Mirrors `Server.digest_metric` and `SpansWorkerExtension`. Units in use are `seconds`, `bytes`, `count`; users may have their own.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Digests(HashMap<Digest, f64>);

impl Digests {
    /// Adds to a sum of any name: `latency`, or `("get-data", "network", "seconds")`.
    pub fn add(&mut self, name: impl Into<DigestName>, value: f64) {
        *self.0.entry((name.into().0, None)).or_default() += value;
    }

    /// Adds to a sum that belongs to a span: `("execute", prefix, activity, unit)` of a task in `span_id`.
    ///
    /// A task without a span counts in the totals alone; the scheduler refuses a heartbeat that names no span.
    pub fn add_in_span(&mut self, name: impl Into<DigestName>, span_id: Option<&Arc<str>>, value: f64) {
        *self.0.entry((name.into().0, span_id.cloned())).or_default() += value;
    }

    /// Adds all sums of another, such as those of a heartbeat that got lost.
    pub fn merge(&mut self, other: Digests) {
        for (digest, value) in other.0 {
            *self.0.entry(digest).or_default() += value;
        }
    }

    /// True when nothing was added.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// `metrics["digests_total_since_heartbeat"]`: spans squashed.
    fn totals(&self) -> Value {
        let mut totals: HashMap<&Key, f64> = HashMap::new();
        for ((name, _), value) in &self.0 {
            *totals.entry(name).or_default() += value;
        }
        Value::Map(totals.into_iter().map(|(name, value)| (name.into(), number(name, value))).collect())
    }

    /// `extensions["spans"]`: those of a span, with the span's id behind the context.
    pub fn by_span(&self) -> Value {
        let spanned = self.0.iter().filter_map(|((name, span), value)| {
            let span = span.as_ref()?;
            let Value::List(mut parts) = Value::from(name) else { return None };
            let has_span = parts.first().and_then(Value::as_str).is_some_and(|c| SPANNED.contains(&c));
            has_span.then(|| {
                parts.insert(1, span.clone().into());
                (Value::List(parts), number(name, *value))
            })
        });
        Value::Map(spanned.collect())
    }
}

/// Bytes and counts are Python ints, the rest floats.
fn number(name: &Key, value: f64) -> Value {
    let unit = match name {
        Key::Tuple(parts) => parts.last(),
        _ => None,
    };
    let whole = matches!(unit, Some(Key::Str(unit)) if matches!(&**unit, "bytes" | "count"));
    if whole && value.fract() == 0.0 { Value::from(value as i128) } else { Value::Float(value) }
}

/// The name of a digest: a string, or a tuple of strings.
pub struct DigestName(Key);

impl From<&str> for DigestName {
    fn from(name: &str) -> Self {
        DigestName(Key::Str(name.into()))
    }
}

impl<const N: usize> From<[&str; N]> for DigestName {
    fn from(parts: [&str; N]) -> Self {
        DigestName(Key::Tuple(parts.iter().map(|part| Key::Str((*part).into())).collect()))
    }
}

impl From<Key> for DigestName {
    /// Any name a runner reports; Dask allows labels of any hashable type.
    fn from(name: Key) -> Self {
        DigestName(name)
    }
}

/// Measured bandwidths (`Worker.bandwidth`, `bandwidth_workers`, `bandwidth_types`).
#[derive(Clone, Debug, PartialEq)]
pub struct Bandwidth {
    /// Smoothed bytes a second over all peers.
    pub total: f64,
    /// Sum of bandwidths and number of transfers since the last heartbeat, by peer.
    workers: HashMap<Arc<str>, (f64, u64)>,
    /// The same, by type of what was transferred.
    types: HashMap<Arc<str>, (f64, u64)>,
}

impl Bandwidth {
    /// Smaller transfers say more about latency than about bandwidth (bytes).
    const MINIMUM: u64 = 1_000_000;

    /// Starts from `distributed.scheduler.bandwidth`, in bytes a second.
    pub fn new(total: f64) -> Self {
        Bandwidth { total, workers: HashMap::new(), types: HashMap::new() }
    }

    /// Counts one transfer of `nbytes` from `worker`, which took `seconds`. `type_name` is given when all of it was of one type.
    ///
    /// Mirrors `Worker._update_metrics_received_data`.
    pub fn observe(&mut self, worker: &str, type_name: Option<&str>, nbytes: u64, seconds: f64) {
        if nbytes <= Self::MINIMUM {
            return;
        }
        let bandwidth = nbytes as f64 / seconds.max(0.001);
        self.total = self.total * 0.95 + bandwidth * 0.05;
        add(&mut self.workers, worker, (bandwidth, 1));
        if let Some(type_name) = type_name {
            add(&mut self.types, type_name, (bandwidth, 1));
        }
    }

    /// What is to be told now; the sums start anew.
    pub fn take(&mut self) -> Bandwidth {
        let total = self.total;
        std::mem::replace(self, Bandwidth::new(total))
    }

    /// Adds the sums of an earlier heartbeat that got lost.
    fn merge(&mut self, lost: Bandwidth) {
        lost.workers.iter().for_each(|(worker, sum)| add(&mut self.workers, worker, *sum));
        lost.types.iter().for_each(|(type_name, sum)| add(&mut self.types, type_name, *sum));
    }

    fn to_value(&self) -> Value {
        let sums = |sums: &HashMap<Arc<str>, (f64, u64)>| {
            let pair = |(sum, n): &(f64, u64)| Value::List(vec![(*sum).into(), (*n).into()]);
            Value::Map(sums.iter().map(|(name, sum)| (name.clone().into(), pair(sum))).collect())
        };
        Value::map([
            ("total", self.total.into()),
            ("workers", sums(&self.workers)),
            ("types", sums(&self.types)),
        ])
    }
}

fn add(sums: &mut HashMap<Arc<str>, (f64, u64)>, name: &str, (sum, n): (f64, u64)) {
    match sums.get_mut(name) {
        Some(entry) => *entry = (entry.0 + sum, entry.1 + n),
        None => _ = sums.insert(name.into(), (sum, n)),
    }
}

/// Transfers between peers, as `metrics["transfer"]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transfers {
    /// Bytes of open transfers from peers.
    pub incoming_bytes: u64,
    /// Open transfers from peers.
    pub incoming_count: u64,
    /// Transfers from peers since the start.
    pub incoming_count_total: u64,
    /// Bytes of open transfers to peers.
    pub outgoing_bytes: u64,
    /// Open transfers to peers.
    pub outgoing_count: u64,
    /// Transfers to peers since the start.
    pub outgoing_count_total: u64,
}

impl Transfers {
    fn to_value(self) -> Value {
        Value::map([
            ("incoming_bytes", self.incoming_bytes.into()),
            ("incoming_count", self.incoming_count.into()),
            ("incoming_count_total", self.incoming_count_total.into()),
            ("outgoing_bytes", self.outgoing_bytes.into()),
            ("outgoing_count", self.outgoing_count.into()),
            ("outgoing_count_total", self.outgoing_count_total.into()),
        ])
    }
}

/// Everything `Worker.get_metrics` tells.
#[derive(Clone, Debug, PartialEq)]
pub struct Metrics {
    /// Tasks by name of their state.
    pub task_counts: Vec<(Arc<str>, u64)>,
    /// Measured bandwidths.
    pub bandwidth: Bandwidth,
    /// Fine performance metrics since the last heartbeat.
    pub digests: Digests,
    /// Bytes of all results held, in memory or spilled, by `sizeof`.
    pub managed_bytes: u64,
    /// Bytes of spilled results: by `sizeof`, as if in memory.
    pub spilled_memory: u64,
    /// Bytes that they take on disk.
    pub spilled_disk: u64,
    /// Transfers between peers.
    pub transfer: Transfers,
    /// Seconds between ticks of the event loop.
    pub event_loop_interval: f64,
    /// `SystemMonitor::nested`.
    pub system: Vec<(Value, Value)>,
    /// What plugins of the worker add (`Worker.metrics`); names above win over these.
    pub extra: Vec<(Arc<str>, Value)>,
}

impl Metrics {
    /// The dict that goes to the scheduler.
    pub fn to_value(&self) -> Value {
        let counts = self.task_counts.iter().map(|(state, n)| (state.clone().into(), (*n).into()));
        let spilled = [("memory", self.spilled_memory.into()), ("disk", self.spilled_disk.into())];
        let fields = [
            ("task_counts", Value::Map(counts.collect())),
            ("bandwidth", self.bandwidth.to_value()),
            ("digests_total_since_heartbeat", self.digests.totals()),
            ("managed_bytes", self.managed_bytes.into()),
            ("spilled_bytes", Value::map(spilled)),
            ("transfer", self.transfer.to_value()),
            ("event_loop_interval", self.event_loop_interval.into()),
        ];
        let mut out: Vec<_> = fields.into_iter().map(|(name, value)| (Value::from(name), value)).collect();
        out.extend(self.system.iter().cloned());
        for (name, value) in &self.extra {
            if !out.iter().any(|(taken, _)| taken.as_str() == Some(name)) {
                out.push((name.clone().into(), value.clone()));
            }
        }
        Value::Map(out)
    }

    /// Takes in what an earlier heartbeat should have told and did not.
    pub(super) fn merge_lost(&mut self, lost: (Bandwidth, Digests)) {
        self.bandwidth.merge(lost.0);
        self.digests.merge(lost.1);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn entry<'a>(map: &'a Value, key: &Value) -> &'a Value {
        map.as_map().unwrap().iter().find(|(k, _)| k == key).map(|(_, v)| v).unwrap()
    }

    fn tuple(parts: &[&str]) -> Value {
        Value::List(parts.iter().map(|p| Value::from(*p)).collect())
    }

    #[test]
    fn digests_are_squashed_for_totals_and_apart_for_spans() {
        let mut digests = Digests::default();
        let (a, b): (Arc<str>, Arc<str>) = ("span-a".into(), "span-b".into());
        digests.add_in_span(["execute", "inc", "thread-cpu", "seconds"], Some(&a), 1.0);
        digests.add_in_span(["execute", "inc", "thread-cpu", "seconds"], Some(&b), 2.0);
        digests.add_in_span(["execute", "inc", "thread-cpu", "seconds"], None, 4.0);
        digests.add(["get-data", "memory-read", "bytes"], 3.0);
        digests.add("latency", 0.5);
        let totals = digests.totals();
        assert_eq!(entry(&totals, &tuple(&["execute", "inc", "thread-cpu", "seconds"])), &Value::Float(7.0));
        assert_eq!(entry(&totals, &tuple(&["get-data", "memory-read", "bytes"])), &Value::from(3));
        assert_eq!(entry(&totals, &"latency".into()), &Value::Float(0.5));
        let spans = digests.by_span();
        assert_eq!(spans.as_map().unwrap().len(), 2);
        let b = entry(&spans, &tuple(&["execute", "span-b", "inc", "thread-cpu", "seconds"]));
        assert_eq!(b, &Value::Float(2.0));
    }

    #[test]
    fn small_transfers_do_not_count_and_lost_sums_come_back() {
        let mut bandwidth = Bandwidth::new(100e6);
        bandwidth.observe("tcp://a:1", Some("bytes"), 1_000_000, 1.0);
        assert_eq!(bandwidth, Bandwidth::new(100e6));
        bandwidth.observe("tcp://a:1", Some("bytes"), 2_000_000, 0.01);
        bandwidth.observe("tcp://a:1", None, 2_000_000, 0.0);
        let mut taken = bandwidth.take();
        assert_eq!(taken.workers["tcp://a:1"], (200e6 + 2e9, 2));
        assert_eq!(taken.types["bytes"], (200e6, 1));
        assert!(bandwidth.workers.is_empty() && bandwidth.total > 100e6);
        taken.merge(taken.clone());
        assert_eq!(taken.workers["tcp://a:1"].1, 4);
    }
}
