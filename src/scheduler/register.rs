//! Getting taken in: finds the scheduler, registers, and tries again as long as that makes sense.
//!
//! Source: `distributed/worker.py: Worker._register_with_scheduler`, `distributed/scheduler.py: Scheduler.add_worker`.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::clock::{Clock, now};
use super::session::{Session, keep_alive};
use super::{Config, Error, Identity, Location, Metrics};
use crate::net::{self, Connection, Pool};
use crate::proto::{Address, Status, Value};
use crate::telemetry;

/// Log target of what a stock worker logs too.
const WORKER: &str = "distributed.worker";

/// First upper bound of the random pause between two attempts; doubles up to [`PAUSE_MAX`].
const PAUSE: Duration = Duration::from_millis(100);

/// So many workers may come back at once to a scheduler that was restarted.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Whether the scheduler may still believe in an earlier connection of this worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// The first registration of this process: whoever has our name or address is somebody else.
    First,
    /// After a lost connection, which the scheduler may not have noticed yet.
    Again,
}

/// The scheduler, found and talked to; clones share everything.
#[derive(Clone)]
pub struct Scheduler(Arc<Inner>);

struct Inner {
    config: Config,
    pool: Pool,
    clock: Clock,
    metrics: telemetry::Metrics,
    address: Mutex<Option<Address>>,
}

impl Scheduler {
    /// A scheduler that is contacted over connections of `pool`.
    pub fn new(config: Config, pool: Pool, metrics: telemetry::Metrics) -> Self {
        let clock = Clock::default();
        Scheduler(Arc::new(Inner { config, pool, clock, metrics, address: Mutex::default() }))
    }

    /// Settings it was made with.
    pub fn config(&self) -> &Config {
        &self.0.config
    }

    /// Its clock seen from here.
    pub fn clock(&self) -> &Clock {
        &self.0.clock
    }

    pub(super) fn metrics(&self) -> &telemetry::Metrics {
        &self.0.metrics
    }

    pub(super) fn pool(&self) -> &Pool {
        &self.0.pool
    }

    /// The address of the scheduler that was last tried or taken; `None` before that.
    pub fn address(&self) -> Option<Address> {
        self.0.address.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Finds the scheduler; waits for a scheduler file that is not there yet.
    ///
    /// # Errors
    /// [`Error::DeathTimeout`]
    pub async fn locate(&self) -> Result<Address, Error> {
        self.within_death_timeout(async { Ok(self.resolve().await) }).await
    }

    pub(super) async fn resolve(&self) -> Address {
        let address = self.0.config.location.resolve().await;
        *self.0.address.lock().unwrap_or_else(PoisonError::into_inner) = Some(address.clone());
        address
    }

    pub(super) async fn within_death_timeout<T>(
        &self,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let Some(limit) = self.0.config.death_timeout else { return work.await };
        let location = match &self.0.config.location {
            Location::Address(address) => address.to_string(),
            Location::File(path) => path.display().to_string(),
        };
        timeout(limit, work).await.unwrap_or(Err(Error::DeathTimeout { timeout: limit, location }))
    }

    /// Registers this worker as `init`, waiting for a scheduler as long as the death timeout allows. `metrics` are those of a
    /// worker without tasks. The caller sends [`super::status_change`] to `running` when it can take tasks.
    ///
    /// After a lost connection ([`Attempt::Again`]), a name or address that is taken is waited for: it is ours, and the
    /// scheduler will notice.
    ///
    /// # Errors
    /// [`Error::NameTaken`], [`Error::NotAccepted`], [`Error::Refused`], [`Error::DeathTimeout`]; [`Error::Net`] for what
    /// does not get better by waiting.
    pub async fn register(
        &self,
        identity: &Identity,
        metrics: &Metrics,
        attempt: Attempt,
    ) -> Result<Session, Error> {
        self.within_death_timeout(self.register_until(identity, metrics, attempt)).await
    }

    async fn register_until(
        &self,
        identity: &Identity,
        metrics: &Metrics,
        attempt: Attempt,
    ) -> Result<Session, Error> {
        let mut ceiling = PAUSE;
        if attempt == Attempt::Again {
            sleep(ceiling.mul_f64(fastrand::f64())).await;
        }
        let mut told = None;
        loop {
            let error = match self.register_once(identity, metrics).await {
                Ok(session) => return Ok(session),
                Err(error) => error,
            };
            match &error {
                Error::Net { scheduler, source } if source.is_connection_loss() => {
                    info!(target: WORKER, "Waiting to connect to: {:>26}", scheduler.as_str());
                    tracing::debug!("{}", source.chain());
                }
                Error::NameTaken { .. } | Error::NotAccepted { .. } if attempt == Attempt::Again => {
                    let text = error.to_string();
                    if told.as_ref() != Some(&text) {
                        warn!(target: WORKER, "Waiting for the scheduler to forget the lost connection: {text}");
                        told = Some(text);
                    }
                }
                _ => return Err(error),
            }
            sleep(ceiling.mul_f64(fastrand::f64())).await;
            ceiling = (ceiling * 2).min(PAUSE_MAX);
        }
    }

    async fn register_once(&self, identity: &Identity, metrics: &Metrics) -> Result<Session, Error> {
        let scheduler = self.resolve().await;
        let failed = |source| Error::Net { scheduler: scheduler.clone(), source };
        let mut connection = net::connect(&scheduler, self.0.pool.config()).await.map_err(failed)?;
        let start = now();
        let message = identity.registration(start, Status::Init, metrics.to_value());
        let mut answer = exchange(&mut connection, &message).await.map_err(failed)?;
        accepted(&answer, &scheduler, identity)?;

        let theirs = answer.field("time").and_then(Value::as_f64);
        self.0.clock.observe(start, now(), theirs);
        self.0.metrics.latency.set(self.0.clock.latency());
        self.0.metrics.registrations.inc();
        if let Some(text) = answer.field("warning").and_then(Value::as_str).filter(|text| !text.is_empty()) {
            warn!(target: WORKER, "{text}");
        }
        info!(target: WORKER, "        Registered to: {:>26}", scheduler.as_str());
        info!(target: WORKER, "{}", "-".repeat(49));
        let plugins = match answer.take_field("worker-plugins") {
            Some(Value::Map(plugins)) => plugins,
            _ => Vec::new(),
        };
        Ok(Session::start(self.clone(), scheduler, identity.address.clone(), connection, plugins))
    }
}

/// Sends the registration and reads what comes of it.
///
/// When the scheduler's handler fails (`Worker already exists`), it sends nothing at all, as a registration wants no reply,
/// and waits for the next request. So one follows at once that means nothing on a stream, and as a request is answered
/// with `None`.
async fn exchange(connection: &mut Connection, registration: &Value) -> Result<Value, net::Error> {
    connection.write(registration).await?;
    connection.write(&keep_alive()).await?;
    connection.read().await
}

/// Whether the answer takes us in; else why not.
fn accepted(answer: &Value, scheduler: &Address, identity: &Identity) -> Result<(), Error> {
    let scheduler = scheduler.clone();
    let not_accepted =
        || Error::NotAccepted { scheduler: scheduler.clone(), address: identity.address.clone() };
    let text = |field: &str| answer.field(field).and_then(Value::as_str);
    match (answer, text("status")) {
        (Value::Nil, _) => Err(not_accepted()),
        (_, Some("OK")) => Ok(()),
        (_, Some(_)) => {
            let message = text("message").or(text("exception_text")).unwrap_or("it does not say why");
            if message.contains("Worker already exists") {
                return Err(not_accepted());
            }
            Err(match message.starts_with("name taken") {
                true => Error::NameTaken { scheduler, name: identity.name.clone() },
                false => Error::Refused { scheduler, message: message.to_owned() },
            })
        }
        _ => Err(Error::Answer { scheduler, op: "register-worker", answer: short(answer) }),
    }
}

/// The beginning of an answer, for the log.
pub(super) fn short(answer: &Value) -> String {
    format!("{answer:?}").chars().take(200).collect()
}
