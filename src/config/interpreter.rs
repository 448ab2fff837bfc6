//! The Python that runs tasks: where it is, and whether it and its `distributed` are ones we can work with.
//!
//! Asked before anything is bound or registered. What an interpreter says of itself is read in `scheduler::Interpreter`.

use std::fmt;
use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, access};

use crate::scheduler::{self, Interpreter};

use super::env::Environment;

/// Oldest supported `distributed`: what changed since then is in `docs/compatibility.md`.
pub const OLDEST: Release = Release(2025, 2);
/// Newest supported `distributed`, year and month.
pub const NEWEST: Release = Release(2026, 8);
/// Oldest supported Python.
pub const OLDEST_PYTHON: Release = Release(3, 10);
/// Newest supported Python.
pub const NEWEST_PYTHON: Release = Release(3, 13);

/// The first two numbers of a version: year and month of a Dask release, major and minor of Python's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Release(u64, u64);

impl Release {
    /// Of a version like `2026.8.0` or `2026.3.0+12.gabc`.
    fn of(version: &str) -> Option<Self> {
        let mut parts = version.split('.').map(str::parse);
        Some(Release(parts.next()?.ok()?, parts.next()?.ok()?))
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// Why an interpreter cannot be used; each message says what to do.
#[derive(Debug, thiserror::Error)]
pub enum InterpreterError {
    /// Nothing of that name.
    #[error("there is no Python interpreter {name}: name one with --python, like --python .venv/bin/python")]
    Missing { name: String },
    /// A file that may not be executed.
    #[error("{} is not an executable file: name a Python interpreter with --python", program.display())]
    NotExecutable { program: PathBuf },
    /// It does not say what it is.
    #[error("this is no usable Python, name another one with --python")]
    Broken {
        #[source]
        source: scheduler::Error,
    },
    /// It has no `distributed`.
    #[error(
        "{0} has no package distributed: run '{0} -m pip install \"distributed=={NEWEST}.*\"', \
         or name another interpreter with --python",
        program.display()
    )]
    NoDistributed { program: PathBuf },
    /// Its `distributed` is too old or too new.
    #[error(
        "{} has distributed {version}, and this worker supports {OLDEST} to {NEWEST}: install one of those, \
         or name another interpreter with --python",
        program.display()
    )]
    Distributed { program: PathBuf, version: String },
    /// It is too old or too new itself.
    #[error(
        "{} is Python {version}, and this worker supports {OLDEST_PYTHON} to {NEWEST_PYTHON}: \
         name another interpreter with --python",
        program.display()
    )]
    Python { program: PathBuf, version: String },
}

/// An interpreter that was found fit.
#[derive(Clone, Debug, PartialEq)]
pub struct Python {
    /// What it says of itself.
    pub interpreter: Interpreter,
    /// Version of its `distributed`.
    pub distributed: String,
}

/// Finds an interpreter by path or by name on `PATH` and checks it. Starts it once, for some 20 ms.
///
/// # Errors
/// See [`InterpreterError`].
pub fn find(name: &str, env: &Environment) -> Result<Python, InterpreterError> {
    let program = locate(name, env)?;
    let interpreter = Interpreter::probe(&program).map_err(|source| InterpreterError::Broken { source })?;
    let distributed = interpreter.package("distributed").or_else(|| hidden_distributed(&interpreter));
    check(&program, &interpreter.version, distributed.as_deref())?;
    // the check has refused an interpreter without it
    Ok(Python { interpreter, distributed: distributed.unwrap_or_default() })
}

/// Asks Python for a package whose metadata lies in no folder of its path.
fn hidden_distributed(interpreter: &Interpreter) -> Option<String> {
    let versions = interpreter.versions(&[]);
    Some(versions.field("packages")?.field("distributed")?.as_str()?.to_owned())
}

fn locate(name: &str, env: &Environment) -> Result<PathBuf, InterpreterError> {
    let runs = |path: &Path| path.is_file() && access(path, AccessFlags::X_OK).is_ok();
    if name.contains('/') {
        let program = std::path::absolute(name).unwrap_or_else(|_| PathBuf::from(name));
        return match (program.exists(), runs(&program)) {
            (_, true) => Ok(program),
            (true, false) => Err(InterpreterError::NotExecutable { program }),
            (false, false) => Err(InterpreterError::Missing { name: name.to_owned() }),
        };
    }
    let path = env.get("PATH").unwrap_or("/usr/local/bin:/usr/bin:/bin");
    let mut candidates = std::env::split_paths(path).map(|folder| folder.join(name));
    candidates.find(|path| runs(path)).ok_or_else(|| InterpreterError::Missing { name: name.to_owned() })
}

fn check(program: &Path, python: &str, distributed: Option<&str>) -> Result<(), InterpreterError> {
    let program = program.to_owned();
    if !Release::of(python).is_some_and(|release| (OLDEST_PYTHON..=NEWEST_PYTHON).contains(&release)) {
        return Err(InterpreterError::Python { program, version: python.to_owned() });
    }
    let Some(version) = distributed else { return Err(InterpreterError::NoDistributed { program }) };
    if !Release::of(version).is_some_and(|release| (OLDEST..=NEWEST).contains(&release)) {
        return Err(InterpreterError::Distributed { program, version: version.to_owned() });
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn versions_outside_the_range_are_refused() {
        let fits = |python, distributed| check(Path::new("python"), python, distributed).is_ok();
        for version in ["2025.2.0", "2026.8.0", "2026.8.1.dev3+g12", "2025.12.0"] {
            assert!(fits("3.11.7.final.0", Some(version)), "{version}");
        }
        for version in ["2024.12.1", "2025.1.0", "2026.9.0", "2027.1.0", "unknown", ""] {
            assert!(!fits("3.11.7.final.0", Some(version)), "{version}");
        }
        assert!(fits("3.10.0.final.0", Some("2026.8.0")) && fits("3.13.0.final.0", Some("2026.8.0")));
        assert!(!fits("3.9.18.final.0", Some("2026.8.0")) && !fits("3.14.0.final.0", Some("2026.8.0")));
        assert!(!fits("3.11.7.final.0", None));
    }

    #[test]
    fn names_are_looked_up_on_the_path() {
        let bin = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin");
        let path = format!("/nonexistent:{}", bin.display());
        let env = Environment::of([("PATH", path.as_str())]);
        let found = find("python", &env).unwrap();
        assert_eq!(found.interpreter.python, bin.join("python"));
        assert!(Release::of(&found.distributed).is_some());
        assert!(matches!(find("python9", &env), Err(InterpreterError::Missing { .. })));
        assert!(matches!(find("/etc/passwd", &env), Err(InterpreterError::NotExecutable { .. })));
        assert!(matches!(find("/bin/true", &env), Err(InterpreterError::Broken { .. })));
    }
}
