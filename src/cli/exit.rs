//! Exit codes, after `sysexits.h`, and which error has which; documented in `--help` and `docs/cli.md`.

use std::io::{self, ErrorKind};
use std::process::ExitCode;

use nix::sys::signal::Signal;

use crate::{agent, config, net, scheduler, scratch};

/// Why the daemon ended, for whoever started it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// As asked.
    Ok,
    /// A bad option (`EX_USAGE`).
    Usage,
    /// No scheduler within the death timeout (`EX_UNAVAILABLE`).
    Unavailable,
    /// A bug of ours (`EX_SOFTWARE`).
    Software,
    /// The system refused what a worker needs: a port, a process, memory (`EX_OSERR`).
    System,
    /// A file or directory could not be created (`EX_CANTCREAT`).
    CannotCreate,
    /// The scheduler refused this worker or talks something else (`EX_PROTOCOL`).
    Protocol,
    /// A permission is missing (`EX_NOPERM`).
    Permission,
    /// A bad value in a file or variable, or an unusable interpreter (`EX_CONFIG`).
    Config,
    /// A second signal while closing.
    Signal(Signal),
}

impl Exit {
    /// The number.
    pub fn code(self) -> u8 {
        match self {
            Exit::Ok => 0,
            Exit::Usage => 64,
            Exit::Unavailable => 69,
            Exit::Software => 70,
            Exit::System => 71,
            Exit::CannotCreate => 73,
            Exit::Protocol => 76,
            Exit::Permission => 77,
            Exit::Config => 78,
            // signal numbers of Linux end at 64
            Exit::Signal(signal) => 128 + (signal as i32).unsigned_abs().min(64) as u8,
        }
    }

    /// For a file or directory that could not be created.
    pub fn of_creating(error: &io::Error) -> Self {
        if error.kind() == ErrorKind::PermissionDenied { Exit::Permission } else { Exit::CannotCreate }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit.code())
    }
}

impl From<&config::Error> for Exit {
    fn from(error: &config::Error) -> Self {
        match error {
            config::Error::Unreadable { source, .. } if source.kind() == ErrorKind::PermissionDenied => {
                Exit::Permission
            }
            error if error.is_usage() => Exit::Usage,
            _ => Exit::Config,
        }
    }
}

impl From<&scratch::Error> for Exit {
    fn from(error: &scratch::Error) -> Self {
        Exit::of_creating(error.io())
    }
}

impl From<&agent::Error> for Exit {
    fn from(error: &agent::Error) -> Self {
        match error {
            agent::Error::Scheduler(error) => error.into(),
            agent::Error::Interpreter { .. } => Exit::Config,
            agent::Error::Listen { source: net::Error::Bind { source, .. }, .. }
                if source.kind() == ErrorKind::PermissionDenied =>
            {
                Exit::Permission
            }
            _ => Exit::System,
        }
    }
}

impl From<&scheduler::Error> for Exit {
    fn from(error: &scheduler::Error) -> Self {
        match error {
            scheduler::Error::DeathTimeout { .. } => Exit::Unavailable,
            scheduler::Error::Net { source, .. } if source.is_connection_loss() => Exit::Unavailable,
            scheduler::Error::Python { .. } => Exit::Config,
            _ => Exit::Protocol,
        }
    }
}
