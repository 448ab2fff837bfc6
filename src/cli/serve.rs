//! The daemon from checked settings to its end: directories, pid file, runtime, workers, signals.
//!
//! Whatever is wrong before the runtime starts ends the daemon before a port is bound.

use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{error, info, warn};

use super::{Exit, PidFile};
use crate::agent::{self, Stop};
use crate::config::Settings;
use crate::scheduler;
use crate::scratch::{self, WorkDir, WorkSpace};
use crate::systemd;
use crate::telemetry::log::Recent;

/// Time for blocking work to end once all workers have.
const LAST_MOMENTS: Duration = Duration::from_secs(2);

/// Runs all workers of the daemon until they have left.
///
/// # Errors
/// The exit code that says what kept it from running; the log says it in words.
pub fn serve(settings: &Settings, recent: &Recent) -> Result<Exit, Exit> {
    let directories = directories(settings).map_err(|error| complain(&error, Exit::from(&error)))?;
    let _pid_file = match &settings.pid_file {
        Some(path) => Some(PidFile::write(path).map_err(|source| {
            error!("cannot write the pid file {}: {source}", path.display());
            Exit::CannotCreate
        })?),
        None => None,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| complain(&error, Exit::System))?;
    let exit = runtime.block_on(run(settings, &directories, recent));
    runtime.shutdown_timeout(LAST_MOMENTS);
    exit
}

/// Logs what is wrong, with its causes, and gives the exit code back.
fn complain(error: &dyn std::error::Error, exit: Exit) -> Exit {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    error!("{text}");
    exit
}

/// A scratch directory for each worker.
fn directories(settings: &Settings) -> Result<Vec<WorkDir>, scratch::Error> {
    let space = WorkSpace::open(&settings.scratch, settings.use_file_locking)?;
    settings.workers.iter().map(|_| space.work_dir()).collect()
}

async fn run(settings: &Settings, directories: &[WorkDir], recent: &Recent) -> Result<Exit, Exit> {
    let (wish, stop) = watch::channel(Stop::No);
    let mut workers = JoinSet::new();
    for (worker, directory) in settings.workers.iter().zip(directories) {
        let config = settings.agent(worker, directory.path().to_owned());
        workers.spawn(agent::run(config, recent.clone(), stop.clone()));
    }
    systemd::ready(&format!("workers: {}", settings.workers.len()));
    let exit = tokio::select! {
        exit = join(&mut workers) => exit,
        exit = signals(&wish) => exit,
        () = watchdog() => Ok(Exit::Software),
    };
    systemd::stopping("closed");
    exit
}

/// Waits for all workers; the first that cannot go on ends the others.
async fn join(workers: &mut JoinSet<Result<(), agent::Error>>) -> Result<Exit, Exit> {
    while let Some(ended) = workers.join_next().await {
        match ended {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(complain(&error, Exit::from(&error))),
            Err(panic) => return Err(complain(&panic, Exit::Software)),
        }
    }
    Ok(Exit::Ok)
}

/// Turns the first signal into a wish to leave gracefully; a second one ends the wait for that.
async fn signals(wish: &watch::Sender<Stop>) -> Result<Exit, Exit> {
    let failed = |error: std::io::Error| complain(&error, Exit::System);
    let mut term = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut next = async || {
        tokio::select! {
            _ = term.recv() => Signal::SIGTERM,
            _ = interrupt.recv() => Signal::SIGINT,
        }
    };
    let first = next().await;
    info!("{first}: closing gracefully; a second signal ends the worker at once");
    systemd::stopping("closing gracefully");
    // the workers may have ended already
    let _ = wish.send(Stop::Gracefully);
    let second = next().await;
    warn!("{second}: leaving at once");
    Err(Exit::Signal(second))
}

/// Tells the service manager that we are alive, as long as this runtime turns.
async fn watchdog() {
    let Some(interval) = systemd::watchdog_interval() else { return std::future::pending().await };
    loop {
        systemd::alive();
        tokio::time::sleep(interval).await;
    }
}

impl From<&scratch::Error> for Exit {
    fn from(error: &scratch::Error) -> Self {
        match error.io().kind() {
            std::io::ErrorKind::PermissionDenied => Exit::Permission,
            _ => Exit::CannotCreate,
        }
    }
}

impl From<&agent::Error> for Exit {
    fn from(error: &agent::Error) -> Self {
        match error {
            agent::Error::Scheduler(scheduler::Error::DeathTimeout { .. }) => Exit::Unavailable,
            agent::Error::Scheduler(scheduler::Error::Net { source, .. }) if source.is_connection_loss() => {
                Exit::Unavailable
            }
            agent::Error::Scheduler(_) => Exit::Protocol,
            agent::Error::Interpreter { .. } => Exit::Config,
            _ => Exit::System,
        }
    }
}
