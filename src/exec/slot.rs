//! One runner's end at the daemon: its queue of jobs, its pipes, its life from fork to burial.
//!
//! What a runner's messages mean is `dispatch`'s business.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use nix::sys::signal::Signal;
use tokio::sync::Notify;

use super::ipc::{self, FromChild, Outgoing, Target, ToChild};
use super::link::{Inbox, Incoming, Link};
use super::live::Home;
use super::mailbox::Mailbox;
use super::object::Segments;
use super::output::{Pipe, Read, Stream, Tail};
use super::pool::Shared;
use super::verdict::Cause;
use super::{Error, Event, Job, Line};
use crate::proto::{Key, Value};
use crate::sys::{self, PidFd};
use crate::telemetry;

/// The doom of a runner that was told to end.
pub(super) const RETIRED: Cause = Cause::Exit { code: 0 };
/// Chunks read at once when a task's output must be complete: more than a pipe holds.
const DRAIN_CHUNKS: usize = 16;

/// How long a process may live on without its connection.
const END_GRACE: Duration = Duration::from_secs(2);

/// A job and how often its process died.
#[derive(Clone, Debug)]
pub(super) struct Attempt {
    pub(super) job: Arc<Job>,
    pub(super) crashes: u32,
}

/// A job in a runner.
#[derive(Debug)]
pub(super) struct Queued {
    pub(super) seq: u64,
    pub(super) attempt: Attempt,
    /// Handed over behind another, and not announced as started yet.
    pub(super) prefetched: bool,
    pub(super) recall: Recalled,
}

impl Queued {
    pub(super) fn key(&self) -> &Key {
        &self.attempt.job.key
    }
}

/// How far a job has been taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Recalled {
    /// It is to be run.
    No,
    /// The runner may have started it: its word counts.
    Asked,
    /// The runner will skip it, and nobody asks.
    Yes,
}

/// A runner process, or one that is being forked.
#[derive(Debug)]
pub(super) struct Runner {
    pub(super) pid: Option<u32>,
    pub(super) process: Option<PidFd>,
    pub(super) data: Link,
    pub(super) control: Link,
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) home: Arc<Home>,
    pub(super) queue: VecDeque<Queued>,
    /// Its task left the pool: it takes no other, and another runner has its slot.
    pub(super) seceded: bool,
    /// The actor it holds: it takes no task as long as it does.
    pub(super) actor: Option<Key>,
    /// It has run a task to its end.
    pub(super) proven: bool,
    /// Why it was killed, if it was.
    pub(super) doom: Option<Cause>,
    /// How it ended, and the most memory it used.
    pub(super) exit: Option<(Cause, u64)>,
    pub(super) exited: Arc<Notify>,
    pub(super) pipes: [Arc<Pipe>; 2],
    pub(super) tail: Tail,
    /// Jobs up to this one were there when the pool last looked for stuck ones.
    pub(super) looked_at: u64,
    next_seq: u64,
}

/// The other ends, for the process.
pub(super) struct ChildEnds {
    pub(super) fds: Vec<OwnedFd>,
    pub(super) data: Inbox,
    pub(super) control: Inbox,
}

impl Runner {
    /// A runner without a process yet; messages wait for it in its socket.
    pub(super) fn prepare(id: u64) -> Result<(Self, ChildEnds), Error> {
        let sys = |what| move |source| Error::Sys { what, source };
        let (data, data_child) = sys::socket_pair().map_err(sys("connect a runner"))?;
        let (control, control_child) = sys::socket_pair().map_err(sys("connect a runner"))?;
        let mailbox = Mailbox::create().map_err(sys("make a runner's mailbox"))?;
        let (pipes, out, err) = pipes()?;
        let (data, control) = (Link::new(data), Link::new(control));
        let (data, control) =
            (data.map_err(sys("connect a runner"))?, control.map_err(sys("connect a runner"))?);
        let home = Arc::new(Home::new(id, control.clone()));
        let io = |source| Error::System { what: "share a runner's mailbox", source };
        let mailbox_child = mailbox.as_fd().try_clone_to_owned().map_err(io)?;
        let ends = ChildEnds {
            fds: vec![data_child, control_child, mailbox_child, out, err],
            data: Inbox::new(&data),
            control: Inbox::new(&control),
        };
        let runner = Runner {
            pid: None,
            process: None,
            data,
            control,
            mailbox: Arc::new(mailbox),
            home,
            queue: VecDeque::new(),
            seceded: false,
            actor: None,
            proven: false,
            doom: None,
            exit: None,
            exited: Arc::default(),
            pipes,
            tail: Tail::default(),
            looked_at: 0,
            next_seq: 1,
        };
        Ok((runner, ends))
    }

    /// Queues a job, to be sent with the next flush of the connection. On an error the runner is as it was.
    pub(super) fn hand_over(
        &mut self,
        attempt: Attempt,
        prefetched: bool,
    ) -> Result<u64, (Attempt, ipc::Error)> {
        let (seq, job) = (self.next_seq, &attempt.job);
        let message = ToChild::Run {
            seq,
            key: &job.key,
            spec: &job.run_spec,
            inputs: &job.inputs,
            live: &job.live,
            annotations: &job.annotations,
            brief: job.brief,
            actor: job.actor,
        };
        match Outgoing::new(&message, Vec::new()) {
            Ok(message) => self.data.queue(message),
            Err(error) => return Err((attempt, error)),
        }
        self.home.use_again();
        self.next_seq += 1;
        // no task waits behind one that may keep the runner
        self.seceded |= job.actor;
        self.queue.push_back(Queued { seq, attempt, prefetched, recall: Recalled::No });
        Ok(seq)
    }

    /// The job it runs or is about to run.
    pub(super) fn current(&self) -> Option<&Queued> {
        self.queue.iter().find(|queued| queued.recall != Recalled::Yes)
    }

    /// The job handed over last.
    pub(super) fn last_seq(&self) -> u64 {
        self.next_seq - 1
    }

    /// Whether a brief job is behind another one, so that it may be held up, or the other's result kept for it.
    pub(super) fn has_company(&self) -> bool {
        let brief = |queued: &Queued| queued.attempt.job.brief;
        self.queue.iter().zip(self.queue.iter().skip(1)).any(|(first, second)| brief(first) && brief(second))
    }

    /// Jobs behind the current one.
    pub(super) fn waiting(&self) -> usize {
        self.queue.len().saturating_sub(1)
    }

    /// Whether it was told to end when it has nothing to do.
    pub(super) fn is_retired(&self) -> bool {
        self.doom == Some(RETIRED)
    }

    /// Whether it can take a job.
    pub(super) fn is_usable(&self) -> bool {
        !self.seceded && self.actor.is_none() && self.doom.is_none() && self.exit.is_none()
    }

    /// Tells it how many bytes of results it may keep to itself.
    pub(super) fn let_keep(&self, bytes: u64) {
        if let Ok(message) = Outgoing::new(&ToChild::Keep { bytes }, Vec::new()) {
            self.data.send(message);
        }
    }

    pub(super) fn configure(&self, info: &Value) {
        match Outgoing::new(&ToChild::Configure(info), Vec::new()) {
            Ok(message) => self.data.send(message),
            Err(error) => tracing::warn!(%error, "a runner could not be told about its worker"),
        }
    }

    /// Has it set plugins up, by name and pickle.
    pub(super) fn plug(&self, plugins: &[(Value, Bytes)]) {
        match Outgoing::new(&ToChild::Plugins { target: Target::Worker, plugins }, Vec::new()) {
            Ok(message) => self.data.send(message),
            Err(error) => tracing::warn!(%error, "a runner could not be told about plugins"),
        }
    }

    /// Kills it and whatever its task started.
    pub(super) fn kill(&mut self, cause: Cause) {
        self.doom.get_or_insert(cause);
        // without a process yet, it is killed when the zygote tells of it
        if let Some(process) = &self.process
            && let Err(error) = process.kill(Signal::SIGKILL)
        {
            tracing::warn!(%error, pid = self.pid, "a runner could not be killed");
        }
    }

    /// Reads what it had written when it sent the message that is being acted on.
    pub(super) fn drain_output(&mut self, shared: &Shared) {
        for pipe in self.pipes.clone() {
            for _ in 0..DRAIN_CHUNKS {
                if pipe.read(|line| self.wrote(shared, pipe.stream(), line)) != Read::More {
                    break;
                }
            }
        }
    }

    /// Reads what is left of a process that is gone, and ends the line that it did not end.
    pub(super) fn finish_output(&mut self, shared: &Shared) {
        for pipe in self.pipes.clone() {
            for _ in 0..DRAIN_CHUNKS {
                if pipe.read_now(|line| self.wrote(shared, pipe.stream(), line)) != Read::More {
                    break;
                }
            }
            if let Some(line) = pipe.rest() {
                self.wrote(shared, pipe.stream(), line);
            }
        }
    }

    fn wrote(&mut self, shared: &Shared, stream: Stream, line: String) {
        self.tail.push(&line);
        let key = self.current().map(|queued| queued.key().clone());
        shared.emit(Event::Output(Line { key, pid: self.pid, stream, line, _room: None }));
    }
}

/// Pipes for standard output and error: the reading ends, and the two writing ends.
pub(super) fn pipes() -> Result<([Arc<Pipe>; 2], OwnedFd, OwnedFd), Error> {
    let make = |stream| {
        let (read, write) = sys::pipe()?;
        sys::set_nonblocking(&read)?;
        Ok((Arc::new(Pipe::new(read, stream)?), write))
    };
    let sys = |source| Error::Sys { what: "make a process's pipes", source };
    let (out, out_child) = make(Stream::Stdout).map_err(sys)?;
    let (err, err_child) = make(Stream::Stderr).map_err(sys)?;
    Ok(([out, err], out_child, err_child))
}

/// Logs what comes through a pipe until its end. `whose` names the writer and its task, and sees the line.
pub(super) async fn log_output(
    shared: Arc<Shared>,
    pipe: Arc<Pipe>,
    whose: impl Fn(&Shared, &str) -> Option<(Option<u32>, Option<Key>)>,
) {
    while let Some(room) = shared.room.wait().await {
        let room = Arc::new(room);
        let read = pipe.read(|line| {
            if let Some((pid, key)) = whose(&shared, &line) {
                let stream = pipe.stream();
                shared.emit(Event::Output(Line { key, pid, stream, line, _room: Some(room.clone()) }));
            }
        });
        drop(room);
        match read {
            Read::More => {}
            Read::Nothing if pipe.readable().await => {}
            Read::Nothing | Read::End => return,
        }
    }
}

/// Reads what runner `id` says until it is dead, then buries it.
pub(super) async fn serve(shared: Arc<Shared>, id: u64, mut inbox: Inbox, exited: Arc<Notify>) {
    loop {
        let received = tokio::select! {
            biased;
            received = inbox.receive() => received,
            () = exited.notified() => break,
        };
        match received {
            Ok(Some(message)) => {
                if !handle(&shared, id, message) {
                    exited.notified().await;
                    break;
                }
            }
            // its end follows, from the zygote; a task that only closed the connection is ended
            Ok(None) => {
                if tokio::time::timeout(END_GRACE, exited.notified()).await.is_err() {
                    shared.condemn(id, Cause::Nonsense { text: "it closed its connection".into() });
                    exited.notified().await;
                }
                break;
            }
            Err(error) => {
                shared.condemn(id, Cause::Nonsense { text: telemetry::chain(&error) });
                exited.notified().await;
                break;
            }
        }
    }
    // it may have finished its task before it died
    while let Ok(Some(message)) = inbox.try_receive() {
        if !handle(&shared, id, message) {
            break;
        }
    }
    shared.bury(id);
}

/// Acts on one message; false when it was nonsense.
fn handle(shared: &Arc<Shared>, id: u64, message: Incoming) -> bool {
    let parsed = ipc::parse(&message.bytes);
    let result = parsed.and_then(|parsed| shared.runner_says(id, parsed, message.fds));
    if let Err(error) = result {
        shared.condemn(id, Cause::Nonsense { text: telemetry::chain(&error) });
        return false;
    }
    true
}

/// Reads what runner `id`'s control thread says.
pub(super) async fn serve_control(shared: Arc<Shared>, id: u64, mut inbox: Inbox, home: Arc<Home>) {
    loop {
        let message = match inbox.receive().await {
            Ok(Some(message)) => message,
            Ok(None) => return,
            Err(error) => return shared.condemn(id, Cause::Nonsense { text: telemetry::chain(&error) }),
        };
        match ipc::parse(&message.bytes) {
            Ok(FromChild::Stacks { request, stacks }) => shared.stacks_came(request, stacks),
            Ok(FromChild::Call { request, body }) => shared.call(id, request, body, message.fds),
            Ok(FromChild::Published { token, object }) => {
                let segments = Segments::map(message.fds);
                let taken = segments.and_then(|segments| shared.published(&home, token, object, &segments));
                if let Err(error) = taken {
                    return shared.condemn(id, Cause::Nonsense { text: telemetry::chain(&error) });
                }
            }
            Ok(FromChild::Reply { request, frames, .. }) => {
                if let Err(error) = shared.actor_answered(request, frames, message.fds) {
                    return shared.condemn(id, Cause::Nonsense { text: telemetry::chain(&error) });
                }
            }
            Ok(_) => return shared.condemn(id, Cause::Nonsense { text: "misplaced message".into() }),
            Err(error) => return shared.condemn(id, Cause::Nonsense { text: telemetry::chain(&error) }),
        }
    }
}
