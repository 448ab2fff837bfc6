//! Typed messages, keys, addresses, priorities: the vocabulary every other room shares.
//!
//! No bytes are parsed here and nothing does IO; `wire` turns frames into [`Value`], this room understands them.

mod ids;
mod message;
mod repr;
mod value;

pub use ids::{Address, AddressError, Key, Priority, RunId, Status};
pub use message::{ComputeTask, MessageError, Stimulus, StreamMessage};
pub use value::{Payload, PayloadKind, Value};
