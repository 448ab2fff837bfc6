//! The daemon from checked settings to its end: directories, pid file, runtime, workers, signals.
//!
//! Whatever is wrong before the runtime starts ends the daemon before a port is bound.

use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{error, info, warn};

use super::exit::Exit;
use super::pid_file::PidFile;
use crate::agent::{self, Stop};
use crate::config::Settings;
use crate::scratch::{self, WorkDir, WorkSpace};
use crate::systemd;
use crate::telemetry::log::Recent;
use crate::telemetry::{self, Pulse};

/// Time for blocking work to end once all workers have.
const LAST_MOMENTS: Duration = Duration::from_secs(2);
/// Time between two looks at whether all workers have registered.
const READY_INTERVAL: Duration = Duration::from_millis(100);

/// Runs all workers of the daemon until they have left.
///
/// # Errors
/// The exit code that says what kept it from running; the log says it in words.
pub fn serve(settings: &Settings, recent: &Recent) -> Result<Exit, Exit> {
    let pid_file = settings.pid_file.as_deref();
    let _pid_file = pid_file.map(write_pid_file).transpose()?;
    let directories = directories(settings).map_err(|error| complain(&error, Exit::from(&error)))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| complain(&error, Exit::System))?;
    let exit = runtime.block_on(run(settings, &directories, recent));
    runtime.shutdown_timeout(LAST_MOMENTS);
    info!("End worker");
    exit
}

/// Logs what is wrong, with its causes, and gives the exit code back.
fn complain(error: &dyn std::error::Error, exit: Exit) -> Exit {
    error!("{}", telemetry::chain(error));
    exit
}

fn write_pid_file(path: &Path) -> Result<PidFile, Exit> {
    PidFile::write(path).map_err(|source| {
        error!("cannot write the pid file {}: {source}", path.display());
        Exit::of_creating(&source)
    })
}

/// A scratch directory for each worker.
fn directories(settings: &Settings) -> Result<Vec<WorkDir>, scratch::Error> {
    let space = WorkSpace::open(&settings.scratch, settings.use_file_locking)?;
    settings.workers.iter().map(|_| space.work_dir()).collect()
}

async fn run(settings: &Settings, directories: &[WorkDir], recent: &Recent) -> Result<Exit, Exit> {
    let (wish, stop) = watch::channel(Stop::No);
    let mut workers = JoinSet::new();
    let mut pulses = Vec::new();
    for (worker, directory) in settings.workers.iter().zip(directories) {
        let pulse = Pulse::new(settings.monitor.interval);
        pulses.push(pulse.clone());
        let config = settings.agent(worker, directory.path().to_owned(), pulse);
        workers.spawn(agent::run(config, recent.clone(), stop.clone()));
    }
    let exit = tokio::select! {
        exit = join(&mut workers) => exit,
        exit = signals(&wish) => exit,
        () = report(&pulses) => Ok(Exit::Software),
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

/// Tells the service manager, if there is one, when all workers have registered, and that none of them hangs. Never ends.
async fn report(pulses: &[Pulse]) {
    if !systemd::is_listening() {
        return std::future::pending().await;
    }
    let watchdog = systemd::watchdog_interval();
    let mut ready = false;
    loop {
        if !ready && pulses.iter().all(Pulse::ready) {
            ready = true;
            systemd::ready(&format!("registered: {} workers", pulses.len()));
        }
        if watchdog.is_some() && !pulses.iter().any(Pulse::stalled) {
            systemd::alive();
        }
        let pause = match (ready, watchdog) {
            (false, _) => READY_INTERVAL,
            (true, Some(interval)) => interval,
            (true, None) => return std::future::pending().await,
        };
        tokio::time::sleep(pause).await;
    }
}
