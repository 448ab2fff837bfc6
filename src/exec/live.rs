//! Results that stay in the runner that made them: who has which, having them published, and what dies with a runner.
//!
//! Which of them the worker still wants is known by who holds a [`Live`]; nothing here keeps one.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;
use tokio::runtime::Handle;

use super::dispatch::MISPLACED;
use super::ipc::{self, Done, Outgoing, RawObject, ToChild};
use super::link::Link;
use super::object::{Places, Segments};
use super::pool::{Shared, State};
use super::slot::{Attempt, Runner};
use super::{Event, Job, Kept};
use crate::proto::Key;
use crate::store::{self, Live, Place, WeakLive};

/// What a runner holds, as the daemon sees it.
#[derive(Debug)]
pub(super) struct Home {
    process: u64,
    control: Link,
    held: Mutex<Held>,
}

#[derive(Debug)]
struct Held {
    results: FxHashMap<u64, WeakLive>,
    /// All are to be published, one after the other.
    clearing: bool,
    /// When it was last given a job.
    used: Instant,
}

impl Home {
    pub(super) fn new(process: u64, control: Link) -> Self {
        let held = Held { results: FxHashMap::default(), clearing: false, used: Instant::now() };
        Home { process, control, held: Mutex::new(held) }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        // nothing panics while it holds the lock
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The runner is given a job.
    pub(super) fn use_again(&self) {
        self.held().used = Instant::now();
    }

    fn keep(self: &Arc<Self>, key: Key, token: u64, nbytes: u64) -> Live {
        let live = Live::new(key, nbytes, Place { process: self.process, token }, self.clone());
        self.held().results.insert(token, live.downgrade());
        live
    }

    fn find(&self, token: u64) -> Option<Live> {
        self.held().results.get(&token)?.upgrade()
    }

    /// All that are in this runner and nowhere else.
    pub(super) fn only_here(&self) -> Vec<Live> {
        // those that are not returned may be the last of their kind, and to drop one takes the lock
        let mut results: Vec<Live> = self.held().results.values().filter_map(WeakLive::upgrade).collect();
        results.retain(Live::is_only_there);
        results
    }

    /// The runner is gone, and with it what was in it alone.
    pub(super) fn lose(&self) -> Vec<Live> {
        let mut results = self.only_here();
        results.retain(|live| live.settle(None));
        results
    }

    /// Has everything published, one after the other: each is in memory twice until it is forgotten here.
    fn clear(&self) {
        let results = self.only_here();
        let mut held = self.held();
        held.clearing = !results.is_empty();
        drop(held);
        if let Some(live) = results.first() {
            live.ask();
        }
    }

    fn send(&self, message: &ToChild<'_>) {
        // objects may outlive the runtime, and their runners
        if let Ok(message) = Outgoing::new(message, Vec::new())
            && Handle::try_current().is_ok()
        {
            self.control.send(message);
        }
    }
}

impl store::Home for Home {
    fn publish(&self, token: u64) {
        self.send(&ToChild::Publish { token });
    }

    fn forget(&self, token: u64) {
        let mut held = self.held();
        held.results.remove(&token);
        let clearing = held.clearing;
        drop(held);
        self.send(&ToChild::Forget { token });
        if clearing {
            self.clear();
        }
    }
}

/// Whether a job can be given to a runner now.
pub(super) enum Access {
    /// Its inputs are published, or in that runner.
    Yes,
    /// Some are in other runners.
    Elsewhere,
    /// Some are lost.
    Lost,
}

impl Job {
    /// Whether runner `id` has what this job needs.
    pub(super) fn access(&self, id: u64) -> Access {
        if self.live.iter().any(Live::is_lost) {
            return Access::Lost;
        }
        match self.live.iter().any(|live| live.is_only_there() && live.place().process != id) {
            true => Access::Elsewhere,
            false => Access::Yes,
        }
    }

    /// Bytes of its inputs that are in runner `id` alone.
    fn bytes_in(&self, id: u64) -> u64 {
        let there = self.live.iter().filter(|live| live.is_only_there() && live.place().process == id);
        there.map(Live::nbytes).sum()
    }

    /// If its inputs are in several runners, has those published that are not in the one with most of them.
    pub(super) fn bring_together(&self) {
        let nearest = self.live.iter().map(|live| live.place().process).max_by_key(|id| self.bytes_in(*id));
        if let Some(id) = nearest {
            self.ask_for_those_not_in(id);
        }
    }

    fn ask_for_those_not_in(&self, id: u64) {
        self.live.iter().filter(|live| live.place().process != id).for_each(Live::ask);
    }
}

impl State {
    /// Takes the idle runner that has most of a job's inputs, else the one used last.
    pub(super) fn take_idle(&mut self, job: &Job) -> Option<u64> {
        if job.live.is_empty() {
            return self.idle.pop();
        }
        let nearest = self.idle.iter().enumerate().max_by_key(|(at, id)| (job.bytes_in(**id), *at));
        let at = nearest.map(|(at, _)| at)?;
        Some(self.idle.remove(at))
    }

    /// Keeps an attempt back for which runner `id` lacks inputs: until they are published, or for good.
    pub(super) fn park(&mut self, shared: &Shared, id: u64, attempt: Attempt) {
        match attempt.job.access(id) {
            Access::Lost => self.give_up(shared, &attempt),
            _ => {
                attempt.job.ask_for_those_not_in(id);
                self.parked.push(attempt);
            }
        }
    }

    /// A job whose inputs are lost is the scheduler's again. How often it crashed is not forgotten: it may be the job that
    /// takes its inputs along, each time they are made.
    fn give_up(&mut self, shared: &Shared, attempt: &Attempt) {
        let Job { key, run_id, .. } = &*attempt.job;
        if attempt.crashes > 0 {
            self.crashed.insert(key.clone(), attempt.crashes);
        }
        shared.emit(Event::Reschedule { key: key.clone(), run_id: *run_id });
    }

    /// An attempt at a job that may have crashed before it was given back.
    pub(super) fn recall_crashes(&mut self, attempt: Attempt) -> Attempt {
        let before = if self.crashed.is_empty() { None } else { self.crashed.remove(&attempt.job.key) };
        Attempt { crashes: attempt.crashes.max(before.unwrap_or(0)), ..attempt }
    }

    /// Tries the jobs again that waited for their inputs to be published.
    pub(super) fn unpark(&mut self, shared: &Arc<Shared>) {
        for attempt in std::mem::take(&mut self.parked) {
            self.place(shared, attempt);
        }
    }
}

impl Shared {
    /// A runner keeps a task's result.
    pub(super) fn kept(&self, state: &mut State, id: u64, seq: u64, done: Done) -> Result<(), ipc::Error> {
        let queued = state.conclude(self, id, seq).ok_or(MISPLACED)?;
        let runner = state.runners.get(&id).ok_or(MISPLACED)?;
        let job = &queued.attempt.job;
        self.emit(Event::Kept(Box::new(Kept {
            run_id: job.run_id,
            live: runner.home.keep(job.key.clone(), seq, done.nbytes),
            type_pickled: done.type_pickled,
            typename: done.typename.into(),
            start: self.scheduler_time(done.start),
            stop: self.scheduler_time(done.stop),
            thread: done.thread,
            cpu: done.cpu,
        })));
        Ok(())
    }

    /// A runner has published a result, or cannot.
    pub(super) fn published(
        self: &Arc<Self>,
        home: &Home,
        token: u64,
        object: Option<RawObject>,
        segments: &Segments,
    ) -> Result<(), ipc::Error> {
        // one that nobody wants any more is forgotten there by now
        let Some(live) = home.find(token) else { return Ok(()) };
        let places = Places { segments, mailbox: None, arena: &self.arena };
        let object = object.map(|object| places.object(object, live.nbytes())).transpose()?;
        let is_lost = object.is_none();
        if live.settle(object) {
            self.emit(if is_lost { Event::Lost { results: vec![live] } } else { Event::Published { live } });
        }
        let mut state = self.state();
        state.unpark(self);
        state.flush();
        Ok(())
    }

    /// Has what lies in runners alone published: in those that had nothing to do for `rest`, or in all.
    pub(super) fn publish(&self, rest: Option<Duration>) {
        let homes: Vec<Arc<Home>> = {
            let state = self.state();
            let idle = |runner: &&Runner| rest.is_none_or(|_| runner.current().is_none());
            state.runners.values().filter(idle).map(|runner| runner.home.clone()).collect()
        };
        for home in homes {
            let rested = rest.is_none_or(|rest| home.held().used.elapsed() >= rest);
            if rested {
                home.clear();
            }
        }
    }
}
