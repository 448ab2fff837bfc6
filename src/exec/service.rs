//! The service process at the daemon: forked when first needed, asked by number, replaced when needed after its death.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rustc_hash::FxHashMap;
use tokio::sync::oneshot;

use super::ipc::{self, Description, FromChild, Outgoing, Role, Target, ToChild};
use super::link::{Inbox, Incoming, Link};
use super::object::Segments;
use super::pool::{Shared, State};
use super::slot;
use super::verdict::Cause;
use super::{Error, Event, ServiceReply};
use crate::proto::Value;
use crate::store::Object;
use crate::sys;
use crate::telemetry;
use crate::wire::payload::Exception;
use crate::wire::{Compression, Limits, decode_message, encode_message};

/// How long plugins may take to say what they have for a heartbeat.
const BEAT_TIMEOUT: Duration = Duration::from_millis(500);

/// The service process of now, if there is one.
#[derive(Debug, Default)]
pub(super) struct Service {
    process: Option<Alive>,
}

#[derive(Debug)]
pub(super) struct Alive {
    child: u64,
    pid: Option<u32>,
    link: Link,
    waiting: FxHashMap<u64, oneshot::Sender<Result<Answer, Error>>>,
    /// It has set up its plugins.
    ready: bool,
    /// It holds what cannot be made again.
    held: bool,
    /// It was told to end.
    leaving: bool,
}

/// What it answered.
#[derive(Debug)]
enum Answer {
    Reply(ServiceReply),
    Returned(Bytes, Vec<OwnedFd>),
    Described(Vec<Result<Description, String>>),
}

impl Service {
    pub(super) fn pid(&self) -> Option<u32> {
        self.process.as_ref()?.pid
    }

    pub(super) fn configure(&self, info: &Value) {
        self.send(&ToChild::Configure(info));
    }

    pub(super) fn is_there(&self) -> bool {
        self.process.is_some()
    }

    /// Tells it something, if it is there.
    pub(super) fn send(&self, message: &ToChild<'_>) {
        if let Some(alive) = &self.process {
            alive.tell(message);
        }
    }

    /// Its plugins are set up; whether it holds what cannot be made again.
    pub(super) fn holds(&mut self, held: bool) {
        if let Some(alive) = &mut self.process {
            alive.ready = true;
            alive.held = held;
        }
    }

    /// Has it tear its plugins down and end.
    pub(super) fn leave(&mut self, nanny: bool) {
        if let Some(alive) = &mut self.process {
            alive.leaving = true;
            alive.tell(&ToChild::Leave { nanny });
        }
    }

    fn end(&mut self, cause: &Cause) {
        let Some(alive) = self.process.take() else { return };
        for (_, waiting) in alive.waiting {
            let _ = waiting.send(Err(Error::ServiceDied { cause: cause.clone() }));
        }
    }
}

impl Alive {
    pub(super) fn tell(&self, message: &ToChild<'_>) {
        match Outgoing::new(message, Vec::new()) {
            Ok(message) => self.link.send(message),
            Err(error) => tracing::warn!(%error, "the service process could not be told something"),
        }
    }
}

impl State {
    /// The service process, forked if there is none.
    pub(super) fn service(&mut self, shared: &Arc<Shared>) -> Result<&mut Alive, Error> {
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
        let waiting = FxHashMap::default();
        let alive = Alive { child, pid: None, link, waiting, ready: false, held: false, leaving: false };
        if let Some(info) = &self.info {
            alive.tell(&ToChild::Configure(info));
        }
        for (target, plugins) in [(Target::Nanny, &self.nanny.plugins), (Target::Worker, &self.plugins)] {
            if !plugins.is_empty() {
                alive.tell(&ToChild::Plugins { target, plugins });
            }
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
    async fn ask<'a>(
        self: &Arc<Self>,
        question: impl FnOnce(u64) -> ToChild<'a>,
        fds: Vec<OwnedFd>,
    ) -> Result<Answer, Error> {
        let (sender, receiver) = oneshot::channel();
        {
            let mut state = self.state();
            let request = state.new_id();
            let alive = state.service(self)?;
            let message = Outgoing::new(&question(request), fds).map_err(|error| {
                let text = telemetry::chain(&error);
                Error::ServiceDied { cause: Cause::Nonsense { text } }
            })?;
            alive.waiting.insert(request, sender);
            alive.link.send(message);
        }
        receiver.await.unwrap_or(Err(Error::Stopping))
    }

    pub(super) async fn service_request(
        self: &Arc<Self>,
        frames: Vec<Bytes>,
        target: Target,
    ) -> ServiceReply {
        let question = |request| ToChild::Request { request, target, frames: &frames };
        let error = match self.ask(question, Vec::new()).await {
            Ok(Answer::Reply(reply)) => return reply,
            Ok(_) => "the service process gave the wrong answer".into(),
            Err(error) => telemetry::chain(&error),
        };
        let reply = Exception::builtin("RuntimeError", error).error_message("uncaught-error");
        // a short error message breaks no limit
        let frames = encode_message(&reply, Compression::None).unwrap_or_default();
        ServiceReply { frames, restart: None }
    }

    /// A runner's call, answered with a body and descriptors that nobody but Python understands.
    pub(super) async fn ask_call(
        self: &Arc<Self>,
        body: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Result<(Bytes, Vec<OwnedFd>), Error> {
        match self.ask(|request| ToChild::Call { request, body }, fds).await? {
            Answer::Returned(body, fds) => Ok((body, fds)),
            _ => Err(wrong_answer()),
        }
    }

    /// What plugins have for the heartbeat; nothing if they take too long.
    pub(super) async fn beat(self: &Arc<Self>) -> Value {
        let asked = self.ask(|request| ToChild::Beat { request }, Vec::new());
        match tokio::time::timeout(BEAT_TIMEOUT, asked).await {
            Ok(Ok(Answer::Reply(reply))) => {
                decode_message(reply.frames, &Limits::default()).unwrap_or_default()
            }
            _ => Value::Nil,
        }
    }

    pub(super) async fn describe(
        self: &Arc<Self>,
        objects: &[Object],
    ) -> Result<Vec<Result<Description, String>>, Error> {
        match self.ask(|request| ToChild::Describe { request, objects }, Vec::new()).await? {
            Answer::Described(described) if described.len() == objects.len() => Ok(described),
            _ => Err(wrong_answer()),
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
    pub(super) fn service_ended(self: &Arc<Self>, child: u64, cause: &Cause) -> bool {
        let mut state = self.state();
        let is_service = state.service.process.as_ref().is_some_and(|alive| alive.child == child);
        if is_service {
            self.bury_service(&mut state, cause);
        }
        is_service
    }

    /// The service died with the zygote.
    pub(super) fn service_lost(self: &Arc<Self>) {
        let mut state = self.state();
        if state.service.is_there() {
            self.bury_service(&mut state, &Cause::ZygoteLost);
        }
    }

    fn bury_service(self: &Arc<Self>, state: &mut State, cause: &Cause) {
        let Some(alive) = &state.service.process else { return };
        let (pid, ready, held, leaving) = (alive.pid, alive.ready, alive.held, alive.leaving);
        state.service.end(cause);
        self.buried.notify_waiters();
        if leaving || state.stopping {
            return;
        }
        tracing::warn!(pid, "the service process {cause}");
        if held {
            self.emit(Event::ServiceLost);
        } else if ready
            && state.has_plugins_to_run()
            && let Err(error) = state.service(self)
        {
            // whoever needs it next tries again
            tracing::debug!("no service process for now: {}", telemetry::chain(&error));
        }
    }

    fn service_says(&self, child: u64, message: Incoming) -> Result<(), ipc::Error> {
        let parsed = ipc::parse(&message.bytes)?;
        // its descriptors are for the runner that called: they may be files
        if let FromChild::Returned { request, body } = parsed {
            self.service_answers(child, request, Answer::Returned(body, message.fds));
            return Ok(());
        }
        let segments = Segments::map(message.fds)?;
        let (request, answer) = match parsed {
            FromChild::Reply { request, frames, restart } => {
                let frames = segments.frames(frames)?;
                (request, Answer::Reply(ServiceReply { frames, restart }))
            }
            FromChild::Described { request, objects } => (request, Answer::Described(objects)),
            said @ (FromChild::PluginAdded { .. }
            | FromChild::PluginRemoved { .. }
            | FromChild::Holds { .. }
            | FromChild::Environment { .. }) => return self.plugins_said(said),
            other => return self.user_says(other, &segments),
        };
        self.service_answers(child, request, answer);
        Ok(())
    }

    fn service_answers(&self, child: u64, request: u64, answer: Answer) {
        let mut state = self.state();
        if let Some(alive) = state.service.process.as_mut().filter(|alive| alive.child == child)
            && let Some(waiting) = alive.waiting.remove(&request)
        {
            // whoever asked may have given up
            let _ = waiting.send(Ok(answer));
        }
    }
}

fn wrong_answer() -> Error {
    Error::ServiceDied { cause: Cause::Nonsense { text: "it gave the wrong answer".into() } }
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
