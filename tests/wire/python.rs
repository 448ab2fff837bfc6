//! Round trips with a live `distributed`: what either side writes, the other reads, in every compression.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use bytes::Bytes;
use iqoqo_dask_worker::proto::{Key, Value};
use iqoqo_dask_worker::wire::frame::{Deframer, Step};
use iqoqo_dask_worker::wire::payload::{self, Exception};
use iqoqo_dask_worker::wire::{Compression, Limits, decode_message, encode_message};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use crate::enframe;

const ALL: [Compression; 5] =
    [Compression::None, Compression::Lz4, Compression::Zstd, Compression::Snappy, Compression::Zlib];

/// A Python process that answers; killed when a test takes too long, and at its end.
pub struct Peer {
    child: Child,
    stdin: ChildStdin,
    stdout: ChildStdout,
    done: mpsc::Sender<()>,
}

impl Peer {
    /// Starts `peer.py` in the tree's virtual environment.
    pub fn start() -> Peer {
        let root = env!("CARGO_MANIFEST_DIR");
        let mut child = Command::new(format!("{root}/.venv/bin/python"))
            .arg(format!("{root}/tests/wire/peer.py"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect(".venv with requirements/ installed");
        let pid = nix::unistd::Pid::from_raw(child.id() as i32);
        let (done, wait) = mpsc::channel();
        std::thread::spawn(move || {
            if wait.recv_timeout(Duration::from_secs(120)) == Err(mpsc::RecvTimeoutError::Timeout) {
                nix::sys::signal::kill(pid, nix::sys::signal::SIGKILL).unwrap();
            }
        });
        let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Peer { child, stdin, stdout, done }
    }

    /// Sends a request and gives the frames of the answer.
    pub fn ask_frames(&mut self, request: &Value, compression: Compression) -> Vec<Bytes> {
        let stream = enframe(&encode_message(request, compression).unwrap());
        // both fit no pipe, but the other side reads a whole request before it answers
        self.stdin.write_all(&stream).unwrap();
        self.stdin.flush().unwrap();
        let mut deframer = Deframer::new(Limits::default());
        let mut buffer = vec![0; 1 << 16];
        let mut input: &[u8] = &[];
        loop {
            match deframer.advance(&mut input).unwrap() {
                Step::Message(frames) => return frames,
                Step::More => {
                    let n = self.stdout.read(&mut buffer).unwrap();
                    assert!(n > 0, "the Python side ended");
                    input = &buffer[..n];
                }
                Step::Large { len } => {
                    let mut frame = vec![0; len as usize];
                    let (head, rest) = frame.split_at_mut(input.len().min(len as usize));
                    input.read_exact(head).unwrap();
                    self.stdout.read_exact(rest).unwrap();
                    deframer.supply(frame.into()).unwrap();
                }
            }
        }
    }

    /// Sends a request and gives the answer.
    pub fn ask(&mut self, request: &Value, compression: Compression) -> Value {
        decode_message(self.ask_frames(request, compression), &Limits::default()).unwrap()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.done.send(());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Any key.
pub fn key() -> impl Strategy<Value = Key> {
    let int =
        prop_oneof![any::<i64>().prop_map(i128::from), any::<u64>().prop_map(i128::from), -130..130i128];
    let float = prop_oneof![
        any::<f64>().prop_filter("one NaN is enough", |f| !f.is_nan()),
        (-5i32..5).prop_map(f64::from),
        Just(f64::INFINITY)
    ];
    let leaf = prop_oneof![
        "[a-f0-9é日<>(),'\"_ .-]{0,40}".prop_map(Key::from),
        prop::collection::vec(any::<u8>(), 0..40).prop_map(|b| Key::Bytes(b.into())),
        int.prop_map(Key::Int),
        float.prop_map(Key::Float),
    ];
    leaf.prop_recursive(3, 20, 4, |inner| {
        prop::collection::vec(inner, 0..4).prop_map(|t| Key::Tuple(t.into()))
    })
}

/// Any value that Python writes back as it came: no two keys of a map are equal, and sets have no order to lose.
pub fn value() -> impl Strategy<Value = Value> {
    let scalar = prop_oneof![
        3 => key().prop_map(|k| Value::from(&k)),
        1 => any::<bool>().prop_map(Value::Bool),
        1 => Just(Value::Nil),
        1 => prop::collection::vec(any::<u8>(), 250..260).prop_map(|b| Value::Bytes(b.into())),
    ];
    scalar.prop_recursive(5, 100, 20, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..20).prop_map(Value::List),
            prop::collection::vec((key(), inner), 0..20).prop_map(|items| {
                let mut seen = HashSet::new();
                let items = items.into_iter().filter(|(k, _)| seen.insert(k.clone()));
                Value::Map(items.map(|(k, v)| (Value::from(&k), v)).collect())
            }),
            prop::collection::vec(key().prop_map(|k| Value::from(&k)), 0..2).prop_map(Value::Set),
        ]
    })
}

#[test]
fn values_written_here_are_read_and_written_alike_by_python() {
    let mut runner = TestRunner::deterministic();
    let values = prop::collection::vec(value(), 2000).new_tree(&mut runner).unwrap().current();
    let mut peer = Peer::start();
    let request = Value::map([("do", "echo".into()), ("value", Value::List(values.clone()))]);
    let frames = peer.ask_frames(&request, Compression::None);
    let expected = encode_message(&Value::map([("value", Value::List(values))]), Compression::None).unwrap();
    assert!(frames[0].len() > 100_000);
    assert!(frames == expected, "python reads or writes some value differently");
}

#[test]
fn values_written_by_python_are_read_and_written_alike_here() {
    let mut peer = Peer::start();
    let request = Value::map([("do", "random".into()), ("seed", 1.into()), ("count", 3000.into())]);
    let frames = peer.ask_frames(&request, Compression::None);
    assert!(frames[0].len() > 100_000);
    let value = decode_message(frames.clone(), &Limits::default()).unwrap();
    assert!(encode_message(&value, Compression::None).unwrap() == frames);
}

#[test]
fn objects_travel_through_in_every_compression() {
    let mut peer = Peer::start();
    for (seed, theirs) in ALL.into_iter().enumerate() {
        let compression = Value::from(theirs.name());
        let make =
            Value::map([("do", "make".into()), ("seed", seed.into()), ("compression", compression.clone())]);
        let frames = peer.ask_frames(&make, Compression::None);
        let bytes: usize = frames.iter().map(Bytes::len).sum();
        assert_eq!(theirs == Compression::None, bytes > 700_000, "{theirs}: {bytes}");
        let back = decode_message(frames, &Limits::default()).unwrap();
        for ours in ALL {
            let check = Value::map([("do", "check".into()), ("seed", seed.into()), ("back", back.clone())]);
            let encoded: usize = encode_message(&check, ours).unwrap().iter().map(Bytes::len).sum();
            assert_eq!(ours == Compression::None, encoded > 700_000, "{ours}: {encoded}");
            let verdict = peer.ask(&check, ours);
            assert_eq!(verdict.field("same"), Some(&Value::Bool(true)), "{theirs} here, {ours} back");
        }
    }
}

#[test]
fn objects_made_here_are_opened_by_python() {
    let mut peer = Peer::start();
    // pickle.dumps((1, 2), 5)
    let pickle: &'static [u8] = b"\x80\x05\x95\x07\x00\x00\x00\x00\x00\x00\x00K\x01K\x02\x86\x94.";
    let data = Bytes::from(vec![b'x'; 20_000]);
    let sent = Value::List(vec![
        payload::bytes_object(data.clone()).into(),
        payload::to_pickle(pickle, Vec::new()).into(),
        payload::pickled_object(Bytes::from_static(pickle), Vec::new()).into(),
    ]);
    for compression in ALL {
        let request = Value::map([("do", "echo".into()), ("value", sent.clone())]);
        let pair = Value::List(vec![Value::from(1), Value::from(2)]);
        let opened = Value::List(vec![Value::Bytes(data.clone()), pair.clone(), pair]);
        assert_eq!(peer.ask(&request, compression).field("value"), Some(&opened), "{compression}");
    }
}

#[test]
fn exceptions_arrive_as_exceptions() {
    let mut peer = Peer::start();
    let long = "é".repeat(20_000);
    let cases = [
        (Exception::builtin("RuntimeError", "text"), "builtins", "RuntimeError('text')"),
        (
            Exception::builtin("MemoryError", "it's \"full\"\n"),
            "builtins",
            "MemoryError('it\\'s \"full\"\\n')",
        ),
        (Exception::builtin("ValueError", "x".repeat(300)), "builtins", ""),
        (Exception::new("distributed.comm.core", "CommClosedError", "gone"), "distributed.comm.core", ""),
        (Exception::builtin("KeyError", long), "builtins", ""),
    ];
    for (exception, module, repr) in cases {
        let error = exception.error_message("error");
        let Value::Map(fields) = error else { panic!() };
        let fields = fields.into_iter().filter(|(k, _)| k.as_str() != Some("status")).collect();
        let request = Value::map([("do", "raise".into()), ("error", Value::Map(fields))]);
        let raised = peer.ask(&request, Compression::None);
        let text = |field| raised.field(field).and_then(Value::as_str).unwrap().to_owned();
        assert_eq!(text("module"), module);
        assert_eq!(text("repr"), exception.text());
        assert!(repr.is_empty() || text("repr") == repr);
        assert_eq!(raised.field("traceback"), Some(&Value::Nil));
    }
}
