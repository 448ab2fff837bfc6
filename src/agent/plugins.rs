//! Plugins that the scheduler sends with a registration: set up in the service process before the first task.
//!
//! Those registered later come as requests, and go there as any request that only Python answers.

use std::sync::Arc;

use tracing::warn;

use super::Error;
use super::driver::{NANNY, WORKER};
use super::shared::Shared;
use crate::exec::{Pool, Target};
use crate::proto::{Address, Value};
use crate::scheduler::NannyRegistration;
use crate::wire::{Compression, encode_message};

/// The plugin that a scheduler sends to each worker. Until the first shuffle it does nothing.
const SHUFFLE: &str = "shuffle";

/// The worker's nanny, as the scheduler knows it.
pub(super) struct Role {
    pub(super) address: Address,
    /// `Nanny-<uuid>`
    pub(super) id: Arc<str>,
    /// Whether the scheduler knows it. It is told once: while it waits for a nanny to do what a plugin wants, it takes
    /// no other.
    known: bool,
    /// It was told, and waits to hear that the worker is up.
    announced: Option<NannyRegistration>,
}

impl Role {
    pub(super) fn new(address: Address, id: Arc<str>) -> Self {
        Role { address, id, known: false, announced: None }
    }

    /// The scheduler is gone.
    pub(super) fn forget(&mut self) {
        (self.known, self.announced) = (false, None);
    }

    /// Tells the scheduler, and sets up the plugins it has for nannies.
    pub(super) async fn announce(&mut self, shared: &Shared, pool: &Pool) -> Result<(), Error> {
        if self.known {
            return Ok(());
        }
        let mut announced = shared.scheduler.register_nanny(&self.address).await?;
        self.known = true;
        for (name, plugin) in std::mem::take(&mut announced.plugins) {
            add(pool, Target::Nanny, name, plugin).await;
        }
        self.announced = Some(announced);
        Ok(())
    }

    pub(super) fn take_announcement(&mut self) -> Option<NannyRegistration> {
        self.announced.take()
    }
}

/// Sets worker plugins up.
pub(super) async fn set_up(pool: &Pool, plugins: Vec<(Value, Value)>) {
    for (name, plugin) in plugins {
        match plugin {
            Value::Bytes(pickle) if name.as_str() == Some(SHUFFLE) => pool.add_plugin_lazily(name, pickle),
            plugin => add(pool, Target::Worker, name, plugin).await,
        }
    }
}

/// Has the service process set a plugin up. One that fails has said so in the log, as with a stock worker.
async fn add(pool: &Pool, target: Target, name: Value, plugin: Value) {
    let op = match target {
        Target::Worker => "plugin-add",
        Target::Nanny => "plugin_add",
    };
    let message = Value::map([("op", op.into()), ("plugin", plugin), ("name", name)]);
    match encode_message(&message, Compression::None) {
        // a restart that it wants is of no use before the worker has registered
        Ok(frames) => drop(pool.service_request(frames, target).await),
        Err(error) => warn!(target: WORKER, %error, "a plugin of the scheduler's cannot be set up"),
    }
}

/// Tells the scheduler that the nanny's worker is there.
pub(super) async fn up(announced: NannyRegistration) {
    if let Err(error) = announced.finish(true).await {
        warn!(target: NANNY, "could not tell the scheduler that the nanny is up: {}", error.chain());
    }
}
