//! The invariants of each state and of the whole.
//!
//! Reads only. Source: `WorkerState.validate_task` and `WorkerState.validate_state`.

use std::fmt::Display;

use rustc_hash::{FxHashMap, FxHashSet};

use super::WorkerState;
use super::collections::Id;
use super::error::Error;
use super::task::{Previous, State, StateName, Task};

/// Gives the first condition that does not hold, in its own words.
macro_rules! hold {
    ($($condition:expr),+ $(,)?) => {
        $(if !$condition { return Err(stringify!($condition)); })+
    };
}

type Verdict = Result<(), &'static str>;

impl WorkerState {
    /// Checks one task.
    pub(super) fn validate_task(&self, id: Id<Task>) -> Result<(), Error> {
        let Some(task) = self.tasks.get(id) else { return Ok(()) };
        let verdict = match &task.state {
            State::Memory => self.validate_memory(task),
            State::Waiting => self.validate_waiting(id, task),
            State::Missing => self.validate_missing(id, task),
            State::Cancelled(previous) => self.validate_going_on(id, task, *previous),
            State::Resumed(previous) => {
                self.validate_going_on(id, task, *previous).and_then(|()| self.dependents_not_ready(task))
            }
            State::Ready | State::Constrained => self.validate_ready(id, task),
            State::Executing => self.validate_going_on(id, task, Previous::Executing),
            State::LongRunning => self.validate_going_on(id, task, Previous::LongRunning),
            State::Flight { from } => self.validate_going_on(id, task, Previous::Flight { from: *from }),
            State::Fetch => self.validate_fetch(id, task),
            State::Released => self.validate_released(id, task),
            State::Error(_) | State::Forgotten => Ok(()),
        };
        verdict.map_err(|invariant| Error::InvalidTask {
            key: task.key.clone(),
            state: task.state.name(),
            invariant,
            story: self.story_of(id),
        })
    }

    fn dependents_not_ready(&self, task: &Task) -> Verdict {
        for dep in &task.dependents {
            hold!(!self.ready.contains(*dep), !self.constrained.contains(*dep));
        }
        Ok(())
    }

    fn validate_memory(&self, task: &Task) -> Verdict {
        hold!(task.is_held(), task.nbytes.is_some(), task.waiting_for_data == 0);
        Ok(())
    }

    fn validate_waiting(&self, id: Id<Task>, task: &Task) -> Verdict {
        hold!(!task.in_data, !task.done, self.waiting.contains(&id), task.waiting_for_data > 0);
        for (dep, link) in &task.dependencies {
            hold!(link.waiting != self.tasks[*dep].is_held());
        }
        self.dependents_not_ready(task)
    }

    fn validate_missing(&self, id: Id<Task>, task: &Task) -> Verdict {
        hold!(!task.is_held(), task.who_has.is_empty(), !task.done, self.missing.contains(&id));
        hold!(!self.peers.iter().any(|(_, peer)| peer.has_what.contains(&id)));
        self.dependents_not_ready(task)
    }

    /// Executing, long-running, flight; and cancelled and resumed tasks that still are.
    fn validate_going_on(&self, id: Id<Task>, task: &Task, previous: Previous) -> Verdict {
        hold!(!task.in_data);
        match previous {
            Previous::Executing => {
                hold!(
                    self.executing.contains(&id),
                    !self.long_running.contains(&id),
                    task.waiting_for_data == 0
                );
            }
            Previous::LongRunning => {
                hold!(
                    !self.executing.contains(&id),
                    self.long_running.contains(&id),
                    task.waiting_for_data == 0
                );
            }
            Previous::Flight { from } => {
                hold!(
                    !task.actor || matches!(task.state, State::Resumed(_)),
                    self.in_flight_tasks.contains(&id)
                );
                let asked = self.peers.get(from).and_then(|peer| peer.in_flight.as_ref());
                hold!(asked.is_some_and(|ids| ids.contains(&id)));
            }
        }
        self.dependents_not_ready(task)
    }

    fn validate_ready(&self, id: Id<Task>, task: &Task) -> Verdict {
        let ready = matches!(task.state, State::Ready);
        hold!(
            ready == task.resource_restrictions.is_empty(),
            ready == self.ready.contains(id),
            ready != self.constrained.contains(id),
            !task.in_data,
            !task.done,
            task.waiting_for_data == 0,
            task.dependencies.keys().all(|dep| self.tasks[*dep].is_held()),
        );
        Ok(())
    }

    fn validate_fetch(&self, id: Id<Task>, task: &Task) -> Verdict {
        hold!(!task.is_held(), !task.done, !task.who_has.is_empty());
        for peer in &task.who_has {
            let peer = &self.peers[*peer];
            hold!(peer.address != self.address, peer.has_what.contains(&id), peer.data_needed.contains(id));
        }
        self.dependents_not_ready(task)
    }

    fn validate_released(&self, id: Id<Task>, task: &Task) -> Verdict {
        hold!(
            !task.is_held(),
            !self.peers.iter().any(|(_, peer)| peer.data_needed.contains(id)),
            !self.executing.contains(&id),
            !self.in_flight_tasks.contains(&id),
            !self.missing.contains(&id),
            task.waiting_for_data == 0,
            !task.done,
        );
        Ok(())
    }

    /// Checks every invariant of every task, and of the whole. Costs time in proportion to everything known.
    ///
    /// # Errors
    /// The first invariant that does not hold.
    pub fn validate_state(&self) -> Result<(), Error> {
        self.validate_links()?;
        self.validate_peers()?;
        self.validate_sets()?;
        self.validate_counts()?;
        self.validate_resources()?;
        self.keys.values().try_for_each(|id| self.validate_task(*id))
    }

    fn validate_links(&self) -> Result<(), Error> {
        let mut waiters: FxHashMap<Id<Task>, usize> = FxHashMap::default();
        for (key, &id) in &self.keys {
            let Some(task) = self.tasks.get(id) else { return Err(broken("keys name living tasks", key)) };
            check(task.key == *key, "tasks lie under their keys", task)?;
            let waiting = task.dependencies.values().filter(|link| link.waiting).count();
            check(waiting == task.waiting_for_data, "waiting_for_data counts the links", task)?;
            for (dep, link) in &task.dependencies {
                let Some(dependency) = self.tasks.get(*dep) else {
                    return Err(broken("dependencies are known", task));
                };
                check(dependency.dependents.contains(&id), "dependents mirror dependencies", task)?;
                *waiters.entry(*dep).or_default() += usize::from(link.waiter);
                let coming = dependency.state.name().may_be_waited_for();
                check(!link.waiting || coming, "what is waited for is on its way", dependency)?;
            }
            for dep in &task.dependents {
                let Some(dependent) = self.tasks.get(*dep) else {
                    return Err(broken("dependents are known", task));
                };
                check(dependent.dependencies.contains_key(&id), "dependencies mirror dependents", task)?;
            }
        }
        for &id in self.keys.values() {
            let task = &self.tasks[id];
            check(waiters.get(&id).copied().unwrap_or(0) == task.waiters, "waiters counts the links", task)?;
        }
        Ok(())
    }

    fn validate_peers(&self) -> Result<(), Error> {
        let mut fetch = FxHashSet::default();
        let mut asked = 0;
        for (id, peer) in self.peers.iter() {
            let address = &peer.address;
            check(self.addresses.get(address) == Some(&id), "peers lie under their addresses", address)?;
            check(*address != self.address, "no peer is this worker", address)?;
            check(
                peer.data_needed.is_empty() || self.needy_peers.contains(&id),
                "needy peers are known",
                address,
            )?;
            asked += usize::from(peer.in_flight.is_some());
            for task in &peer.has_what {
                let holds = self.tasks.get(*task).is_some_and(|task| task.who_has.contains(&id));
                check(holds, "who_has mirrors has_what", address)?;
            }
            for task in peer.data_needed.iter() {
                let needed = &self.tasks[task];
                check(matches!(needed.state, State::Fetch), "data_needed is in fetch", needed)?;
                check(needed.who_has.contains(&id), "data_needed is held there", needed)?;
                fetch.insert(task);
            }
        }
        check(asked == self.in_flight_workers, "in_flight_workers counts the peers", asked)?;
        check(fetch.len() == self.fetch_count, "fetch_count counts data_needed", self.fetch_count)?;
        for &id in self.keys.values() {
            let task = &self.tasks[id];
            let mirrored = |peer| self.peers.get(peer).is_some_and(|peer| peer.has_what.contains(&id));
            check(task.who_has.iter().all(|peer| mirrored(*peer)), "has_what mirrors who_has", task)?;
        }
        Ok(())
    }

    /// Every task in a set is known and in the state the set stands for.
    fn validate_sets(&self) -> Result<(), Error> {
        let is = |id: Id<Task>, name: StateName| {
            let task = self.tasks.get(id).filter(|task| self.id(&task.key) == Some(id));
            task.is_some_and(|task| {
                task.state.name() == name || task.state.previous().is_some_and(|p| p.name() == name)
            })
        };
        let sets: [(&str, StateName, Vec<Id<Task>>); 7] = [
            ("waiting", StateName::Waiting, self.waiting.iter().copied().collect()),
            ("ready", StateName::Ready, self.ready.iter().collect()),
            ("constrained", StateName::Constrained, self.constrained.iter().collect()),
            ("executing", StateName::Executing, self.executing.iter().copied().collect()),
            ("long_running", StateName::LongRunning, self.long_running.iter().copied().collect()),
            ("in_flight_tasks", StateName::Flight, self.in_flight_tasks.iter().copied().collect()),
            ("missing", StateName::Missing, self.missing.iter().copied().collect()),
        ];
        for (set, name, ids) in sets {
            check(ids.into_iter().all(|id| is(id, name)), "sets hold tasks in their state", set)?;
        }
        let promoted = self.promoted.iter().all(|id| self.ready.contains(*id));
        check(promoted, "promoted tasks are ready", "promoted")?;
        let executing = self.executing.len();
        check(executing <= self.config.nthreads, "executing fits nthreads", executing)
    }

    fn validate_counts(&self) -> Result<(), Error> {
        let nbytes: u64 = self.tasks().filter(|task| task.is_held()).filter_map(|task| task.nbytes).sum();
        check(nbytes == self.nbytes, "nbytes sums up what is held", format!("{} not {nbytes}", self.nbytes))?;
        let mut counts: FxHashMap<_, u64> = FxHashMap::default();
        for task in self.tasks() {
            *counts.entry((task.prefix.clone(), task.state.name())).or_default() += 1;
        }
        let told: FxHashMap<_, u64> =
            self.task_counts_by_prefix().into_iter().map(|(prefix, state, n)| ((prefix, state), n)).collect();
        check(counts == told, "the task counter counts tasks", format!("{told:?} not {counts:?}"))
    }

    /// Available resources and those of running tasks make up the total.
    fn validate_resources(&self) -> Result<(), Error> {
        for ((name, total), (_, available)) in self.total_resources.iter().zip(&self.available_resources) {
            let running = self.executing.iter().chain(&self.long_running);
            let restrictions = running.flat_map(|id| &self.tasks[*id].resource_restrictions);
            let held: f64 = restrictions.filter(|(n, _)| n == name).map(|(_, q)| q).sum();
            let sound = *available > -1e-9 && (total - available - held).abs() < 1e-9;
            check(sound, "resources add up", format!("{name}: {total} = {available} + {held}"))?;
        }
        Ok(())
    }
}

fn check(holds: bool, invariant: &'static str, detail: impl Display) -> Result<(), Error> {
    if holds { Ok(()) } else { Err(broken(invariant, detail)) }
}

fn broken(invariant: &'static str, detail: impl Display) -> Error {
    Error::InvalidState { invariant, detail: detail.to_string() }
}
