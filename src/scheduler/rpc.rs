//! Requests to the scheduler, and messages for its stream that are not the state machine's.
//!
//! Source: `distributed/worker.py`, `distributed/nanny.py`, handlers of `distributed/scheduler.py`.

use std::sync::Arc;

use super::Error;
use super::clock::now;
use super::register::{Scheduler, short};
use crate::net::{self, Connection};
use crate::proto::{Address, Key, Status, Value};

/// `{"op": "worker-status-change"}` for the stream.
pub fn status_change(status: Status, stimulus_id: &str) -> Value {
    Value::map([
        ("op", "worker-status-change".into()),
        ("status", status.as_str().into()),
        ("stimulus_id", stimulus_id.into()),
    ])
}

/// `{"op": "log-event"}` for the stream (`Worker.log_event`).
pub fn log_event(topic: &str, message: Value) -> Value {
    Value::map([("op", "log-event".into()), ("topic", topic.into()), ("msg", message)])
}

impl Scheduler {
    /// One request and its reply.
    ///
    /// # Errors
    /// [`Error::Unknown`] before a scheduler was found, [`Error::Net`] when it cannot be reached or failed.
    pub async fn request(&self, message: &Value) -> Result<Value, Error> {
        let scheduler = self.address().ok_or(Error::Unknown)?;
        let reply = self.pool().rpc(&scheduler, message).await;
        reply.map_err(|source| Error::Net { scheduler, source })
    }

    /// Which workers hold each key.
    ///
    /// # Errors
    /// As [`Scheduler::request`]; [`Error::Answer`] when the reply is malformed.
    pub async fn who_has(&self, keys: &[Key]) -> Result<Vec<(Key, Vec<Address>)>, Error> {
        let keys = keys.iter().map(Value::from).collect();
        let reply =
            self.request(&Value::map([("op", "who_has".into()), ("keys", Value::List(keys))])).await?;
        let addresses = |workers: &Value| -> Option<Vec<Address>> {
            workers.as_list()?.iter().map(|worker| Address::parse(worker.as_str()?).ok()).collect()
        };
        let pairs = reply.as_map().and_then(|pairs| {
            pairs.iter().map(|(key, workers)| Some((key.to_key()?, addresses(workers)?))).collect()
        });
        pairs.ok_or_else(|| self.unexpected("who_has", &reply))
    }

    /// Asks to be retired: the scheduler moves our data elsewhere and removes us (`Worker.close_gracefully`). Takes as long as that takes.
    ///
    /// # Errors
    /// As [`Scheduler::request`]
    pub async fn retire(&self, worker: &Address) -> Result<(), Error> {
        let request = Value::map([
            ("op", "retire_workers".into()),
            ("workers", Value::List(vec![worker.as_str().into()])),
            ("close_workers", false.into()),
            ("remove", true.into()),
            ("stimulus_id", format!("worker-close-gracefully-{}", now()).into()),
        ]);
        self.request(&request).await.map(drop)
    }

    /// Tells the scheduler that a worker is gone (`Nanny._unregister`).
    ///
    /// # Errors
    /// As [`Scheduler::request`]
    pub async fn unregister(&self, worker: &Address, reason: &str) -> Result<(), Error> {
        let request = Value::map([
            ("op", "unregister".into()),
            ("address", worker.as_str().into()),
            ("stimulus_id", format!("{reason}-{}", now()).into()),
        ]);
        self.request(&request).await.map(drop)
    }

    /// Tells the worker's abstract resources after a change (`Worker.set_resources`).
    ///
    /// # Errors
    /// As [`Scheduler::request`]
    pub async fn set_resources(&self, worker: &Address, resources: &[(Arc<str>, f64)]) -> Result<(), Error> {
        let resources = resources.iter().map(|(name, quantity)| (name.clone().into(), (*quantity).into()));
        let request = Value::map([
            ("op", "set_resources".into()),
            ("resources", Value::Map(resources.collect())),
            ("worker", worker.as_str().into()),
        ]);
        self.request(&request).await.map(drop)
    }

    /// Announces the nanny, before its worker registers (`Nanny.start_unsafe`). Waits for a scheduler like a registration.
    ///
    /// # Errors
    /// [`Error::DeathTimeout`], [`Error::Net`], [`Error::Answer`]
    pub async fn register_nanny(&self, nanny: &Address) -> Result<NannyRegistration, Error> {
        self.within_death_timeout(async {
            loop {
                match self.register_nanny_once(nanny).await {
                    Err(Error::Net { scheduler, source }) if source.is_connection_loss() => {
                        tracing::info!(target: "distributed.nanny", "Waiting to connect to: {:>26}", scheduler.as_str());
                    }
                    outcome => return outcome,
                }
            }
        })
        .await
    }

    async fn register_nanny_once(&self, nanny: &Address) -> Result<NannyRegistration, Error> {
        let scheduler = self.resolve().await;
        let failed = |source| Error::Net { scheduler: scheduler.clone(), source };
        let mut connection = net::connect(&scheduler, self.pool().config()).await.map_err(failed)?;
        let request = Value::map([("op", "register_nanny".into()), ("address", nanny.as_str().into())]);
        let mut answer = connection.request(&request).await.map_err(failed)?;
        match answer.take_field("nanny-plugins") {
            Some(Value::Map(plugins)) => Ok(NannyRegistration { plugins, connection }),
            _ => Err(self.unexpected("register_nanny", &answer)),
        }
    }

    fn unexpected(&self, op: &'static str, answer: &Value) -> Error {
        match self.address() {
            Some(scheduler) => Error::Answer { scheduler, op, answer: short(answer) },
            None => Error::Unknown,
        }
    }
}

/// A nanny that the scheduler waits for: new nanny plugins go to it only once it says that it is up.
pub struct NannyRegistration {
    /// The nanny plugins to set up: name and pickle.
    pub plugins: Vec<(Value, Value)>,
    connection: Connection,
}

impl NannyRegistration {
    /// Says that the nanny is up, or that it is not going to be.
    ///
    /// # Errors
    /// The connection's; the scheduler then takes the nanny for gone, which harms nobody.
    pub async fn finish(mut self, up: bool) -> Result<(), net::Error> {
        let status = if up { "ok" } else { "error" };
        self.connection.write(&Value::map([("status", status.into())])).await.map(drop)
    }
}
