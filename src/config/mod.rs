//! Configuration: every source that counts, read and checked into [`Settings`] before anything is bound.
//!
//! An option counts more than an `IQOQO_*` variable, that more than our own file, that more than a `DASK_*` variable, that
//! more than Dask's files, that more than the default. This room starts nothing; running Python once to ask its version
//! is the only thing it does besides reading.

mod addresses;
mod assemble;
mod dask;
#[cfg(test)]
mod differential;
mod env;
pub mod interpreter;
mod keys;
mod literal;
mod log;
pub mod machine;
mod own;
pub mod parse;
mod resolve;
mod settings;
mod sources;
mod value;
mod yaml;

use std::io;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;

pub use env::Environment;
pub use interpreter::{InterpreterError, Python};
pub use machine::Machine;
pub use own::DEFAULT_FILE;
pub use settings::{Comm, Lifetime, Memory, Runner, Settings, Transfer, Tuning, Worker};
pub use sources::Place;
pub use value::{Node, Source, Value};

use crate::telemetry;
use sources::Sources;

/// Why there is no usable configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A value that is not one of its kind.
    #[error("bad value {value} for {place}: {reason}")]
    Value { place: Place, value: String, reason: String },
    /// Something Dask has and this worker has not (yet).
    #[error("{place}: {why}")]
    Refused { place: Place, why: &'static str },
    /// Options that contradict each other.
    #[error("{message}")]
    Combination { message: String },
    /// A variable that contradicts others, or cannot be read.
    #[error("{place}: {reason}")]
    Conflict { place: Source, reason: String },
    /// Nobody says where the scheduler is.
    #[error(
        "need a scheduler address like 'iqoqo-dask-worker tcp://SCHEDULER:8786', or --scheduler-file, \
         or DASK_SCHEDULER_ADDRESS"
    )]
    NoScheduler,
    /// Our own file has a key that nobody knows.
    #[error(
        "unknown key {key} in {path}{hint}",
        path = path.display(),
        hint = suggestion.map(|name| format!(": did you mean {name}?")).unwrap_or_default()
    )]
    UnknownKey { path: PathBuf, key: String, suggestion: Option<&'static str> },
    /// Our own file cannot be read.
    #[error("cannot read {}", path.display())]
    Unreadable {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A file does not parse.
    #[error("{path} is malformed: {reason}", path = path.display())]
    Malformed { path: PathBuf, reason: String },
    /// The interpreter cannot be used.
    #[error(transparent)]
    Interpreter(#[from] InterpreterError),
}

impl Error {
    /// Whether the command line is at fault, rather than a file or the environment.
    pub fn is_usage(&self) -> bool {
        match self {
            Error::Value { place, .. } | Error::Refused { place, .. } => {
                matches!(place.source, Source::Option(_))
            }
            Error::Combination { .. } | Error::NoScheduler => true,
            _ => false,
        }
    }
}

/// Whether there is a setting of that name.
pub fn is_setting(name: &str) -> bool {
    keys::setting(name).is_some()
}

/// What every source says, not yet checked.
#[derive(Debug)]
pub struct Gathered {
    sources: Sources,
    env: Environment,
    machine: Machine,
    python: Python,
    remarks: Vec<String>,
}

/// Reads every source, and finds the interpreter that some of them depend on.
///
/// `options` are those of the command line by our names, `file` is what `--config` named.
///
/// # Errors
/// Files that do not parse, unknown keys in our own, and an interpreter that cannot be used.
pub fn gather(
    options: IndexMap<&'static str, Node>,
    file: Option<&Path>,
    env: Environment,
) -> Result<Gathered, Error> {
    let own = own::read(file, &env)?;
    let mut remarks: Vec<String> = own
        .unknown_variables
        .iter()
        .map(|name| format!("environment variable {name} is no setting of this worker"))
        .collect();
    let mut sources = Sources { options, own, dask: value::Table::new() };
    let python = sources.read("python", sources::text)?.unwrap_or_else(|| "python3".to_owned());
    let python = interpreter::find(&python, &env)?;
    sources.dask = dask::collect(&env, &python.interpreter.prefix)?;
    if sources.find("scheduler-file").is_some() && sources.options.contains_key("scheduler") {
        remarks.push("--scheduler-file counts, the scheduler address given besides does not".to_owned());
    }
    Ok(Gathered { sources, env, machine: Machine::detect(), python, remarks })
}

impl Gathered {
    /// Settings of the log.
    ///
    /// # Errors
    /// A value that makes no sense.
    pub fn log(&mut self) -> Result<telemetry::log::Config, Error> {
        log::read(&self.sources, &mut self.remarks)
    }

    /// Resolves and checks everything else.
    ///
    /// # Errors
    /// The first value or combination that is wrong, or not supported.
    pub fn settings(&mut self) -> Result<Settings, Error> {
        let python = self.python.clone();
        resolve::resolve(&self.sources, &self.env, self.machine, python, &mut self.remarks)
    }

    /// What an operator should know though nothing is wrong, for the log.
    pub fn remarks(&self) -> &[String] {
        &self.remarks
    }

    /// The interpreter that runs the tasks.
    pub fn python(&self) -> &Python {
        &self.python
    }

    /// What the machine offers.
    pub fn machine(&self) -> Machine {
        self.machine
    }
}
