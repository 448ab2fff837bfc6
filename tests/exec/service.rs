//! The service process.

use super::fixture::*;
use super::forge;

#[tokio::test]
async fn the_service_answers_comm_messages() {
    let fixture = Fixture::new(1);
    let run = "import pickle, cloudpickle\n\
        def g(a, dask_worker=None): return a + len(dask_worker.name or '')\n\
        message = {'op': 'run', 'function': cloudpickle.dumps(g), 'args': pickle.dumps((4,))}";
    let reply = fixture.pool.service_request(forge::dumps(run), Target::Worker).await.frames;
    assert_eq!(forge::loads(&reply, "message.get('result', message)"), "4");

    let nope = forge::dumps("message = {'op': 'nope'}");
    let reply = fixture.pool.service_request(nope, Target::Worker).await.frames;
    assert_eq!(forge::loads(&reply, "message"), "None");
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn the_service_serves_many_and_dies_without_harm() {
    let fixture = Fixture::new(1);
    let ask = |code: &str| {
        let run = format!(
            "import pickle, cloudpickle\n{code}\nmessage = {{'op': 'run', 'function': cloudpickle.dumps(g)}}"
        );
        let (pool, frames) = (fixture.pool.clone(), forge::dumps(&run));
        tokio::spawn(async move { pool.service_request(frames, Target::Worker).await.frames })
    };
    let slow = ask("import asyncio\nasync def g(): await asyncio.sleep(0.5); return 'slow'");
    let large = ask("def g(): return b'x' * 1_000_000");
    let fails = ask("def g(): raise OSError(5)");
    let fast = ask("def g(): return 'fast'").await.unwrap();
    assert!(!slow.is_finished());
    assert_eq!(forge::loads(&fast, "message['result']"), "'fast'");
    assert_eq!(forge::loads(&large.await.unwrap(), "len(message['result'])"), "1000000");
    assert_eq!(
        forge::loads(&fails.await.unwrap(), "message['status'], message['exception_text']"),
        "('error', 'OSError(5)')"
    );
    assert_eq!(forge::loads(&slow.await.unwrap(), "message['result']"), "'slow'");

    let dead = ask("import os\ndef g(): os._exit(4)").await.unwrap();
    let text = forge::loads(&dead, "message['status'], message['exception_text']");
    assert!(text.contains("uncaught-error") && text.contains("exited with code 4"), "{text}");
    let again = ask("def g(): return 'again'").await.unwrap();
    assert_eq!(forge::loads(&again, "message['result']"), "'again'");
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn scattered_objects_are_described() {
    let mut fixture = Fixture::new(1);
    let object = fixture.run("def f():\n  import numpy\n  return numpy.ones(100_000)").await.object;
    let bad = Object::new(object.kind(), "nonsense".into(), vec![], 0);
    let described = fixture.pool.describe(&[object, bad]).await.unwrap();
    let first = described[0].as_ref().unwrap();
    assert_eq!((first.nbytes, first.typename.as_str()), (800_000, "numpy.ndarray"));
    assert!(described[1].is_err());
    fixture.pool.shutdown().await;
}

/// A request that adds a plugin to worker or nanny, whose class is given as code.
fn add(op: &str, class: &str) -> Vec<bytes::Bytes> {
    forge::dumps(&format!(
        "import cloudpickle\nfrom distributed import NannyPlugin, WorkerPlugin\n{class}\n\
         message = {{'op': '{op}', 'plugin': cloudpickle.dumps(P()), 'name': 'p'}}"
    ))
}

const MARK: &str = "class P(WorkerPlugin):\n  def setup(self, worker):\n    worker.mark = 5";
const MARKED: &str = "def f():\n  from distributed import get_worker\n  w = get_worker()\n  \
    return len(w.plugins) * 100 + getattr(w, 'mark', 0)";

#[tokio::test]
async fn runners_of_today_and_tomorrow_have_the_plugins() {
    let mut fixture = Fixture::new(1);
    let none = fixture.run(MARKED).await.object;
    let reply = fixture.pool.service_request(add("plugin-add", MARK), Target::Worker).await;
    assert_eq!(forge::loads(&reply.frames, "message['status']"), "'OK'");
    let marked = fixture.run(MARKED).await.object;
    assert_ne!(none.frames()[0].bytes(), marked.frames()[0].bytes());

    fixture.pool.submit(job("dies", "def f():\n  import os\n  os._exit(1)"));
    // tried twice
    let mut deaths = 0;
    while deaths < 2 {
        deaths += u32::from(matches!(fixture.next().await, Event::RunnerDied { .. }));
    }
    let again = fixture.run(MARKED).await.object;
    assert_eq!(again.frames()[0].bytes(), marked.frames()[0].bytes());

    let remove = forge::dumps("message = {'op': 'plugin-remove', 'name': 'p'}");
    fixture.pool.service_request(remove, Target::Worker).await;
    let gone =
        fixture.run("def f():\n  from distributed import get_worker\n  return len(get_worker().plugins)");
    assert_eq!(
        gone.await.object.frames()[0].bytes(),
        fixture.run("def f(): return 0").await.object.frames()[0].bytes()
    );
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn a_service_process_that_died_has_its_plugins_again() {
    let fixture = Fixture::new(1);
    fixture.pool.service_request(add("plugin-add", MARK), Target::Worker).await;
    let run = |code: &str| {
        let run = format!(
            "import cloudpickle\n{code}\nmessage = {{'op': 'run', 'function': cloudpickle.dumps(g)}}"
        );
        let (pool, frames) = (fixture.pool.clone(), forge::dumps(&run));
        async move { pool.service_request(frames, Target::Worker).await.frames }
    };
    let dead = run("import os\ndef g(): os._exit(4)").await;
    assert!(forge::loads(&dead, "message['exception_text']").contains("exited with code 4"));
    let mark = run("def g(dask_worker): return dask_worker.mark").await;
    assert_eq!(forge::loads(&mark, "message['result']"), "5");
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn what_nanny_plugins_want_is_for_processes_to_come() {
    let fixture = Fixture::new(1);
    let class =
        "class P(NannyPlugin):\n  restart = True\n  def setup(self, nanny):\n    nanny.env['A'] = 'x'";
    let reply = fixture.pool.service_request(add("plugin_add", class), Target::Nanny).await;
    assert_eq!(reply.restart.as_deref(), Some("nanny-plugin-p-restart"));
    let nanny = fixture.pool.nanny();
    assert_eq!(nanny.variables, [("A".into(), Some("x".into()))]);
    assert_eq!(nanny.plugins.len(), 1);
    fixture.pool.shutdown_worker().await;

    let mut fixture = Fixture::with(Config { nanny, ..config(1) });
    let seen = fixture.run("def f():\n  import os\n  return os.environ['A']").await.object;
    assert_eq!(seen.frames()[0].bytes(), fixture.run("def f(): return 'x'").await.object.frames()[0].bytes());
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn calls_of_runners_come_back_with_what_was_raised() {
    let mut fixture = Fixture::new(1);
    let call =
        "def f():\n  from distributed import get_worker\n  get_worker().call('shuffle_barrier', 'x', (1,))";
    fixture.pool.submit(job("x", call));
    let failed = fixture.failed().await;
    assert!(
        failed.exception_text.contains("does not have a P2P shuffle plugin"),
        "{}",
        failed.exception_text
    );
    fixture.pool.shutdown().await;
}
