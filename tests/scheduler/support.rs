//! A real `dask scheduler`, and stock workers for it, as processes that end with the test.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use iqoqo_dask_worker::net::{self, Pool};
use iqoqo_dask_worker::proto::{Address, Value};
use tempfile::TempDir;
use tokio::time::{sleep, timeout};

/// How long anything here may take, on a machine that has much else to do.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The future's outcome, or a failed test.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match timeout(PATIENCE, future).await {
        Ok(outcome) => outcome,
        Err(_) => panic!("{what} took longer than {PATIENCE:?}"),
    }
}

/// A process that is killed, with its children, when the test is over.
pub struct Process(Child);

impl Process {
    pub fn dask(args: &[&str]) -> Self {
        let dask = root().join(".venv/bin/dask");
        let child = Command::new(dask)
            .args(args)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn();
        Process(child.expect(".venv/bin/dask exists: make it with the pinned test requirements"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let group = nix::unistd::Pid::from_raw(self.0.id() as i32);
        // it may have ended by itself
        let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
        let _ = self.0.wait();
    }
}

pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

/// A stock scheduler that answers Python expressions.
pub struct DaskScheduler {
    process: Option<Process>,
    directory: TempDir,
    address: Address,
    pool: Pool,
}

impl DaskScheduler {
    pub async fn start() -> Self {
        let directory = tempfile::tempdir().expect("a scratch directory can be made");
        let mut scheduler = DaskScheduler {
            process: None,
            address: Address::parse("tcp://127.0.0.1:0").expect("is an address"),
            pool: pool(),
            directory,
        };
        scheduler.launch().await;
        scheduler
    }

    /// Starts the process, at the port it had before if it had one.
    pub async fn launch(&mut self) {
        let file = self.file();
        let _ = std::fs::remove_file(&file);
        let port = self.address.port().to_string();
        let preload = root().join("tests/scheduler/evaluate.py");
        self.process = Some(Process::dask(&[
            "scheduler",
            "--host=127.0.0.1",
            "--port",
            &port,
            "--no-dashboard",
            "--dashboard-address=:0",
            "--preload",
            path(&preload),
            "--scheduler-file",
            path(&file),
        ]));
        let written = async {
            loop {
                let text = std::fs::read(&file).unwrap_or_default();
                if let Ok(json) = serde_json::from_slice::<serde_json::Value>(&text) {
                    break json["address"].as_str().and_then(|a| Address::parse(a).ok());
                }
                sleep(Duration::from_millis(20)).await;
            }
        };
        self.address = within("starting a scheduler", written).await.expect("the file has an address");
    }

    pub fn kill(&mut self) {
        self.process = None;
        self.pool.remove(&self.address);
    }

    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The `--scheduler-file` it writes.
    pub fn file(&self) -> PathBuf {
        self.directory.path().join("scheduler.json")
    }

    /// What a Python expression is, with the scheduler as `s`.
    pub async fn evaluate(&self, expression: &str) -> serde_json::Value {
        let request = Value::map([("op", "evaluate".into()), ("expression", expression.into())]);
        let answer = within(expression, self.pool.rpc(&self.address, &request)).await;
        let answer = answer.unwrap_or_else(|error| panic!("{expression}: {}", error.chain()));
        serde_json::from_str(answer.as_str().expect("the answer is text")).expect("the answer is JSON")
    }

    /// Waits until a Python expression is `value`.
    pub async fn becomes(&self, expression: &str, value: serde_json::Value) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = self.evaluate(expression).await;
            if now == value {
                return;
            }
            assert!(Instant::now() < deadline, "{expression} is {now}, not {value}");
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// What the scheduler tells everybody about a worker.
    pub async fn worker(&self, address: &Address) -> Value {
        let request = Value::map([("op", "identity".into()), ("n_workers", (-1).into())]);
        let mut answer =
            within("identity", self.pool.rpc(&self.address, &request)).await.expect("is answered");
        let mut workers = answer.take_field("workers").expect("has workers");
        workers.take_field(address.as_str()).unwrap_or_else(|| panic!("{address} is no worker"))
    }
}

pub fn pool() -> Pool {
    Pool::new(Arc::new(net::Config { connect_timeout: Duration::from_secs(10), ..net::Config::default() }))
}

fn path(path: &Path) -> &str {
    path.to_str().expect("paths of tests are text")
}
