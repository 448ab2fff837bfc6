//! Payloads made here, for replies: Python objects whose pickle is at hand or takes a few bytes to write.
//!
//! Writes pickles of exceptions, and reads the type's name out of a header. Never unpickles.
//!
//! Source: `distributed/protocol/serialize.py: dask_dumps, pickle_dumps`, `distributed/core.py: error_message`.

use bytes::Bytes;
use rmp::encode::{self, ByteBuf};

use super::msgpack::{Reader, Token};
use crate::proto::{Key, Payload, PayloadKind, Value};

/// `pickle.dumps(bytes, protocol=5)`
const BYTES_TYPE: &[u8] =
    b"\x80\x05\x95\x16\x00\x00\x00\x00\x00\x00\x00\x8c\x08builtins\x94\x8c\x05bytes\x94\x93\x94.";
/// `distributed.admin.max-error-length`, in characters.
const MAX_ERROR: usize = 10_000;

/// `to_serialize(data)` for a Python `bytes` object.
pub fn bytes_object(data: Bytes) -> Payload {
    let mut header = ByteBuf::with_capacity(192);
    map(&mut header, 8);
    text(&mut header, "sub-header");
    map(&mut header, 0);
    text(&mut header, "type");
    text(&mut header, "bytes");
    text(&mut header, "type-serialized");
    let Ok(()) = encode::write_bin(&mut header, BYTES_TYPE);
    text(&mut header, "serializer");
    text(&mut header, "dask");
    split(&mut header, 1);
    text(&mut header, "num-sub-frames");
    let Ok(_) = encode::write_uint(&mut header, 1);
    Payload { kind: PayloadKind::Serialized, header: header.into_vec().into(), frames: vec![data] }
}

/// `to_serialize(obj)` for an object of which this is the pickle; `buffers` are its out-of-band buffers, each with
/// whether Python may write to it.
pub fn pickled_object(pickle: Bytes, buffers: Vec<(Bytes, bool)>) -> Payload {
    let mut header = ByteBuf::with_capacity(128 + 8 * buffers.len());
    map(&mut header, 6);
    text(&mut header, "serializer");
    text(&mut header, "pickle");
    text(&mut header, "writeable");
    array(&mut header, buffers.len());
    for (_, writeable) in &buffers {
        let Ok(()) = encode::write_bool(&mut header, *writeable);
    }
    let count = 1 + buffers.len();
    split(&mut header, count);
    text(&mut header, "num-sub-frames");
    let Ok(_) = encode::write_uint(&mut header, count as u64);
    let frames = std::iter::once(pickle).chain(buffers.into_iter().map(|(frame, _)| frame)).collect();
    Payload { kind: PayloadKind::Serialized, header: header.into_vec().into(), frames }
}

/// `ToPickle(obj)` for an object of which this is the pickle: the receiver opens it on arrival.
pub fn to_pickle(pickle: &[u8], buffers: Vec<Bytes>) -> Payload {
    let mut header = ByteBuf::with_capacity(64 + pickle.len() + buffers.len());
    map(&mut header, 3);
    text(&mut header, "pickled-obj");
    let Ok(()) = encode::write_bin(&mut header, pickle);
    no_compression(&mut header, buffers.len());
    text(&mut header, "num-sub-frames");
    let Ok(_) = encode::write_uint(&mut header, buffers.len() as u64);
    Payload { kind: PayloadKind::Pickled, header: header.into_vec().into(), frames: buffers }
}

/// The `dask.utils.typename` of a `to_serialize` object, where its header tells: Dask's own serializers and
/// collections of them do, pickle does not.
pub fn type_name(header: &[u8]) -> Option<String> {
    let mut reader = Reader::new(header, 0);
    let Token::Map(pairs) = reader.token().ok()? else { return None };
    let mut collection = None;
    for _ in 0..pairs {
        let Token::Str(len) = reader.token().ok()? else { return None };
        let key = reader.text(len).ok()?;
        if !matches!(key, "type" | "type-serialized") {
            reader.skip().ok()?;
            continue;
        }
        match reader.token().ok()? {
            Token::Str(len) if key == "type" => return reader.text(len).ok().map(str::to_owned),
            // of a collection this is `list`, `dict`...; of other objects a pickle
            Token::Str(len) => collection = reader.text(len).ok(),
            Token::Bin(len) => drop(reader.take("bytes", len).ok()?),
            _ => return None,
        }
    }
    collection.map(str::to_owned)
}

/// A Python exception to answer with, as from `raise module.name(*args)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exception {
    module: &'static str,
    name: &'static str,
    args: Vec<String>,
}

impl Exception {
    /// `name(message)` of `builtins`: `RuntimeError`, `MemoryError`...
    pub fn builtin(name: &'static str, message: impl Into<String>) -> Self {
        Exception::new("builtins", name, message)
    }

    /// `module.name(message)`; the receiver must be able to import it. A very long message is cut as Dask does
    /// (`truncate_exception`).
    pub fn new(module: &'static str, name: &'static str, message: impl Into<String>) -> Self {
        let message = message.into();
        let args = match message.char_indices().nth(MAX_ERROR) {
            None => vec![message],
            Some((end, _)) => vec!["Long error message".to_owned(), message[..end].to_owned()],
        };
        Exception { module, name, args }
    }

    /// Its pickle (`pickle.dumps(e, protocol=5)`).
    pub fn pickle(&self) -> Bytes {
        let mut body = Vec::new();
        pickle_text(&mut body, self.module);
        pickle_text(&mut body, self.name);
        body.extend_from_slice(b"\x93\x94"); // STACK_GLOBAL, MEMOIZE
        for arg in &self.args {
            pickle_text(&mut body, arg);
        }
        // TUPLE1 or TUPLE2, MEMOIZE, REDUCE, MEMOIZE, STOP
        body.push(if self.args.len() == 1 { 0x85 } else { 0x86 });
        body.extend_from_slice(b"\x94R\x94.");
        // PROTO 5, FRAME
        let mut pickle = vec![0x80, 5, 0x95];
        pickle.extend_from_slice(&(body.len() as u64).to_le_bytes());
        pickle.extend_from_slice(&body);
        pickle.into()
    }

    /// What goes under `exception`: the pickle as a serialized `bytes` object.
    pub fn payload(&self) -> Payload {
        bytes_object(self.pickle())
    }

    /// Python's `repr(e)`.
    pub fn text(&self) -> String {
        let args: Vec<String> = self.args.iter().map(|a| format!("{:?}", Key::from(a.as_str()))).collect();
        format!("{}({})", self.name, args.join(", "))
    }

    /// The reply that raises it at the other end (`error_message`). There is no traceback: no Python code raised it.
    pub fn error_message(&self, status: &str) -> Value {
        Value::map([
            ("status", status.into()),
            ("exception", self.payload().into()),
            ("traceback", Value::Nil),
            ("exception_text", self.text().into()),
            ("traceback_text", "".into()),
        ])
    }
}

/// SHORT_BINUNICODE or BINUNICODE, MEMOIZE.
fn pickle_text(out: &mut Vec<u8>, text: &str) {
    match u8::try_from(text.len()) {
        Ok(len) => out.extend_from_slice(&[0x8c, len]),
        Err(_) => {
            out.push(b'X');
            // names are short and arguments cut to MAX_ERROR characters
            out.extend_from_slice(&(text.len() as u32).to_le_bytes());
        }
    }
    out.extend_from_slice(text.as_bytes());
    out.push(0x94);
}

/// The fields of `serialize_and_split` for `count` frames that were neither split nor compressed.
fn split(out: &mut ByteBuf, count: usize) {
    text(out, "split-num-sub-frames");
    array(out, count);
    for _ in 0..count {
        let Ok(_) = encode::write_uint(out, 1);
    }
    text(out, "split-offsets");
    array(out, count);
    for i in 0..count {
        let Ok(_) = encode::write_uint(out, i as u64);
    }
    no_compression(out, count);
}

fn no_compression(out: &mut ByteBuf, count: usize) {
    text(out, "compression");
    array(out, count);
    for _ in 0..count {
        let Ok(()) = encode::write_nil(out);
    }
}

fn text(out: &mut ByteBuf, text: &str) {
    let Ok(()) = encode::write_str(out, text);
}

fn map(out: &mut ByteBuf, pairs: u32) {
    let Ok(_) = encode::write_map_len(out, pairs);
}

fn array(out: &mut ByteBuf, items: usize) {
    // buffers are frames of a message: far fewer than 2^32
    let Ok(_) = encode::write_array_len(out, items as u32);
}
