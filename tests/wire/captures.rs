//! What `tests/data/capture.py` recorded decodes, and encodes to the same bytes again.

use std::collections::BTreeMap;

use bytes::Bytes;
use iqoqo_dask_worker::proto::{Key, Payload, PayloadKind, Status, Stimulus, StreamMessage, Value};
use iqoqo_dask_worker::wire::handshake::Info;
use iqoqo_dask_worker::wire::payload::{self, Exception};
use iqoqo_dask_worker::wire::{Compression, Limits, decode_message, encode_message};

use crate::{captured, deframe, enframe};

fn frames(stream: &[u8]) -> Vec<Bytes> {
    let mut messages = deframe(stream, usize::MAX, &Limits::default()).unwrap();
    assert_eq!(messages.len(), 1);
    messages.remove(0)
}

fn capture(name: &str) -> Value {
    let (_, stream) = captured().into_iter().find(|(n, _)| n == name).expect(name);
    decode_message(frames(&stream), &Limits::default()).unwrap()
}

fn payloads(value: &Value, out: &mut Vec<Payload>) {
    match value {
        Value::Payload(p) => out.push((**p).clone()),
        Value::List(items) | Value::Set(items) => items.iter().for_each(|v| payloads(v, out)),
        Value::Map(items) => items.iter().for_each(|(k, v)| {
            payloads(k, out);
            payloads(v, out);
        }),
        _ => {}
    }
}

fn is_compressed(name: &str) -> bool {
    ["-lz4", "-zstd", "-snappy", "-zlib"].iter().any(|c| name.ends_with(c)) && !name.starts_with("handshake")
}

#[test]
fn every_capture_decodes_and_encodes_to_the_same_bytes() {
    for (name, stream) in captured() {
        for piece in [1, 13, 4096] {
            let pieces = deframe(&stream, piece, &Limits::default()).unwrap();
            assert_eq!(pieces, [frames(&stream)], "{name} in pieces of {piece}");
        }
        let original = frames(&stream);
        let value = decode_message(original.clone(), &Limits::default())
            .unwrap_or_else(|e| panic!("{name} does not decode: {e}"));
        let again = encode_message(&value, Compression::None).unwrap();
        if !is_compressed(&name) {
            assert_eq!(again, original, "{name}");
            assert_eq!(enframe(&again)[8..], stream[8..], "{name}");
        }
        // not the values: one has a NaN
        let again = decode_message(again, &Limits::default()).unwrap();
        assert_eq!(format!("{again:?}"), format!("{value:?}"), "{name}");
    }
}

#[test]
fn the_first_part_is_cut_where_dask_cuts_it() {
    // messages made to order have small buffers, which Dask knows by their Python type
    for (name, stream) in captured() {
        if name.starts_with("stream") || name.starts_with("message") {
            assert_eq!(enframe(&frames(&stream)), stream, "{name}");
        }
    }
}

#[test]
fn compressed_frames_come_out_as_the_plain_ones() {
    for base in ["get-data", "update-data", "pickled"] {
        let mut plain = BTreeMap::new();
        for form in ["plain", "shards"] {
            let mut all = Vec::new();
            payloads(&capture(&format!("{base}-{form}")), &mut all);
            plain.insert(form, all);
        }
        for compression in ["lz4", "zstd", "snappy", "zlib"] {
            let mut all = Vec::new();
            payloads(&capture(&format!("{base}-{compression}")), &mut all);
            assert_eq!(all.len(), plain["plain"].len());
            for (a, b) in all.iter().zip(&plain["plain"]) {
                assert_eq!(a.frames, b.frames, "{base}-{compression}");
                assert_eq!(payload::type_name(&a.header), payload::type_name(&b.header));
            }
        }
        let shards: Vec<usize> = plain["shards"].iter().map(|p| p.frames.len()).collect();
        let whole: Vec<usize> = plain["plain"].iter().map(|p| p.frames.len()).collect();
        if base != "pickled" {
            assert!(shards.iter().sum::<usize>() > whole.iter().sum(), "{base}");
        }
        for (a, b) in plain["shards"].iter().zip(&plain["plain"]) {
            assert_eq!(a.frames.concat(), b.frames.concat(), "{base}");
        }
    }
}

#[test]
fn stream_messages_of_the_scheduler_are_understood() {
    let mut ops = BTreeMap::new();
    for (name, stream) in captured().into_iter().filter(|(name, _)| name.starts_with("stream-")) {
        let Value::List(messages) = decode_message(frames(&stream), &Limits::default()).unwrap() else {
            panic!("{name} is no list");
        };
        for message in messages.into_iter().filter(|m| m.field("op").is_some()) {
            let op = message.field("op").unwrap().as_str().unwrap().to_owned();
            // these two go the other way as well, with other fields
            if name.starts_with("stream-release-worker-data") || op == "worker-status-change" {
                continue;
            }
            let parsed = Stimulus::parse(message).unwrap_or_else(|e| panic!("{name}: {e}"));
            ops.insert(op, parsed.message);
        }
    }
    let StreamMessage::ComputeTask(task) = &ops["compute-task"] else { panic!() };
    assert!(task.run_spec.as_ref().is_some_and(|p| p.kind == PayloadKind::Pickled && p.frames.is_empty()));
    assert!(matches!(&ops["free-keys"], StreamMessage::FreeKeys { keys } if !keys.is_empty()));
    assert!(matches!(&ops["remove-worker"], StreamMessage::RemoveWorker { .. }));
}

#[test]
fn a_batch_of_tasks_keeps_keys_priorities_and_dependencies() {
    let Value::List(messages) = capture("stream-compute-task-long") else { panic!() };
    assert!(messages.len() > 3);
    for message in messages {
        let Stimulus { message: StreamMessage::ComputeTask(task), .. } = Stimulus::parse(message).unwrap()
        else {
            panic!()
        };
        assert!(matches!(&task.key, Key::Tuple(parts) if parts[0] == Key::from("n")), "{:?}", task.key);
        assert_eq!(task.priority.0.len(), 3);
        assert!(task.run_id.0 >= 0);
    }
}

#[test]
fn plain_values_have_their_python_types() {
    let Value::List(ints) = capture("value-ints") else { panic!() };
    assert_eq!(ints[11], Value::from(u64::MAX));
    assert_eq!(ints.last(), Some(&Value::from(i64::MIN)));
    let sets = capture("value-sets");
    assert_eq!(sets.field("set"), Some(&Value::Set(vec![Value::from(1)])));
    assert_eq!(sets.field("empty"), Some(&Value::Set(vec![])));
    let Value::Map(keys) = capture("value-keys") else { panic!() };
    let nested = Value::List(vec![Value::from("m"), Value::List(vec![Value::from(0), Value::from(1)])]);
    assert_eq!(keys[4], (Value::List(vec!["n".into(), nested]), Value::Bool(true)));
    assert_eq!(keys[1], (Value::Bytes("raw".into()), Value::from(2)));
    // an enum member stays the map that becomes one again in Python
    let status = capture("value-enum");
    let member = status.field("status").unwrap();
    assert_eq!(member.field("name").and_then(Value::as_str), Some(Status::Running.as_str()));
    assert_eq!(member.field("__Enum__"), Some(&Value::Bool(true)));
}

#[test]
fn types_are_read_from_headers() {
    let data = capture("get-data-plain");
    let Some(Value::Map(items)) = data.field("data") else { panic!() };
    let types: Vec<_> = items
        .iter()
        .map(|(key, value)| match value {
            Value::Payload(p) => (key.as_str().unwrap(), payload::type_name(&p.header)),
            other => panic!("{other:?}"),
        })
        .collect();
    let named = |key, name: &str| assert!(types.contains(&(key, Some(name.to_owned()))), "{types:?}");
    named("array", "numpy.ndarray");
    named("bytes", "bytes");
    named("list", "list");
    named("dict", "dict");
    assert!(types.contains(&("frame", None)) && types.contains(&("none", None)), "{types:?}");
}

#[test]
fn handshakes_are_understood() {
    let plain = Info::from_value(&capture("handshake-none")).unwrap();
    assert_eq!(plain, Info::new(Compression::None, [3, 11, 7]));
    let lz4 = Info::from_value(&capture("handshake-lz4")).unwrap();
    assert_eq!(lz4, Info::new(Compression::Lz4, [3, 11, 7]));
    assert_eq!(lz4.to_value(), capture("handshake-lz4"));
    assert_eq!(lz4.negotiate(&plain).compression, Compression::None);
    assert_eq!(lz4.negotiate(&lz4).compression, Compression::Lz4);
}

#[test]
fn errors_have_the_shape_of_dasks() {
    let theirs = capture("error-memory");
    let ours = Exception::builtin("MemoryError", "x").error_message("error");
    let fields = |v: &Value| -> Vec<String> {
        v.as_map().unwrap().iter().map(|(k, _)| k.as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(fields(&ours), fields(&theirs));
    let header = |v: &Value| match v.field("exception") {
        Some(Value::Payload(p)) => p.header.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(header(&ours), header(&theirs));
    let theirs = capture("exception-runtime");
    let Some(Value::Payload(object)) = theirs.field("exception") else { panic!() };
    let ours = payload::pickled_object(object.frames[0].clone(), Vec::new());
    assert_eq!(encode_message(&ours.into(), Compression::None).unwrap()[1], object.header);
    assert!(
        capture("error-unicode").field("exception_text").unwrap().as_str()
            == Some("ValueError(\"'schön'\\n\")")
    );
    assert_eq!(Exception::builtin("ValueError", "'schön'\n").text(), "ValueError(\"'schön'\\n\")");
}
