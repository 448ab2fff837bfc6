//! Every message between the daemon and its Python processes, and how they lie on the socket.
//!
//! A message is a head (u32 length, u32 number of descriptors), then a msgpack array whose first item is its tag;
//! descriptors ride with the first bytes. The other end is `runner/channel.py`. What comes from a child is the word of
//! a process that runs users' code: lengths, counts and types are checked here, meaning is checked by the callers.

mod outcome;
mod plugins;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use bytes::{Bytes, BytesMut};
use rmp::encode::{self, ByteBuf};

use crate::proto::{Key, Payload, PayloadKind, Value};
use crate::store::{Frame, Live, Object, SHARED_FRAME_MIN, Segment};
use crate::sys::{self, MemfdMut};
use crate::wire::{self, Limits, msgpack};

pub(super) use outcome::{Done, RawFailure};

/// Bytes of the head.
pub(super) const HEAD: usize = 8;
/// Longest message taken from a child, in bytes. Large frames are not in messages.
pub(super) const MESSAGE_MAX: usize = 256 << 20;
/// Descriptors taken with one message: a result has one, an error two.
pub(super) const FDS_MAX: usize = 4;
/// Latest descriptors of a message among which one that is needed again is looked for.
const SEARCHED: usize = 64;
/// Nesting in messages of ours; what users nest is in payloads.
const DEPTH: usize = 32;

/// Messages to a child.
#[derive(Debug)]
pub(super) enum ToChild<'a> {
    /// To the zygote: fork a child; its descriptors come along.
    Fork { child: u64, role: Role },
    /// To a runner or the service: what the worker is.
    Configure(&'a Value),
    /// To a runner: run a task.
    Run {
        seq: u64,
        key: &'a Key,
        spec: &'a Payload,
        inputs: &'a [(Key, Object)],
        live: &'a [Live],
        annotations: &'a Value,
        /// The runner may keep the results before it until this one is there.
        brief: bool,
        actor: bool,
    },
    /// To a runner: end when all before this is done, and what it has kept is published if that matters.
    Exit { publish: bool },
    /// To a runner or the service: plugins to set up, by name and pickle.
    Plugins { target: Target, plugins: &'a [(Value, Bytes)] },
    /// To a runner: a plugin to tear down.
    Unplug { name: &'a Value },
    /// To the service: tear plugins down and end; those of the nanny, too, if it leaves.
    Leave { nanny: bool },
    /// To a runner's control thread: say what runs.
    Stacks { request: u64 },
    /// To a runner's control thread: stop task `seq` if it runs.
    Interrupt { seq: u64 },
    /// To a runner's control thread: hand over the reports that are held.
    HandOver,
    /// To a runner: the bytes of results it may keep to itself.
    Keep { bytes: u64 },
    /// To a runner's control thread: publish the result of task `token`.
    Publish { token: u64 },
    /// To a runner's control thread: the result of task `token` is not needed any more.
    Forget { token: u64 },
    /// To the service, or to the control thread of an actor's runner: answer a comm message.
    Request { request: u64, target: Target, frames: &'a [Bytes] },
    /// To the service: size and type of objects.
    Describe { request: u64, objects: &'a [Object] },
    /// To the service: a runner's call, which only Python understands.
    Call { request: u64, body: &'a [u8] },
    /// To a runner's control thread: what became of its call; text where it has no answer.
    Return { request: u64, result: Result<&'a [u8], &'a str> },
    /// To the service: a message of the scheduler's stream with an op of a plugin's.
    Stream { frames: &'a [Bytes] },
    /// To the service: tasks that changed their state, for plugins that want to know.
    Transitions { transitions: &'a Value },
    /// To the service: what plugins have for the heartbeat.
    Beat { request: u64 },
}

/// What a forked process becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Runner = 0,
    Service = 1,
}

/// Whose op a comm message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// It came to the worker's address.
    Worker = 0,
    /// It came to the nanny's address.
    Nanny = 1,
}

/// Messages from a child. `frames` may lie in the descriptors that came along.
#[derive(Debug, PartialEq)]
pub(super) enum FromChild {
    /// The zygote can fork.
    Ready { pid: u32, python: String, distributed: String },
    /// The zygote forked; a pidfd came along.
    Forked { child: u64, pid: u32 },
    /// The zygote could not.
    ForkFailed { child: u64, text: String },
    /// A child of the zygote ended: exit code, or minus the signal.
    Exited { child: u64, code: i32, peak: u64 },
    /// A task's result.
    Finished { seq: u64, object: RawObject, done: Done },
    /// A task's result, which stays in the runner.
    Kept { seq: u64, done: Done },
    /// A result that was kept; none where there is no memory for it.
    Published { token: u64, object: Option<RawObject> },
    /// A task's exception.
    Failed { seq: u64, failure: Box<RawFailure> },
    /// A task raised `Reschedule`.
    Reschedule { seq: u64 },
    /// A task was revoked before it started, or interrupted.
    Skipped { seq: u64 },
    /// The running task left the pool.
    Seceded { seq: u64, duration: f64 },
    /// A comm message for the scheduler.
    Event { frames: Vec<Bytes> },
    /// Data that user code puts on this worker.
    Scattered { key: Key, object: RawObject, description: Description },
    /// Call stacks by key.
    Stacks { request: u64, stacks: Vec<(Key, Vec<String>)> },
    /// The service's or an actor's answer, and why the nanny is to restart its worker, if it is.
    Reply { request: u64, frames: Vec<RawFrame>, restart: Option<String> },
    /// The service's descriptions.
    Described { request: u64, objects: Vec<Result<Description, String>> },
    /// A plugin is set up in the service.
    PluginAdded { target: Target, name: Value, pickle: Bytes },
    /// A plugin is gone.
    PluginRemoved { target: Target, name: Value },
    /// Plugins are set up: whether they want to know of transitions, and whether the service holds what cannot be
    /// made again, so that the worker is lost with it.
    Holds { transitions: bool, state: bool },
    /// What nanny plugins want of processes to come: variables (none is unset) and entries of `sys.path`.
    Environment { variables: Vec<(String, Option<String>)>, path: Vec<String> },
    /// A runner's call of the service. Descriptors may have come along.
    Call { request: u64, body: Bytes },
    /// The service's answer to a call. Descriptors may have come along.
    Returned { request: u64, body: Bytes },
}

/// An object as it came: its header and where its frames are.
#[derive(Debug, PartialEq)]
pub(super) struct RawObject {
    pub(super) header: Bytes,
    pub(super) frames: Vec<RawFrame>,
}

/// A frame in the message, or a region of one of its descriptors.
#[derive(Debug, PartialEq)]
pub(super) enum RawFrame {
    Inline(Bytes),
    Shared {
        index: usize,
        offset: u64,
        len: u64,
    },
    /// A region of the room in the runner's mailbox.
    Left {
        offset: u64,
        len: usize,
    },
}

/// What an object is, once Python has opened it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Size in bytes by Dask's `sizeof`.
    pub nbytes: u64,
    /// The type, pickled.
    pub type_pickled: Bytes,
    /// The type's name (`dask.utils.typename`).
    pub typename: String,
}

/// Why a message cannot be understood, or sent.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// Not msgpack, or past a limit.
    #[error("malformed message")]
    Wire(#[from] wire::Error),
    /// A head that announces too much.
    #[error("message of {bytes} bytes and {fds} descriptors is past the limit")]
    TooLarge { bytes: usize, fds: usize },
    /// A known tag with the wrong items, or an unknown one.
    #[error("message {tag:?} is unknown or malformed")]
    Form { tag: Option<i64> },
    /// Shared memory could not be made or taken.
    #[error("shared memory")]
    Memory(#[from] sys::Error),
    /// A frame points at a descriptor that did not come.
    #[error("descriptor {index} did not come along")]
    NoDescriptor { index: usize },
}

/// A descriptor on its way to a child.
#[derive(Debug)]
pub(super) enum Carried {
    Own(OwnedFd),
    Segment(Segment),
}

impl AsFd for Carried {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Carried::Own(fd) => fd.as_fd(),
            Carried::Segment(segment) => segment.fd(),
        }
    }
}

/// A message ready for the socket.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    pub(super) bytes: Vec<u8>,
    pub(super) fds: Vec<Carried>,
}

impl Outgoing {
    /// A message that carries `fds` besides what its objects need.
    pub(super) fn new(message: &ToChild<'_>, fds: Vec<OwnedFd>) -> Result<Self, Error> {
        let mut writer = Writer { out: ByteBuf::with_capacity(512), fds: Vec::new() };
        writer.fds.extend(fds.into_iter().map(Carried::Own));
        writer.out.as_mut_vec().extend_from_slice(&[0; HEAD]);
        writer.message(message)?;
        let mut bytes = writer.out.into_vec();
        let too_large = Error::TooLarge { bytes: bytes.len(), fds: writer.fds.len() };
        let length = u32::try_from(bytes.len() - HEAD).map_err(|_| too_large)?;
        bytes[..4].copy_from_slice(&length.to_le_bytes());
        // a message has far fewer inputs than 2^32
        bytes[4..HEAD].copy_from_slice(&(writer.fds.len() as u32).to_le_bytes());
        Ok(Outgoing { bytes, fds: writer.fds })
    }
}

/// Writes one message, collecting descriptors.
struct Writer {
    out: ByteBuf,
    fds: Vec<Carried>,
}

impl Writer {
    fn message(&mut self, message: &ToChild<'_>) -> Result<(), Error> {
        match message {
            ToChild::Fork { child, role } => {
                self.head(3, 1);
                self.uint(*child);
                self.uint(*role as u64);
            }
            ToChild::Configure(info) => {
                self.head(2, 10);
                self.value(info)?;
            }
            ToChild::Run { seq, key, spec, inputs, live, annotations, brief, actor } => {
                self.head(8, if *actor { 19 } else { 11 });
                self.uint(*seq);
                self.key(key)?;
                self.spec(spec)?;
                self.array(inputs.len() + live.len());
                for (key, object) in *inputs {
                    self.array(4);
                    self.key(key)?;
                    self.object(object)?;
                }
                live.iter().try_for_each(|live| self.live(live))?;
                self.value(annotations)?;
                let Ok(()) = encode::write_bool(&mut self.out, *brief);
            }
            ToChild::Exit { publish } => {
                self.head(2, 12);
                self.uint(u64::from(*publish));
            }
            ToChild::Stacks { request } => {
                self.head(2, 13);
                self.uint(*request);
            }
            ToChild::Interrupt { seq } => {
                self.head(2, 14);
                self.uint(*seq);
            }
            ToChild::HandOver => self.head(1, 18),
            ToChild::Keep { bytes } => {
                self.head(2, 60);
                self.uint(*bytes);
            }
            ToChild::Publish { token } => {
                self.head(2, 61);
                self.uint(*token);
            }
            ToChild::Forget { token } => {
                self.head(2, 62);
                self.uint(*token);
            }
            ToChild::Request { request, target, frames } => {
                self.head(4, 30);
                self.uint(*request);
                self.uint(*target as u64);
                self.array(frames.len());
                frames.iter().try_for_each(|frame| self.heap(frame))?;
            }
            ToChild::Describe { request, objects } => {
                self.head(3, 32);
                self.uint(*request);
                self.array(objects.len());
                for object in *objects {
                    self.array(3);
                    self.object(object)?;
                }
            }
            other => self.plugin_message(other)?,
        }
        Ok(())
    }

    fn head(&mut self, items: usize, tag: u64) {
        self.array(items);
        self.uint(tag);
    }

    fn array(&mut self, len: usize) {
        // nothing here has 2^32 items: their descriptions alone would not fit into a message
        let Ok(_) = encode::write_array_len(&mut self.out, len as u32);
    }

    fn uint(&mut self, n: u64) {
        let Ok(_) = encode::write_uint(&mut self.out, n);
    }

    fn bytes(&mut self, bytes: &[u8]) -> Result<(), Error> {
        if u32::try_from(bytes.len()).is_err() {
            return Err(Error::TooLarge { bytes: bytes.len(), fds: 0 });
        }
        let Ok(()) = encode::write_bin(&mut self.out, bytes);
        Ok(())
    }

    fn value(&mut self, value: &Value) -> Result<(), Error> {
        match value {
            Value::Nil => {
                let Ok(()) = encode::write_nil(&mut self.out);
            }
            Value::Map(items) if items.is_empty() => {
                let Ok(()) = encode::write_nil(&mut self.out);
            }
            value => {
                let mut packed = BytesMut::new();
                msgpack::encode(value, &mut packed)?;
                self.out.as_mut_vec().extend_from_slice(&packed);
            }
        }
        Ok(())
    }

    fn key(&mut self, key: &Key) -> Result<(), Error> {
        match key {
            Key::Str(s) => {
                let Ok(()) = encode::write_str(&mut self.out, s);
                Ok(())
            }
            other => self.value(&Value::from(other)),
        }
    }

    /// An input that was kept: published by now, or in the runner that this goes to.
    fn live(&mut self, live: &Live) -> Result<(), Error> {
        self.array(if live.object().is_some() { 4 } else { 2 });
        self.key(live.key())?;
        match live.object() {
            Some(object) => self.object(object)?,
            None => self.uint(live.place().token),
        }
        Ok(())
    }

    /// A task: its pickle and out-of-band buffers.
    fn spec(&mut self, spec: &Payload) -> Result<(), Error> {
        let header = msgpack::decode(&spec.header, &Limits::default())?;
        let Some(Value::Bytes(pickle)) = header.field("pickled-obj") else {
            return Err(Error::Form { tag: None });
        };
        self.bytes(pickle)?;
        self.array(spec.frames.len());
        spec.frames.iter().try_for_each(|frame| self.heap(frame))
    }

    /// Kind, header and frames of an object: three items.
    fn object(&mut self, object: &Object) -> Result<(), Error> {
        self.uint(match object.kind() {
            PayloadKind::Serialized => 0,
            PayloadKind::Pickled => 1,
        });
        self.bytes(object.header())?;
        self.array(object.frames().len());
        object.frames().iter().try_for_each(|frame| self.frame(frame))
    }

    fn frame(&mut self, frame: &Frame) -> Result<(), Error> {
        let Some(segment) = frame.segment() else { return self.heap(frame.bytes()) };
        let number = segment.fd().as_raw_fd();
        let recent = self.fds.len().saturating_sub(SEARCHED);
        let known = self.fds[recent..].iter().rposition(|fd| fd.as_fd().as_raw_fd() == number);
        let index = known.map(|at| recent + at).unwrap_or_else(|| {
            self.fds.push(Carried::Segment(segment.clone()));
            self.fds.len() - 1
        });
        self.region(index, segment.offset(), frame.bytes().len() as u64, segment.is_packed());
        Ok(())
    }

    /// Where a frame lies; a fourth item says that others lie there too.
    fn region(&mut self, index: usize, offset: u64, len: u64, is_packed: bool) {
        self.array(3 + usize::from(is_packed));
        self.uint(index as u64);
        self.uint(offset);
        self.uint(len);
        if is_packed {
            self.uint(1);
        }
    }

    /// A frame on the heap: inline when small, else copied into shared memory, which the child maps writable.
    fn heap(&mut self, frame: &Bytes) -> Result<(), Error> {
        if frame.len() < SHARED_FRAME_MIN {
            return self.bytes(frame);
        }
        let mut memory = MemfdMut::create("iqoqo-frame", frame.len() as u64)?;
        memory.as_mut().copy_from_slice(frame);
        let memory = memory.seal()?;
        self.fds.push(Carried::Segment(Segment::new(memory.fd().clone(), 0)));
        self.region(self.fds.len() - 1, 0, frame.len() as u64, false);
        Ok(())
    }
}

/// Length and number of descriptors in a head.
pub(super) fn parse_head(head: [u8; HEAD]) -> Result<(usize, usize), Error> {
    let [a, b, c, d, e, f, g, h] = head;
    let bytes = u32::from_le_bytes([a, b, c, d]) as usize;
    let fds = u32::from_le_bytes([e, f, g, h]) as usize;
    if bytes > MESSAGE_MAX || fds > FDS_MAX {
        return Err(Error::TooLarge { bytes, fds });
    }
    Ok((bytes, fds))
}

/// Understands a message from a child. Bytes in it are slices of `message`: it is hardly larger than they are.
pub(super) fn parse(message: &Bytes) -> Result<FromChild, Error> {
    let limits = Limits { depth: DEPTH, ..Limits::default() };
    let Value::List(items) = msgpack::decode(message, &limits)? else {
        return Err(Error::Form { tag: None });
    };
    let mut items = Items(items.into_iter());
    let tag = items.int();
    tag.and_then(|tag| items.message(tag)).ok_or(Error::Form { tag })
}

/// The items of a message, taken one by one; `None` when one is missing or of the wrong type.
struct Items(std::vec::IntoIter<Value>);

impl Items {
    fn message(&mut self, tag: i64) -> Option<FromChild> {
        Some(match tag {
            2 => FromChild::Ready { pid: self.pid()?, python: self.text()?, distributed: self.text()? },
            3 => FromChild::Forked { child: self.uint()?, pid: self.pid()? },
            4 => FromChild::Exited {
                child: self.uint()?,
                code: self.int()?.try_into().ok()?,
                peak: self.uint()?,
            },
            5 => FromChild::ForkFailed { child: self.uint()?, text: self.text()? },
            13 => FromChild::Stacks { request: self.uint()?, stacks: self.list()?.all(Items::stack)? },
            20 => {
                let seq = self.uint()?;
                match self.maybe_object()? {
                    Some(object) => FromChild::Finished { seq, object, done: self.done()? },
                    None => FromChild::Kept { seq, done: self.done()? },
                }
            }
            63 => FromChild::Published { token: self.uint()?, object: self.maybe_object()? },
            21 => FromChild::Failed { seq: self.uint()?, failure: Box::new(self.failure()?) },
            22 => FromChild::Reschedule { seq: self.uint()? },
            23 => FromChild::Skipped { seq: self.uint()? },
            24 => FromChild::Seceded { seq: self.uint()?, duration: self.float()? },
            25 => FromChild::Event {
                frames: self.list()?.each(|value| match value {
                    Value::Bytes(frame) => Some(frame),
                    _ => None,
                })?,
            },
            26 => FromChild::Scattered {
                key: self.0.next()?.to_key()?,
                object: self.list()?.object()?,
                description: self.description()?,
            },
            31 => FromChild::Reply {
                request: self.uint()?,
                frames: self.list()?.each(raw_frame)?,
                restart: self.maybe_text()?,
            },
            33 => FromChild::Described { request: self.uint()?, objects: self.list()?.each(description)? },
            tag => return self.plugin_message(tag),
        })
    }

    fn object(&mut self) -> Option<RawObject> {
        if self.int()? != 0 {
            return None;
        }
        Some(RawObject { header: self.bytes()?, frames: self.list()?.each(raw_frame)? })
    }

    fn maybe_object(&mut self) -> Option<Option<RawObject>> {
        match self.0.next()? {
            Value::Nil => Some(None),
            Value::List(items) => Items(items.into_iter()).object().map(Some),
            _ => None,
        }
    }

    fn description(&mut self) -> Option<Description> {
        Some(Description { nbytes: self.uint()?, type_pickled: self.bytes()?, typename: self.text()? })
    }

    fn stack(&mut self) -> Option<(Key, Vec<String>)> {
        let key = self.0.next()?.to_key()?;
        let lines = self.list()?.each(|line| line.as_str().map(str::to_owned))?;
        Some((key, lines))
    }

    fn int(&mut self) -> Option<i64> {
        self.0.next()?.as_i64()
    }

    fn uint(&mut self) -> Option<u64> {
        match self.0.next()? {
            Value::Int(n) => n.get().try_into().ok(),
            _ => None,
        }
    }

    fn pid(&mut self) -> Option<u32> {
        self.uint()?.try_into().ok()
    }

    fn float(&mut self) -> Option<f64> {
        self.0.next()?.as_f64()
    }

    fn maybe_float(&mut self) -> Option<Option<f64>> {
        match self.0.next()? {
            Value::Nil => Some(None),
            value => value.as_f64().map(Some),
        }
    }

    fn text(&mut self) -> Option<String> {
        self.0.next()?.as_str().map(str::to_owned)
    }

    fn maybe_text(&mut self) -> Option<Option<String>> {
        match self.0.next()? {
            Value::Nil => Some(None),
            value => value.as_str().map(|text| Some(text.to_owned())),
        }
    }

    fn bytes(&mut self) -> Option<Bytes> {
        match self.0.next()? {
            Value::Bytes(bytes) => Some(bytes),
            _ => None,
        }
    }

    fn list(&mut self) -> Option<Items> {
        match self.0.next()? {
            Value::List(items) => Some(Items(items.into_iter())),
            _ => None,
        }
    }

    fn each<T>(self, read: impl FnMut(Value) -> Option<T>) -> Option<Vec<T>> {
        self.0.map(read).collect()
    }

    fn all<T>(self, mut read: impl FnMut(&mut Items) -> Option<T>) -> Option<Vec<T>> {
        self.each(|value| match value {
            Value::List(items) => read(&mut Items(items.into_iter())),
            _ => None,
        })
    }
}

fn raw_frame(value: Value) -> Option<RawFrame> {
    match value {
        Value::Bytes(bytes) => Some(RawFrame::Inline(bytes)),
        Value::List(items) => {
            let left = items.len() == 2;
            let mut items = Items(items.into_iter());
            if left {
                return Some(RawFrame::Left { offset: items.uint()?, len: items.uint()?.try_into().ok()? });
            }
            Some(RawFrame::Shared {
                index: usize::try_from(items.uint()?).ok()?,
                offset: items.uint()?,
                len: items.uint()?,
            })
        }
        _ => None,
    }
}

fn description(value: Value) -> Option<Result<Description, String>> {
    match value {
        Value::Str(text) => Some(Err(text.as_ref().to_owned())),
        Value::List(items) => Items(items.into_iter()).description().map(Ok),
        _ => None,
    }
}
