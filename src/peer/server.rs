//! The loop behind an address: requests are answered one after the other on each connection.
//!
//! Knows ops by name only as far as every server has them; what they do is a [`Service`]'s business.
//!
//! Source: `distributed/core.py: Server._handle_comm, handle_stream`.

use std::sync::Arc;

use bytes::Bytes;
use tracing::{debug, warn};

use super::Failure;
use super::backend::Relay;
use super::request::{NoRequest, Request, Signature};
use crate::net::{self, Connection, Listener};
use crate::proto::Value;
use crate::wire::payload::Exception;

/// What follows a request.
pub(super) enum Reply {
    /// This answer.
    Value(Value),
    /// This answer, encoded already.
    Frames(Vec<Bytes>),
    /// Nothing; the handler has said everything.
    Nothing,
    /// Nothing either; the handler has read the next request already.
    Overtaken(Vec<Bytes>),
    /// The end of the connection.
    HangUp,
}

/// A set of ops.
pub(super) trait Service: Send + Sync + 'static {
    /// Name of the Python class this stands for.
    const NAME: &'static str;

    /// Ops that the configuration forbids.
    fn blocked(&self) -> &[String];

    /// What an op takes; `None` for ops that are not ours.
    fn signature(&self, op: &str) -> Option<Signature>;

    /// Answers an op of ours, whose arguments have the right names.
    fn handle(
        &self,
        op: &str,
        request: Request,
        connection: &mut Connection,
    ) -> impl Future<Output = Result<Reply, Failure>> + Send;

    /// Answers any other op.
    fn relay(&self, request: Relay) -> impl Future<Output = Result<Vec<Bytes>, Failure>> + Send;
}

/// Serves for ever. Dropped, it closes the listener and all connections.
pub(super) async fn serve<S: Service>(listener: Listener, service: Arc<S>) {
    let converse = move |connection| {
        let service = service.clone();
        async move { converse(connection, &*service).await }
    };
    listener.run(converse).await;
}

/// Why a conversation ended other than by the peer's leaving.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error(transparent)]
    Net(#[from] net::Error),
    #[error(transparent)]
    NoRequest(#[from] NoRequest),
}

async fn converse<S: Service>(mut connection: Connection, service: &S) {
    let peer = connection.peer_address().clone();
    match requests(&mut connection, service).await {
        Ok(()) => {}
        Err(End::NoRequest(error)) => warn!("closing connection from {peer}: {error}"),
        Err(End::Net(error)) if error.is_misbehaviour() => {
            warn!("closing connection from {peer}: {}", error.chain());
        }
        Err(End::Net(error)) => debug!("lost connection from {peer}: {}", error.chain()),
    }
}

/// Answers requests until either side ends the connection.
async fn requests<S: Service>(connection: &mut Connection, service: &S) -> Result<(), End> {
    let mut next = connection.next_request().await?;
    while let Some(frames) = next {
        let message = connection.decode(frames.clone()).await?;
        let request = Request::parse(message, frames, connection.peer_address().clone())?;
        let (wants_reply, close) = (request.reply, request.close);
        if request.op.as_deref() == Some("close") {
            if wants_reply {
                connection.write(&"OK".into()).await?;
            }
            return Ok(());
        }
        let reply = match answer(service, request, connection).await {
            Ok(reply) => reply,
            Err(Failure::Connection(error)) => return Err(error.into()),
            Err(failure) => Reply::Value(error_reply(failure)),
        };
        let mut overtaken = None;
        match reply {
            Reply::HangUp => return Ok(()),
            Reply::Overtaken(frames) => overtaken = Some(frames),
            Reply::Value(value) if wants_reply => _ = connection.write(&value).await?,
            Reply::Frames(frames) if wants_reply => _ = connection.write_frames(&frames).await?,
            Reply::Value(_) | Reply::Frames(_) | Reply::Nothing => {}
        }
        if close {
            return Ok(());
        }
        next = match overtaken {
            Some(frames) => Some(frames),
            None => connection.next_request().await?,
        };
    }
    Ok(())
}

async fn answer<S: Service>(
    service: &S,
    request: Request,
    connection: &mut Connection,
) -> Result<Reply, Failure> {
    let op = request.op.clone().unwrap_or_default();
    if service.blocked().contains(&op) {
        let text = format!(
            "The '{op}' handler has been explicitly disallowed in {}, possibly due to security concerns.",
            S::NAME
        );
        return Err(Exception::builtin("ValueError", text).into());
    }
    let result = match service.signature(&op) {
        Some(signature) => match signature.check(&request.arguments) {
            Ok(()) => service.handle(&op, request, connection).await,
            Err(exception) => Err(exception.into()),
        },
        None => {
            let relay = Relay { op: request.op, frames: request.frames, peer: request.peer };
            service.relay(relay).await.map(Reply::Frames)
        }
    };
    if let Err(Failure::Exception(exception)) = &result {
        warn!("op {op:?} from {} failed: {}", connection.peer_address(), exception.text());
    }
    result
}

/// `error_message(e, status="uncaught-error")`.
fn error_reply(failure: Failure) -> Value {
    const STATUS: &str = "uncaught-error";
    match failure {
        Failure::Exception(exception) => exception.error_message(STATUS),
        Failure::Remote(error) => Value::map([
            ("status", STATUS.into()),
            ("exception", error.exception.into()),
            ("traceback", error.traceback.into()),
            ("exception_text", error.exception_text.into()),
            ("traceback_text", error.traceback_text.into()),
        ]),
        // whoever asked is gone; nobody reads this
        Failure::Connection(error) => Exception::builtin("OSError", error.chain()).error_message(STATUS),
    }
}
