//! What was transferred between peers: counts of what is under way, totals, and the logs that dumps show.
//!
//! Keeps numbers and forms no opinion: bandwidths for the heartbeat are worked out from [`Received`] by whoever
//! sends it.
//!
//! Source: `distributed/worker.py: Worker.get_data, _update_metrics_received_data`.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::proto::{Address, Key, Value};

/// Name of a digest, as the parts of Dask's tuple; a single part stands for a plain string.
pub type DigestName = &'static [&'static str];

/// Shortest time, in seconds, that a transfer is taken to have lasted.
const SHORTEST: f64 = 0.001;

/// Shared by the data server and all fetches of one worker. Clones share it.
#[derive(Clone, Debug)]
pub struct Transfers(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    outgoing: OutgoingCounts,
    /// Seconds to add to our clock for the scheduler's.
    scheduler_delay: f64,
    log_length: usize,
    incoming_log: VecDeque<Entry>,
    outgoing_log: VecDeque<Entry>,
    digests: BTreeMap<DigestName, f64>,
}

/// Transfers to peers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OutgoingCounts {
    /// Bytes of transfers under way, by Dask's `sizeof`.
    pub bytes: u64,
    /// Transfers under way.
    pub count: u64,
    /// Bytes since the start.
    pub bytes_total: u64,
    /// Transfers since the start.
    pub count_total: u64,
}

/// One finished transfer, as the logs show it.
#[derive(Clone, Debug)]
struct Entry {
    start: f64,
    stop: f64,
    middle: f64,
    duration: f64,
    who: Value,
    keys: Vec<(Key, u64)>,
    total: u64,
    /// Bytes on the wire; known for outgoing transfers.
    compressed: Option<u64>,
}

/// A finished transfer from a peer, for bandwidths and for the startstops of the task that wanted it.
#[derive(Clone, Debug, PartialEq)]
pub struct Received {
    /// Who sent it.
    pub worker: Address,
    /// Begin, in seconds since 1970 by the scheduler's clock.
    pub start: f64,
    /// End, by the same clock.
    pub stop: f64,
    /// Bytes by Dask's `sizeof`.
    pub nbytes: u64,
    /// Seconds it took, at least a millisecond.
    pub duration: f64,
    /// Type of everything in it, when that is one and the data say which.
    pub type_name: Option<Arc<str>>,
}

/// Seconds since 1970.
pub(super) fn now() -> f64 {
    // A clock before 1970 is a clock that was never set.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |t| t.as_secs_f64())
}

impl Transfers {
    /// Logs of at most `log_length` entries each (`distributed.admin.low-level-log-length`).
    pub fn new(log_length: usize) -> Self {
        Transfers(Arc::new(Mutex::new(Inner {
            outgoing: OutgoingCounts::default(),
            scheduler_delay: 0.0,
            log_length,
            incoming_log: VecDeque::new(),
            outgoing_log: VecDeque::new(),
            digests: BTreeMap::new(),
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over what a registration or heartbeat found out about the scheduler's clock, in seconds.
    pub fn set_scheduler_delay(&self, seconds: f64) {
        self.lock().scheduler_delay = seconds;
    }

    /// Transfers to peers, now and so far.
    pub fn outgoing(&self) -> OutgoingCounts {
        self.lock().outgoing
    }

    /// `Worker.transfer_incoming_log`, oldest first.
    pub fn incoming_log(&self) -> Value {
        self.lock().incoming_log.iter().map(Entry::to_value).collect::<Vec<_>>().into()
    }

    /// `Worker.transfer_outgoing_log`, oldest first.
    pub fn outgoing_log(&self) -> Value {
        self.lock().outgoing_log.iter().map(Entry::to_value).collect::<Vec<_>>().into()
    }

    /// Sums that were digested since this was last asked.
    pub fn take_digests(&self) -> Vec<(DigestName, f64)> {
        std::mem::take(&mut self.lock().digests).into_iter().collect()
    }

    pub(super) fn digest(&self, name: DigestName, value: f64) {
        self.lock().digest(name, value);
    }

    /// Admits one more transfer to a peer, unless `limit` of them are under way.
    pub(super) fn begin_outgoing(&self, limit: Option<u64>) -> Option<Outgoing> {
        let mut inner = self.lock();
        if limit.is_some_and(|limit| inner.outgoing.count >= limit) {
            return None;
        }
        inner.outgoing.count += 1;
        inner.outgoing.count_total += 1;
        Some(Outgoing { transfers: self.clone(), keys: Vec::new(), total: 0 })
    }

    /// Notes a finished transfer from a peer; times are those of our clock.
    pub(super) fn received(
        &self,
        worker: &Address,
        start: f64,
        stop: f64,
        keys: Vec<(Key, u64)>,
        type_name: Option<Arc<str>>,
    ) -> Received {
        let mut inner = self.lock();
        let nbytes = keys.iter().map(|(_, n)| n).sum();
        let duration = (stop - start).max(SHORTEST);
        let delay = inner.scheduler_delay;
        let entry = Entry {
            start: start + delay,
            stop: stop + delay,
            middle: (start + stop) / 2.0 + delay,
            duration,
            who: worker.as_str().into(),
            keys,
            total: nbytes,
            compressed: None,
        };
        let length = inner.log_length;
        push(&mut inner.incoming_log, entry, length);
        inner.digest(&["transfer-bandwidth"], nbytes as f64 / duration);
        inner.digest(&["transfer-duration"], duration);
        Received {
            worker: worker.clone(),
            start: start + delay,
            stop: stop + delay,
            nbytes,
            duration,
            type_name,
        }
    }
}

impl Inner {
    fn digest(&mut self, name: DigestName, value: f64) {
        *self.digests.entry(name).or_default() += value;
    }
}

fn push(log: &mut VecDeque<Entry>, entry: Entry, length: usize) {
    log.push_back(entry);
    while log.len() > length {
        log.pop_front();
    }
}

impl Entry {
    fn to_value(&self) -> Value {
        let keys = self.keys.iter().map(|(k, n)| (Value::from(k), Value::from(*n))).collect();
        let mut fields = vec![
            ("start", self.start.into()),
            ("stop", self.stop.into()),
            ("middle", self.middle.into()),
            ("duration", self.duration.into()),
            ("who", self.who.clone()),
            ("keys", Value::Map(keys)),
            ("total", self.total.into()),
            ("bandwidth", (self.total as f64 / self.duration).into()),
        ];
        fields.extend(self.compressed.map(|bytes| ("compressed", bytes.into())));
        Value::map(fields)
    }
}

/// A transfer to a peer that is under way; it counts until this is dropped.
pub(super) struct Outgoing {
    transfers: Transfers,
    keys: Vec<(Key, u64)>,
    total: u64,
}

impl Outgoing {
    /// Says what is being sent.
    pub(super) fn carries(&mut self, keys: Vec<(Key, u64)>) {
        self.total = keys.iter().map(|(_, n)| n).sum();
        self.keys = keys;
        let mut inner = self.transfers.lock();
        inner.outgoing.bytes += self.total;
        inner.outgoing.bytes_total += self.total;
    }

    /// Notes that the peer has got everything; times are those of our clock, `compressed` bytes went over the wire.
    pub(super) fn finish(mut self, who: Value, start: f64, stop: f64, compressed: u64) {
        let mut inner = self.transfers.lock();
        let delay = inner.scheduler_delay;
        let entry = Entry {
            start: start + delay,
            stop: stop + delay,
            // by our own clock, as Dask has it
            middle: (start + stop) / 2.0,
            duration: (stop - start).max(SHORTEST),
            who,
            keys: std::mem::take(&mut self.keys),
            total: self.total,
            compressed: Some(compressed),
        };
        let length = inner.log_length;
        push(&mut inner.outgoing_log, entry, length);
        inner.digest(&["get-data", "network", "seconds"], (stop - start).max(0.0));
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        let mut inner = self.transfers.lock();
        inner.outgoing.count -= 1;
        inner.outgoing.bytes -= self.total;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn outgoing_transfers_count_while_they_last() {
        let transfers = Transfers::new(2);
        let mut first = transfers.begin_outgoing(Some(1)).unwrap();
        assert!(transfers.begin_outgoing(Some(1)).is_none());
        first.carries(vec![("a".into(), 3), ("b".into(), 4)]);
        assert_eq!(
            transfers.outgoing(),
            OutgoingCounts { bytes: 7, count: 1, bytes_total: 7, count_total: 1 }
        );
        first.finish("me".into(), 10.0, 12.0, 9);
        assert_eq!(
            transfers.outgoing(),
            OutgoingCounts { bytes: 0, count: 0, bytes_total: 7, count_total: 1 }
        );
        assert!(transfers.begin_outgoing(None).is_some());
        assert_eq!(transfers.take_digests(), [(&["get-data", "network", "seconds"][..], 2.0)]);
        assert!(transfers.take_digests().is_empty());
    }

    #[test]
    fn logs_have_the_fields_of_dask_and_a_bound() {
        let transfers = Transfers::new(2);
        transfers.set_scheduler_delay(100.0);
        let peer = Address::parse("tcp://h:1").unwrap();
        for i in 0..3u8 {
            let at = f64::from(i);
            let received = transfers.received(&peer, at, at, vec![("k".into(), 50)], None);
            assert_eq!((received.start, received.duration, received.nbytes), (at + 100.0, 0.001, 50));
        }
        let log = transfers.incoming_log();
        let entries = log.as_list().unwrap();
        assert_eq!(entries.len(), 2);
        let last = &entries[1];
        assert_eq!(last.field("middle"), Some(&102.0.into()));
        assert_eq!(last.field("bandwidth"), Some(&50_000.0.into()));
        assert_eq!(last.field("who"), Some(&"tcp://h:1".into()));
        assert_eq!(last.field("compressed"), None);

        transfers.begin_outgoing(None).unwrap().finish(Value::Nil, 1.0, 3.0, 8);
        let log = transfers.outgoing_log();
        let entry = &log.as_list().unwrap()[0];
        assert_eq!(entry.field("start"), Some(&101.0.into()));
        assert_eq!(entry.field("middle"), Some(&2.0.into()));
        assert_eq!(entry.field("compressed"), Some(&8.into()));
    }
}
