//! The worker's answers to requests at its address: from what is shared, from the driver, or from Python.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::oneshot;

use super::gather::hold;
use super::requests::Command;
use super::shared::Shared;
use crate::exec::{self, Target};
use crate::net;
use crate::peer::{Backend, Failure, Relay, Terminate};
use crate::proto::{Address, Key, Payload, Status, Stimulus, Value};
use crate::scheduler;
use crate::state::{Stored, Subject, TypeInfo};
use crate::telemetry::log::Line;
use crate::wire::payload::Exception;
use crate::wire::{Limits, decode_message};

/// The worker as its peers and clients see it.
pub(super) struct WorkerBackend(pub(super) Arc<Shared>);

impl WorkerBackend {
    /// Sends the driver a command and waits for its answer.
    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Failure> {
        let (reply, answer) = oneshot::channel();
        self.0.command(command(reply));
        answer.await.map_err(|_| not_running())
    }

    fn pool(&self) -> Result<exec::Pool, Failure> {
        self.0.pool().ok_or_else(not_running)
    }
}

pub(super) fn not_running() -> Failure {
    Exception::builtin("RuntimeError", "the worker is not running").into()
}

impl Backend for WorkerBackend {
    fn status(&self) -> Status {
        self.0.status()
    }

    fn identity(&self) -> Value {
        let identity = self.0.identity();
        match self.0.scheduler.address() {
            Some(scheduler) => identity.to_value(&scheduler),
            // requests are served only once the scheduler was found, as our address depends on where it is
            None => Value::Nil,
        }
    }

    async fn versions(&self, packages: Option<Value>) -> Result<Value, Failure> {
        let names = packages.as_ref().and_then(Value::as_list).unwrap_or_default();
        let names: Vec<String> = names.iter().filter_map(|name| Some(name.as_str()?.to_owned())).collect();
        let interpreter = self.0.config.interpreter.clone();
        let versions = tokio::task::spawn_blocking(move || interpreter.versions(&names)).await;
        versions.map_err(|error| Exception::builtin("RuntimeError", error.to_string()).into())
    }

    async fn update_data(
        &self,
        data: Vec<(Key, Payload)>,
        stimulus_id: Arc<str>,
    ) -> Result<Vec<(Key, u64)>, Failure> {
        let mut keys = Vec::with_capacity(data.len());
        let mut objects = Vec::with_capacity(data.len());
        for (key, payload) in data {
            let size = payload.len();
            let object = hold(payload, size, self.0.store.arena()).await;
            objects.push(object.map_err(|error| Exception::builtin("OSError", error.to_string()))?);
            keys.push(key);
        }
        let described = self.pool()?.describe(&objects).await;
        let described = described.map_err(|error| Exception::builtin("RuntimeError", error.to_string()))?;
        let mut sizes = Vec::with_capacity(keys.len());
        let mut entries = Vec::with_capacity(keys.len());
        for ((key, object), description) in keys.into_iter().zip(objects).zip(described) {
            let facts = description.map_err(|text| Exception::builtin("TypeError", text))?;
            let name = facts.typename.into();
            let type_ = Some(TypeInfo { pickled: facts.type_pickled, name });
            let stored = Stored { nbytes: facts.nbytes, type_ };
            sizes.push((key.clone(), facts.nbytes));
            entries.push((key, object.with_nbytes(facts.nbytes), stored));
        }
        self.ask(|done| Command::UpdateData { data: entries, stimulus_id, done }).await?;
        Ok(sizes)
    }

    async fn free_keys(&self, keys: Vec<Key>, stimulus_id: Arc<str>) {
        // a worker without a driver holds nothing
        let _ = self.ask(|done| Command::FreeKeys { keys, stimulus_id, done }).await;
    }

    async fn who_has(&self, keys: Vec<Key>) -> Result<Vec<(Key, Vec<Address>)>, net::Error> {
        match self.0.scheduler.who_has(&keys).await {
            Ok(who_has) => Ok(who_has),
            Err(scheduler::Error::Net { source, .. }) => Err(source),
            // an answer that makes no sense names nobody
            Err(error) => {
                tracing::warn!("{error}");
                Ok(Vec::new())
            }
        }
    }

    async fn actors(&self, _keys: Vec<Key>) -> Vec<(Key, Payload)> {
        Vec::new()
    }

    fn logs(&self, start: f64, n: Option<usize>) -> Vec<Line> {
        self.0.recent.lines("", start, n)
    }

    fn monitor_info(&self, recent: bool, start: u64) -> Value {
        self.0.monitor().info(recent, start)
    }

    async fn call_stacks(&self, keys: Option<Vec<Key>>) -> Result<Value, Failure> {
        let stacks = self.pool()?.call_stacks(keys.as_deref()).await;
        Ok(Value::Map(stacks.iter().map(|(key, lines)| (key.into(), lines.clone().into())).collect()))
    }

    async fn story(&self, keys_or_stimuli: Vec<Key>) -> Value {
        let stimuli = keys_or_stimuli.iter().filter_map(|key| match key {
            Key::Str(text) => Some(Subject::Stimulus(text.clone())),
            _ => None,
        });
        let subjects = keys_or_stimuli.iter().cloned().map(Subject::Key).chain(stimuli).collect();
        self.ask(|reply| Command::Story { subjects, reply }).await.unwrap_or(Value::List(Vec::new()))
    }

    async fn dump(&self, exclude: Vec<Key>) -> Value {
        let state = self.ask(|reply| Command::Dump { reply }).await.unwrap_or(Value::Map(Vec::new()));
        let logs = self
            .logs(0.0, None)
            .into_iter()
            .map(|(_, level, text)| Value::from(vec![level.to_owned(), text]));
        let mut fields = match self.identity() {
            Value::Map(fields) => fields,
            _ => Vec::new(),
        };
        fields.extend([
            ("address".into(), self.0.identity().address.as_str().into()),
            ("status".into(), self.status().as_str().into()),
            ("logs".into(), Value::List(logs.collect())),
            ("transfer_incoming_log".into(), self.0.transfers.incoming_log()),
            ("transfer_outgoing_log".into(), self.0.transfers.outgoing_log()),
        ]);
        if let Value::Map(items) = state {
            fields.extend(items);
        }
        fields.retain(|(name, _)| !name.to_key().is_some_and(|name| exclude.contains(&name)));
        Value::Map(fields)
    }

    async fn stream(&self, stimulus: Stimulus) -> Result<(), Failure> {
        self.0.command(Command::Stream { stimulus });
        Ok(())
    }

    async fn terminate(&self, how: Terminate) {
        // a nanny that is not to leave as well starts another worker
        let command = match how.nanny || self.0.config.nanny.is_none() {
            true => Command::Close { reason: how.reason },
            false => Command::Restart { reason: how.reason, done: oneshot::channel().0 },
        };
        self.0.command(command);
    }

    async fn relay(&self, request: Relay) -> Result<Vec<Bytes>, Failure> {
        let pool = self.pool()?;
        if matches!(request.op.as_deref(), Some("actor_execute" | "actor_attribute"))
            && let Ok(message) = decode_message(request.frames.clone(), &Limits::default())
            && let Some(key) = message.field("actor").and_then(Value::to_key)
        {
            return Ok(pool.actor_request(&key, request.frames).await);
        }
        Ok(pool.service_request(request.frames, Target::Worker).await.frames)
    }
}
