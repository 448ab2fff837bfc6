//! Which worker to ask for which key, until each has been got or nobody is left who might hold it.
//!
//! No IO and no clock: the caller runs the [`Step`]s and reports back. Mirrors `distributed/worker.py: Worker.gather`
//! around `distributed/utils_comm.py: gather_from_workers`, with one addition: a worker that said that it lacks a key
//! is not asked for it again, whatever the scheduler repeats, so that gathering always ends.

use std::collections::HashSet;

use crate::proto::{Address, Key};

/// What the caller does next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Ask these workers, all at once, and report each answer by [`Gather::answered`].
    Fetch(Vec<(Address, Vec<Key>)>),
    /// Everyone who is left is busy: wait a moment, then go on.
    Wait,
    /// Ask the scheduler who has these keys and report by [`Gather::refreshed`].
    Refresh(Vec<Key>),
    /// All is done; these keys could not be got.
    Done { failed: Vec<Key> },
}

/// How one worker answered.
#[derive(Debug)]
pub(super) enum Answer {
    /// These keys arrived; what else was asked for is not there.
    Got(Vec<Key>),
    /// Ask again later.
    Busy,
    /// It is away.
    Away,
    /// It failed in a way that another try does not help.
    Failed,
}

/// A gathering under way.
#[derive(Debug)]
pub(super) struct Gather {
    wanted: Vec<(Key, Vec<Address>)>,
    failed: Vec<Key>,
    away: HashSet<Address>,
    busy: HashSet<Address>,
    absent: HashSet<(Key, Address)>,
}

impl Gather {
    /// Wants these keys from these workers.
    pub(super) fn new(who_has: Vec<(Key, Vec<Address>)>) -> Self {
        let mut gather = Gather {
            wanted: Vec::new(),
            failed: Vec::new(),
            away: HashSet::new(),
            busy: HashSet::new(),
            absent: HashSet::new(),
        };
        gather.refreshed(who_has);
        gather
    }

    /// The next step. `choose(n)` picks one of n workers that hold a key.
    pub(super) fn next(&mut self, mut choose: impl FnMut(usize) -> usize) -> Step {
        if self.wanted.is_empty() {
            return Step::Done { failed: std::mem::take(&mut self.failed) };
        }
        let mut requests: Vec<(Address, Vec<Key>)> = Vec::new();
        for (key, workers) in &self.wanted {
            let ready: Vec<&Address> = workers.iter().filter(|w| !self.busy.contains(*w)).collect();
            if ready.is_empty() {
                continue;
            }
            let worker = ready[choose(ready.len()).min(ready.len() - 1)];
            match requests.iter_mut().find(|(w, _)| w == worker) {
                Some((_, keys)) => keys.push(key.clone()),
                None => requests.push((worker.clone(), vec![key.clone()])),
            }
        }
        if !requests.is_empty() {
            return Step::Fetch(requests);
        }
        if self.busy.is_empty() {
            return Step::Refresh(self.wanted.iter().map(|(key, _)| key.clone()).collect());
        }
        self.busy.clear();
        Step::Wait
    }

    /// Takes in the answer of one worker to one request.
    pub(super) fn answered(&mut self, worker: &Address, asked: &[Key], answer: Answer) {
        match answer {
            Answer::Busy => _ = self.busy.insert(worker.clone()),
            Answer::Away => {
                self.away.insert(worker.clone());
                self.wanted.iter_mut().for_each(|(_, workers)| workers.retain(|w| w != worker));
            }
            Answer::Failed => {
                let given_up: HashSet<&Key> = asked.iter().collect();
                self.wanted.retain(|(key, _)| !given_up.contains(key));
                self.failed.extend(asked.iter().cloned());
            }
            Answer::Got(keys) => {
                let got: HashSet<Key> = keys.into_iter().collect();
                let asked: HashSet<&Key> = asked.iter().collect();
                self.wanted.retain(|(key, _)| !got.contains(key));
                for (key, workers) in self.wanted.iter_mut().filter(|(key, _)| asked.contains(key)) {
                    workers.retain(|w| w != worker);
                    self.absent.insert((key.clone(), worker.clone()));
                }
            }
        }
    }

    /// Takes in who has the keys that are still wanted. Keys without a worker, or not named, have failed.
    pub(super) fn refreshed(&mut self, who_has: Vec<(Key, Vec<Address>)>) {
        let unnamed: Vec<Key> = std::mem::take(&mut self.wanted).into_iter().map(|(key, _)| key).collect();
        let mut named = HashSet::new();
        for (key, mut workers) in who_has {
            if !named.insert(key.clone()) {
                continue;
            }
            workers.retain(|w| !self.away.contains(w) && !self.absent.contains(&(key.clone(), w.clone())));
            if workers.is_empty() {
                self.failed.push(key);
            } else {
                self.wanted.push((key, workers));
            }
        }
        self.failed.extend(unnamed.into_iter().filter(|key| !named.contains(key)));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn worker(name: &str) -> Address {
        Address::parse(&format!("tcp://{name}:1")).unwrap()
    }

    fn who_has(pairs: &[(&str, &[&str])]) -> Vec<(Key, Vec<Address>)> {
        pairs.iter().map(|(k, ws)| (Key::from(*k), ws.iter().map(|w| worker(w)).collect())).collect()
    }

    fn keys(names: &[&str]) -> Vec<Key> {
        names.iter().map(|n| Key::from(*n)).collect()
    }

    fn first(_: usize) -> usize {
        0
    }

    #[test]
    fn keys_of_one_worker_go_into_one_request() {
        let mut gather =
            Gather::new(who_has(&[("x", &["a", "b"]), ("y", &["a"]), ("z", &["b"]), ("x", &["c"])]));
        let expected = vec![(worker("a"), keys(&["x", "y"])), (worker("b"), keys(&["z"]))];
        assert_eq!(gather.next(first), Step::Fetch(expected));
        gather.answered(&worker("a"), &keys(&["x", "y"]), Answer::Got(keys(&["x", "y"])));
        gather.answered(&worker("b"), &keys(&["z"]), Answer::Got(keys(&["z"])));
        assert_eq!(gather.next(first), Step::Done { failed: vec![] });
    }

    #[test]
    fn any_holder_can_be_chosen() {
        let mut gather = Gather::new(who_has(&[("x", &["a", "b", "c"])]));
        assert_eq!(gather.next(|n| n - 1), Step::Fetch(vec![(worker("c"), keys(&["x"]))]));
        assert_eq!(gather.next(|_| 7), Step::Fetch(vec![(worker("c"), keys(&["x"]))]));
    }

    #[test]
    fn a_busy_worker_is_asked_again_after_a_wait() {
        let mut gather = Gather::new(who_has(&[("x", &["a", "b"])]));
        gather.answered(&worker("a"), &keys(&["x"]), Answer::Busy);
        assert_eq!(gather.next(first), Step::Fetch(vec![(worker("b"), keys(&["x"]))]));
        gather.answered(&worker("b"), &keys(&["x"]), Answer::Busy);
        assert_eq!(gather.next(first), Step::Wait);
        assert_eq!(gather.next(first), Step::Fetch(vec![(worker("a"), keys(&["x"]))]));
    }

    #[test]
    fn a_worker_that_is_away_is_never_asked_again() {
        let mut gather = Gather::new(who_has(&[("x", &["a"]), ("y", &["a", "b"])]));
        gather.answered(&worker("a"), &keys(&["x", "y"]), Answer::Away);
        assert_eq!(gather.next(first), Step::Fetch(vec![(worker("b"), keys(&["y"]))]));
        gather.answered(&worker("b"), &keys(&["y"]), Answer::Got(keys(&["y"])));
        assert_eq!(gather.next(first), Step::Refresh(keys(&["x"])));
        gather.refreshed(who_has(&[("x", &["a", "c"])]));
        assert_eq!(gather.next(first), Step::Fetch(vec![(worker("c"), keys(&["x"]))]));
        gather.answered(&worker("c"), &keys(&["x"]), Answer::Away);
        assert_eq!(gather.next(first), Step::Refresh(keys(&["x"])));
        gather.refreshed(who_has(&[("x", &["a"])]));
        assert_eq!(gather.next(first), Step::Done { failed: keys(&["x"]) });
    }

    #[test]
    fn a_scheduler_that_repeats_itself_does_not_make_it_endless() {
        let mut gather = Gather::new(who_has(&[("x", &["a"])]));
        gather.answered(&worker("a"), &keys(&["x"]), Answer::Got(vec![]));
        assert_eq!(gather.next(first), Step::Refresh(keys(&["x"])));
        gather.refreshed(who_has(&[("x", &["a"])]));
        assert_eq!(gather.next(first), Step::Done { failed: keys(&["x"]) });
    }

    #[test]
    fn keys_that_nobody_has_and_keys_that_fail_are_reported() {
        let mut gather = Gather::new(who_has(&[("gone", &[]), ("bad", &["a"]), ("x", &["a", "b"])]));
        assert_eq!(gather.next(first), Step::Fetch(vec![(worker("a"), keys(&["bad", "x"]))]));
        gather.answered(&worker("a"), &keys(&["bad", "x"]), Answer::Failed);
        assert_eq!(gather.next(first), Step::Done { failed: keys(&["gone", "bad", "x"]) });
    }

    #[test]
    fn a_key_that_the_scheduler_forgot_has_failed() {
        let mut gather = Gather::new(who_has(&[("x", &["a"])]));
        gather.answered(&worker("a"), &keys(&["x"]), Answer::Away);
        assert_eq!(gather.next(first), Step::Refresh(keys(&["x"])));
        gather.refreshed(vec![]);
        assert_eq!(gather.next(first), Step::Done { failed: keys(&["x"]) });
    }
}
