//! Serving data to other workers and to clients, straight from the store.
//!
//! Source: `distributed/worker.py: Worker.get_data`.

use std::collections::{HashMap, HashSet};

use tracing::{debug, warn};

use super::request::Arguments;
use super::server::Reply;
use super::transfers::now;
use super::{Backend, Failure, Peer};
use crate::net::Connection;
use crate::proto::{Key, Payload, Status, Value};
use crate::store::{self, Live, Lookup};
use crate::telemetry;
use crate::wire::payload::Exception;

/// What is to be sent, and its sizes.
type Collected = (Vec<(Key, Payload)>, Vec<(Key, u64)>);

impl<B: Backend> Peer<B> {
    /// Sends what there is of the asked keys and waits for the receiver's "OK"; says `busy` when too many others are
    /// being served.
    pub(super) async fn get_data(
        &self,
        mut arguments: Arguments,
        connection: &mut Connection,
    ) -> Result<Reply, Failure> {
        let who = arguments.take("who").unwrap_or(Value::Nil);
        // Dask admits a request first and complains about its keys afterwards; nobody can tell the difference
        let keys = arguments.keys("keys")?;
        let Some(mut outgoing) = self.transfers.begin_outgoing(self.limit(connection)) else {
            debug!("too many transfers under way to serve {who:?}");
            return Ok(Reply::Value(Value::map([("status", "busy".into())])));
        };
        let (data, sizes) = self.collect(keys).await?;
        outgoing.carries(sizes);
        let items = data.into_iter().map(|(key, payload)| (Value::from(&key), payload.into())).collect();
        let message = Value::map([("status", "OK".into()), ("data", Value::Map(items))]);
        let start = now();
        let exchange = async {
            let bytes = connection.write(&message).await?;
            let frames = connection.read_frames().await?;
            let response = connection.decode(frames.clone()).await?;
            Ok((bytes, frames, response))
        };
        let (bytes, frames, response) = match exchange.await {
            Ok(exchanged) => exchanged,
            Err(error) => {
                let error: crate::net::Error = error;
                warn!("sending data to {} failed: {}", connection.peer_address(), error.chain());
                return Err(error.into());
            }
        };
        // A stock worker that cannot open what it was sent leaves the "OK" out and uses the connection again. Taking its
        // next request for an error would cost it that one, too.
        let is_request = response.field("op").is_some();
        if response.as_str() != Some("OK") && !is_request {
            let text = response.as_str().map_or_else(|| format!("{response:?}"), str::to_owned);
            return Err(Exception::builtin("AssertionError", text).into());
        }
        outgoing.finish(who, start, now(), bytes);
        Ok(if is_request { Reply::Overtaken(frames) } else { Reply::Nothing })
    }

    /// How many transfers may be under way for this one to be admitted; `None` for any number.
    fn limit(&self, connection: &Connection) -> Option<u64> {
        if self.backend.status() == Status::Paused {
            return Some(1);
        }
        let limit = self.config.transfer_outgoing_count_limit?;
        let same_host = connection.peer_address().host() == self.address.host();
        Some(if same_host { limit.saturating_mul(2) } else { limit })
    }

    /// What there is of the keys, and the sizes of it; actors are their handles, of no size.
    ///
    /// What was spilled is read back, which may take seconds.
    async fn collect(&self, keys: Vec<Key>) -> Result<Collected, Failure> {
        let mut seen = HashSet::new();
        let (mut data, mut sizes, mut missing) = (Vec::new(), Vec::new(), Vec::new());
        // all are asked for before one is waited for
        let live: Vec<Live> = keys.iter().filter_map(|key| self.store.live(key)).collect();
        live.iter().for_each(Live::ask);
        let mut published = HashMap::new();
        for live in live {
            if let Some(object) = live.published().await {
                published.insert(live.key().clone(), object);
            }
        }
        for key in keys {
            if !seen.insert(key.clone()) {
                continue;
            }
            let read = match (published.remove(&key), self.store.find(&key)) {
                (Some(object), _) | (None, Lookup::Here(object)) => Some(object),
                (None, Lookup::OnDisk) => self.store.load(&key).await.map_err(unreadable)?,
                (None, Lookup::Nowhere) => None,
            };
            match read {
                Some(object) => {
                    sizes.push((key.clone(), object.nbytes()));
                    data.push((key, object.to_payload()));
                }
                None => missing.push(key),
            }
        }
        if !missing.is_empty() {
            data.extend(self.backend.actors(missing).await);
        }
        Ok((data, sizes))
    }
}

fn unreadable(error: store::Error) -> Failure {
    Exception::builtin("OSError", telemetry::chain(&error)).into()
}
