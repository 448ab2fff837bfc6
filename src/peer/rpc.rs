//! The ops at a worker's address: what Python would call with which arguments, and who answers.
//!
//! Source: `distributed/worker.py: Worker.__init__` (handlers) and the methods it names.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::future::join_all;
use tracing::{error, info};

use super::backend::{Relay, Terminate};
use super::fetch::{self, get_data};
use super::gather::{Answer, Gather, Step};
use super::request::{Arguments, Request, Signature};
use super::server::{Reply, Service};
use super::transfers::now;
use super::{Backend, Failure, Peer};
use crate::net::Connection;
use crate::proto::{Address, Key, Payload, PayloadKind, Stimulus, Value};
use crate::wire::msgpack;
use crate::wire::payload::Exception;

/// Pause before a busy worker is asked again.
const BUSY_PAUSE: Duration = Duration::from_millis(150);

impl<B: Backend> Service for Peer<B> {
    const NAME: &'static str = "Worker";

    fn blocked(&self) -> &[String] {
        &self.config.blocked_handlers
    }

    fn signature(&self, op: &str) -> Option<Signature> {
        signature(op)
    }

    async fn handle(
        &self,
        op: &str,
        request: Request,
        connection: &mut Connection,
    ) -> Result<Reply, Failure> {
        let mut arguments = request.arguments;
        let value = match op {
            "get_data" => return self.get_data(arguments, connection).await,
            "connection_stream" => return self.stream(connection).await,
            "terminate" => {
                self.backend.terminate(terminate(&arguments)?).await;
                return Ok(Reply::HangUp);
            }
            "ping" => Value::Bytes(Bytes::from_static(b"pong")),
            "identity" => self.backend.identity(),
            "echo" => arguments.take("data").unwrap_or(Value::Nil),
            "versions" => self.backend.versions(arguments.take("packages")).await?,
            "keys" => Value::List(self.store.keys().iter().map(Value::from).collect()),
            "gather" => self.gather(arguments).await?,
            "update_data" => self.update_data(arguments).await?,
            "free_keys" => {
                let stimulus_id = arguments.text("stimulus_id").unwrap_or("free-keys").into();
                self.backend.free_keys(arguments.keys("keys")?, stimulus_id).await;
                Value::Nil
            }
            "call_stack" => self.backend.call_stacks(arguments.optional_keys("keys")?).await?,
            "get_logs" => logs(&arguments, |start, n| self.backend.logs(start, n))?,
            "get_monitor_info" => {
                let start = arguments.number("start", 0.0)?.max(0.0) as u64;
                self.backend.monitor_info(arguments.flag("recent", false), start)
            }
            "get_story" => self.backend.story(arguments.keys("keys_or_stimuli")?).await,
            "dump_state" => self.backend.dump(arguments.optional_keys("exclude")?.unwrap_or_default()).await,
            // `signature` knows exactly the names above
            _ => Value::Nil,
        };
        Ok(Reply::Value(value))
    }

    fn relay(&self, request: Relay) -> impl Future<Output = Result<Vec<Bytes>, Failure>> + Send {
        self.backend.relay(request)
    }
}

/// What Python's handlers take. An op that is not here is the service process's business.
fn signature(op: &str) -> Option<Signature> {
    let (name, required, optional): (_, &'static [&'static str], &'static [&'static str]) = match op {
        "get_data" => ("Worker.get_data", &["keys"], &["who"]),
        "connection_stream" => ("Server.handle_stream", &[], &["extra"]),
        "terminate" => ("Worker.close", &[], &["timeout", "executor_wait", "nanny", "reason"]),
        "ping" => ("pingpong", &[], &[]),
        "identity" => ("Worker.identity", &[], &[]),
        "echo" => ("Server.echo", &[], &["data"]),
        "versions" => ("ServerNode.versions", &[], &["packages"]),
        "keys" => ("Worker.keys", &[], &[]),
        "gather" => ("Worker.gather", &["who_has"], &[]),
        "update_data" => ("Worker.update_data", &["data"], &["stimulus_id"]),
        "free_keys" => ("FreeKeysEvent.__init__", &["stimulus_id", "keys"], &[]),
        "call_stack" => ("Worker.get_call_stack", &[], &["keys"]),
        "get_logs" => ("ServerNode.get_logs", &[], &["start", "n", "timestamps"]),
        "get_monitor_info" => ("Worker.get_monitor_info", &[], &["recent", "start"]),
        "get_story" => ("Worker.get_story", &["keys_or_stimuli"], &[]),
        "dump_state" => ("Worker._to_dict", &[], &["exclude"]),
        _ => return None,
    };
    Some(Signature { name, required, optional })
}

fn terminate(arguments: &Arguments) -> Result<Terminate, Exception> {
    Ok(Terminate {
        timeout: arguments.number("timeout", 30.0)?,
        executor_wait: arguments.flag("executor_wait", true),
        nanny: arguments.flag("nanny", true),
        reason: arguments.text("reason").unwrap_or("worker-close").to_owned(),
    })
}

/// `ServerNode.get_logs`: newest first, as `(level, text)` or `(created, level, text)`.
pub(super) fn logs(
    arguments: &Arguments,
    read: impl FnOnce(f64, Option<usize>) -> Vec<crate::telemetry::log::Line>,
) -> Result<Value, Exception> {
    let start = arguments.number("start", 0.0)?;
    let n = arguments.number("n", 0.0)?;
    let timestamps = arguments.flag("timestamps", false);
    let lines = read(start, (n > 0.0).then_some(n as usize));
    let line = |(created, level, text): (f64, &str, String)| {
        let mut fields = vec![level.into(), text.into()];
        if timestamps {
            fields.insert(0, created.into());
        }
        Value::List(fields)
    };
    Ok(Value::List(lines.into_iter().map(line).collect()))
}

impl<B: Backend> Peer<B> {
    /// `Worker.update_data`: what a client scatters.
    async fn update_data(&self, mut arguments: Arguments) -> Result<Value, Failure> {
        let stimulus_id = match arguments.text("stimulus_id") {
            Some(id) => id.into(),
            None => format!("update-data-{}", now()).into(),
        };
        let data = arguments.dict("data")?.into_iter().map(|(k, v)| Ok((k, payload_of(v)?)));
        let data = data.collect::<Result<Vec<_>, Exception>>()?;
        let sizes = self.backend.update_data(data, stimulus_id).await?;
        let sizes = sizes.iter().map(|(k, n)| (Value::from(k), Value::from(*n))).collect();
        Ok(Value::map([("nbytes", Value::Map(sizes)), ("status", "OK".into())]))
    }

    /// `Worker.gather`: fetches replicas that the scheduler wants to be here.
    async fn gather(&self, mut arguments: Arguments) -> Result<Value, Failure> {
        let stimulus_id: Arc<str> = format!("gather-{}", now()).into();
        let mut who_has = Vec::new();
        for (key, workers) in arguments.dict("who_has")? {
            if !self.store.contains(&key) {
                who_has.push((key, addresses(&workers)));
            }
        }
        let mut gather = Gather::new(who_has);
        loop {
            match gather.next(|n| fastrand::usize(..n)) {
                Step::Done { failed } if failed.is_empty() => {
                    return Ok(Value::map([("status", "OK".into())]));
                }
                Step::Done { failed } => {
                    error!("could not find data: {failed:?}");
                    let failed = Value::List(failed.iter().map(Value::from).collect());
                    return Ok(Value::map([("status", "partial-fail".into()), ("keys", failed)]));
                }
                Step::Wait => tokio::time::sleep(BUSY_PAUSE).await,
                Step::Refresh(keys) => gather.refreshed(self.refresh(keys).await?),
                Step::Fetch(requests) => {
                    let data = self.fetch_all(&mut gather, requests).await;
                    if !data.is_empty() {
                        self.backend.update_data(data, stimulus_id.clone()).await?;
                    }
                }
            }
        }
    }

    async fn refresh(&self, keys: Vec<Key>) -> Result<Vec<(Key, Vec<Address>)>, Failure> {
        let retry = &self.config.retry;
        let found = retry
            .run("who_has", crate::net::Error::is_connection_loss, || self.backend.who_has(keys.clone()))
            .await;
        // the scheduler is away, not whoever asks us
        found.map_err(|e| Exception::builtin("OSError", e.chain()).into())
    }

    /// Asks all these workers at once; what arrived.
    async fn fetch_all(
        &self,
        gather: &mut Gather,
        requests: Vec<(Address, Vec<Key>)>,
    ) -> Vec<(Key, Payload)> {
        let retry = &self.config.retry;
        let is_loss = |failure: &fetch::Failure| matches!(failure, fetch::Failure::Network(error) if error.is_connection_loss());
        let answers = join_all(requests.iter().map(|(worker, keys)| {
            retry.run("get_data", is_loss, move || get_data(&self.pool, worker, keys, &self.address))
        }));
        let mut all = Vec::new();
        for ((worker, keys), answer) in requests.iter().zip(answers.await) {
            let answer = match answer {
                Ok(fetch::Answer::Data(data)) => {
                    let got = data.iter().map(|(key, _)| key.clone()).collect();
                    all.extend(data);
                    Answer::Got(got)
                }
                Ok(fetch::Answer::Busy) => Answer::Busy,
                Err(fetch::Failure::Network(error)) if error.is_connection_loss() => {
                    info!("cannot gather from {worker}: {}", error.chain());
                    Answer::Away
                }
                Err(fetch::Failure::Network(failure)) => {
                    error!("unexpected error while collecting {keys:?} from {worker}: {}", failure.chain());
                    Answer::Failed
                }
                Err(fetch::Failure::Answer(failure)) => {
                    let text = &failure.exception_text;
                    error!("unexpected error while collecting {keys:?} from {worker}: {text}");
                    Answer::Failed
                }
            };
            gather.answered(worker, keys, answer);
        }
        all
    }

    /// `Server.handle_stream`: messages without answers, until the peer has had enough.
    async fn stream(&self, connection: &mut Connection) -> Result<Reply, Failure> {
        info!("starting established connection to {}", connection.peer_address());
        loop {
            let messages = match connection.read().await? {
                Value::List(messages) => messages,
                message => vec![message],
            };
            for message in messages {
                match message.field("op").and_then(Value::as_str) {
                    Some("close-stream") => return Ok(Reply::HangUp),
                    None if message.as_str() == Some("OK") => break,
                    _ => {}
                }
                match Stimulus::parse(message) {
                    Ok(stimulus) => self.backend.stream(stimulus).await?,
                    Err(malformed) => {
                        tracing::warn!("closing stream from {}: {malformed}", connection.peer_address());
                        return Ok(Reply::HangUp);
                    }
                }
            }
        }
    }
}

/// Those of a list of addresses that are addresses.
fn addresses(workers: &Value) -> Vec<Address> {
    let workers = workers.as_list().unwrap_or_default().iter();
    workers.filter_map(|w| Address::parse(w.as_str()?).ok()).collect()
}

/// An argument as an object to store. What was not marked as serialized is plain msgpack, for which Dask has a
/// serializer as well (`distributed/protocol/serialize.py: msgpack_dumps`).
fn payload_of(value: Value) -> Result<Payload, Exception> {
    let plain = match value {
        Value::Payload(payload) => return Ok(*payload),
        plain => plain,
    };
    let encode = |value: &Value| {
        let mut out = BytesMut::new();
        let failed = |e: crate::wire::Error| Exception::builtin("TypeError", e.to_string());
        msgpack::encode(value, &mut out).map_err(failed).map(|()| out.freeze())
    };
    let header = Value::map([("serializer", "msgpack".into()), ("num-sub-frames", 1.into())]);
    Ok(Payload { kind: PayloadKind::Serialized, header: encode(&header)?, frames: vec![encode(&plain)?] })
}
