//! The zygote at the daemon: executed through the sandbox's stub, watched, replaced when it dies.
//!
//! It forks on request and reports the ends of what it forked; who they are is the pool's business.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::sync::oneshot;

use super::ipc::{self, FromChild, HEAD, Outgoing, ToChild};
use super::link::{Inbox, Incoming, Link};
use super::output::Tail;
use super::pool::Shared;
use super::slot;
use super::verdict::Cause;
use super::{Error, Event};
use crate::sandbox;
use crate::sys::{self, PidFd};
use crate::telemetry;

/// What the interpreter executes first: it takes the other sources from the connection.
const BOOT: &str = include_str!("runner/boot.py");

/// The sources, in the order of their imports. The name of `task` makes Dask cut its frames from tracebacks as it cuts
/// its own worker's.
const MODULES: [(&str, &str, &str); 10] = [
    ("channel", "iqoqo-dask-worker/distributed/worker_channel.py", include_str!("runner/channel.py")),
    ("calls", "iqoqo-dask-worker/runner/calls.py", include_str!("runner/calls.py")),
    ("shuffle", "iqoqo-dask-worker/runner/shuffle.py", include_str!("runner/shuffle.py")),
    ("worker", "iqoqo-dask-worker/runner/worker.py", include_str!("runner/worker.py")),
    ("plugins", "iqoqo-dask-worker/runner/plugins.py", include_str!("runner/plugins.py")),
    ("actors", "iqoqo-dask-worker/runner/actors.py", include_str!("runner/actors.py")),
    ("task", "iqoqo-dask-worker/distributed/worker.py", include_str!("runner/task.py")),
    ("nanny", "iqoqo-dask-worker/runner/nanny.py", include_str!("runner/nanny.py")),
    ("service", "iqoqo-dask-worker/runner/service.py", include_str!("runner/service.py")),
    ("zygote", "iqoqo-dask-worker/runner/zygote.py", include_str!("runner/zygote.py")),
];

/// `PYTHONHASHSEED` of every worker: keys must hash alike on all hosts (`distributed/nanny.py`).
const HASH_SEED: &str = "6640";

/// Time before a zygote that failed is started again, and the longest such time.
const BACKOFF: Duration = Duration::from_millis(250);
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// How long the Python processes may take to end once their connection is closed.
const END_TIMEOUT: Duration = Duration::from_secs(1);

/// The variables that a nanny sets for its worker: `pre-spawn-environ` and `environ` of `distributed.nanny`, where
/// `inherited` (the daemon's own environment) does not say otherwise, and the hash seed.
pub fn nanny_environment(
    configured: &[(String, String)],
    inherited: impl Fn(&str) -> Option<OsString>,
) -> Vec<(OsString, OsString)> {
    let mut variables: Vec<(OsString, OsString)> = configured
        .iter()
        .map(|(name, value)| (name.into(), inherited(name).unwrap_or_else(|| value.into())))
        .collect();
    let seeded = |(name, value): &(OsString, OsString)| name == "PYTHONHASHSEED" && value != "0";
    if !variables.iter().any(seeded) {
        variables.push(("PYTHONHASHSEED".into(), HASH_SEED.into()));
    }
    variables
}

/// The zygote of now, if there is one.
#[derive(Debug, Default)]
pub(super) struct Zygote {
    alive: Option<Alive>,
}

#[derive(Debug)]
struct Alive {
    link: Link,
    process: Option<PidFd>,
    pid: u32,
    /// Closes the connection when dropped or used.
    stop: Option<oneshot::Sender<oneshot::Sender<()>>>,
}

impl Zygote {
    pub(super) fn is_there(&self) -> bool {
        self.alive.is_some()
    }

    pub(super) fn pid(&self) -> Option<u32> {
        self.alive.as_ref().map(|alive| alive.pid)
    }

    /// Sends a request; without a zygote it is lost, as with one that dies before it reads it.
    pub(super) fn send(&self, message: &ToChild<'_>, fds: Vec<OwnedFd>) {
        let Some(alive) = &self.alive else { return };
        match Outgoing::new(message, fds) {
            Ok(message) => alive.link.send(message),
            Err(error) => tracing::error!(%error, "a request to the zygote could not be written"),
        }
    }

    /// Closes the connection, upon which it ends all processes. The receiver tells when it is gone.
    pub(super) fn stop(&mut self) -> Option<oneshot::Receiver<()>> {
        let (gone, ended) = oneshot::channel();
        self.alive.as_mut()?.stop.take()?.send(gone).ok()?;
        Some(ended)
    }
}

/// A zygote that was executed.
struct Launched {
    inbox: Inbox,
    ended: oneshot::Receiver<std::io::Result<ExitStatus>>,
    stopped: oneshot::Receiver<oneshot::Sender<()>>,
    tail: Arc<Mutex<Tail>>,
}

/// Starts the first zygote, and a task that replaces it whenever it dies.
pub(super) fn start(shared: &Arc<Shared>) -> Result<(), Error> {
    let first = launch(shared)?;
    tokio::spawn(supervise(shared.clone(), first));
    Ok(())
}

async fn supervise(shared: Arc<Shared>, first: Launched) {
    let mut next = Ok(first);
    let mut failures = 0;
    loop {
        let text = match next {
            Ok(launched) => {
                let lived = live(&shared, launched).await;
                if shared.state().stopping {
                    return;
                }
                if lived.was_ready {
                    failures = 0;
                }
                lived.end
            }
            Err(error) => telemetry::chain(&error),
        };
        failures += 1;
        tracing::error!(attempts = failures, "the zygote ended: {text}");
        shared.emit(Event::InterpreterFailed { text, attempts: failures });
        if failures > 1 {
            let exponent = (failures - 2).min(16);
            tokio::time::sleep((BACKOFF * (1 << exponent)).min(BACKOFF_MAX)).await;
        }
        if shared.state().stopping {
            return;
        }
        next = launch(&shared);
    }
}

/// How a zygote's life was.
struct Lived {
    was_ready: bool,
    end: String,
}

/// Serves one zygote until it is dead, and its children with it.
async fn live(shared: &Arc<Shared>, launched: Launched) -> Lived {
    let Launched { mut inbox, mut ended, mut stopped, tail } = launched;
    {
        let mut state = shared.state();
        state.fill(shared);
        // one that was there died with the last zygote
        if state.has_plugins_to_run()
            && let Err(error) = state.service(shared)
        {
            tracing::warn!("no service process for plugins: {}", telemetry::chain(&error));
        }
    }
    let mut was_ready = false;
    let gone = loop {
        tokio::select! {
            biased;
            received = inbox.receive() => match received {
                Ok(Some(message)) => match act(shared, message) {
                    Ok(ready) => was_ready |= ready,
                    Err(error) => break Err(telemetry::chain(&error)),
                },
                Ok(None) => break Ok(None),
                Err(error) => break Err(telemetry::chain(&error)),
            },
            gone = &mut stopped => break Ok(gone.ok()),
        }
    };
    // dropping both ends closes the connection, and the zygote ends its children and itself
    drop(inbox);
    let process = shared.state().zygote.alive.take().and_then(|alive| alive.process);
    if gone.is_err() {
        kill(process.as_ref());
    }
    let status = match tokio::time::timeout(END_TIMEOUT, &mut ended).await {
        Ok(status) => status,
        Err(_) => {
            tracing::warn!("the Python processes did not end in time and are killed");
            kill(process.as_ref());
            ended.await
        }
    };
    shared.zygote_lost();
    let end = match (gone, status) {
        (Err(text), _) => text,
        (Ok(Some(gone)), _) => {
            let _ = gone.send(());
            String::new()
        }
        (Ok(None), Ok(Ok(status))) => describe_end(status, &tail),
        (Ok(None), Ok(Err(error))) => error.to_string(),
        (Ok(None), Err(_)) => "it is not known how".into(),
    };
    Lived { was_ready, end }
}

/// Kills the zygote; the kernel then kills its children.
fn kill(process: Option<&PidFd>) {
    if let Some(Err(error)) = process.map(|process| process.kill(Signal::SIGKILL)) {
        tracing::warn!(%error, "the zygote could not be killed");
    }
}

fn describe_end(status: ExitStatus, tail: &Mutex<Tail>) -> String {
    let tail = tail.lock().unwrap_or_else(PoisonError::into_inner).text();
    if tail.is_empty() { status.to_string() } else { format!("{status}; its last output was:\n{tail}") }
}

/// Acts on a message of the zygote's. True when it was its first.
fn act(shared: &Arc<Shared>, message: Incoming) -> Result<bool, ipc::Error> {
    match ipc::parse(&message.bytes)? {
        FromChild::Ready { python, distributed, .. } => {
            shared.emit(Event::InterpreterReady { python, distributed });
            return Ok(true);
        }
        FromChild::Forked { child, pid } => {
            let fd = message.fds.into_iter().next().ok_or(ipc::Error::NoDescriptor { index: 0 })?;
            shared.child_forked(child, pid, PidFd::from_fd(fd));
        }
        FromChild::ForkFailed { child, text } => shared.child_ended(child, Cause::NotForked { text }, 0),
        FromChild::Exited { child, code, peak } => shared.child_ended(child, Cause::from_code(code), peak),
        _ => return Err(ipc::Error::Form { tag: None }),
    }
    Ok(false)
}

impl Shared {
    fn child_forked(&self, child: u64, pid: u32, process: PidFd) {
        if !self.service_forked(child, pid) {
            self.runner_forked(child, pid, process);
        }
    }

    fn child_ended(self: &Arc<Self>, child: u64, cause: Cause, peak: u64) {
        if !self.service_ended(child, &cause) {
            self.runner_ended(child, cause, peak);
        }
    }

    /// All that the zygote forked dies with it.
    fn zygote_lost(self: &Arc<Self>) {
        let children: Vec<u64> = self.state().runners.keys().copied().collect();
        for child in children {
            self.condemn(child, Cause::ZygoteLost);
            self.runner_ended(child, Cause::ZygoteLost, 0);
        }
        self.service_lost();
    }
}

/// Executes the interpreter through the stub; it takes requests at once.
fn launch(shared: &Arc<Shared>) -> Result<Launched, Error> {
    let sys = |source| Error::Sys { what: "connect the zygote", source };
    let io = |source| Error::System { what: "start the zygote", source };
    let (ours, theirs) = sys::socket_pair().map_err(sys)?;
    let (pipes, out, err) = slot::pipes()?;
    let config = &shared.config;
    let python = config.python.as_os_str();
    let mut command = sandbox::command(&config.stub, python, &["-c", BOOT].map(OsStr::new), theirs);
    command.envs(config.environment.iter().cloned()).stdout(Stdio::from(out)).stderr(Stdio::from(err));
    for secret in &config.secrets {
        command.env_remove(secret);
    }
    let nanny = shared.state().nanny.clone();
    for (name, value) in &nanny.variables {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    // The kernel ends the zygote when the thread that made it ends: so that thread must live as long.
    let (started, ended) = (std::sync::mpsc::channel(), oneshot::channel());
    let thread = std::thread::Builder::new().name("zygote".into()).stack_size(128 * 1024);
    let watch = move || match command.spawn() {
        Ok(mut child) => {
            drop(command);
            let _ = started.0.send(Ok(child.id()));
            let _ = ended.0.send(child.wait());
        }
        Err(error) => {
            let _ = started.0.send(Err(error));
        }
    };
    thread.spawn(watch).map_err(io)?;
    let gone = || std::io::Error::other("its thread ended");
    let pid = started.1.recv().unwrap_or_else(|_| Err(gone())).map_err(io)?;

    let link = Link::new(ours).map_err(sys)?;
    link.send(boot_message(shared, &nanny.path));
    let tail = Arc::<Mutex<Tail>>::default();
    for pipe in pipes {
        let tail = tail.clone();
        let whose = move |_: &Shared, line: &str| {
            tail.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            Some((Some(pid), None))
        };
        tokio::spawn(slot::log_output(shared.clone(), pipe, whose));
    }
    let inbox = Inbox::new(&link);
    let (stop, stopped) = oneshot::channel();
    let process = PidFd::open(pid).ok();
    shared.state().zygote.alive = Some(Alive { link, process, pid, stop: Some(stop) });
    Ok(Launched { inbox, ended: ended.1, stopped, tail })
}

/// The sources and what they need to know, as JSON behind a head like any message's.
fn boot_message(shared: &Shared, path: &[String]) -> Outgoing {
    let modules: Vec<HashMap<&str, &str>> = MODULES
        .iter()
        .map(|(name, file, source)| HashMap::from([("name", *name), ("file", file), ("source", source)]))
        .collect();
    let boot = serde_json::json!({
        "argv": shared.config.argv,
        "local_directory": shared.config.local_directory.to_string_lossy(),
        "path": path,
        "modules": modules,
    });
    let body = boot.to_string().into_bytes();
    let mut bytes = (body.len() as u64).to_le_bytes()[..HEAD].to_vec();
    bytes.extend_from_slice(&body);
    Outgoing { bytes, fds: Vec::new() }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn get(variables: &[(OsString, OsString)], name: &str) -> Vec<String> {
        let named = variables.iter().filter(|(n, _)| n == name);
        named.map(|(_, value)| value.to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn the_environment_is_a_nannys() {
        let configured = [("OMP_NUM_THREADS".to_owned(), "1".to_owned()), ("A".into(), "x".into())];
        let inherited = |name: &str| (name == "OMP_NUM_THREADS").then(|| "4".into());
        let variables = nanny_environment(&configured, inherited);
        assert_eq!(get(&variables, "OMP_NUM_THREADS"), ["4"]);
        assert_eq!(get(&variables, "A"), ["x"]);
        assert_eq!(get(&variables, "PYTHONHASHSEED"), ["6640"]);

        let configured = [("PYTHONHASHSEED".to_owned(), "1".to_owned())];
        assert_eq!(get(&nanny_environment(&configured, |_| None), "PYTHONHASHSEED"), ["1"]);
    }
}
