//! Actors: objects that stay in the runner that made them, each in one of its own, and the calls of their methods.
//!
//! What others hold of an actor is a handle, which is an object like any other. Calls come as requests to the worker.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytes::Bytes;
use rustc_hash::FxHashMap;
use tokio::sync::oneshot;

use super::ipc::{self, Outgoing, RawFrame, Target, ToChild};
use super::object::Segments;
use super::pool::{Shared, State};
use super::verdict::Cause;
use crate::proto::{Key, Value};
use crate::telemetry;
use crate::wire::payload::{Exception, pickled_object};
use crate::wire::{Compression, encode_message};

/// Actors by key, and questions they have not answered.
#[derive(Debug, Default)]
pub(super) struct Actors {
    runners: FxHashMap<Key, u64>,
    /// Those whose runner died, and what it died of.
    dead: FxHashMap<Key, String>,
    /// By the question's number: whom was asked, and who waits.
    waiting: FxHashMap<u64, (u64, oneshot::Sender<Vec<Bytes>>)>,
}

impl State {
    /// A runner has made an actor.
    pub(super) fn holds_actor(&mut self, id: u64, key: &Key) {
        if let Some(runner) = self.runners.get_mut(&id) {
            runner.actor = Some(key.clone());
            self.actors.dead.remove(key);
            if let Some(former) = self.actors.runners.insert(key.clone(), id) {
                self.retire(former);
            }
        }
    }

    /// A runner with an actor is dead.
    pub(super) fn actor_died(&mut self, id: u64, key: Key, cause: &Cause) {
        self.actors.waiting.retain(|_, (asked, _)| *asked != id);
        if self.actors.runners.get(&key) == Some(&id) {
            self.actors.runners.remove(&key);
            self.actors.dead.insert(key, format!("its process {cause}"));
        }
    }

    pub(super) fn drop_actor(&mut self, key: &Key) {
        if self.actors.runners.is_empty() && self.actors.dead.is_empty() {
            return;
        }
        self.actors.dead.remove(key);
        if let Some(id) = self.actors.runners.remove(key) {
            self.retire(id);
        }
    }

    /// Asks the runner that has the actor.
    fn ask_actor(&mut self, key: &Key, frames: &[Bytes]) -> Result<oneshot::Receiver<Vec<Bytes>>, String> {
        let Some(&id) = self.actors.runners.get(key) else {
            let why = self.actors.dead.get(key);
            return Err(why.cloned().unwrap_or_else(|| "this worker does not have it".into()));
        };
        let request = self.new_id();
        let question = ToChild::Request { request, target: Target::Worker, frames };
        let question = Outgoing::new(&question, Vec::new()).map_err(|error| telemetry::chain(&error))?;
        let (sender, receiver) = oneshot::channel();
        if let Some(runner) = self.runners.get(&id) {
            self.actors.waiting.insert(request, (id, sender));
            runner.control.send(question);
        }
        Ok(receiver)
    }
}

impl Shared {
    pub(super) async fn actor_request(self: &Arc<Self>, key: &Key, frames: Vec<Bytes>) -> Vec<Bytes> {
        let asked = self.state().ask_actor(key, &frames);
        let why = match asked {
            Ok(answer) => match answer.await {
                Ok(frames) => return frames,
                Err(_) => {
                    let state = self.state();
                    state.actors.dead.get(key).cloned().unwrap_or_else(|| "it was released".into())
                }
            },
            Err(text) => text,
        };
        // callers of actors open this answer themselves: nothing is raised for them
        let error = Exception::builtin("RuntimeError", format!("Actor {key:?} was lost: {why}"));
        let exception = pickled_object(error.pickle(), Vec::new());
        let reply = Value::map([("status", "error".into()), ("exception", exception.into())]);
        // a short error message breaks no limit
        encode_message(&reply, Compression::None).unwrap_or_default()
    }

    pub(super) fn actor_answered(
        &self,
        request: u64,
        frames: Vec<RawFrame>,
        fds: Vec<OwnedFd>,
    ) -> Result<(), ipc::Error> {
        let frames = Segments::map(fds)?.frames(frames)?;
        if let Some((_, waiting)) = self.state().actors.waiting.remove(&request) {
            // whoever asked may have given up
            let _ = waiting.send(frames);
        }
        Ok(())
    }
}
