//! What can go wrong inside the state machine: events that were impossible in the state it was in.

use std::fmt;

use crate::proto::{Address, Key};

use super::log::LogRecord;
use super::task::StateName;

/// The log records that led to an error, oldest first.
#[derive(Clone, Debug)]
pub struct Story(pub Vec<LogRecord>);

impl fmt::Display for Story {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|record| write!(f, "\n    {record}"))
    }
}

/// Why an event could not be handled.
///
/// After any of them but [`Error::ReplicaInUse`], [`Error::UnknownTask`] and [`Error::NotInFlight`], which leave
/// everything as it was, the state may be inconsistent: drop it and register anew.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no way from that state to that one.
    #[error("invalid transition of {key:?}: {start} -> {finish}; story:{story}")]
    InvalidTransition { key: Key, start: StateName, finish: StateName, story: Story },
    /// A computation ended that was never started.
    #[error("{event} for unknown task {key:?}; story:{story}")]
    UnknownTask { key: Key, event: &'static str, story: Story },
    /// A transfer ended that was never started.
    #[error("nothing is being gathered from {worker}")]
    NotInFlight { worker: Address },
    /// The scheduler wants a replica removed that a running task uses.
    #[error("cannot remove the replica of {key:?} while {dependent:?} is {state}")]
    ReplicaInUse { key: Key, dependent: Key, state: StateName },
    /// An invariant does not hold; found only when `validate` is on.
    #[error("{key:?} in state {state} breaks \"{invariant}\"; story:{story}")]
    InvalidTask { key: Key, state: StateName, invariant: &'static str, story: Story },
    /// An invariant of the whole does not hold; found only by `validate_state`.
    #[error("state breaks \"{invariant}\": {detail}")]
    InvalidState { invariant: &'static str, detail: String },
}
