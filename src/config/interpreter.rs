//! The Python that runs tasks: where it is, and whether its `distributed` is one we can work with.
//!
//! Asked before anything is bound or registered. A virtual environment is read without running it; any other interpreter
//! is run once, which costs some 20 ms.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use nix::unistd::{AccessFlags, Pid, access};

use super::env::Environment;

/// Oldest supported `distributed`, year and month.
pub const OLDEST: Release = Release { year: 2025, month: 2 };
/// Newest supported `distributed`, year and month.
pub const NEWEST: Release = Release { year: 2026, month: 8 };
/// Oldest supported Python, major and minor; the oldest that a supported `distributed` runs on.
pub const OLDEST_PYTHON: (u64, u64) = (3, 10);
/// Newest supported Python, major and minor.
pub const NEWEST_PYTHON: (u64, u64) = (3, 13);

/// How long an interpreter may take to say what it is.
const PATIENCE: Duration = Duration::from_secs(60);

/// Year and month of a Dask release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Release {
    /// Year.
    pub year: u64,
    /// Month, or the number in that place.
    pub month: u64,
}

impl Release {
    /// The first two numbers of a version like `2026.8.0` or `2026.3.0+12.gabc`.
    fn of(version: &str) -> Option<Self> {
        let mut parts = version.split('.');
        Some(Release { year: parts.next()?.parse().ok()?, month: parts.next()?.parse().ok()? })
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.year, self.month)
    }
}

/// A usable interpreter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interpreter {
    /// The program to run.
    pub program: PathBuf,
    /// Its version: major, minor, micro.
    pub version: [u64; 3],
    /// Its `sys.prefix` and `sys.exec_prefix`, once where they are one.
    pub prefixes: Vec<PathBuf>,
    /// Version of its `distributed`.
    pub distributed: String,
}

/// Why an interpreter cannot be used; each message says what to do.
#[derive(Debug, thiserror::Error)]
pub enum InterpreterError {
    /// Nothing of that name.
    #[error("there is no Python interpreter {name}: name one with --python, like --python .venv/bin/python")]
    Missing { name: String },
    /// A file that may not be executed.
    #[error("{program} is not an executable file: name a Python interpreter with --python", program = program.display())]
    NotExecutable { program: PathBuf },
    /// It could not be started.
    #[error("cannot run {program}: {source}", program = program.display())]
    Spawn {
        program: PathBuf,
        #[source]
        source: io::Error,
    },
    /// It failed, or is no Python.
    #[error("{program} does not work as a Python interpreter: {reason}", program = program.display())]
    Broken { program: PathBuf, reason: String },
    /// It said nothing for too long.
    #[error("{program} did not say its version within {seconds} s", program = program.display())]
    Silent { program: PathBuf, seconds: u64 },
    /// It has no `distributed`.
    #[error(
        "{program} has no package distributed: run '{program} -m pip install \"distributed<={NEWEST}.*\"', \
         or name another interpreter with --python",
        program = program.display()
    )]
    NoDistributed { program: PathBuf },
    /// Its `distributed` is too old or too new.
    #[error(
        "{program} has distributed {version}, and this worker supports {OLDEST} to {NEWEST}: install one of those, \
         or name another interpreter with --python",
        program = program.display()
    )]
    Unsupported { program: PathBuf, version: String },
    /// Its Python is too old or too new.
    #[error(
        "{program} is Python {major}.{minor}, and this worker supports {}.{} to {}.{}: name another interpreter with \
         --python",
        OLDEST_PYTHON.0, OLDEST_PYTHON.1, NEWEST_PYTHON.0, NEWEST_PYTHON.1,
        program = program.display()
    )]
    UnsupportedPython { program: PathBuf, major: u64, minor: u64 },
}

/// Finds an interpreter by path or by name on `PATH` and checks it.
///
/// # Errors
/// See [`InterpreterError`].
pub fn find(name: &str, env: &Environment) -> Result<Interpreter, InterpreterError> {
    let program = locate(name, env)?;
    let found = match read_virtual_environment(&program, env) {
        Some(found) => found,
        None => ask(&program)?,
    };
    check(&found)?;
    Ok(found)
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

fn check_python(program: &Path, [major, minor, _]: [u64; 3]) -> Result<(), InterpreterError> {
    if (OLDEST_PYTHON..=NEWEST_PYTHON).contains(&(major, minor)) {
        return Ok(());
    }
    Err(InterpreterError::UnsupportedPython { program: program.to_owned(), major, minor })
}

fn check(found: &Interpreter) -> Result<(), InterpreterError> {
    let program = found.program.clone();
    check_python(&program, found.version)?;
    match Release::of(&found.distributed) {
        Some(release) if (OLDEST..=NEWEST).contains(&release) => Ok(()),
        _ => Err(InterpreterError::Unsupported { program, version: found.distributed.clone() }),
    }
}

/// Reads a plain virtual environment's own files; `None` where its `sys.path` may hold more than they show.
fn read_virtual_environment(program: &Path, env: &Environment) -> Option<Interpreter> {
    if ["PYTHONPATH", "PYTHONHOME"].iter().any(|name| env.get(name).is_some_and(|v| !v.is_empty())) {
        return None;
    }
    let prefix = program.parent()?.parent()?;
    let config = std::fs::read_to_string(prefix.join("pyvenv.cfg")).ok()?;
    let setting = |name: &str| {
        let mut pairs = config.lines().filter_map(|line| line.split_once('='));
        pairs.find(|(key, _)| key.trim().eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
    };
    if setting("include-system-site-packages").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
        return None;
    }
    // `venv` writes the one, `virtualenv` and `uv` the other
    let mut numbers = setting("version").or_else(|| setting("version_info"))?.split('.').map(str::parse);
    let mut number = || numbers.next()?.ok();
    let version: [u64; 3] = [number()?, number()?, number()?];
    let site = prefix.join(format!("lib/python{}.{}/site-packages", version[0], version[1]));
    if !site.join("distributed/__init__.py").is_file() {
        return None;
    }
    let names = std::fs::read_dir(site).ok()?.flatten().map(|entry| entry.file_name());
    let version_of = |name: std::ffi::OsString| {
        let name = name.into_string().ok()?;
        Some(name.strip_prefix("distributed-")?.strip_suffix(".dist-info")?.to_owned())
    };
    let mut versions = names.filter_map(version_of);
    let (distributed, None) = (versions.next()?, versions.next()) else { return None };
    Some(Interpreter { program: program.to_owned(), version, prefixes: vec![prefix.to_owned()], distributed })
}

/// Asks the interpreter itself. The folder it is run in is not on its path, as it is not on `dask worker`'s.
fn ask(program: &Path) -> Result<Interpreter, InterpreterError> {
    const QUESTION: &str = r#"
import sys
sys.path[:] = [p for p in sys.path if p]
import json, importlib.util, importlib.metadata as metadata
version = None
if importlib.util.find_spec("distributed"):
    try:
        version = metadata.version("distributed")
    except metadata.PackageNotFoundError:
        import distributed
        version = distributed.__version__
print("\nANSWER " + json.dumps([sys.version_info[:3], [sys.prefix, sys.exec_prefix], version]))
"#;
    let output = run(program, QUESTION)?;
    let broken = |reason: String| InterpreterError::Broken { program: program.to_owned(), reason };
    let text = String::from_utf8_lossy(&output.stdout);
    let answer = text.lines().find_map(|line| line.strip_prefix("ANSWER "));
    let Some(answer) = answer.filter(|_| output.status.success()) else {
        let errors = String::from_utf8_lossy(&output.stderr);
        let last = errors.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it printed nothing");
        return Err(broken(format!("{last} ({})", output.status)));
    };
    let (version, mut prefixes, distributed): ([u64; 3], Vec<PathBuf>, Option<String>) =
        serde_json::from_str(answer).map_err(|error| broken(error.to_string()))?;
    prefixes.dedup();
    let program = program.to_owned();
    check_python(&program, version)?;
    match distributed {
        Some(distributed) => Ok(Interpreter { program, version, prefixes, distributed }),
        None => Err(InterpreterError::NoDistributed { program }),
    }
}

/// Runs a piece of Python to its end, within [`PATIENCE`].
fn run(program: &Path, code: &str) -> Result<Output, InterpreterError> {
    let spawned = Command::new(program)
        .args(["-c", code])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let failed = |source| InterpreterError::Spawn { program: program.to_owned(), source };
    let child = spawned.map_err(failed)?;
    let pid = Pid::from_raw(child.id().cast_signed());
    let (done, finished) = mpsc::channel();
    let waiter = std::thread::spawn(move || done.send(child.wait_with_output()));
    let Ok(output) = finished.recv_timeout(PATIENCE) else {
        // the waiter has not reaped it yet, so the number is still this child's
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        let _ = waiter.join();
        return Err(InterpreterError::Silent { program: program.to_owned(), seconds: PATIENCE.as_secs() });
    };
    output.map_err(failed)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// The function under test; a script that a test has just written may still be open in another test's fork.
    fn find(name: &str, env: &Environment) -> Result<Interpreter, InterpreterError> {
        loop {
            match super::find(name, env) {
                Err(InterpreterError::Spawn { source, .. })
                    if source.kind() == io::ErrorKind::ExecutableFileBusy => {}
                done => return done,
            }
        }
    }

    /// A script that stands for an interpreter.
    fn program(folder: &Path, body: &str) -> String {
        let path = folder.join("bin/python");
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn environment(folder: &Path, distributed: &str) {
        std::fs::write(folder.join("pyvenv.cfg"), "home = /x\nversion = 3.12.1\n").unwrap();
        let site = folder.join("lib/python3.12/site-packages");
        std::fs::create_dir_all(site.join("distributed")).unwrap();
        std::fs::write(site.join("distributed/__init__.py"), "").unwrap();
        std::fs::create_dir(site.join(format!("distributed-{distributed}.dist-info"))).unwrap();
    }

    #[test]
    fn a_virtual_environment_is_not_run() {
        let dir = tempfile::tempdir().unwrap();
        let name = program(dir.path(), "exit 3");
        environment(dir.path(), "2026.8.0");
        let found = find(&name, &Environment::default()).unwrap();
        assert_eq!((found.version, found.distributed.as_str()), ([3, 12, 1], "2026.8.0"));
        assert_eq!(found.prefixes, [dir.path()]);
        let with_path = Environment::of([("PYTHONPATH", "/somewhere")]);
        assert!(matches!(find(&name, &with_path), Err(InterpreterError::Broken { .. })));
    }

    #[test]
    fn versions_outside_the_range_are_refused() {
        for (version, fits) in [
            ("2024.12.1", false),
            ("2025.1.0", false),
            ("2025.2.0", true),
            ("2026.8.1", true),
            ("2026.9.0", false),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let name = program(dir.path(), "exit 3");
            environment(dir.path(), version);
            assert_eq!(find(&name, &Environment::default()).is_ok(), fits, "{version}");
        }
    }

    #[test]
    fn any_other_interpreter_is_asked() {
        let dir = tempfile::tempdir().unwrap();
        let answer = r#"echo 'a greeting'; echo 'ANSWER [[3, 11, 7], ["/usr", "/usr"], "2026.1.2"]'"#;
        let found = find(&program(dir.path(), answer), &Environment::default()).unwrap();
        assert_eq!(found.prefixes, [Path::new("/usr")]);
        assert_eq!(found.version, [3, 11, 7]);
        let without = program(dir.path(), r#"echo 'ANSWER [[3, 11, 7], ["/usr", "/usr"], null]'"#);
        let error = find(&without, &Environment::default()).unwrap_err();
        assert!(error.to_string().contains("pip install"), "{error}");
        let old = program(dir.path(), r#"echo 'ANSWER [[3, 8, 1], ["/usr", "/usr"], null]'"#);
        assert!(matches!(
            find(&old, &Environment::default()),
            Err(InterpreterError::UnsupportedPython { .. })
        ));
        let broken = program(dir.path(), "echo 'no such library' >&2; exit 127");
        let error = find(&broken, &Environment::default()).unwrap_err();
        assert!(error.to_string().contains("no such library"), "{error}");
    }

    #[test]
    fn names_are_looked_up_on_the_path() {
        let dir = tempfile::tempdir().unwrap();
        program(dir.path(), r#"echo 'ANSWER [[3, 11, 7], ["/usr"], "2026.1.2"]'"#);
        let path = format!("/nonexistent:{}", dir.path().join("bin").display());
        assert!(find("python", &Environment::of([("PATH", path.as_str())])).is_ok());
        assert!(matches!(
            find("python9", &Environment::of([("PATH", path.as_str())])),
            Err(InterpreterError::Missing { .. })
        ));
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let error = find(file.to_str().unwrap(), &Environment::default()).unwrap_err();
        assert!(matches!(error, InterpreterError::NotExecutable { .. }));
    }
}
