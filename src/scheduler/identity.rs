//! Who this worker is: the fixed facts that the scheduler learns at registration.
//!
//! Source: `distributed/worker.py: Worker._register_with_scheduler, Worker.identity`.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use uuid::Uuid;

use crate::proto::{Address, Status, Value};

/// The name the scheduler knows a worker by: Dask's cluster classes number theirs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Name {
    /// `str`
    Text(Arc<str>),
    /// `int`
    Number(i64),
}

impl Name {
    /// The meaning of `--name` (`distributed/cli/dask_worker.py`): a number where it is one.
    pub fn parse(text: &str) -> Self {
        // Python's int() also takes blanks around it and underscores; nobody names workers so
        text.parse().map_or_else(|_| Name::Text(text.into()), Name::Number)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Name::Text(text) => f.write_str(text),
            Name::Number(number) => write!(f, "{number}"),
        }
    }
}

impl From<&Name> for Value {
    fn from(name: &Name) -> Self {
        match name {
            Name::Text(text) => text.clone().into(),
            Name::Number(number) => (*number).into(),
        }
    }
}

/// What a worker is, apart from what it does at the moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Identity {
    /// Where peers, clients and the scheduler reach it (`--contact-address`).
    pub address: Address,
    /// Its name; the address where none was given.
    pub name: Name,
    /// Tasks at once.
    pub nthreads: usize,
    /// Bytes; `None` without a limit.
    pub memory_limit: Option<u64>,
    /// Abstract resources (`--resources`).
    pub resources: Vec<(Arc<str>, f64)>,
    /// Scratch directory.
    pub local_directory: PathBuf,
    /// Ports of other services: `dashboard`.
    pub services: Vec<(Arc<str>, u16)>,
    /// The nanny's own address.
    pub nanny: Option<Address>,
    /// `Interpreter::versions`
    pub versions: Value,
    /// `Worker-<uuid>`, new for each process.
    pub server_id: Arc<str>,
}

impl Identity {
    /// A fresh `server_id`.
    pub fn new_server_id() -> Arc<str> {
        format!("Worker-{}", Uuid::new_v4()).into()
    }

    /// The answer to `identity` (`Worker.identity`).
    pub fn to_value(&self, scheduler: &Address) -> Value {
        Value::map([
            ("type", "Worker".into()),
            ("id", self.server_id.clone().into()),
            ("scheduler", scheduler.as_str().into()),
            ("nthreads", self.nthreads.into()),
            ("memory_limit", self.memory_limit.into()),
        ])
    }

    /// `{"op": "register-worker"}` at unix time `now`.
    pub(super) fn registration(&self, now: f64, status: Status, metrics: Value) -> Value {
        let resources =
            self.resources.iter().map(|(name, quantity)| (name.clone().into(), (*quantity).into()));
        let services = self.services.iter().map(|(name, port)| (name.clone().into(), (*port).into()));
        Value::map([
            ("op", "register-worker".into()),
            ("reply", false.into()),
            ("address", self.address.as_str().into()),
            ("status", status.as_str().into()),
            ("nthreads", self.nthreads.into()),
            ("name", (&self.name).into()),
            ("now", now.into()),
            ("resources", Value::Map(resources.collect())),
            ("memory_limit", self.memory_limit.into()),
            ("local_directory", self.local_directory.to_string_lossy().into_owned().into()),
            ("services", Value::Map(services.collect())),
            ("nanny", self.nanny.as_ref().map(|nanny| Value::from(nanny.as_str())).into()),
            ("pid", std::process::id().into()),
            ("versions", self.versions.clone()),
            ("metrics", metrics),
            ("extra", Value::Map(Vec::new())),
            ("stimulus_id", format!("worker-connect-{now}").into()),
            ("server_id", self.server_id.clone().into()),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_numbers_where_they_can_be() {
        assert_eq!(Name::parse("17"), Name::Number(17));
        assert_eq!(Name::parse("-1"), Name::Number(-1));
        assert_eq!(Name::parse("w-1"), Name::Text("w-1".into()));
        assert_eq!(Name::parse("17").to_string(), "17");
    }
}
