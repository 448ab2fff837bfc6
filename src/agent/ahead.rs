//! Tasks handed to busy runners before the state machine starts them, so that a runner never waits for the next one.
//!
//! The state machine knows nothing of it: a task handed ahead is `ready` until its turn comes. This room keeps the two
//! views together: it remembers who was handed what, tells the state machine which task a runner has begun by
//! itself, and holds a result that came before its turn. How far ahead depends on how long tasks of that prefix take.

use std::sync::Arc;

use rustc_hash::{FxHashMap, FxHashSet};

use crate::exec;
use crate::proto::{Key, RunId};

/// Seconds of work that lie ready in a runner, if tasks are short enough to allow more than one.
const WORK_AHEAD: f64 = 2e-3;
/// Most tasks that lie ready in one runner.
pub const DEPTH_MAX: usize = 16;
/// Longest mean duration of tasks that are called brief, in seconds: about what it takes to wake a process.
const BRIEF: f64 = 1e-4;
/// Weight of the latest task in the mean duration of its prefix.
const SMOOTHING: f64 = 0.2;

/// What is handed ahead, and how long tasks take.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    handed: FxHashMap<Key, Handed>,
    /// Outcomes of tasks that ran before their turn.
    early: FxHashMap<Key, exec::Event>,
    /// Mean duration by prefix.
    seconds: FxHashMap<Arc<str>, f64>,
    /// Prefixes of tasks that have written something.
    wrote: FxHashSet<Arc<str>>,
}

/// A task in a runner's queue, or begun by the runner itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Handed {
    /// The attempt it was handed out for.
    pub(super) run_id: RunId,
    /// Whether the runner is at it, or done.
    pub(super) begun: bool,
    /// Seconds after which it seceded, if it has.
    pub(super) seceded: Option<f64>,
}

impl Ahead {
    /// Learns how long a task of `prefix` took.
    pub(super) fn took(&mut self, prefix: &Arc<str>, seconds: f64) {
        match self.seconds.get_mut(prefix) {
            Some(mean) => *mean += (seconds - *mean) * SMOOTHING,
            None => _ = self.seconds.insert(prefix.clone(), seconds),
        }
    }

    /// How many tasks like those of `prefix` may lie in one runner's queue: one, or more when they are short.
    pub(super) fn depth(&self, prefix: &str) -> usize {
        match self.seconds.get(prefix) {
            Some(mean) => ((WORK_AHEAD / mean.max(1e-6)) as usize).clamp(1, DEPTH_MAX),
            None => 1,
        }
    }

    /// Notes that a task of `prefix` has written something.
    pub(super) fn wrote(&mut self, prefix: &str) {
        if !self.wrote.contains(prefix) {
            self.wrote.insert(prefix.into());
        }
    }

    /// Whether tasks of `prefix` take less time than waking another process would. Not those that write: whose a line
    /// is can be told only while each result comes by itself.
    pub(super) fn is_brief(&self, prefix: &str) -> bool {
        self.seconds.get(prefix).is_some_and(|mean| *mean < BRIEF) && !self.wrote.contains(prefix)
    }

    /// A runner was handed `key`.
    pub(super) fn hand(&mut self, key: Key, run_id: RunId) {
        self.handed.insert(key, Handed { run_id, begun: false, seceded: None });
    }

    /// A runner has begun that attempt of `key`. False if it is not ahead any more.
    pub(super) fn begin(&mut self, key: &Key, run_id: RunId) -> bool {
        let handed = self.handed.get_mut(key).filter(|handed| handed.run_id == run_id);
        handed.map(|handed| handed.begun = true).is_some()
    }

    /// `key` has seceded before its turn, after so many seconds.
    pub(super) fn secede(&mut self, key: &Key, seconds: f64) {
        if let Some(handed) = self.handed.get_mut(key) {
            handed.seceded = Some(seconds);
        }
    }

    /// What is known of `key`, if it is ahead.
    pub(super) fn get(&self, key: &Key) -> Option<Handed> {
        self.handed.get(key).copied()
    }

    /// `key` is no longer ahead: its turn has come, or it was taken back. Gives its outcome, if it ran already.
    pub(super) fn take(&mut self, key: &Key) -> Option<(Handed, Option<exec::Event>)> {
        let handed = self.handed.remove(key)?;
        Some((handed, self.early.remove(key)))
    }

    /// Tasks ahead in all runners together.
    pub(super) fn len(&self) -> usize {
        self.handed.len()
    }

    /// All keys handed ahead.
    pub(super) fn keys(&self) -> Vec<Key> {
        self.handed.keys().cloned().collect()
    }

    /// Keeps the outcome of a task that ran before its turn.
    pub(super) fn keep(&mut self, key: Key, outcome: exec::Event) {
        self.early.insert(key, outcome);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_tasks_go_deeper() {
        let mut ahead = Ahead::default();
        assert_eq!((ahead.depth("new"), ahead.is_brief("new")), (1, false));
        let (short, long): (Arc<str>, Arc<str>) = ("inc".into(), "fit".into());
        ahead.took(&short, 20e-6);
        ahead.took(&long, 3.0);
        assert_eq!((ahead.depth("inc"), ahead.is_brief("inc")), (DEPTH_MAX, true));
        ahead.took(&"say".into(), 20e-6);
        ahead.wrote("say");
        assert!(!ahead.is_brief("say"));
        assert_eq!((ahead.depth("fit"), ahead.is_brief("fit")), (1, false));
        ahead.took(&short, 0.01);
        assert!(!ahead.is_brief("inc"), "one that was not brief is enough to doubt the next");
        for _ in 0..20 {
            ahead.took(&short, 1.0);
        }
        assert_eq!(ahead.depth("inc"), 1);
    }
}
