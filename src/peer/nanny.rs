//! The ops at a nanny's address. The daemon is its own nanny; the address is one that schedulers and clients expect.
//!
//! Source: `distributed/nanny.py: Nanny`.

use bytes::Bytes;

use super::Failure;
use super::backend::{NannyBackend, Relay, Restarted};
use super::request::{Arguments, Request, Signature};
use super::rpc::logs;
use super::server::{Reply, Service};
use crate::net::Connection;
use crate::proto::{Status, Value};

/// The nanny's side of [`NannyBackend`].
pub(super) struct Nanny<B> {
    pub(super) backend: B,
    pub(super) blocked_handlers: Vec<String>,
}

impl<B: NannyBackend> Service for Nanny<B> {
    const NAME: &'static str = "Nanny";

    fn blocked(&self) -> &[String] {
        &self.blocked_handlers
    }

    fn signature(&self, op: &str) -> Option<Signature> {
        signature(op)
    }

    async fn handle(
        &self,
        op: &str,
        request: Request,
        _connection: &mut Connection,
    ) -> Result<Reply, Failure> {
        let mut arguments = request.arguments;
        let value = match op {
            "identity" => self.backend.identity(),
            "echo" => arguments.take("data").unwrap_or(Value::Nil),
            "dump_state" => self.backend.dump(arguments.optional_keys("exclude")?.unwrap_or_default()).await,
            "get_logs" => logs(&arguments, |start, n| self.backend.logs(start, n))?,
            "instantiate" => enum_value(self.backend.instantiate().await?),
            "kill" => {
                let timeout = arguments.number("timeout", 5.0)?;
                self.backend.kill(timeout, reason(&arguments, "nanny-kill")).await?;
                Value::Nil
            }
            "restart" => {
                let timeout = arguments.number("timeout", 30.0)?;
                self.restart(timeout, reason(&arguments, "nanny-restart")).await?
            }
            "close_gracefully" => {
                self.backend.close_gracefully(reason(&arguments, "nanny-close-gracefully")).await;
                Value::Nil
            }
            "terminate" => {
                let timeout = arguments.number("timeout", 5.0)?;
                self.backend.terminate(timeout, reason(&arguments, "nanny-close")).await;
                return Ok(Reply::HangUp);
            }
            // `signature` knows exactly the names above
            _ => Value::Nil,
        };
        Ok(Reply::Value(value))
    }

    fn relay(&self, request: Relay) -> impl Future<Output = Result<Vec<Bytes>, Failure>> + Send {
        self.backend.relay(request)
    }
}

impl<B: NannyBackend> Nanny<B> {
    /// An exception is an answer here, with the status `error`.
    async fn restart(&self, timeout: f64, reason: String) -> Result<Value, Failure> {
        match self.backend.restart(timeout, reason).await {
            Ok(Restarted::Done) => Ok("OK".into()),
            Ok(Restarted::TimedOut) => Ok("timed out".into()),
            Err(Failure::Exception(exception)) => Ok(exception.error_message("error")),
            Err(failure) => Err(failure),
        }
    }
}

fn reason(arguments: &Arguments, default: &str) -> String {
    arguments.text("reason").unwrap_or(default).to_owned()
}

/// A member of `distributed.core.Status` as msgpack has it (`protocol/serialize.py: msgpack_encode_default`).
fn enum_value(status: Status) -> Value {
    Value::map([
        ("__Enum__", true.into()),
        ("name", status.as_str().into()),
        ("__module__", "distributed.core".into()),
        ("__name__", "Status".into()),
    ])
}

fn signature(op: &str) -> Option<Signature> {
    let (name, optional): (_, &'static [&'static str]) = match op {
        "identity" => ("Server.identity", &[]),
        "echo" => ("Server.echo", &["data"]),
        "dump_state" => ("Server._to_dict", &["exclude"]),
        "get_logs" => ("ServerNode.get_logs", &["start", "n", "timestamps"]),
        "instantiate" => ("Nanny.instantiate", &[]),
        "kill" => ("Nanny.kill", &["timeout", "reason"]),
        "restart" => ("Nanny.restart", &["timeout", "reason"]),
        "close_gracefully" => ("Nanny.close_gracefully", &["reason"]),
        "terminate" => ("Nanny.close", &["timeout", "reason"]),
        _ => return None,
    };
    Some(Signature { name, required: &[], optional })
}
