//! Registration, heartbeats, requests and their ends against a real `dask scheduler`.

#![allow(clippy::unwrap_used)]

#[path = "scheduler/support.rs"]
mod support;

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use iqoqo_dask_worker::net::{ANY_PORT, Connection, Listener};
use iqoqo_dask_worker::proto::{Address, Key, Status, StreamMessage, Value};
use iqoqo_dask_worker::scheduler::{
    Attempt, Bandwidth, Beat, Config, Digests, Error, Identity, Incoming, Interpreter, Location, Lost,
    Metrics, MonitorConfig, Name, Scheduler, Session, SystemMonitor, Transfers, log_event, status_change,
};
use iqoqo_dask_worker::telemetry;
use serde_json::json;
use support::{DaskScheduler, Process, pool, root, within};
use tokio::time::timeout;

/// No port of a worker's is listened on here: the scheduler never connects to one.
fn worker_address(n: u16) -> Address {
    Address::parse(&format!("tcp://127.0.0.1:{n}")).unwrap()
}

fn identity(n: u16, name: &str) -> Identity {
    static VERSIONS: OnceLock<Value> = OnceLock::new();
    let probe = || Interpreter::probe(&root().join(".venv/bin/python")).unwrap().versions(&[]);
    Identity {
        address: worker_address(n),
        name: Name::parse(name),
        nthreads: 3,
        memory_limit: Some(4 << 30),
        resources: vec![("GPU".into(), 2.0)],
        local_directory: "/tmp/nowhere".into(),
        services: vec![("dashboard".into(), 8790)],
        nanny: Some(worker_address(n + 1)),
        versions: VERSIONS.get_or_init(probe).clone(),
        server_id: Identity::new_server_id(),
    }
}

fn metrics() -> Metrics {
    Metrics {
        task_counts: vec![("memory".into(), 2)],
        bandwidth: Bandwidth::new(100e6),
        digests: Digests::default(),
        managed_bytes: 5,
        spilled_memory: 0,
        spilled_disk: 0,
        transfer: Transfers::default(),
        event_loop_interval: 0.02,
        system: SystemMonitor::new(&MonitorConfig::default()).nested(),
        extra: vec![("ours".into(), 1.into()), ("cpu".into(), "does not win".into())],
    }
}

fn beat() -> Beat {
    Beat { metrics: metrics(), executing: Vec::new(), extensions: Vec::new() }
}

fn link(config: Config) -> Scheduler {
    Scheduler::new(config, pool(), telemetry::Metrics::default())
}

fn link_to(scheduler: &DaskScheduler) -> Scheduler {
    let config = Config::new(Location::Address(scheduler.address().clone()));
    link(Config { heartbeat_interval: Duration::from_millis(50), ..config })
}

async fn register(link: &Scheduler, identity: &Identity, attempt: Attempt) -> Result<Session, Error> {
    within("registering", link.register(identity, &metrics(), attempt)).await
}

/// Drives a session until something that is not a heartbeat comes, or `pick` takes what did.
async fn until<T>(session: &mut Session, what: &str, mut pick: impl FnMut(Incoming) -> Option<T>) -> T {
    let waiting = async {
        loop {
            match session.next().await {
                Incoming::Heartbeat(answer) => drop(answer.send(beat())),
                other => {
                    if let Some(found) = pick(other) {
                        return found;
                    }
                }
            }
        }
    };
    within(what, waiting).await
}

async fn lost(session: &mut Session) -> Lost {
    until(session, "losing the session", |incoming| match incoming {
        Incoming::Lost(lost) => Some(lost),
        _ => None,
    })
    .await
}

/// Drives a session while something else happens.
async fn meanwhile<T>(session: &mut Session, work: impl Future<Output = T>) -> T {
    tokio::select! {
        done = work => done,
        lost = lost(session) => panic!("the session ended: {lost}"),
    }
}

/// Where every value of a metrics dict lies and what type it has; keys that depend on the work done are left out.
fn shape(value: &Value, at: &str, shape_of: &mut BTreeMap<String, &'static str>) {
    let kind = match value {
        Value::Int(_) => "int",
        Value::Float(_) => "float",
        Value::Str(_) => "str",
        Value::Map(items) => {
            let varies = ["digests_total_since_heartbeat", "task_counts", "workers", "types"];
            if !varies.iter().any(|name| at.ends_with(name)) {
                items.iter().for_each(|(k, v)| shape(v, &format!("{at}.{}", k.as_str().unwrap()), shape_of));
            }
            "dict"
        }
        other => panic!("{at} is {other:?}"),
    };
    shape_of.insert(at.to_owned(), kind);
}

#[tokio::test]
async fn metrics_and_identity_have_the_shape_of_a_stock_workers() {
    let scheduler = DaskScheduler::start().await;
    let _stock = Process::dask(&[
        "worker",
        scheduler.address().as_str(),
        "--name=stock",
        "--no-nanny",
        "--nthreads=1",
        "--no-dashboard",
    ]);
    let link = link_to(&scheduler);
    let mut session = register(&link, &identity(41, "ours"), Attempt::First).await.unwrap();
    let work = scheduler.becomes("sorted(map(str, s.aliases))", json!(["ours", "stock"]));
    meanwhile(&mut session, work).await;
    let stock = scheduler.evaluate("s.aliases['stock']").await;
    let stock = scheduler.worker(&Address::parse(stock.as_str().unwrap()).unwrap()).await;
    let ours = scheduler.worker(&worker_address(41)).await;
    let names = |v: &Value| -> Vec<String> {
        v.as_map().unwrap().iter().map(|(k, _)| k.as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(&ours), names(&stock));

    let shapes = [&ours, &stock].map(|worker| {
        let mut found = BTreeMap::new();
        shape(worker.field("metrics").unwrap(), "", &mut found);
        found
    });
    let [mut ours, mut stock] = shapes;
    assert_eq!(ours.remove(".ours"), Some("int"));
    // an int in Dask until the first transfer, a float from then on
    assert_eq!(
        (ours.remove(".bandwidth.total"), stock.remove(".bandwidth.total")),
        (Some("float"), Some("int"))
    );
    assert_eq!(ours, stock);
}

#[tokio::test]
async fn registers_beats_and_leaves() {
    let scheduler = DaskScheduler::start().await;
    let link = link_to(&scheduler);
    let identity = identity(51, "7");
    let mut session = register(&link, &identity, Attempt::First).await.unwrap();
    assert_eq!(session.scheduler(), scheduler.address());
    let me = "s.workers['tcp://127.0.0.1:51']";
    let facts = format!(
        "[{me}.name, {me}.nthreads, {me}.memory_limit, {me}.resources, {me}.services, {me}.nanny, {me}.server_id]"
    );
    let facts = meanwhile(&mut session, scheduler.evaluate(&facts)).await;
    let expected = json!([7, 3, 4_u64 << 30, {"GPU": 2.0}, {"dashboard": 8790}, "tcp://127.0.0.1:52", &*identity.server_id]);
    assert_eq!(facts, expected);
    assert_eq!(
        scheduler
            .evaluate(&format!(
                "{me}.versions['packages'] == __import__('distributed').versions.get_versions()['packages']"
            ))
            .await,
        json!(true)
    );

    assert_eq!(scheduler.evaluate(&format!("{me}.status.name")).await, json!("init"));
    session.sender().send(status_change(Status::Running, "test-1"));
    let status = format!("{me}.status.name");
    meanwhile(&mut session, scheduler.becomes(&status, json!("running"))).await;
    session.sender().send(log_event("a-topic", Value::map([("n", 1.into())])));
    let logged = scheduler.becomes("[e[1]['n'] for e in s.get_events('a-topic')]", json!([1]));
    meanwhile(&mut session, logged).await;

    let seen = scheduler.evaluate(&format!("{me}.last_seen")).await;
    let later = format!("{me}.last_seen > {seen} + 0.6");
    meanwhile(&mut session, scheduler.becomes(&later, json!(true))).await;
    assert!(link.clock().delay().abs() < 5.0 && link.clock().latency() > 0.0);

    session.close(Duration::from_secs(10)).await;
    scheduler.becomes("len(s.workers)", json!(0)).await;
}

#[tokio::test]
async fn what_a_beat_tells_arrives() {
    let scheduler = DaskScheduler::start().await;
    let link = link_to(&scheduler);
    let mut session = register(&link, &identity(61, "w"), Attempt::First).await.unwrap();
    let made = "s.extensions['spans'].spans.__setitem__('span-1', __import__('distributed').spans.Span(\
                name=('t',), id_='span-1', parent=None, total_nthreads_history=s.total_nthreads_history))";
    let _ = scheduler.evaluate(made).await;
    let mut told = beat();
    let id: Arc<str> = "span-1".into();
    told.metrics.digests.add_in_span(["execute", "inc", "thread-cpu", "seconds"], Some(&id), 2.5);
    told.metrics.digests.add_in_span(["execute", "inc", "thread-cpu", "seconds"], None, 0.5);
    told.metrics.digests.add(["get-data", "memory-read", "bytes"], 10.0);
    told.metrics.bandwidth.observe("tcp://127.0.0.1:99", Some("bytes"), 50_000_000, 0.5);
    told.executing.push((Key::Str("x".into()), 1.5));
    let mut told = Some(told);
    let first = async {
        while told.is_some() {
            if let Incoming::Heartbeat(answer) = session.next().await {
                answer.send(told.take().unwrap()).unwrap();
            }
        }
    };
    within("the first heartbeat", first).await;
    let total = "s.cumulative_worker_metrics.get(('execute', 'inc', 'thread-cpu', 'seconds'))";
    meanwhile(&mut session, scheduler.becomes(total, json!(3.0))).await;
    let by_span = "dict((repr(k), v) for k, v in s.extensions['spans'].spans['span-1']._cumulative_worker_metrics.items())";
    let by_span = meanwhile(&mut session, scheduler.evaluate(by_span)).await;
    assert_eq!(by_span, json!({"('execute', 'inc', 'thread-cpu', 'seconds')": 2.5}));
    let read = "s.cumulative_worker_metrics[('get-data', 'memory-read', 'bytes')]";
    assert_eq!(scheduler.evaluate(read).await, json!(10));
    let bandwidth = "s.bandwidth_workers[('tcp://127.0.0.1:61', 'tcp://127.0.0.1:99')]";
    assert_eq!(scheduler.evaluate(bandwidth).await, json!(100e6));
    assert_eq!(scheduler.evaluate("s.bandwidth_types['bytes']").await, json!(100e6));
}

#[tokio::test]
async fn a_scheduler_that_dies_is_noticed_and_its_successor_taken() {
    let mut scheduler = DaskScheduler::start().await;
    let link = link_to(&scheduler);
    let identity = identity(71, "w");
    let mut session = register(&link, &identity, Attempt::First).await.unwrap();
    scheduler.kill();
    assert!(matches!(lost(&mut session).await, Lost::Connection(_)));
    assert!(matches!(session.next().await, Incoming::Lost(Lost::Ended)));
    session.sender().send(status_change(Status::Running, "to nobody"));

    let again = tokio::spawn({
        let (link, identity) = (link.clone(), identity.clone());
        async move { register(&link, &identity, Attempt::Again).await }
    });
    scheduler.launch().await;
    let mut session = within("registering again", again).await.unwrap().unwrap();
    let known = scheduler.becomes("list(s.workers)", json!(["tcp://127.0.0.1:71"]));
    meanwhile(&mut session, known).await;
}

#[tokio::test]
async fn names_and_addresses_that_are_taken() {
    let scheduler = DaskScheduler::start().await;
    let link = link_to(&scheduler);
    let mut first = register(&link, &identity(81, "w"), Attempt::First).await.unwrap();
    let (by_name, by_address) = (identity(83, "w"), identity(81, "other"));
    let same_name = register(&link, &by_name, Attempt::First);
    let same_name = meanwhile(&mut first, same_name).await.err().unwrap();
    assert!(matches!(same_name, Error::NameTaken { .. }), "{same_name}");
    assert!(same_name.to_string().contains("name taken, w"), "{same_name}");
    let same_address = register(&link, &by_address, Attempt::First);
    let same_address = meanwhile(&mut first, same_address).await.err().unwrap();
    assert!(matches!(same_address, Error::NotAccepted { .. }), "{same_address}");

    // after a loss that only we know of, both are waited for
    for again in [by_name, identity(83, "other")] {
        let link = link.clone();
        let mut waiting = tokio::spawn(async move { register(&link, &again, Attempt::Again).await });
        let still = timeout(Duration::from_secs(1), &mut waiting);
        assert!(meanwhile(&mut first, still).await.is_err(), "registered beside the one that is there");
        drop(first);
        first = within("registering again", waiting).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn told_to_close_and_forgotten() {
    let scheduler = DaskScheduler::start().await;
    let link = link_to(&scheduler);
    let mut session = register(&link, &identity(91, "w"), Attempt::First).await.unwrap();
    let _ = scheduler.evaluate("s.remove_worker('tcp://127.0.0.1:91', stimulus_id='test')").await;
    let reason = until(&mut session, "being told to close", |incoming| match incoming {
        Incoming::Messages(stimuli) => stimuli.into_iter().find_map(|stimulus| match stimulus.message {
            StreamMessage::Close { reason } => Some(reason),
            _ => None,
        }),
        Incoming::Lost(lost) => panic!("lost without a word: {lost}"),
        Incoming::Heartbeat(_) => None,
    });
    assert_eq!(reason.await, "scheduler-remove-worker");
    drop(session);

    let mut session = register(&link, &identity(93, "v"), Attempt::First).await.unwrap();
    let _ =
        scheduler.evaluate("s.remove_worker('tcp://127.0.0.1:93', stimulus_id='test', close=False)").await;
    assert!(matches!(lost(&mut session).await, Lost::Unaware));
}

#[tokio::test]
async fn a_scheduler_file_that_comes_late() {
    let mut scheduler = DaskScheduler::start().await;
    scheduler.kill();
    std::fs::write(scheduler.file(), "{\"address\": \"tcp://127.").unwrap();
    let link = link(Config::new(Location::File(scheduler.file())));
    let registering = tokio::spawn({
        let link = link.clone();
        async move { register(&link, &identity(101, "w"), Attempt::First).await }
    });
    scheduler.launch().await;
    let session = within("registering", registering).await.unwrap().unwrap();
    assert_eq!(session.scheduler(), scheduler.address());
    assert_eq!(link.address().as_ref(), Some(scheduler.address()));
}

#[tokio::test]
async fn nobody_there_until_the_death_timeout() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    for location in
        [Location::Address(worker_address(free)), Location::File("/nonexistent/scheduler.json".into())]
    {
        let config = Config { death_timeout: Some(Duration::from_millis(300)), ..Config::new(location) };
        let error = register(&link(config), &identity(111, "w"), Attempt::First).await.err().unwrap();
        assert!(matches!(error, Error::DeathTimeout { .. }), "{error}");
    }
    let tls = Config::new(Location::Address(Address::parse("tls://127.0.0.1:1").unwrap()));
    let error = register(&link(tls), &identity(111, "w"), Attempt::First).await.err().unwrap();
    assert!(matches!(error, Error::Net { .. }), "{error}");
}

#[tokio::test]
async fn requests_and_plugins() {
    let scheduler = DaskScheduler::start().await;
    let link = link_to(&scheduler);
    assert!(matches!(link.who_has(&[]).await, Err(Error::Unknown)));
    let _ = scheduler
        .evaluate("[s.worker_plugins.__setitem__('a', b'pickled'), s.nanny_plugins.__setitem__('b', b'too')]")
        .await;
    let nanny = within("register_nanny", link.register_nanny(&worker_address(122))).await.unwrap();
    assert_eq!(nanny.plugins, [("b".into(), Value::Bytes("too".into()))]);
    assert_eq!(scheduler.evaluate("list(s._starting_nannies)").await, json!(["tcp://127.0.0.1:122"]));
    nanny.finish(true).await.unwrap();
    scheduler.becomes("len(s._starting_nannies)", json!(0)).await;

    let worker = identity(121, "w");
    let mut session = register(&link, &worker, Attempt::First).await.unwrap();
    // a stock scheduler has one of its own for shuffles
    let plugins = session.take_plugins();
    assert_eq!(plugins.last(), Some(&("a".into(), Value::Bytes("pickled".into()))));
    assert!(plugins.iter().any(|(name, _)| name.as_str() == Some("shuffle")), "{plugins:?}");
    assert!(session.take_plugins().is_empty());
    let key = Key::Tuple([Key::Str("x".into()), Key::Int(1)].into());
    let who = meanwhile(&mut session, link.who_has(std::slice::from_ref(&key))).await.unwrap();
    assert_eq!(who, [(key, Vec::new())]);
    let resources: [(Arc<str>, f64); 1] = [("GPU".into(), 5.0)];
    meanwhile(&mut session, link.set_resources(&worker.address, &resources)).await.unwrap();
    assert_eq!(scheduler.evaluate("s.workers['tcp://127.0.0.1:121'].resources").await, json!({"GPU": 5.0}));
    session.sender().send(status_change(Status::Running, "test-1"));
    meanwhile(&mut session, link.retire(&worker.address)).await.unwrap();
    scheduler.becomes("len(s.workers)", json!(0)).await;
    link.unregister(&worker.address, "test").await.unwrap();
}

/// What a scheduler of our own making does with each connection, in the order in which they come.
async fn fake_scheduler(
    answers: Vec<Option<Value>>,
) -> (Scheduler, tokio::task::JoinHandle<(Vec<Value>, Connection)>) {
    let config = pool().config().clone();
    let listener = Listener::bind("127.0.0.1", ANY_PORT, config).await.unwrap();
    let link_config = Config::new(Location::Address(listener.listen_address()));
    let link = link(Config { heartbeat_interval: Duration::from_millis(20), ..link_config });
    let serving = tokio::spawn(async move {
        let (mut asked, mut first) = (Vec::new(), None);
        for answer in answers {
            let mut connection = listener.accept().await.handshake().await.unwrap();
            asked.push(connection.read().await.unwrap());
            if let Some(answer) = answer {
                connection.write(&answer).await.unwrap();
                first.get_or_insert(connection);
            }
        }
        (asked, first.unwrap())
    });
    (link, serving)
}

fn ok() -> Value {
    Value::map([("status", "OK".into()), ("time", 1.0.into()), ("heartbeat-interval", 0.01.into())])
}

#[tokio::test]
async fn what_a_lost_beat_told_is_told_again() {
    // registered; a heartbeat whose connection breaks; the next one
    let (link, serving) = fake_scheduler(vec![Some(ok()), None, Some(ok())]).await;
    let mut session = register(&link, &identity(141, "w"), Attempt::First).await.unwrap();
    let driving = async {
        let mut n = 0.0;
        loop {
            if let Incoming::Heartbeat(answer) = session.next().await {
                n += 1.0;
                let mut beat = beat();
                beat.metrics.digests.add("latency", n);
                beat.metrics.bandwidth.observe("tcp://127.0.0.1:9", None, 2_000_000, 1.0);
                let _ = answer.send(beat);
            }
        }
    };
    let serving = async {
        tokio::select! {
            served = serving => served.unwrap(),
            () = driving => unreachable!(),
        }
    };
    let (asked, _connection) = within("three requests", serving).await;
    let told = asked[2].field("metrics").unwrap();
    assert_eq!(
        told.field("digests_total_since_heartbeat").unwrap().field("latency"),
        Some(&Value::Float(3.0))
    );
    let workers = told.field("bandwidth").unwrap().field("workers").unwrap();
    assert_eq!(workers.as_map().unwrap()[0].1, Value::List(vec![4e6.into(), 2.into()]));
}

#[tokio::test]
async fn answers_that_make_no_sense() {
    let error = Value::map([("status", "error".into()), ("message", "not today".into())]);
    let failed = Value::map([
        ("status", "uncaught-error".into()),
        ("exception_text", "ValueError('Worker already exists tcp://...')".into()),
    ]);
    for (answer, text) in
        [(error, "not today"), (failed, "still registered"), (17.into(), "unexpected answer")]
    {
        let (link, _serving) = fake_scheduler(vec![Some(answer)]).await;
        let error = register(&link, &identity(151, "w"), Attempt::First).await.err().unwrap();
        assert!(error.to_string().contains(text), "{error}");
    }
    let (link, serving) = fake_scheduler(vec![Some(ok())]).await;
    let mut session = register(&link, &identity(151, "w"), Attempt::First).await.unwrap();
    let (_, mut connection) = within("registering", serving).await.unwrap();
    let message = Value::map([("op", "compute-task".into()), ("key", "x".into())]);
    connection.write(&Value::List(vec![message])).await.unwrap();
    assert!(matches!(lost(&mut session).await, Lost::Malformed(_)));
}

#[tokio::test]
async fn other_versions_are_warned_of() {
    let recent = telemetry::log::start(telemetry::log::Config::default()).unwrap();
    let scheduler = DaskScheduler::start().await;
    let link = link_to(&scheduler);
    let mut worker = identity(131, "w");
    let packages = [("python", "3.0.0.final.0".into()), ("dask", "1.0.0".into())];
    worker.versions = Value::map([("host", Value::Map(Vec::new())), ("packages", Value::map(packages))]);
    let _session = register(&link, &worker, Attempt::First).await.unwrap();
    let lines = recent.lines("distributed.worker", 0.0, None);
    let warning =
        lines.iter().find(|(_, level, text)| *level == "WARNING" && text.contains("Mismatched versions"));
    assert!(warning.unwrap().2.contains("1.0.0"), "{lines:?}");
}
