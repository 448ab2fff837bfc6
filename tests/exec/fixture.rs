//! A pool under test, its jobs and its events.

use std::path::PathBuf;
pub use std::sync::Arc;
pub use std::time::Duration;

pub use iqoqo_dask_worker::exec::{
    Cause, Config, Event, Failed, Finished, Job, Pool, ProcessKind, Recall, Target, WorkerInfo,
};
pub use iqoqo_dask_worker::proto::{Key, RunId, Value};
pub use iqoqo_dask_worker::store::{Arena, Object};
pub use tokio::sync::mpsc;

use super::forge;

pub const TIMEOUT: Duration = Duration::from_secs(60);

/// A pool and what it says.
pub struct Fixture {
    pub pool: Pool,
    pub events: mpsc::UnboundedReceiver<Event>,
    pub output: Vec<(Option<Key>, String)>,
}

pub fn config(slots: usize) -> Config {
    Config {
        python: forge::python().into(),
        stub: PathBuf::from(env!("CARGO_BIN_EXE_iqoqo-dask-worker")),
        slots,
        environment: iqoqo_dask_worker::exec::nanny_environment(
            &[("OPENBLAS_NUM_THREADS".into(), "1".into()), ("OMP_NUM_THREADS".into(), "1".into())],
            |name| std::env::var_os(name),
        ),
        ..Config::default()
    }
}

impl Fixture {
    pub fn new(slots: usize) -> Self {
        Self::with(config(slots))
    }

    pub fn with(config: Config) -> Self {
        let (sender, events) = mpsc::unbounded_channel();
        Fixture { pool: Pool::start(config, Arena::new(), sender).unwrap(), events, output: Vec::new() }
    }

    /// The next event that is not output.
    pub async fn next(&mut self) -> Event {
        loop {
            let event = tokio::time::timeout(TIMEOUT, self.events.recv()).await;
            match event.expect("no event in time").expect("the pool is gone") {
                Event::Output(line) => {
                    eprintln!("{:?} {:?} {:?}: {}", line.pid, line.stream, line.key, line.line);
                    self.output.push((line.key, line.line));
                }
                Event::InterpreterReady { .. } => {}
                event => return event,
            }
        }
    }

    pub async fn finished(&mut self) -> Finished {
        match self.next().await {
            Event::Finished(finished) => *finished,
            other => panic!("{other:?}"),
        }
    }

    pub async fn failed(&mut self) -> Failed {
        match self.next().await {
            Event::Failed(failed) => *failed,
            other => panic!("{other:?}"),
        }
    }

    /// Waits until a task has written a line.
    pub async fn wait_for_output(&mut self, text: &str) {
        loop {
            let event = tokio::time::timeout(TIMEOUT, self.events.recv()).await.unwrap().unwrap();
            match event {
                Event::Output(line) if line.line == text => return,
                Event::Output(_) | Event::InterpreterReady { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }

    pub fn process(&self, kind: ProcessKind) -> u32 {
        self.pool.processes().iter().find(|process| process.kind == kind).unwrap().pid
    }

    pub fn runner(&self) -> u32 {
        self.process(ProcessKind::Runner)
    }

    pub async fn run(&mut self, code: &str) -> Finished {
        self.pool.submit(job("x", code));
        self.finished().await
    }
}

/// A place in a task where it waits for the test.
pub struct Gate {
    pub listener: tokio::net::UnixListener,
    pub open: std::sync::Mutex<Option<tokio::net::UnixStream>>,
    pub directory: tempfile::TempDir,
}

impl Gate {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = tokio::net::UnixListener::bind(directory.path().join("gate")).unwrap();
        Gate { listener, open: Default::default(), directory }
    }

    /// A task that waits at the gate, and then does `then`.
    pub fn code(&self, then: &str) -> String {
        let path = self.directory.path().join("gate");
        format!(
            "def f():\n  import socket\n  s = socket.socket(socket.AF_UNIX)\n  s.connect({path:?})\n  \
             s.recv(1)\n  {then}"
        )
    }

    pub async fn entered(&self) {
        let (stream, _) = tokio::time::timeout(TIMEOUT, self.listener.accept()).await.unwrap().unwrap();
        *self.open.lock().unwrap() = Some(stream);
    }

    pub fn open(&self) {
        self.open.lock().unwrap().take();
    }
}

pub fn job(key: &str, code: &str) -> Job {
    job_with(key, code, Vec::new())
}

pub fn job_with(key: &str, code: &str, inputs: Vec<(Key, Object)>) -> Job {
    Job {
        key: key.into(),
        run_id: RunId(7),
        run_spec: forge::task(code),
        inputs,
        live: Vec::new(),
        annotations: Arc::new(Value::Map(Vec::new())),
        brief: false,
        actor: false,
    }
}
