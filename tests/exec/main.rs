//! The pool against a real interpreter: jobs, deaths, recalls, the service process.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod forge;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use iqoqo_dask_worker::exec::{Config, Event, Failed, Finished, Job, Pool, Target};
use iqoqo_dask_worker::proto::{Key, RunId, Value};
use iqoqo_dask_worker::store::Object;
use tokio::sync::mpsc;

const TIMEOUT: Duration = Duration::from_secs(60);

/// A pool and what it says.
struct Fixture {
    pool: Pool,
    events: mpsc::UnboundedReceiver<Event>,
    output: Vec<(Option<Key>, String)>,
}

fn config(slots: usize) -> Config {
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
    fn new(slots: usize) -> Self {
        Self::with(config(slots))
    }

    fn with(config: Config) -> Self {
        let (sender, events) = mpsc::unbounded_channel();
        Fixture { pool: Pool::start(config, sender).unwrap(), events, output: Vec::new() }
    }

    /// The next event that is not output.
    async fn next(&mut self) -> Event {
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

    async fn finished(&mut self) -> Finished {
        match self.next().await {
            Event::Finished(finished) => *finished,
            other => panic!("{other:?}"),
        }
    }

    async fn failed(&mut self) -> Failed {
        match self.next().await {
            Event::Failed(failed) => *failed,
            other => panic!("{other:?}"),
        }
    }

    async fn run(&mut self, code: &str) -> Finished {
        self.pool.submit(job("x", code));
        self.finished().await
    }
}

fn job(key: &str, code: &str) -> Job {
    job_with(key, code, Vec::new())
}

fn job_with(key: &str, code: &str, inputs: Vec<(Key, Object)>) -> Job {
    Job {
        key: key.into(),
        run_id: RunId(7),
        run_spec: forge::task(code),
        inputs,
        annotations: Arc::new(Value::Map(Vec::new())),
    }
}

#[tokio::test]
async fn a_task_runs() {
    let mut fixture = Fixture::new(1);
    let done = fixture.run("def f(a, b=1): return a + b\nargs = (2,)").await;
    assert_eq!((done.key, done.run_id), ("x".into(), RunId(7)));
    assert_eq!(forge::result(&done.object.to_payload(), "x"), "3");
    assert_eq!((&*done.typename, done.object.nbytes()), ("int", 28));
    assert!(done.start <= done.stop && done.stop - done.start < 1.0);
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn an_exception_arrives_as_from_dasks_worker() {
    let mut fixture = Fixture::new(1);
    fixture.pool.submit(job("x", "def f(a):\n  def g(): raise KeyError(a)\n  g()\nargs = ('why',)"));
    let failed = fixture.failed().await;
    assert_eq!(&*failed.exception_text, "KeyError('why')");
    assert_eq!(forge::raised(&failed.exception, "(type(x), x.args)"), "(<class 'KeyError'>, ('why',))");
    // the frames of Dask and ours are cut off, the user's are there
    let lines: Vec<&str> = failed.traceback_text.lines().filter(|line| line.contains("File")).collect();
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(lines[0].ends_with("in f") && lines[1].ends_with("in g"), "{lines:?}");
    let traceback = failed.traceback.unwrap();
    assert_eq!(forge::raised(&traceback, "x.tb_frame.f_code.co_name"), "'f'");
    assert!(failed.start.unwrap() <= failed.stop.unwrap());
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn a_crash_costs_its_task_two_attempts_and_nobody_else_anything() {
    let mut fixture = Fixture::new(1);
    fixture
        .pool
        .submit(job("x", "def f():\n  import os, sys\n  print('last words', file=sys.stderr)\n  os.abort()"));
    let mut pids = Vec::new();
    for _ in 0..2 {
        match fixture.next().await {
            Event::RunnerDied { pid, key, .. } => {
                assert_eq!(key, Some("x".into()));
                pids.push(pid);
            }
            Event::Failed(failed) => {
                for part in ["'x'", "signal 6 (SIGABRT)", "attempt 2", "last words"] {
                    assert!(failed.exception_text.contains(part), "{}", failed.exception_text);
                }
                assert!(forge::raised(&failed.exception, "type(x)").contains("RuntimeError"));
                pids.push(None);
            }
            other => panic!("{other:?}"),
        }
    }
    let Event::RunnerDied { .. } = fixture.next().await else { panic!("a second death") };
    assert_eq!(forge::result(&fixture.run("def f(): return 5").await.object.to_payload(), "x"), "5");
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn large_objects_pass_through_shared_memory() {
    let mut fixture = Fixture::new(2);
    let made = fixture.run("def f():\n  import numpy\n  return numpy.arange(1_000_000)").await;
    assert_eq!(made.object.shared_bytes(), 8_000_000);
    assert_eq!(&*made.typename, "numpy.ndarray");
    let code = "def f(a):\n  a[0] = 5\n  return int(a.sum()), a.flags.writeable\nargs = (TaskRef('in'),)";
    for _ in 0..2 {
        // written to by the task, yet the same for the next
        fixture.pool.submit(job_with("y", code, vec![("in".into(), made.object.clone())]));
        let done = fixture.finished().await;
        assert_eq!(forge::result(&done.object.to_payload(), "x"), "(499999500005, True)");
    }
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn the_service_answers_comm_messages() {
    let fixture = Fixture::new(1);
    let run = "import pickle, cloudpickle\n\
        def g(a, dask_worker=None): return a + len(dask_worker.name or '')\n\
        message = {'op': 'run', 'function': cloudpickle.dumps(g), 'args': pickle.dumps((4,))}";
    let reply = fixture.pool.service_request(forge::dumps(run), Target::Worker).await;
    assert_eq!(forge::loads(&reply, "message.get('result', message)"), "4");

    let reply = fixture.pool.service_request(forge::dumps("message = {'op': 'nope'}"), Target::Worker).await;
    assert_eq!(forge::loads(&reply, "message"), "None");
    fixture.pool.shutdown().await;
}
