//! One peer worker, as far as fetching from it goes. Data only.

use crate::proto::Address;

use super::collections::{HeapSet, Id, IdSet};
use super::task::Task;

/// What the state machine knows of another worker.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    pub(super) address: Address,
    /// It runs on the same host as this worker.
    pub(super) local: bool,
    /// Tasks that we know, and believe to be there. Dask's `WorkerState.has_what`.
    pub(super) has_what: IdSet<Task>,
    /// Tasks in `fetch` that it holds. Dask's `WorkerState.data_needed`.
    pub(super) data_needed: HeapSet<Task>,
    /// What is being gathered from it. Dask's `WorkerState.in_flight_workers`.
    pub(super) in_flight: Option<Vec<Id<Task>>>,
    /// It said so lately. Dask's `WorkerState.busy_workers`.
    pub(super) busy: bool,
}

impl Peer {
    pub(super) fn new(address: Address, local: bool) -> Self {
        Peer {
            address,
            local,
            has_what: IdSet::default(),
            data_needed: HeapSet::default(),
            in_flight: None,
            busy: false,
        }
    }

    /// Nothing is known about it any more.
    pub(super) fn is_idle(&self) -> bool {
        self.has_what.is_empty() && self.data_needed.is_empty() && self.in_flight.is_none() && !self.busy
    }
}
