//! One task as this worker sees it: its state, its links to other tasks, its bookkeeping.
//!
//! Data and small queries only; whatever moves a task from state to state is in `transition`.
//! Source: `distributed/worker_state_machine.py: TaskState`.

use std::fmt;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::proto::{Key, Payload, Priority, RunId, Value};

use super::collections::{Id, IdMap, IdSet};
use super::event::{ErrorMessage, StartStop, TypeInfo};
use super::peer::Peer;

/// Dask's name of a task state: what logs, counters and `steal-response` say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StateName {
    /// Freed while it ran or was in flight; waits for that to end.
    Cancelled,
    /// Ready to run, needs abstract resources.
    Constrained,
    /// Its computation or its transfer raised.
    Error,
    /// Runs, and counts towards `nthreads`.
    Executing,
    /// Is to be fetched from a peer.
    Fetch,
    /// Comes from a peer right now.
    Flight,
    /// Known no longer.
    Forgotten,
    /// Runs, and does not count towards `nthreads` (it seceded).
    LongRunning,
    /// Its value is here.
    Memory,
    /// Is to be fetched, and nobody is known to hold it.
    Missing,
    /// Ready to run.
    Ready,
    /// Known, and nothing is to be done about it.
    Released,
    /// Raised `Reschedule`; never lasts.
    Rescheduled,
    /// Cancelled, and then asked for again in the other way (compute or fetch).
    Resumed,
    /// Waits for dependencies.
    Waiting,
}

impl StateName {
    /// How many there are.
    pub(super) const COUNT: usize = StateName::Waiting as usize + 1;

    /// All of them, in order.
    pub const ALL: [StateName; StateName::COUNT] = [
        StateName::Cancelled,
        StateName::Constrained,
        StateName::Error,
        StateName::Executing,
        StateName::Fetch,
        StateName::Flight,
        StateName::Forgotten,
        StateName::LongRunning,
        StateName::Memory,
        StateName::Missing,
        StateName::Ready,
        StateName::Released,
        StateName::Rescheduled,
        StateName::Resumed,
        StateName::Waiting,
    ];

    /// The word Dask uses.
    pub fn as_str(self) -> &'static str {
        match self {
            StateName::Cancelled => "cancelled",
            StateName::Constrained => "constrained",
            StateName::Error => "error",
            StateName::Executing => "executing",
            StateName::Fetch => "fetch",
            StateName::Flight => "flight",
            StateName::Forgotten => "forgotten",
            StateName::LongRunning => "long-running",
            StateName::Memory => "memory",
            StateName::Missing => "missing",
            StateName::Ready => "ready",
            StateName::Released => "released",
            StateName::Rescheduled => "rescheduled",
            StateName::Resumed => "resumed",
            StateName::Waiting => "waiting",
        }
    }

    /// `ready` or `constrained`.
    pub(super) fn is_ready(self) -> bool {
        matches!(self, StateName::Ready | StateName::Constrained)
    }

    /// `executing` or `long-running`.
    pub(super) fn is_running(self) -> bool {
        matches!(self, StateName::Executing | StateName::LongRunning)
    }

    /// Dask's `WAITING_FOR_DATA`: the states of a dependency whose value will come.
    pub(super) fn may_be_waited_for(self) -> bool {
        use StateName as S;
        self.is_processing() || matches!(self, S::Fetch | S::Flight | S::Missing | S::Resumed)
    }

    /// Dask's `PROCESSING`: the scheduler believes that this worker works on it.
    pub(super) fn is_processing(self) -> bool {
        self.is_ready() || self.is_running() || self == StateName::Waiting
    }
}

impl fmt::Display for StateName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a cancelled or resumed task was doing, and still is, since neither can be stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Previous {
    Executing,
    LongRunning,
    Flight { from: Id<Peer> },
}

impl Previous {
    /// Dask's `TaskState.previous`.
    pub(super) fn name(self) -> StateName {
        match self {
            Previous::Executing => StateName::Executing,
            Previous::LongRunning => StateName::LongRunning,
            Previous::Flight { .. } => StateName::Flight,
        }
    }

    /// Dask's `TaskState.next` of a resumed task: always the other way of getting the value.
    pub(super) fn next(self) -> StateName {
        match self {
            Previous::Executing | Previous::LongRunning => StateName::Fetch,
            Previous::Flight { .. } => StateName::Waiting,
        }
    }

    /// True when user code runs.
    pub(super) fn is_running(self) -> bool {
        !matches!(self, Previous::Flight { .. })
    }
}

/// The state, with what belongs to it alone.
#[derive(Clone, Debug)]
pub(super) enum State {
    Cancelled(Previous),
    Constrained,
    Error(Arc<ErrorMessage>),
    Executing,
    Fetch,
    Flight { from: Id<Peer> },
    Forgotten,
    LongRunning,
    Memory,
    Missing,
    Ready,
    Released,
    Resumed(Previous),
    Waiting,
}

impl State {
    pub(super) fn name(&self) -> StateName {
        match self {
            State::Cancelled(_) => StateName::Cancelled,
            State::Constrained => StateName::Constrained,
            State::Error(_) => StateName::Error,
            State::Executing => StateName::Executing,
            State::Fetch => StateName::Fetch,
            State::Flight { .. } => StateName::Flight,
            State::Forgotten => StateName::Forgotten,
            State::LongRunning => StateName::LongRunning,
            State::Memory => StateName::Memory,
            State::Missing => StateName::Missing,
            State::Ready => StateName::Ready,
            State::Released => StateName::Released,
            State::Resumed(_) => StateName::Resumed,
            State::Waiting => StateName::Waiting,
        }
    }

    /// What still goes on behind a cancelled or resumed task.
    pub(super) fn previous(&self) -> Option<Previous> {
        match self {
            State::Cancelled(previous) | State::Resumed(previous) => Some(*previous),
            _ => None,
        }
    }

    /// The peer the value comes from, if it is on its way.
    pub(super) fn coming_from(&self) -> Option<Id<Peer>> {
        match *self {
            State::Flight { from }
            | State::Cancelled(Previous::Flight { from })
            | State::Resumed(Previous::Flight { from }) => Some(from),
            _ => None,
        }
    }
}

/// What a task knows about one of its dependencies.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Link {
    /// In Dask's `TaskState.waiting_for_data`.
    pub(super) waiting: bool,
    /// This task is in the dependency's `TaskState.waiters`.
    pub(super) waiter: bool,
}

/// A task, as far as this worker knows and needs it.
#[derive(Clone, Debug)]
pub struct Task {
    pub(super) key: Key,
    pub(super) prefix: Arc<str>,
    pub(super) run_id: RunId,
    pub(super) run_spec: Option<Arc<Payload>>,
    pub(super) dependencies: IdMap<Task, Link>,
    pub(super) dependents: IdSet<Task>,
    /// Number of `dependencies` with `waiting`.
    pub(super) waiting_for_data: usize,
    /// Number of `dependents` whose link to this one says `waiter`.
    pub(super) waiters: usize,
    pub(super) state: State,
    /// The worker's own generation is appended to the scheduler's.
    pub(super) priority: Option<Priority>,
    /// Sorted.
    pub(super) who_has: SmallVec<[Id<Peer>; 2]>,
    pub(super) resource_restrictions: Vec<(Arc<str>, f64)>,
    pub(super) type_: Option<TypeInfo>,
    pub(super) startstops: Vec<StartStop>,
    pub(super) start_time: Option<f64>,
    pub(super) metadata: Option<Box<Value>>,
    pub(super) nbytes: Option<u64>,
    pub(super) annotations: Option<Arc<Value>>,
    pub(super) span_id: Option<Arc<str>>,
    /// The transfer or computation behind this task has just ended; lasts for the event only, but in `memory` and `error`.
    pub(super) done: bool,
    /// Its value is in the store: Dask's `key in WorkerState.data`.
    pub(super) in_data: bool,
    /// It is an actor: Dask's `key in WorkerState.actors`.
    pub(super) actor: bool,
    pub(super) thread: Option<i64>,
    /// The task counter has seen it.
    pub(super) counted: bool,
    /// The last step that touched it.
    pub(super) touched: u64,
}

impl Task {
    pub(super) fn new(key: Key, prefix: Arc<str>) -> Self {
        Task {
            key,
            prefix,
            run_id: RunId::NONE,
            run_spec: None,
            dependencies: IdMap::default(),
            dependents: IdSet::default(),
            waiting_for_data: 0,
            waiters: 0,
            state: State::Released,
            priority: None,
            who_has: SmallVec::new(),
            resource_restrictions: Vec::new(),
            type_: None,
            startstops: Vec::new(),
            start_time: None,
            metadata: None,
            nbytes: None,
            annotations: None,
            span_id: None,
            done: false,
            in_data: false,
            actor: false,
            thread: None,
            counted: false,
            touched: 0,
        }
    }

    /// The task's key.
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// Leftmost part of the key: the name tasks are grouped by.
    pub fn prefix(&self) -> &Arc<str> {
        &self.prefix
    }

    /// The latest attempt the scheduler asked for; to be kept from `Execute` until its end and echoed there.
    pub fn run_id(&self) -> RunId {
        self.run_id
    }

    /// The pickled `GraphNode`; none for data that came from elsewhere.
    pub fn run_spec(&self) -> Option<&Arc<Payload>> {
        self.run_spec.as_ref()
    }

    /// Dask's name of the state.
    pub fn state_name(&self) -> StateName {
        self.state.name()
    }

    /// What a cancelled or resumed task was, and is still, doing.
    pub fn previous_state_name(&self) -> Option<StateName> {
        self.state.previous().map(Previous::name)
    }

    /// Priority; the smallest runs first.
    pub fn priority(&self) -> Option<&Priority> {
        self.priority.as_ref()
    }

    /// Abstract resources it holds while it runs.
    pub fn resource_restrictions(&self) -> &[(Arc<str>, f64)] {
        &self.resource_restrictions
    }

    /// User annotations.
    pub fn annotations(&self) -> Option<&Arc<Value>> {
        self.annotations.as_ref()
    }

    /// The span it belongs to.
    pub fn span_id(&self) -> Option<&Arc<str>> {
        self.span_id.as_ref()
    }

    /// Size in bytes, as told by the scheduler or measured.
    pub fn nbytes(&self) -> Option<u64> {
        self.nbytes
    }

    /// Type of the value, while or after it was in memory.
    pub fn type_info(&self) -> Option<&TypeInfo> {
        self.type_.as_ref()
    }

    /// Unix seconds at which it began to run, if it ever did.
    pub fn start_time(&self) -> Option<f64> {
        self.start_time
    }

    /// What took time in its life here.
    pub fn startstops(&self) -> &[StartStop] {
        &self.startstops
    }

    /// Dask's `TaskState.done`: what ran or was in flight for it has ended.
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// Whether it is to become, or is, an actor.
    pub fn is_actor(&self) -> bool {
        self.actor
    }

    /// Whether its value is in the store.
    pub fn in_data(&self) -> bool {
        self.in_data
    }

    /// The error it ended in, while it is in that state.
    pub fn error(&self) -> Option<&Arc<ErrorMessage>> {
        match &self.state {
            State::Error(error) => Some(error),
            _ => None,
        }
    }

    /// Held as a value or as an actor: what a dependent needs in order to run.
    pub(super) fn is_held(&self) -> bool {
        self.in_data || self.actor
    }
}

/// Dask's `repr(TaskState)`.
impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<TaskState {:?} ", self.key)?;
        match &self.state {
            State::Cancelled(previous) => write!(f, "cancelled({})", previous.name())?,
            State::Resumed(previous) => write!(f, "resumed({}->{})", previous.name(), previous.next())?,
            state => write!(f, "{}", state.name())?,
        }
        f.write_str(">")
    }
}
