//! The service process at the daemon: forked when first needed, asked by number, replaced when needed after its death.

use std::sync::Arc;

use bytes::Bytes;
use rustc_hash::FxHashMap;
use tokio::sync::oneshot;

use super::Error;
use super::ipc::{self, Description, FromChild, Outgoing, Role, Target, ToChild};
use super::link::{Inbox, Incoming, Link};
use super::object::Segments;
use super::pool::{Shared, State};
use super::slot;
use super::verdict::Cause;
use crate::proto::Value;
use crate::store::Object;
use crate::sys;
use crate::telemetry;
use crate::wire::payload::Exception;
use crate::wire::{Compression, encode_message};

/// The service process of now, if there is one.
#[derive(Debug, Default)]
pub(super) struct Service {
    process: Option<Alive>,
}

#[derive(Debug)]
struct Alive {
    child: u64,
    pid: Option<u32>,
    link: Link,
    waiting: FxHashMap<u64, oneshot::Sender<Result<Answer, Error>>>,
}

/// What it answered.
#[derive(Debug)]
enum Answer {
    Reply(Vec<Bytes>),
    Described(Vec<Result<Description, String>>),
}

impl Service {
    pub(super) fn pid(&self) -> Option<u32> {
        self.process.as_ref()?.pid
    }

    pub(super) fn configure(&self, info: &Value) {
        if let Some(alive) = &self.process
            && let Ok(message) = Outgoing::new(&ToChild::Configure(info), Vec::new())
        {
            alive.link.send(message);
        }
    }

    fn end(&mut self, cause: &Cause) {
        let Some(alive) = self.process.take() else { return };
        for (_, waiting) in alive.waiting {
            let _ = waiting.send(Err(Error::ServiceDied { cause: cause.clone() }));
        }
    }
}

impl State {
    /// The service process, forked if there is none.
    fn service(&mut self, shared: &Arc<Shared>) -> Result<&mut Alive, Error> {
        if self.stopping {
            return Err(Error::Stopping);
        }
        let alive = match self.service.process.take() {
            Some(alive) => alive,
            None => self.fork_service(shared)?,
        };
        Ok(self.service.process.insert(alive))
    }

    fn fork_service(&mut self, shared: &Arc<Shared>) -> Result<Alive, Error> {
        if !self.zygote.is_there() {
            let text = "the interpreter is not running".into();
            return Err(Error::ServiceDied { cause: Cause::NotForked { text } });
        }
        let child = self.new_id();
        let sys = |source| Error::Sys { what: "connect the service process", source };
        let (ours, theirs) = sys::socket_pair().map_err(sys)?;
        let (pipes, out, err) = slot::pipes()?;
        let link = Link::new(ours).map_err(sys)?;
        self.zygote.send(&ToChild::Fork { child, role: Role::Service }, vec![theirs, out, err]);
        let alive = Alive { child, pid: None, link, waiting: FxHashMap::default() };
        if let Some(info) = &self.info
            && let Ok(message) = Outgoing::new(&ToChild::Configure(info), Vec::new())
        {
            alive.link.send(message);
        }
        tokio::spawn(serve(shared.clone(), child, Inbox::new(&alive.link)));
        for pipe in pipes {
            let whose = |shared: &Shared, _: &str| Some((shared.state().service.pid(), None));
            tokio::spawn(slot::log_output(shared.clone(), pipe, whose));
        }
        Ok(alive)
    }
}

impl Shared {
    /// Sends a question and waits for its answer.
    async fn ask<'a>(self: &Arc<Self>, question: impl FnOnce(u64) -> ToChild<'a>) -> Result<Answer, Error> {
        let (sender, receiver) = oneshot::channel();
        {
            let mut state = self.state();
            let request = state.new_id();
            let alive = state.service(self)?;
            let message = Outgoing::new(&question(request), Vec::new()).map_err(|error| {
                let text = telemetry::chain(&error);
                Error::ServiceDied { cause: Cause::Nonsense { text } }
            })?;
            alive.waiting.insert(request, sender);
            alive.link.send(message);
        }
        receiver.await.unwrap_or(Err(Error::Stopping))
    }

    pub(super) async fn service_request(self: &Arc<Self>, frames: Vec<Bytes>, target: Target) -> Vec<Bytes> {
        let answer = self.ask(|request| ToChild::Request { request, target, frames: &frames }).await;
        let error = match answer {
            Ok(Answer::Reply(frames)) => return frames,
            Ok(Answer::Described(_)) => "the service process gave the wrong answer".into(),
            Err(error) => telemetry::chain(&error),
        };
        let reply = Exception::builtin("RuntimeError", error).error_message("uncaught-error");
        // a short error message breaks no limit
        encode_message(&reply, Compression::None).unwrap_or_default()
    }

    pub(super) async fn describe(
        self: &Arc<Self>,
        objects: &[Object],
    ) -> Result<Vec<Result<Description, String>>, Error> {
        match self.ask(|request| ToChild::Describe { request, objects }).await? {
            Answer::Described(described) if described.len() == objects.len() => Ok(described),
            _ => {
                let text = "it gave the wrong answer".into();
                Err(Error::ServiceDied { cause: Cause::Nonsense { text } })
            }
        }
    }

    /// Whether a forked child is the service, which is noted.
    pub(super) fn service_forked(&self, child: u64, pid: u32) -> bool {
        let mut state = self.state();
        match &mut state.service.process {
            Some(alive) if alive.child == child => {
                alive.pid = Some(pid);
                true
            }
            _ => false,
        }
    }

    /// Whether an ended child is the service: then its questions have no answers.
    pub(super) fn service_ended(&self, child: u64, cause: &Cause) -> bool {
        let mut state = self.state();
        let is_service = state.service.process.as_ref().is_some_and(|alive| alive.child == child);
        if is_service {
            let pid = state.service.pid();
            state.service.end(cause);
            tracing::warn!(pid, "the service process {cause}");
        }
        is_service
    }

    /// The service died with the zygote.
    pub(super) fn service_lost(&self) {
        self.state().service.end(&Cause::ZygoteLost);
    }

    fn service_says(&self, child: u64, message: Incoming) -> Result<(), ipc::Error> {
        let segments = Segments::map(message.fds)?;
        let (request, answer) = match ipc::parse(&message.bytes)? {
            FromChild::Reply { request, frames } => (request, Answer::Reply(segments.frames(frames)?)),
            FromChild::Described { request, objects } => (request, Answer::Described(objects)),
            other => return self.user_says(other, &segments),
        };
        let mut state = self.state();
        if let Some(alive) = state.service.process.as_mut().filter(|alive| alive.child == child)
            && let Some(waiting) = alive.waiting.remove(&request)
        {
            let _ = waiting.send(Ok(answer));
        }
        Ok(())
    }
}

/// Reads the service's answers until it is gone.
async fn serve(shared: Arc<Shared>, child: u64, mut inbox: Inbox) {
    loop {
        let result = match inbox.receive().await {
            Ok(Some(message)) => {
                shared.service_says(child, message).map_err(|error| telemetry::chain(&error))
            }
            // the zygote reports how it ended
            Ok(None) => return,
            Err(error) => Err(telemetry::chain(&error)),
        };
        if let Err(text) = result {
            // closing the connection ends it
            shared.service_ended(child, &Cause::Nonsense { text });
            return;
        }
    }
}
