//! The nanny's answers at its address: the daemon is its own nanny, whose worker can end and begin anew inside it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;

use super::backend::not_running;
use super::requests::Command;
use super::shared::Shared;
use crate::exec::Target;
use crate::peer::{Failure, NannyBackend, Relay, Restarted};
use crate::proto::{Key, Status, Value};
use crate::telemetry::log::Line;
use crate::wire::payload::Exception;

/// Seconds that a restart for a plugin's sake is waited for (`Nanny.restart`).
const RESTART_TIMEOUT: f64 = 30.0;

/// The daemon in its nanny's role.
pub(super) struct Nanny {
    pub(super) shared: Arc<Shared>,
    /// `Nanny-<uuid>`
    pub(super) id: Arc<str>,
}

impl Nanny {
    /// Sends the driver a command and waits for it to be done, at most `timeout` seconds. False when that is too short.
    async fn order(
        &self,
        timeout: f64,
        command: impl FnOnce(oneshot::Sender<()>) -> Command,
    ) -> Result<bool, Failure> {
        let (done, answer) = oneshot::channel();
        self.shared.command(command(done));
        let limit = Duration::try_from_secs_f64(timeout).unwrap_or(Duration::MAX);
        match tokio::time::timeout(limit, answer).await {
            Ok(Ok(())) => Ok(true),
            Ok(Err(_)) => Err(not_running()),
            Err(_) => Ok(false),
        }
    }
}

impl NannyBackend for Nanny {
    fn identity(&self) -> Value {
        Value::map([("type", "Nanny".into()), ("id", self.id.clone().into())])
    }

    async fn dump(&self, exclude: Vec<Key>) -> Value {
        let Value::Map(mut fields) = self.identity() else { return Value::Nil };
        fields.push(("worker_address".into(), self.shared.identity().address.as_str().into()));
        fields.retain(|(name, _)| !name.to_key().is_some_and(|name| exclude.contains(&name)));
        Value::Map(fields)
    }

    fn logs(&self, start: f64, n: Option<usize>) -> Vec<Line> {
        self.shared.recent.lines("distributed.nanny", start, n)
    }

    async fn instantiate(&self) -> Result<Status, Failure> {
        self.order(f64::INFINITY, |done| Command::Instantiate { done }).await?;
        Ok(Status::Running)
    }

    async fn kill(&self, timeout: f64, reason: String) -> Result<(), Failure> {
        match self.order(timeout, |done| Command::Kill { reason, done }).await? {
            true => Ok(()),
            false => Err(Exception::builtin("TimeoutError", format!("not down after {timeout} s")).into()),
        }
    }

    async fn restart(&self, timeout: f64, reason: String) -> Result<Restarted, Failure> {
        let done = self.order(timeout, |done| Command::Restart { reason, done }).await?;
        Ok(if done { Restarted::Done } else { Restarted::TimedOut })
    }

    async fn close_gracefully(&self, reason: String) {
        self.shared.command(Command::CloseGracefully { reason, restart: false });
    }

    async fn terminate(&self, _timeout: f64, reason: String) {
        self.shared.command(Command::Close { reason });
    }

    async fn relay(&self, request: Relay) -> Result<Vec<Bytes>, Failure> {
        let pool = self.shared.pool().ok_or_else(not_running)?;
        let reply = pool.service_request(request.frames, Target::Nanny).await;
        if let Some(reason) = reply.restart {
            // as in Dask, a worker that takes longer is not waited for
            self.order(RESTART_TIMEOUT, |done| Command::Restart { reason, done }).await?;
        }
        Ok(reply.frames)
    }
}
