//! What stands between a task and the machine: the stub that every Python process is executed through.
//!
//! The daemon executes its own binary once more with [`SUBCOMMAND`]; that single-threaded process confines itself and
//! then executes the interpreter. Nothing here talks to the daemon or knows a task.
//!
//! This is level `off`: the process is tied to the daemon's life, has a session of its own, none of the daemon's
//! descriptors but the one connection, and leaves no core files. It restricts nothing.

use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::sys;

/// First argument that makes the binary this stub; not for users.
pub const SUBCOMMAND: &str = "__sandbox-init";

/// Exit code of a stub that could not do its work (`EX_OSERR`); what failed is on its standard error.
const EXIT_CODE: i32 = 71;

/// Why the stub gave up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its arguments are not what [`command`] writes.
    #[error("{SUBCOMMAND} is not for users: expected the parent's process id and a program")]
    Arguments,
    /// A step of the confinement failed.
    #[error("could not {step}")]
    Step {
        /// What was to be done.
        step: &'static str,
        /// What the kernel said.
        #[source]
        source: sys::Error,
    },
    /// The program could not be executed.
    #[error("could not execute {program}")]
    Program {
        /// As given.
        program: String,
        /// What the kernel said.
        #[source]
        source: sys::Error,
    },
}

/// A command that runs `program` confined. It gets `connection` as a descriptor whose number is appended to its
/// arguments, and ends when the thread that spawns it does.
pub fn command(stub: &Path, program: &OsStr, arguments: &[&OsStr], connection: OwnedFd) -> Command {
    let mut command = Command::new(stub);
    command.arg(SUBCOMMAND).arg(std::process::id().to_string()).arg(program).args(arguments);
    command.stdin(Stdio::from(connection));
    command
}

/// The stub's whole life: `arguments` are those after [`SUBCOMMAND`]. Called before any thread is started.
#[allow(clippy::disallowed_methods, reason = "the stub holds nothing that a drop would tidy up")]
pub fn init_main(arguments: impl Iterator<Item = OsString>) -> ! {
    let Err(error) = confine_and_exec(&arguments.collect::<Vec<_>>());
    let mut text = format!("{SUBCOMMAND}: {error}");
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    // nobody is left to tell if this fails
    let _ = writeln!(std::io::stderr(), "{text}");
    std::process::exit(EXIT_CODE)
}

fn confine_and_exec(arguments: &[OsString]) -> Result<Infallible, Error> {
    let [parent, program, arguments @ ..] = arguments else { return Err(Error::Arguments) };
    let parent = parent.to_str().and_then(|pid| pid.parse().ok()).ok_or(Error::Arguments)?;

    // first, so that nothing below outlives the daemon
    sys::die_with_parent(parent).map_err(step("tie its life to the daemon's"))?;
    // a signal to the daemon's group (Ctrl-C) is for the daemon to handle; this group is for it to kill
    sys::new_session().map_err(step("make a session of its own"))?;
    sys::forbid_core_dumps().map_err(step("forbid core dumps"))?;
    let connection = sys::detach_stdin().map_err(step("take over the connection"))?;
    sys::close_descriptors_except(&[connection]).map_err(step("close inherited descriptors"))?;

    let number = OsString::from(connection.to_string());
    let arguments: Vec<&OsStr> = arguments.iter().chain([&number]).map(OsString::as_os_str).collect();
    sys::exec(program, &arguments)
        .map_err(|source| Error::Program { program: program.to_string_lossy().into_owned(), source })
}

fn step(step: &'static str) -> impl FnOnce(sys::Error) -> Error {
    move |source| Error::Step { step, source }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn wrong_arguments_are_refused_before_anything_is_done() {
        for arguments in [vec![], vec!["1"], vec!["x", "python"]] {
            let arguments: Vec<OsString> = arguments.into_iter().map(Into::into).collect();
            assert!(matches!(confine_and_exec(&arguments), Err(Error::Arguments)));
        }
    }
}
