//! The data server and the fetching side against stock workers, and the same requests to a stock worker and to ours.

#![allow(clippy::unwrap_used)]

#[path = "net/python.rs"]
mod python;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use iqoqo_dask_worker::net::{self, ANY_PORT, Listener, Pool};
use iqoqo_dask_worker::peer::{
    Backend, Config, Failure, FetchResult, NannyBackend, OutgoingCounts, Peer, Relay, Request, Restarted,
    Terminate, Transfers, fetch, serve, serve_nanny,
};
use iqoqo_dask_worker::proto::{Address, Key, Payload, Status, Stimulus, StreamMessage, Value};
use iqoqo_dask_worker::store::{Object, Store};
use iqoqo_dask_worker::wire::payload::Exception;
use iqoqo_dask_worker::wire::{Compression, encode_message};
use python::Python;
use tokio::io::AsyncWriteExt;
use tokio::task::JoinHandle;
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(60);

async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.expect("done in time")
}

/// As little of a worker as the server needs.
#[derive(Default)]
struct Fake {
    store: Store,
    paused: bool,
    /// Whom the scheduler names for every key.
    holder: Mutex<Option<Address>>,
    heard: Mutex<Vec<String>>,
}

impl Fake {
    fn hear(&self, what: impl Into<String>) {
        self.heard.lock().unwrap().push(what.into());
    }
}

fn frames(reply: &Value) -> Vec<Bytes> {
    encode_message(reply, Compression::None).unwrap()
}

impl Backend for Fake {
    fn status(&self) -> Status {
        if self.paused { Status::Paused } else { Status::Running }
    }

    fn identity(&self) -> Value {
        Value::map([("type", "Worker".into())])
    }

    async fn versions(&self, _packages: Option<Value>) -> Result<Value, Failure> {
        Ok(Value::map([]))
    }

    async fn update_data(
        &self,
        data: Vec<(Key, Payload)>,
        _stimulus_id: Arc<str>,
    ) -> Result<Vec<(Key, u64)>, Failure> {
        let mut sizes = Vec::new();
        for (key, payload) in data {
            let nbytes = payload.len();
            self.store
                .insert(key.clone(), Object::from_payload(payload, nbytes, self.store.arena()).unwrap());
            sizes.push((key, nbytes));
        }
        Ok(sizes)
    }

    async fn free_keys(&self, keys: Vec<Key>, _stimulus_id: Arc<str>) {
        keys.iter().for_each(|key| _ = self.store.remove(key));
    }

    async fn who_has(&self, keys: Vec<Key>) -> Result<Vec<(Key, Vec<Address>)>, net::Error> {
        let holder: Vec<Address> = self.holder.lock().unwrap().iter().cloned().collect();
        Ok(keys.into_iter().map(|key| (key, holder.clone())).collect())
    }

    async fn actors(&self, _keys: Vec<Key>) -> Vec<(Key, Payload)> {
        Vec::new()
    }

    fn logs(&self, _start: f64, _n: Option<usize>) -> Vec<(f64, &'static str, String)> {
        Vec::new()
    }

    fn monitor_info(&self, _recent: bool, _start: u64) -> Value {
        Value::map([])
    }

    async fn call_stacks(&self, _keys: Option<Vec<Key>>) -> Result<Value, Failure> {
        Ok(Value::map([]))
    }

    async fn story(&self, _keys_or_stimuli: Vec<Key>) -> Value {
        Value::List(Vec::new())
    }

    async fn dump(&self, _exclude: Vec<Key>) -> Value {
        Value::map([])
    }

    async fn stream(&self, stimulus: Stimulus) -> Result<(), Failure> {
        self.hear(match stimulus.message {
            StreamMessage::Unknown { op, .. } => format!("unknown {op}"),
            message => format!("{message:?}"),
        });
        Ok(())
    }

    async fn terminate(&self, how: Terminate) {
        self.hear(format!("terminate: {}", how.reason));
    }

    async fn relay(&self, request: Relay) -> Result<Vec<Bytes>, Failure> {
        assert!(!request.frames.is_empty());
        Ok(frames(&Value::Nil))
    }
}

struct Ours {
    address: Address,
    peer: Arc<Peer<Fake>>,
    _serving: JoinHandle<()>,
}

fn network(compression: Compression) -> Arc<net::Config> {
    let connect_timeout = Duration::from_millis(300);
    Arc::new(net::Config { compression, connect_timeout, ..net::Config::default() })
}

async fn ours(host: &str, compression: Compression, config: Config, paused: bool) -> Ours {
    let listener = Listener::bind(host, ANY_PORT, network(compression)).await.unwrap();
    let address = listener.listen_address();
    let backend = Fake { paused, ..Fake::default() };
    let peer = Arc::new(Peer {
        store: backend.store.clone(),
        backend,
        transfers: Transfers::new(100),
        pool: Pool::new(network(compression)),
        address: address.clone(),
        config,
    });
    let _serving = tokio::spawn(serve(listener, peer.clone()));
    Ours { address, peer, _serving }
}

fn request(worker: &str, keys: &[(Key, u64)]) -> Request {
    Request {
        worker: Address::parse(worker).unwrap(),
        keys: keys.to_vec(),
        who: Address::parse("tcp://127.0.0.1:9").unwrap(),
    }
}

async fn exchange_with_stock(host: &str, compression: Compression, name: &str) {
    let ours = ours(host, compression, Config::default(), false).await;
    let mut python = Python::start("peers.py", &["stock", host, name]);
    let stock = python.line().await;
    let pair = Key::Tuple([Key::from("y"), Key::Int(1)].into());
    let keys = [
        (Key::from("x"), 12_000_000),
        (pair, 10),
        (Key::Bytes(b"z"[..].into()), 800_000),
        (Key::Int(4), 200_000),
        (Key::from("missing"), 7),
    ];
    let request = request(&stock, &keys);
    let fetched = within(fetch(&ours.peer.pool, &ours.peer.transfers, &request)).await;
    let FetchResult::Success { data, received } = fetched else { panic!("{fetched:?}") };
    let received = received.unwrap();
    assert_eq!(data.len(), 4, "what the other lacks is left out");
    assert_eq!((received.nbytes, received.worker.as_str()), (13_000_010, &*stock));
    assert_eq!(received.type_name, None, "they are of several types");
    within(ours.peer.backend.update_data(data, "s".into())).await.unwrap();

    python.tell(ours.address.as_str());
    assert_eq!(python.line().await, "ok");
    let total = ours.peer.transfers.outgoing();
    assert_eq!((total.count, total.bytes, total.count_total), (0, 0, 2));
    assert_eq!(ours.peer.transfers.outgoing_log().as_list().unwrap().len(), 2);

    // one type alone is known by its name
    let one = within(fetch(
        &ours.peer.pool,
        &ours.peer.transfers,
        &Request { keys: vec![keys[0].clone()], ..request.clone() },
    ))
    .await;
    let FetchResult::Success { received: Some(received), .. } = one else { panic!("{one:?}") };
    assert_eq!(received.type_name.as_deref(), Some("numpy.ndarray"));
    // nothing there at all is a success without data
    let none = within(fetch(
        &ours.peer.pool,
        &ours.peer.transfers,
        &Request { keys: vec![keys[4].clone()], ..request },
    ))
    .await;
    assert!(matches!(&none, FetchResult::Success { data, received: None } if data.is_empty()), "{none:?}");
    assert_eq!(ours.peer.pool.counts(), net::Counts { open: 1, active: 0 });
}

#[tokio::test(flavor = "multi_thread")]
async fn data_goes_both_ways() {
    exchange_with_stock("127.0.0.1", Compression::None, "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn data_goes_both_ways_compressed() {
    // ours and the stock worker both dial from 127.0.0.1, so that each end believes in two hosts
    exchange_with_stock("127.0.0.2", Compression::Lz4, "lz4").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_scatters_and_reads_back() {
    let ours = ours("127.0.0.1", Compression::None, Config::default(), false).await;
    Python::start("peers.py", &["scatter", ours.address.as_str()]).succeeds().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gather_goes_on_where_the_scheduler_points() {
    let ours = ours("127.0.0.1", Compression::None, Config::default(), false).await;
    let mut python = Python::start("peers.py", &["gather", ours.address.as_str()]);
    let holder = Address::parse(&python.line().await).unwrap();
    *ours.peer.backend.holder.lock().unwrap() = Some(holder);
    python.tell("go");
    python.succeeds().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_answered_as_by_a_stock_worker() {
    let config = Config { blocked_handlers: vec!["benchmark_disk".into()], ..Config::default() };
    let ours = ours("127.0.0.1", Compression::None, config, false).await;
    Python::start("peers.py", &["compare", ours.address.as_str()]).succeeds().await;
    assert_eq!(*ours.peer.backend.heard.lock().unwrap(), ["terminate: enough"]);
    assert_eq!(ours.peer.transfers.outgoing().count, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_worker_is_busy() {
    // to its own host a worker serves twice as many
    for (limit, paused) in [(Some(10), true), (None, true)] {
        let config = Config { transfer_outgoing_count_limit: limit, ..Config::default() };
        let ours = ours("127.0.0.1", Compression::None, config, paused).await;
        Python::start("peers.py", &["busy", ours.address.as_str()]).succeeds().await;
    }
    let config = Config { transfer_outgoing_count_limit: Some(1), ..Config::default() };
    let ours = ours("127.0.0.2", Compression::None, config, false).await;
    Python::start("peers.py", &["busy", ours.address.as_str()]).succeeds().await;
}

#[tokio::test]
async fn twice_as_many_are_served_on_one_host() {
    let config = Config { transfer_outgoing_count_limit: Some(1), ..Config::default() };
    let ours = ours("127.0.0.1", Compression::None, config, false).await;
    let ask = Value::map([("op", "get_data".into()), ("keys", Value::List(Vec::new()))]);
    let mut replies = Vec::new();
    let mut connections = Vec::new();
    for _ in 0..3 {
        let mut connection = within(net::connect(&ours.address, &net::Config::default())).await.unwrap();
        let reply = within(connection.request(&ask)).await.unwrap();
        replies.push(reply.field("status").and_then(Value::as_str).map(str::to_owned).unwrap());
        connections.push(connection);
    }
    assert_eq!(replies, ["OK", "OK", "busy"]);
    assert_eq!(
        ours.peer.transfers.outgoing(),
        OutgoingCounts { bytes: 0, count: 2, bytes_total: 0, count_total: 2 }
    );

    let busy = request(ours.address.as_str(), &[("x".into(), 1)]);
    let result = within(fetch(&ours.peer.pool, &Transfers::new(1), &busy)).await;
    assert!(matches!(result, FetchResult::Busy), "{result:?}");
}

#[tokio::test]
async fn a_peer_that_is_away_is_a_network_failure() {
    let ours = ours("127.0.0.1", Compression::None, Config::default(), false).await;
    let away = Listener::bind("127.0.0.1", ANY_PORT, network(Compression::None)).await.unwrap();
    let address = away.listen_address();
    drop(away);
    let request = request(address.as_str(), &[("x".into(), 1)]);
    let result = within(fetch(&ours.peer.pool, &ours.peer.transfers, &request)).await;
    assert!(matches!(result, FetchResult::NetworkFailure(_)), "{result:?}");
    let digests = ours.peer.transfers.take_digests();
    assert!(digests.iter().any(|(name, _)| *name == ["gather-dep", "failed", "seconds"]));
}

#[tokio::test]
async fn an_exception_of_a_peer_is_carried_whole() {
    let config = Config { blocked_handlers: vec!["get_data".into()], ..Config::default() };
    let refusing = ours("127.0.0.1", Compression::None, config, false).await;
    let request = request(refusing.address.as_str(), &[("x".into(), 1)]);
    let result = within(fetch(&refusing.peer.pool, &refusing.peer.transfers, &request)).await;
    let FetchResult::Error(error) = result else { panic!("{result:?}") };
    let text = "The 'get_data' handler has been explicitly disallowed in Worker, \
                possibly due to security concerns.";
    assert_eq!(error.exception, Exception::builtin("ValueError", text).payload());
    assert_eq!(refusing.peer.pool.counts(), net::Counts { open: 1, active: 0 }, "it can be used again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_reaches_the_worker() {
    let ours = ours("127.0.0.1", Compression::None, Config::default(), false).await;
    Python::start("peers.py", &["stream", ours.address.as_str()]).succeeds().await;
    let heard = ours.peer.backend.heard.lock().unwrap();
    assert_eq!(*heard, ["FreeKeys { keys: ['a'] }", "unknown unheard-of"]);
}

#[tokio::test]
async fn bad_peers_cost_their_own_connection() {
    let ours = ours("127.0.0.1", Compression::None, Config::default(), false).await;
    let mut good = within(net::connect(&ours.address, &net::Config::default())).await.unwrap();
    let mut raw = tokio::net::TcpStream::connect(ours.address.host_port()).await.unwrap();
    raw.write_all(&[0xff; 64]).await.unwrap();
    let (mut reader, mut writer) =
        within(net::connect(&ours.address, &net::Config::default())).await.unwrap().into_split();
    within(writer.write_frames(&[Bytes::from_static(b"\xc1")])).await.unwrap();
    assert!(within(reader.read()).await.is_err());
    let ping = Value::map([("op", "ping".into())]);
    assert_eq!(within(good.request(&ping)).await.unwrap(), Bytes::from_static(b"pong").into());
}

#[tokio::test]
async fn a_server_that_is_dropped_closes_its_connections() {
    let ours = ours("127.0.0.1", Compression::None, Config::default(), false).await;
    let mut connection = within(net::connect(&ours.address, &net::Config::default())).await.unwrap();
    ours._serving.abort();
    assert!(within(connection.read()).await.is_err());
}

/// A nanny whose worker restarts when it is given the time.
#[derive(Default)]
struct FakeNanny(Arc<Mutex<Vec<String>>>);

impl NannyBackend for FakeNanny {
    fn identity(&self) -> Value {
        Value::map([("type", "Nanny".into())])
    }

    async fn dump(&self, _exclude: Vec<Key>) -> Value {
        Value::map([])
    }

    fn logs(&self, _start: f64, _n: Option<usize>) -> Vec<(f64, &'static str, String)> {
        vec![(1.5, "INFO", "a line".into())]
    }

    async fn instantiate(&self) -> Result<Status, Failure> {
        Ok(Status::Running)
    }

    async fn kill(&self, timeout: f64, reason: String) -> Result<(), Failure> {
        self.0.lock().unwrap().push(format!("kill {timeout} {reason}"));
        Ok(())
    }

    async fn restart(&self, timeout: f64, reason: String) -> Result<Restarted, Failure> {
        match (reason.as_str(), timeout > 0.0) {
            ("fail", _) => Err(Exception::builtin("RuntimeError", "no worker").into()),
            (_, true) => Ok(Restarted::Done),
            (_, false) => Ok(Restarted::TimedOut),
        }
    }

    async fn close_gracefully(&self, reason: String) {
        self.0.lock().unwrap().push(format!("close_gracefully {reason}"));
    }

    async fn terminate(&self, timeout: f64, reason: String) {
        self.0.lock().unwrap().push(format!("terminate {timeout} {reason}"));
    }

    async fn relay(&self, _request: Relay) -> Result<Vec<Bytes>, Failure> {
        Ok(frames(&Value::Nil))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nanny_answers_at_its_own_address() {
    let listener = Listener::bind("127.0.0.1", ANY_PORT, network(Compression::None)).await.unwrap();
    let address = listener.listen_address();
    let heard = Arc::default();
    let serving = tokio::spawn(serve_nanny(listener, FakeNanny(Arc::clone(&heard)), Vec::new()));
    Python::start("peers.py", &["nanny", address.as_str()]).succeeds().await;
    let heard = heard.lock().unwrap();
    assert_eq!(*heard, ["kill 3 why", "close_gracefully bye", "terminate 5 nanny-close"]);
    serving.abort();
}
