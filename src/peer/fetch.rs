//! Getting data from another worker: one `get_data`, with its closing "OK".
//!
//! Says what happened and draws no conclusions; whether to try again is the state machine's or the caller's.
//!
//! Source: `distributed/worker.py: get_data_from_worker, Worker.gather_dep`, `distributed/utils_comm.py: retry`.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tracing::info;

use super::transfers::{Received, Transfers, now};
use crate::net::{self, Pool};
use crate::proto::{Address, Key, Payload, Value};
use crate::wire::payload::{Exception, type_name};

/// A request for data of one worker.
#[derive(Clone, Debug)]
pub struct Request {
    /// Whom to ask.
    pub worker: Address,
    /// What for, with the sizes that the scheduler named, in bytes.
    pub keys: Vec<(Key, u64)>,
    /// Our own address, for the other side's logs.
    pub who: Address,
}

/// What became of a [`Request`].
#[derive(Debug)]
pub enum FetchResult {
    /// These arrived; keys that are missing here are missing there.
    Success {
        /// As they lay on the wire.
        data: Vec<(Key, Payload)>,
        /// For bandwidths and startstops; none when nothing arrived.
        received: Option<Received>,
    },
    /// The worker serves too many others now.
    Busy,
    /// The worker, or the way to it, is gone.
    NetworkFailure(net::Error),
    /// The worker answered, and not with data.
    Error(FetchError),
}

/// An exception in place of data, in the parts of Dask's `error_message`.
#[derive(Clone, Debug)]
pub struct FetchError {
    /// The pickled exception, as a serialized `bytes` object.
    pub exception: Payload,
    /// The pickled traceback.
    pub traceback: Option<Payload>,
    /// `repr` of the exception.
    pub exception_text: Arc<str>,
    /// The traceback as text.
    pub traceback_text: Arc<str>,
}

impl From<Exception> for FetchError {
    fn from(exception: Exception) -> Self {
        FetchError {
            exception: exception.payload(),
            traceback: None,
            exception_text: exception.text().into(),
            traceback_text: "".into(),
        }
    }
}

/// Asks one worker for data, for a dependency, and notes the transfer.
pub async fn fetch(pool: &Pool, transfers: &Transfers, request: &Request) -> FetchResult {
    let start = now();
    let keys: Vec<Key> = request.keys.iter().map(|(key, _)| key.clone()).collect();
    let answer = get_data(pool, &request.worker, &keys, &request.who).await;
    let stop = now();
    let seconds = (stop - start).max(0.0);
    match answer {
        Ok(Answer::Data(data)) => {
            // what was in vain is told apart, as `BaseWorker._finalize_metrics` does
            let activity = if data.is_empty() { "missing" } else { "network" };
            transfers.digest(name_of(activity), seconds);
            let received = (!data.is_empty()).then(|| {
                let arrived: HashSet<&Key> = data.iter().map(|(key, _)| key).collect();
                let sizes = request.keys.iter().filter(|(key, _)| arrived.contains(key)).cloned().collect();
                transfers.received(&request.worker, start, stop, sizes, one_type(&data))
            });
            FetchResult::Success { data, received }
        }
        Ok(Answer::Busy) => {
            transfers.digest(name_of("busy"), seconds);
            FetchResult::Busy
        }
        Err(Failure::Network(error)) => {
            transfers.digest(name_of("failed"), seconds);
            FetchResult::NetworkFailure(error)
        }
        Err(Failure::Answer(error)) => {
            transfers.digest(name_of("failed"), seconds);
            FetchResult::Error(*error)
        }
    }
}

fn name_of(activity: &str) -> super::DigestName {
    match activity {
        "missing" => &["gather-dep", "missing", "seconds"],
        "busy" => &["gather-dep", "busy", "seconds"],
        "failed" => &["gather-dep", "failed", "seconds"],
        _ => &["gather-dep", "network", "seconds"],
    }
}

/// The type of all of them, if it is one and known.
fn one_type(data: &[(Key, Payload)]) -> Option<Arc<str>> {
    let mut types = data.iter().map(|(_, payload)| type_name(&payload.header));
    let first = types.next()??;
    types.all(|t| t.as_ref() == Some(&first)).then(|| first.into())
}

/// What a worker says to `get_data`.
pub(super) enum Answer {
    Data(Vec<(Key, Payload)>),
    Busy,
}

/// Why it did not say that.
pub(super) enum Failure {
    /// What Python sees as an `OSError`.
    Network(net::Error),
    /// Every other exception.
    Answer(Box<FetchError>),
}

impl From<net::Error> for Failure {
    fn from(error: net::Error) -> Self {
        Failure::Network(error)
    }
}

impl From<Exception> for Failure {
    fn from(exception: Exception) -> Self {
        Failure::Answer(Box::new(exception.into()))
    }
}

/// `get_data_from_worker`: the request, the answer, and the "OK" that lets the other side forget about it.
pub(super) async fn get_data(
    pool: &Pool,
    worker: &Address,
    keys: &[Key],
    who: &Address,
) -> Result<Answer, Failure> {
    let request = Value::map([
        ("op", "get_data".into()),
        ("keys", Value::List(keys.iter().map(Value::from).collect())),
        ("who", who.as_str().into()),
        ("reply", true.into()),
    ]);
    let mut connection = pool.get(worker).await?;
    let mut reply = connection.request(&request).await?;
    match reply.field("status").and_then(Value::as_str) {
        Some("OK") => {}
        Some("busy") => {
            connection.reuse();
            return Ok(Answer::Busy);
        }
        Some("uncaught-error") => {
            connection.reuse();
            return Err(remote_error(reply));
        }
        _ => return Err(unexpected("status", worker)),
    }
    connection.write(&"OK".into()).await?;
    connection.reuse();
    let Some(Value::Map(items)) = reply.take_field("data") else { return Err(unexpected("data", worker)) };
    let mut data = Vec::with_capacity(items.len());
    for (key, value) in items {
        let key = key.to_key().ok_or_else(|| unexpected("key", worker))?;
        let Value::Payload(payload) = value else { return Err(unexpected("value", worker)) };
        data.push((key, *payload));
    }
    Ok(Answer::Data(data))
}

fn unexpected(what: &str, worker: &Address) -> Failure {
    Exception::builtin("ValueError", format!("Unexpected response: no proper {what} from {worker}")).into()
}

fn remote_error(mut reply: Value) -> Failure {
    let text = |reply: &Value, name| reply.field(name).and_then(Value::as_str).unwrap_or("").into();
    let (exception_text, traceback_text): (Arc<str>, Arc<str>) =
        (text(&reply, "exception_text"), text(&reply, "traceback_text"));
    let traceback = match reply.take_field("traceback") {
        Some(Value::Payload(payload)) => Some(*payload),
        _ => None,
    };
    match reply.take_field("exception") {
        Some(Value::Payload(exception)) => Failure::Answer(Box::new(FetchError {
            exception: *exception,
            traceback,
            exception_text,
            traceback_text,
        })),
        _ => Exception::builtin("Exception", &*exception_text).into(),
    }
}

/// How often network operations are tried again (`distributed.comm.retry`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// Further attempts after the first.
    pub count: u32,
    /// Unit of the pause: none after the first attempt, then this, three times this...
    pub delay_min: Duration,
    /// Longest pause.
    pub delay_max: Duration,
}

impl Default for Retry {
    fn default() -> Self {
        Retry { count: 0, delay_min: Duration::from_secs(1), delay_max: Duration::from_secs(20) }
    }
}

impl Retry {
    /// Runs `attempt` until it succeeds, fails otherwise than by a lost connection, or was tried often enough
    /// (`distributed.utils_comm.retry_operation`).
    ///
    /// # Errors
    /// Those of the last attempt.
    pub async fn run<T, E, F>(
        &self,
        operation: &str,
        is_loss: impl Fn(&E) -> bool,
        mut attempt: impl FnMut() -> F,
    ) -> Result<T, E>
    where
        F: Future<Output = Result<T, E>>,
    {
        for i in 0..self.count {
            match attempt().await {
                Err(error) if is_loss(&error) => {
                    info!("retrying {operation} after attempt {i}/{} failed", self.count);
                    tokio::time::sleep(self.delay(i).mul_f64(1.0 + 0.1 * fastrand::f64())).await;
                }
                done => return done,
            }
        }
        attempt().await
    }

    /// The pause after attempt number `i`, without jitter.
    fn delay(&self, i: u32) -> Duration {
        let factor = 2u32.saturating_pow(i) - 1;
        self.delay_min.saturating_mul(factor).min(self.delay_max)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound() {
        let retry = Retry { count: 9, delay_min: Duration::from_secs(1), delay_max: Duration::from_secs(5) };
        let seconds: Vec<u64> = (0..5).map(|i| retry.delay(i).as_secs()).collect();
        assert_eq!(seconds, [0, 1, 3, 5, 5]);
        assert_eq!(retry.delay(40).as_secs(), 5);
    }

    #[tokio::test]
    async fn only_lost_connections_are_tried_again() {
        let retry = Retry { count: 2, delay_min: Duration::ZERO, ..Retry::default() };
        for (lost, expected) in [(true, 3), (false, 1)] {
            let mut tries = 0;
            let attempt = || {
                tries += 1;
                std::future::ready(Err(lost))
            };
            let result: Result<(), bool> = retry.run("x", |lost| *lost, attempt).await;
            assert_eq!((result, tries), (Err(lost), expected));
        }
    }
}
