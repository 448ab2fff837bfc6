//! What the scheduler is told with each heartbeat, and operators at `/metrics`: numbers that are kept elsewhere.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use rustc_hash::FxHashMap;
use tokio::sync::oneshot;

use super::driver::Driver;
use super::shared::Shared;
use crate::proto::{Key, Value};
use crate::scheduler::{Bandwidth, Beat, Digests, Metrics, Transfers, now};
use crate::state::StateName;
use crate::telemetry::{ActivityLabel, MemoryLabel, StateLabel};

/// Seconds that tasks took since the last heartbeat, by prefix and span.
#[derive(Debug, Default)]
pub(super) struct Executed(FxHashMap<(Arc<str>, Option<Arc<str>>), Seconds>);

#[derive(Clone, Copy, Debug, Default)]
struct Seconds {
    cpu: f64,
    other: f64,
}

impl Executed {
    /// Counts a task that took `seconds`, `cpu` of them on the processor.
    pub(super) fn add(&mut self, prefix: Arc<str>, span: Option<Arc<str>>, seconds: f64, cpu: f64) {
        let sum = self.0.entry((prefix, span)).or_default();
        sum.cpu += cpu;
        sum.other += (seconds - cpu).max(0.0);
    }

    /// Moves the sums into the digests of a heartbeat.
    fn drain_into(&mut self, digests: &mut Digests) {
        for ((prefix, span), seconds) in self.0.drain() {
            digests.add_in_span(["execute", &prefix, "thread-cpu", "seconds"], span.as_ref(), seconds.cpu);
            digests.add_in_span(
                ["execute", &prefix, "thread-noncpu", "seconds"],
                span.as_ref(),
                seconds.other,
            );
        }
    }
}

/// Metrics of a worker without tasks, for its registration.
pub(super) fn at_rest(shared: &Shared) -> Metrics {
    let outgoing = shared.transfers.outgoing();
    let spilled = shared.store.usage().spilled;
    Metrics {
        task_counts: Vec::new(),
        bandwidth: Bandwidth::new(shared.config.bandwidth),
        digests: Digests::default(),
        managed_bytes: 0,
        spilled_memory: spilled.memory,
        spilled_disk: spilled.disk,
        transfer: Transfers {
            outgoing_bytes: outgoing.bytes,
            outgoing_count: outgoing.count,
            outgoing_count_total: outgoing.count_total,
            ..Transfers::default()
        },
        event_loop_interval: shared.pulse.event_loop_interval(),
        system: shared.monitor().nested(),
        extra: Vec::new(),
    }
}

/// Adds what plugins had to say: their extensions' parts, and what they measured.
fn extend(beat: &mut Beat, told: &Value) {
    for (name, data) in told.field("extensions").and_then(Value::as_map).unwrap_or_default() {
        if let Value::Str(name) = name {
            beat.extensions.push((name.clone(), data.clone()));
        }
    }
    for digest in told.field("digests").and_then(Value::as_list).unwrap_or_default() {
        let Some([name, Value::Float(value)]) = digest.as_list() else { continue };
        let digests = &mut beat.metrics.digests;
        match name.as_list() {
            // these have their span, or none, behind the context
            Some([context, span, rest @ ..]) if context.as_str() == Some("p2p") => {
                let parts = [context].into_iter().chain(rest).map(Value::to_key);
                if let Some(parts) = parts.collect::<Option<_>>() {
                    let span = span.as_str().map(Into::into);
                    digests.add_in_span(Key::Tuple(parts), span.as_ref(), *value);
                }
            }
            _ => {
                if let Some(name) = name.to_key() {
                    digests.add(name, *value);
                }
            }
        }
    }
}

impl Driver {
    /// What a heartbeat tells now; sums since the last one start anew.
    pub(super) fn beat(&mut self) -> Beat {
        let mut digests = Digests::default();
        self.executed.drain_into(&mut digests);
        for (name, value) in self.shared.transfers.take_digests() {
            let parts = name.iter().map(|part| Key::from(*part)).collect();
            digests.add(if let [single] = name { Key::from(*single) } else { Key::Tuple(parts) }, value);
        }
        self.keep_time();
        let rest = at_rest(&self.shared);
        let metrics = Metrics {
            task_counts: self.state.task_counts().into_iter().map(|(s, n)| (s.as_str().into(), n)).collect(),
            bandwidth: self.bandwidth.take(),
            digests,
            managed_bytes: self.state.nbytes(),
            transfer: Transfers {
                incoming_bytes: self.state.transfer_incoming_bytes(),
                incoming_count: self.state.transfer_incoming_count() as u64,
                incoming_count_total: self.state.transfer_incoming_count_total(),
                ..rest.transfer
            },
            ..rest
        };
        let time = now();
        let since = |key: &Key| self.state.task(key).and_then(|task| task.start_time());
        let running = self.running.keys().filter_map(|key| Some((key.clone(), time - since(key)?)));
        Beat { executing: running.collect(), metrics, extensions: Vec::new() }
    }

    /// Tells a heartbeat what there is, with what plugins have to say.
    pub(super) fn heartbeat(&mut self, reply: oneshot::Sender<Beat>) {
        let mut beat = self.beat();
        // a heartbeat that nobody waits for any more belongs to a session that is over
        match self.pool.service_beat() {
            None => drop(reply.send(beat)),
            Some(told) => drop(tokio::spawn(async move {
                extend(&mut beat, &told.await);
                drop(reply.send(beat));
            })),
        }
    }

    /// Hands the offset of the scheduler's clock to those who tell it times.
    pub(super) fn keep_time(&self) {
        let delay = self.shared.scheduler.clock().delay();
        self.pool.set_time_delay(delay);
        self.shared.transfers.set_scheduler_delay(delay);
    }

    /// Brings `/metrics` up to date.
    pub(super) fn tell_metrics(&self, processes: usize) {
        let metrics = &self.shared.metrics;
        let store = self.shared.store.usage();
        let counts = self.state.task_counts();
        let on_disk = store.spilled.count as u64;
        for state in StateName::ALL {
            let mut count = counts.iter().find(|(name, _)| *name == state).map_or(0, |(_, count)| *count);
            if state == StateName::Memory {
                count = count.saturating_sub(on_disk);
            }
            metrics.tasks.get_or_create(&StateLabel { state: state.as_str() }).set(count);
        }
        metrics.tasks.get_or_create(&StateLabel { state: "disk" }).set(on_disk);
        metrics.threads.set(self.state.config().nthreads as u64);
        metrics.runners.set(processes as u64);
        let used = self.shared.monitor().usage().memory;
        let managed = self.state.nbytes().saturating_sub(store.spilled.memory).min(used);
        let memory = |part| metrics.memory.get_or_create(&MemoryLabel { r#type: part });
        memory("managed").set(managed);
        memory("unmanaged").set(used - managed);
        memory("spilled").set(store.spilled.disk);
        metrics.spill_files.set(store.files);
        let activities = [
            ("memory-read", store.memory_read),
            ("disk-read", store.disk_read),
            ("disk-write", store.disk_write),
        ];
        for (activity, done) in activities.into_iter().filter(|(_, done)| done.count > 0) {
            let label = ActivityLabel { activity };
            metrics.spill_count.get_or_create(&label).inner().store(done.count, Relaxed);
            metrics.spill_bytes.get_or_create(&label).inner().store(done.bytes, Relaxed);
            // nothing times what is in memory already
            if done.seconds > 0.0 {
                metrics.spill_time.get_or_create(&label).inner().store(done.seconds.to_bits(), Relaxed);
            }
        }
        metrics.transfer_incoming_bytes.set(self.state.transfer_incoming_bytes());
        metrics.transfer_incoming_count.set(self.state.transfer_incoming_count() as u64);
        let total = self.state.transfer_incoming_count_total();
        metrics.transfer_incoming_count_total.inner().store(total, Relaxed);
        let outgoing = self.shared.transfers.outgoing();
        metrics.transfer_outgoing_bytes.set(outgoing.bytes);
        metrics.transfer_outgoing_count.set(outgoing.count);
        metrics.transfer_outgoing_bytes_total.inner().store(outgoing.bytes_total, Relaxed);
        metrics.transfer_outgoing_count_total.inner().store(outgoing.count_total, Relaxed);
    }
}
