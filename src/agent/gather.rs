//! Transfers from peers: fetches, and makes what came into objects that runners can map.
//!
//! Runs beside the driver; what comes of it is the driver's to judge.

use std::sync::Arc;

use rustc_hash::FxHashMap;

use crate::net;
use crate::peer::{self, FetchError, FetchResult, Received, Transfers};
use crate::proto::{Key, Payload};
use crate::state::ErrorMessage;
use crate::store::{self, Arena, Object};
use crate::telemetry;
use crate::wire::payload::Exception;

/// Payloads from this size on, in bytes, are moved to shared memory on a thread of their own.
const OFFLOAD_MIN: u64 = 1 << 20;

/// What became of a transfer.
#[derive(Debug)]
pub(super) enum Outcome {
    /// These arrived.
    Success { data: Vec<(Key, Object)>, received: Option<Received> },
    /// The peer serves too many others now.
    Busy,
    /// The peer, or the way to it, is gone.
    NetworkFailure(net::Error),
    /// Anything else.
    Failure(ErrorMessage),
}

/// Fetches from a peer.
pub(super) async fn fetch(
    pool: &net::Pool,
    transfers: &Transfers,
    arena: &Arena,
    request: peer::Request,
) -> Outcome {
    match peer::fetch(pool, transfers, &request).await {
        FetchResult::Success { data, received } => match hold_all(data, &request.keys, arena).await {
            Ok(data) => Outcome::Success { data, received },
            Err(error) => Outcome::Failure(failure(&error)),
        },
        FetchResult::Busy => Outcome::Busy,
        FetchResult::NetworkFailure(error) => Outcome::NetworkFailure(error),
        FetchResult::Error(error) => Outcome::Failure(error.into()),
    }
}

/// Makes objects of what a peer sent; `sizes` are the scheduler's, by `sizeof`.
async fn hold_all(
    data: Vec<(Key, Payload)>,
    sizes: &[(Key, u64)],
    arena: &Arena,
) -> Result<Vec<(Key, Object)>, store::Error> {
    let sizes: FxHashMap<&Key, u64> = sizes.iter().map(|(key, nbytes)| (key, *nbytes)).collect();
    let mut objects = Vec::with_capacity(data.len());
    for (key, payload) in data {
        let nbytes = sizes.get(&key).copied().unwrap_or_else(|| payload.len());
        objects.push((key, hold(payload, nbytes, arena).await?));
    }
    Ok(objects)
}

/// Makes an object of a payload, large ones off the driver's thread.
///
/// # Errors
/// [`store::Error`] when there is no shared memory for it.
pub(super) async fn hold(payload: Payload, nbytes: u64, arena: &Arena) -> Result<Object, store::Error> {
    if payload.len() < OFFLOAD_MIN {
        return Object::from_payload(payload, nbytes, arena);
    }
    let arena = arena.clone();
    let copy = tokio::task::spawn_blocking(move || Object::from_payload(payload, nbytes, &arena));
    // the copy neither panics nor is it cancelled while the runtime lives, and with the runtime all ends
    copy.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

/// An error of ours as a task's failure.
pub(super) fn failure(error: &dyn std::error::Error) -> ErrorMessage {
    raised("OSError", telemetry::chain(error))
}

/// A builtin exception as a task's failure.
pub(super) fn raised(name: &'static str, text: impl Into<String>) -> ErrorMessage {
    FetchError::from(Exception::builtin(name, text.into())).into()
}

impl From<FetchError> for ErrorMessage {
    fn from(error: FetchError) -> Self {
        ErrorMessage {
            exception: Arc::new(error.exception),
            traceback: error.traceback.map(Arc::new),
            exception_text: error.exception_text,
            traceback_text: error.traceback_text,
        }
    }
}
