//! The daemon from start to end as its owner sees it: what it writes and removes, when it is ready, how it leaves.
//!
//! A stock `dask scheduler` runs beside it. What tasks do is tested elsewhere.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long anything here may take.
const PATIENCE: Duration = Duration::from_secs(60);

fn venv(program: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin").join(program)
}

/// A process whose standard error is read; killed when dropped.
struct Process {
    child: Child,
    lines: Receiver<String>,
    log: String,
}

impl Process {
    fn start(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (send, lines) = channel();
        std::thread::spawn(move || stderr.lines().map_while(Result::ok).try_for_each(|line| send.send(line)));
        Process { child, lines, log: String::new() }
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// Waits for a line with this text.
    #[track_caller]
    fn wait_for(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    self.log.push_str(&line);
                    self.log.push('\n');
                    if line.contains(text) {
                        return line;
                    }
                }
                Err(_) => panic!("no {text:?} in:\n{}", self.log),
            }
        }
    }

    /// Waits for the end, which closes the log.
    fn end(mut self) -> (ExitStatus, String) {
        let deadline = Instant::now() + PATIENCE;
        while let Ok(line) = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            self.log.push_str(&line);
            self.log.push('\n');
        }
        assert!(Instant::now() < deadline, "still running:\n{}", self.log);
        (self.child.wait().unwrap(), std::mem::take(&mut self.log))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // it may have ended
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A scheduler, a folder of its own, and workers that find it by its file.
struct Site {
    dir: tempfile::TempDir,
    _scheduler: Process,
}

impl Site {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("scheduler.json");
        let mut scheduler = Process::start(
            Command::new(venv("dask"))
                .args([
                    "scheduler",
                    "--host",
                    "127.0.0.1",
                    "--port",
                    "0",
                    "--no-dashboard",
                    "--scheduler-file",
                ])
                .arg(&file)
                .stdout(Stdio::null()),
        );
        scheduler.wait_for("Scheduler at:");
        Site { dir, _scheduler: scheduler }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn worker(&self, options: &[&str]) -> Command {
        let mut command = worker(self.dir.path(), options);
        command.arg("--scheduler-file").arg(self.path("scheduler.json"));
        command
    }
}

fn worker(dir: &Path, options: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_iqoqo-dask-worker"));
    command
        .args(options)
        .arg("--python")
        .arg(venv("python"))
        .arg("--local-directory")
        .arg(dir.join("scratch"));
    command.env_remove("NOTIFY_SOCKET");
    command
}

#[test]
fn a_signal_ends_it_gracefully_and_nothing_stays_behind() {
    let site = Site::new();
    let pid_file = site.path("worker.pid");
    let options = ["--nthreads", "2", "--name", "boot", "--pid-file", pid_file.to_str().unwrap()];
    let mut worker = Process::start(&mut site.worker(&options));
    worker.wait_for("Start worker at:");
    worker.wait_for("Registered to:");
    assert_eq!(std::fs::read_to_string(&pid_file).unwrap(), worker.pid().to_string());
    let scratch = site.path("scratch/dask-scratch-space");
    let work_dirs = || {
        let names = std::fs::read_dir(&scratch).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter(|name| name.to_str().unwrap().starts_with("worker-")).count()
    };
    assert_eq!(work_dirs(), 2, "a directory and its lock");
    worker.signal(Signal::SIGTERM);
    let (status, log) = worker.end();
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(log.contains("End worker"), "{log}");
    assert!(!pid_file.exists());
    assert_eq!(work_dirs(), 0);
}

#[test]
fn several_workers_are_numbered_and_leave_together() {
    let site = Site::new();
    let mut worker =
        Process::start(&mut site.worker(&["--nworkers", "2", "--nthreads", "1", "--name", "many"]));
    worker.wait_for("Registered to:");
    worker.wait_for("Registered to:");
    assert!(worker.log.contains("many-0") && worker.log.contains("many-1"), "{}", worker.log);
    worker.signal(Signal::SIGINT);
    assert_eq!(worker.end().0.code(), Some(0));
}

#[test]
fn a_service_manager_is_told() {
    let site = Site::new();
    let socket = site.path("notify");
    let manager = UnixDatagram::bind(&socket).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut told = String::new();
    let mut wait_for = |text: &str| {
        let mut buffer = [0; 4096];
        while !told.contains(text) {
            let length =
                manager.recv(&mut buffer).unwrap_or_else(|error| panic!("no {text} in {told}: {error}"));
            told.push_str(std::str::from_utf8(&buffer[..length]).unwrap());
        }
    };
    let mut command = site.worker(&["--nthreads", "1"]);
    command.env("NOTIFY_SOCKET", &socket).env("WATCHDOG_USEC", "200000");
    let mut worker = Process::start(&mut command);
    wait_for("WATCHDOG=1");
    wait_for("READY=1");
    worker.wait_for("Registered to:");
    worker.signal(Signal::SIGTERM);
    wait_for("STOPPING=1");
    // nobody reads any more: a full socket must not hold up the worker's last words
    drop(manager);
    assert_eq!(worker.end().0.code(), Some(0));
}

#[test]
fn a_signal_ends_the_wait_for_a_scheduler() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("later.json");
    let options = ["--scheduler-file", missing.to_str().unwrap()];
    let mut waiting = Process::start(&mut worker(dir.path(), &options));
    waiting.wait_for("Waiting for scheduler file");
    waiting.signal(Signal::SIGTERM);
    let (status, log) = waiting.end();
    assert_eq!(status.code(), Some(0), "{log}");
}

#[test]
fn the_death_timeout_has_an_exit_code_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let (status, log) =
        Process::start(&mut worker(dir.path(), &["tcp://127.0.0.1:9", "--death-timeout", "300ms"])).end();
    assert_eq!(status.code(), Some(69), "{log}");
    assert!(log.contains("death timeout"), "{log}");
}

#[test]
fn what_cannot_be_created_is_said_before_a_port_is_bound() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let run = |options: &[&str]| {
        let mut command = worker(dir.path(), &["tcp://127.0.0.1:9"]);
        Process::start(command.args(options)).end()
    };
    let (status, log) = run(&["--local-directory", file.to_str().unwrap()]);
    assert_eq!(status.code(), Some(73), "{log}");
    assert!(log.contains("--local-directory") && !log.contains("Start worker"), "{log}");
    let (status, log) = run(&["--pid-file", file.join("x").to_str().unwrap()]);
    assert_eq!(status.code(), Some(73), "{log}");
    assert!(log.contains("pid file") && !log.contains("Start worker"), "{log}");
}

#[test]
fn a_taken_port_names_itself() {
    let dir = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let options = ["tcp://127.0.0.1:9", "--host", "127.0.0.1", "--worker-port", &port];
    let (status, log) = Process::start(&mut worker(dir.path(), &options)).end();
    assert_eq!(status.code(), Some(71), "{log}");
    assert!(log.contains(&port), "{log}");
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let site = Site::new();
    let mut worker = Process::start(&mut site.worker(&["--nthreads", "1"]));
    worker.wait_for("Registered to:");
    // a client keeps the only slot busy with a task that takes no notice, so that leaving gracefully takes long
    let mut client = Command::new(venv("python"))
        .args(["-c", BUSY])
        .arg(site.path("scheduler.json"))
        .stdout(Stdio::piped())
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0; 1];
    client.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    worker.signal(Signal::SIGTERM);
    worker.wait_for("closing gracefully");
    worker.signal(Signal::SIGINT);
    let pid = worker.pid();
    let (status, log) = worker.end();
    assert_eq!((status.code(), status.signal()), (Some(130), None), "{log}");
    assert_eq!(kill(pid, None), Err(nix::errno::Errno::ESRCH));
    let _ = client.kill();
    let _ = client.wait();
}

/// Says so once its task, which would take minutes, has begun.
const BUSY: &str = r#"
import pathlib, sys, tempfile, time
from distributed import Client
def busy(path):
    pathlib.Path(path).touch()
    time.sleep(300)
client = Client(scheduler_file=sys.argv[1])
path = pathlib.Path(tempfile.mkdtemp(), "begun")
future = client.submit(busy, str(path))
while not path.exists():
    time.sleep(0.01)
print(1, end="", flush=True)
sys.stdin.read()
"#;
