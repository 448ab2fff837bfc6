//! Connections against the real `distributed`, and against peers that break the protocol.

#![allow(clippy::unwrap_used)]

#[path = "net/python.rs"]
mod python;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use iqoqo_dask_worker::net::{
    ANY_PORT, BatchedWriter, Config, Connection, Counts, Error, Listener, Pool, connect,
};
use iqoqo_dask_worker::proto::{Address, Value};
use iqoqo_dask_worker::wire::Compression;
use python::Python;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(30);

/// Not the address we dial from, so that both ends believe in two hosts and agree on compression.
const OTHER_HOST: &str = "127.0.0.2";

fn config(compression: Compression) -> Arc<Config> {
    Arc::new(Config { compression, connect_timeout: Duration::from_secs(10), ..Config::default() })
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.expect("done in time")
}

/// Echoes every message until the peer leaves; how each connection ended goes to the channel.
async fn echo_server(
    host: &str,
    config: Arc<Config>,
) -> (Address, mpsc::UnboundedReceiver<Result<(), Error>>) {
    let listener = Listener::bind(host, ANY_PORT, config).await.unwrap();
    let address = listener.listen_address();
    let (ends, ended) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let incoming = listener.accept().await;
            let ends = ends.clone();
            tokio::spawn(async move {
                let end = match incoming.handshake().await {
                    Ok(connection) => echo(connection).await,
                    Err(error) => Err(error),
                };
                let _ = ends.send(end);
            });
        }
    });
    (address, ended)
}

async fn echo(mut connection: Connection) -> Result<(), Error> {
    while let Some(frames) = connection.next_request().await? {
        let message = connection.decode(frames).await?;
        connection.write(&message).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn python_client_of_our_listener() {
    let (address, mut ended) = echo_server("127.0.0.1", config(Compression::None)).await;
    Python::start("client.py", &[address.as_str(), ""]).succeeds().await;
    within(ended.recv()).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn python_client_of_our_listener_with_compression() {
    let (address, mut ended) = echo_server(OTHER_HOST, config(Compression::Lz4)).await;
    Python::start("client.py", &[address.as_str(), "lz4"]).succeeds().await;
    within(ended.recv()).await.unwrap().unwrap();
}

/// A stock server for our client side.
async fn python_server(host: &str, compression: &str) -> (Python, Address) {
    let mut python = Python::start("server.py", &[host, compression]);
    let address = Address::parse(&python.line().await).unwrap();
    (python, address)
}

fn op(name: &str) -> Value {
    Value::map([("op", name.into())])
}

#[tokio::test]
async fn our_client_of_a_python_server() {
    for (host, compression, name) in
        [("127.0.0.1", Compression::None, ""), (OTHER_HOST, Compression::Lz4, "lz4")]
    {
        let (_python, address) = python_server(host, name).await;
        let pool = Pool::new(config(compression));

        let identity = within(pool.rpc(&address, &op("identity"))).await.unwrap();
        assert_eq!(identity.field("type").and_then(Value::as_str), Some("Echo"));

        let ask = Value::map([("op", "array".into()), ("n", 20_000_000.into())]);
        let reply = within(pool.rpc(&address, &ask)).await.unwrap();
        let Some(Value::Payload(payload)) = reply.field("data") else { panic!("no payload in {reply:?}") };
        let expected: Vec<u8> = (0..20_000_000u32).map(|i| i as u8).collect();
        assert!(payload.frames.iter().flatten().eq(&expected), "the array arrived as it was");

        // and back again, opened there and sent once more
        let ask = Value::map([("op", "back".into()), ("data", Value::Payload(payload.clone()))]);
        let reply = within(pool.rpc(&address, &ask)).await.unwrap();
        let Some(Value::Payload(back)) = reply.field("data") else { panic!("no payload in {reply:?}") };
        assert!(back.frames.iter().flatten().eq(&expected), "the array came back as it was");

        assert_eq!(pool.counts(), Counts { open: 1, active: 0 }, "one connection did it all");
    }
}

#[tokio::test]
async fn an_exception_in_a_handler_is_an_error_with_its_text() {
    let (_python, address) = python_server("127.0.0.1", "").await;
    let pool = Pool::new(config(Compression::None));
    match within(pool.rpc(&address, &op("fail"))).await {
        Err(Error::Remote { text, .. }) => assert_eq!(text, "ValueError('as it must be')"),
        other => panic!("{other:?}"),
    }
    within(pool.rpc(&address, &op("identity"))).await.unwrap();
    assert_eq!(pool.counts(), Counts { open: 1, active: 0 });
}

#[tokio::test]
async fn a_removed_address_fails_requests_under_way() {
    let (_python, address) = python_server("127.0.0.1", "").await;
    let pool = Pool::new(config(Compression::None));
    let mut hanging = within(pool.get(&address)).await.unwrap();
    within(hanging.write(&op("hang"))).await.unwrap();
    let reading = tokio::spawn(async move { hanging.read().await });
    pool.remove(&address);
    match within(reading).await.unwrap() {
        Err(Error::Removed { .. }) => {}
        other => panic!("{other:?}"),
    }
    // the address can be used again
    within(pool.rpc(&address, &op("identity"))).await.unwrap();
    pool.close();
    assert!(matches!(within(pool.rpc(&address, &op("identity"))).await, Err(Error::Removed { .. })));
    assert_eq!(pool.counts(), Counts { open: 0, active: 0 });
}

#[tokio::test]
async fn a_full_pool_closes_idle_connections_and_then_waits() {
    let (_python, address) = python_server("127.0.0.1", "").await;
    let (other, _ended) = echo_server("127.0.0.1", config(Compression::None)).await;
    let pool = Pool::new(Arc::new(Config { max_outgoing: 1, ..Config::default() }));
    within(pool.rpc(&address, &op("identity"))).await.unwrap();
    // the idle connection makes room
    let busy = within(pool.get(&other)).await.unwrap();
    assert_eq!(pool.counts(), Counts { open: 1, active: 1 });
    // a busy one does not, until it is given back
    let waiting = tokio::spawn({
        let (pool, address) = (pool.clone(), address.clone());
        async move { pool.rpc(&address, &op("identity")).await }
    });
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished());
    busy.reuse();
    within(waiting).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_connection_that_ended_while_idle_is_not_used_again() {
    let listener = Listener::bind("127.0.0.1", ANY_PORT, config(Compression::None)).await.unwrap();
    let address = listener.listen_address();
    let pool = Pool::new(config(Compression::None));
    let (client, server) =
        tokio::join!(pool.get(&address), async { listener.accept().await.handshake().await });
    client.unwrap().reuse();
    let (_, mut theirs) = server.unwrap().into_split();
    theirs.write(&"unasked".into()).await.unwrap();
    drop(theirs);
    // The news of the end travels through the kernel; the pool must notice without being told.
    let noticed = async {
        loop {
            let pooled = pool.get(&address);
            let (client, _server) = tokio::join!(pooled, async {
                timeout(Duration::from_millis(50), async { listener.accept().await.handshake().await }).await
            });
            if _server.is_ok() {
                return client;
            }
        }
    };
    within(noticed).await.unwrap();
}

#[tokio::test]
async fn nobody_there_is_a_timeout_that_names_the_address() {
    let free = Listener::bind("127.0.0.1", ANY_PORT, config(Compression::None)).await.unwrap();
    let address = free.listen_address();
    drop(free);
    let config = Config { connect_timeout: Duration::from_millis(200), ..Config::default() };
    match within(connect(&address, &config)).await.map(drop) {
        Err(error @ Error::Connect { .. }) => {
            assert!(error.to_string().contains(address.as_str()));
            assert!(error.chain().contains("refused"), "{}", error.chain());
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_server_that_starts_late_is_found() {
    let free = Listener::bind("127.0.0.1", ANY_PORT, config(Compression::None)).await.unwrap();
    let address = free.listen_address();
    drop(free);
    let connecting = tokio::spawn({
        let address = address.clone();
        async move { connect(&address, &config(Compression::None)).await }
    });
    tokio::task::yield_now().await;
    let port = address.port();
    let late = Listener::bind("127.0.0.1", port..=port, config(Compression::None)).await.unwrap();
    within(late.accept()).await.handshake().await.unwrap();
    within(connecting).await.unwrap().unwrap();
}

#[tokio::test]
async fn tls_is_refused_by_name() {
    let address = Address::parse("tls://127.0.0.1:1").unwrap();
    let error = connect(&address, &Config::default()).await.map(drop).unwrap_err();
    assert!(error.to_string().contains("not supported yet"), "{error}");
}

#[tokio::test]
async fn the_first_free_port_of_a_range_is_taken() {
    let config = config(Compression::None);
    let first = Listener::bind("127.0.0.1", ANY_PORT, config.clone()).await.unwrap();
    let port = first.listen_address().port();
    let taken = Listener::bind("127.0.0.1", port..=port, config.clone()).await.map(drop).unwrap_err();
    assert!(matches!(taken, Error::Bind { .. }), "{taken}");
    assert!(taken.to_string().contains(&port.to_string()));
    let next = Listener::bind("127.0.0.1", port..=port + 20, config.clone()).await.unwrap();
    assert!((port + 1..=port + 20).contains(&next.listen_address().port()));

    let foreign = Listener::bind("192.0.2.77", ANY_PORT, config.clone()).await.map(drop).unwrap_err();
    assert!(matches!(foreign, Error::Bind { .. }), "{foreign}");

    let everywhere = Listener::bind("", ANY_PORT, config.clone()).await.unwrap();
    assert_eq!(everywhere.listen_address().host(), "0.0.0.0");
    let contact = everywhere.contact_address([127, 0, 0, 1].into());
    let (connected, ()) = tokio::join!(connect(&contact, &config), async { drop(everywhere.accept().await) });
    let ended = connected.map(drop).unwrap_err();
    assert!(matches!(ended, Error::Closed { .. } | Error::Lost { .. }), "{ended}");
}

/// A raw socket that has said what a peer says first.
async fn greeted(address: &Address) -> TcpStream {
    let mut socket = TcpStream::connect(address.host_port()).await.unwrap();
    let config = Config { connect_timeout: PATIENCE, ..Config::default() };
    // our own greeting, as bytes, from a listener of our own
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = Address::from(listener.local_addr().unwrap());
    let dialling = tokio::spawn(async move { connect(&to, &config).await.map(drop) });
    let (mut greeting, _) = listener.accept().await.unwrap();
    let mut bytes = vec![0; 4096];
    let count = within(greeting.read(&mut bytes)).await.unwrap();
    drop(greeting);
    within(dialling).await.unwrap().unwrap_err();
    socket.write_all(&bytes[..count]).await.unwrap();
    // theirs is read, so that closing the socket is no reset
    assert!(within(socket.read(&mut bytes)).await.unwrap() > 16);
    socket
}

async fn end_of(ended: &mut mpsc::UnboundedReceiver<Result<(), Error>>) -> Error {
    within(ended.recv()).await.unwrap().unwrap_err()
}

#[tokio::test]
async fn garbage_ends_its_connection_and_no_other() {
    let (address, mut ended) = echo_server("127.0.0.1", config(Compression::None)).await;
    let mut good = within(connect(&address, &Config::default())).await.unwrap();

    // not even a greeting
    let mut socket = TcpStream::connect(address.host_port()).await.unwrap();
    socket.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    assert!(matches!(end_of(&mut ended).await, Error::Garbage { .. }));

    // a greeting larger than any greeting
    let mut socket = TcpStream::connect(address.host_port()).await.unwrap();
    socket.write_all(&[&(1u64 << 20).to_le_bytes()[..], &1u64.to_le_bytes()].concat()).await.unwrap();
    assert!(matches!(end_of(&mut ended).await, Error::Garbage { .. }));

    // a giant length
    let mut socket = greeted(&address).await;
    socket.write_all(&[0xff; 16]).await.unwrap();
    assert!(matches!(end_of(&mut ended).await, Error::Garbage { .. }));

    // a frame as large as is allowed, announced only: nothing of it is kept waiting for
    let mut socket = greeted(&address).await;
    let announced = [16u64, 1, 60 << 30].map(u64::to_le_bytes).concat();
    socket.write_all(&announced).await.unwrap();
    drop(socket);
    let end = end_of(&mut ended).await;
    assert!(matches!(end, Error::Truncated { .. } | Error::Memory { .. }), "{end}");

    // half a message
    let mut socket = greeted(&address).await;
    socket.write_all(&[26u64, 1, 10].map(u64::to_le_bytes).concat()).await.unwrap();
    socket.write_all(b"half").await.unwrap();
    drop(socket);
    assert!(matches!(end_of(&mut ended).await, Error::Truncated { .. }));

    // a well-framed message that is no msgpack
    let mut socket = greeted(&address).await;
    socket.write_all(&[17u64, 1, 1].map(u64::to_le_bytes).concat()).await.unwrap();
    socket.write_all(&[0xc1]).await.unwrap();
    assert!(matches!(end_of(&mut ended).await, Error::Garbage { .. }));

    assert_eq!(within(good.request(&"still here".into())).await.unwrap(), "still here".into());
}

#[tokio::test]
async fn a_silent_peer_is_given_up() {
    let config = Config { connect_timeout: Duration::from_millis(100), ..Config::default() };
    let (address, mut ended) = echo_server("127.0.0.1", Arc::new(config)).await;
    let _silent = TcpStream::connect(address.host_port()).await.unwrap();
    assert!(matches!(end_of(&mut ended).await, Error::Handshake { .. }));
}

#[tokio::test]
async fn a_slow_sender_is_understood() {
    let (address, _ended) = echo_server("127.0.0.1", config(Compression::None)).await;
    let message = [&[18u64, 1, 2].map(u64::to_le_bytes).concat()[..], b"\xa1x"].concat();
    let mut socket = greeted(&address).await;
    let mut other = within(connect(&address, &Config::default())).await.unwrap();
    for byte in message {
        socket.write_all(&[byte]).await.unwrap();
        // others are served between any two bytes of it
        assert_eq!(within(other.request(&1.into())).await.unwrap(), 1.into());
    }
    let mut answer = [0; 26];
    within(socket.read_exact(&mut answer)).await.unwrap();
    assert_eq!(&answer[24..], b"\xa1x");
}

#[tokio::test]
async fn a_dropped_read_loses_nothing() {
    let listener = Listener::bind("127.0.0.1", ANY_PORT, config(Compression::None)).await.unwrap();
    let address = listener.listen_address();
    let config = config(Compression::None);
    let (client, server) =
        tokio::join!(connect(&address, &config), async { listener.accept().await.handshake().await });
    let (mut reader, _keep) = client.unwrap().into_split();
    let large = Bytes::from((0..3_000_000u32).map(|i| i as u8).collect::<Vec<_>>());
    let sending: JoinHandle<()> = tokio::spawn({
        let large = large.clone();
        async move {
            let (_keep, mut writer) = server.unwrap().into_split();
            for _ in 0..5 {
                writer.write_frames(&[Bytes::from_static(b"\xa1x"), large.clone()]).await.unwrap();
            }
        }
    });
    for _ in 0..5 {
        let frames = within(async {
            loop {
                // given up and begun anew, again and again, at whatever point it is
                tokio::select! {
                    biased;
                    () = tokio::task::yield_now() => {}
                    frames = reader.read_frames() => break frames.unwrap(),
                }
            }
        })
        .await;
        assert!(frames[0] == b"\xa1x"[..] && frames[1] == large);
    }
    assert!(matches!(within(reader.read()).await, Err(Error::Closed { .. })));
    sending.await.unwrap();
}

#[tokio::test]
async fn idle_connections_make_room_for_new_ones() {
    let config = Arc::new(Config { max_incoming: 2, ..Config::default() });
    let (address, mut ended) = echo_server("127.0.0.1", config.clone()).await;
    let mut first = within(connect(&address, &config)).await.unwrap();
    within(first.request(&1.into())).await.unwrap();
    let mut second = within(connect(&address, &config)).await.unwrap();
    within(second.request(&1.into())).await.unwrap();
    let mut third = within(connect(&address, &config)).await.unwrap();
    within(ended.recv()).await.unwrap().unwrap();
    within(third.request(&1.into())).await.unwrap();
    within(second.request(&1.into())).await.unwrap();
    assert!(within(first.request(&1.into())).await.is_err());
}

#[tokio::test]
async fn a_newcomer_gets_the_place_it_waits_for() {
    let config = Arc::new(Config { max_incoming: 1, ..Config::default() });
    let listener = Listener::bind("127.0.0.1", ANY_PORT, config.clone()).await.unwrap();
    let address = listener.listen_address();
    let serving = tokio::spawn(async move { listener.run(|c| async { drop(echo(c).await) }).await });
    let mut kept = Vec::new();
    for _ in 0..5 {
        let mut next = within(connect(&address, &config)).await.unwrap();
        within(next.request(&1.into())).await.unwrap();
        // kept open and idle: the next one has to displace it
        kept.push(next);
    }
    let mut last = within(connect(&address, &config)).await.unwrap();
    serving.abort();
    assert!(within(last.read()).await.is_err(), "a listener that is gone closes its connections");
}

async fn stream_to(address: &Address, slow: bool, limit: u64) -> BatchedWriter {
    let mut connection = within(connect(address, &Config::default())).await.unwrap();
    let start = Value::map([("op", "stream".into()), ("slow", slow.into()), ("reply", false.into())]);
    within(connection.write(&start)).await.unwrap();
    let (_, writer) = connection.into_split();
    BatchedWriter::spawn(writer, Duration::from_millis(2), limit)
}

#[tokio::test]
async fn a_stream_arrives_whole_in_order_and_in_few_batches() {
    let (_python, address) = python_server("127.0.0.1", "").await;
    let stream = stream_to(&address, false, 1 << 30).await;
    for i in 0..5000 {
        stream.send(Value::map([("i", i.into())])).unwrap();
    }
    within(stream.close()).await;
    assert!(!stream.is_open());
    assert!(matches!(stream.send(Value::Nil), Err(Error::Closed { .. })));
    assert_eq!(stream.stats().queued, 0);

    let pool = Pool::new(config(Compression::None));
    let seen = within(async {
        loop {
            let seen = pool.rpc(&address, &op("streamed")).await.unwrap();
            if seen.field("messages").and_then(Value::as_list).is_some_and(|m| m.len() == 5000) {
                break seen;
            }
        }
    })
    .await;
    let numbers = seen.field("messages").and_then(Value::as_list).unwrap();
    assert!(numbers.iter().map(Value::as_i64).eq((0..5000).map(Some)));
    let batches = seen.field("batches").and_then(Value::as_list).unwrap().len();
    assert!(batches < 100, "{batches} batches for 5000 messages");
    assert_eq!(stream.stats().batches, batches as u64);
}

#[tokio::test]
async fn a_peer_that_takes_nothing_cannot_fill_the_memory() {
    let (_python, address) = python_server("127.0.0.1", "").await;
    let stream = stream_to(&address, true, 50_000_000).await;
    let filler = Value::map([("i", 0.into()), ("pad", Bytes::from(vec![0; 1_000_000]).into())]);
    let mut sent = 0;
    let error = within(async {
        loop {
            match stream.send(filler.clone()) {
                Ok(()) => sent += 1,
                Err(error) => break error,
            }
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(matches!(error, Error::Backlog { .. }), "{error}");
    assert!(sent >= 50, "{sent} messages were taken");
    within(stream.closed()).await;
    assert_eq!(stream.stats().queued_bytes, 0);
}

#[tokio::test]
async fn a_stream_without_owners_sends_what_it_has() {
    let (_python, address) = python_server("127.0.0.1", "").await;
    let stream = stream_to(&address, false, 1 << 30).await;
    stream.send(Value::map([("i", 7.into())])).unwrap();
    drop(stream);
    let pool = Pool::new(config(Compression::None));
    within(async {
        loop {
            let seen = pool.rpc(&address, &op("streamed")).await.unwrap();
            if seen.field("messages").and_then(Value::as_list) == Some(&[7.into()]) {
                break;
            }
        }
    })
    .await;
}
