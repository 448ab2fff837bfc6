//! Tasks that wait for room or for inputs from disk, between their start in the state machine and a runner.
//!
//! What is spilled and read is the store's business; why a task cannot be run at all is `execute`'s.

use rustc_hash::FxHashMap;

use super::driver::{Driver, Report};
use super::execute::NoJob;
use super::gather::failure;
use crate::proto::{Key, RunId};
use crate::scheduler::now;
use crate::state::{Action, EventKind, StartStop};
use crate::store::{self, Object};

/// Reading inputs for longer than this, in seconds, shows in the task's times (`Worker._prepare_args_for_execution`).
const WORTH_TELLING: f64 = 0.005;

/// What came of reading a task's inputs.
#[derive(Debug)]
pub(super) struct Loaded {
    key: Key,
    run_id: RunId,
    inputs: FxHashMap<Key, Object>,
    /// An input is not held any more.
    is_short: bool,
    error: Option<store::Error>,
    start: f64,
    stop: f64,
}

impl Driver {
    /// Gives a started task to a runner: now, or once results have been spilled, or its inputs read.
    pub(super) fn submit(&mut self, key: Key, run_id: RunId) {
        if self.shared.store.is_crowded() {
            self.held_back.push((key, run_id));
        } else {
            self.submit_with(key, run_id, FxHashMap::default());
        }
    }

    fn submit_with(&mut self, key: Key, run_id: RunId, loaded: FxHashMap<Key, Object>) {
        match self.job(&key, &loaded) {
            Ok(job) => self.pool.submit(job),
            Err(NoJob::Short) => self.give_back(key),
            Err(NoJob::Error(error)) => self.refuse(key, run_id, *error),
            Err(NoJob::OnDisk { inputs, others }) => {
                let (store, jobs) = (self.shared.store.clone(), self.jobs.clone());
                let loaded = loaded.into_iter().chain(others).collect();
                tokio::spawn(async move {
                    let report = load(&store, key, run_id, inputs, loaded).await;
                    // without a driver nobody wants the inputs
                    let _ = jobs.send(Report::Loaded(Box::new(report)));
                });
            }
        }
    }

    /// Inputs were read, or could not be.
    pub(super) fn loaded(&mut self, loaded: Loaded) {
        // the scheduler must hear of the loss before it hears of the task
        self.report_lost();
        let Loaded { key, run_id, inputs, is_short, error, start, stop } = loaded;
        if self.running.get(&key) != Some(&run_id) {
            return;
        }
        if let Some(error) = error {
            return self.refuse(key, run_id, failure(&error));
        }
        if is_short {
            return self.give_back(key);
        }
        if stop - start > WORTH_TELLING {
            let delay = self.shared.scheduler.clock().delay();
            let (start, stop) = (start + delay, stop + delay);
            self.state.add_startstop(&key, StartStop { action: Action::DiskRead, start, stop, source: None });
        }
        self.submit_with(key, run_id, inputs);
    }

    /// A task whose inputs are lost is the scheduler's again.
    fn give_back(&mut self, key: Key) {
        self.running.remove(&key);
        self.apply_own("reschedule", EventKind::Reschedule { key });
    }

    /// Tells of results whose files were damaged.
    pub(super) fn report_lost(&mut self) {
        let keys = self.shared.store.take_lost();
        if !keys.is_empty() {
            self.apply_own("data-lost", EventKind::DataLost { keys });
        }
    }

    /// Gives out what waited for room, once there is some.
    pub(super) fn give_out(&mut self) {
        if self.held_back.is_empty() || self.shared.store.is_crowded() {
            return;
        }
        for (key, run_id) in std::mem::take(&mut self.held_back) {
            if self.running.get(&key) == Some(&run_id) {
                self.submit(key, run_id);
            }
        }
    }
}

/// Reads the inputs of a task, those of `loaded` besides.
async fn load(
    store: &store::Store,
    key: Key,
    run_id: RunId,
    inputs: Vec<Key>,
    loaded: FxHashMap<Key, Object>,
) -> Loaded {
    let start = now();
    let reads = inputs.iter().map(|input| store.load(input));
    let reads = futures_util::future::join_all(reads).await;
    let mut report = Loaded { key, run_id, inputs: loaded, is_short: false, error: None, start, stop: now() };
    for (input, read) in inputs.into_iter().zip(reads) {
        match read {
            Ok(Some(object)) => _ = report.inputs.insert(input, object),
            Ok(None) => report.is_short = true,
            Err(error) => report.error = Some(error),
        }
    }
    report
}
