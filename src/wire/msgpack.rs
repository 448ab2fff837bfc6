//! Dask's msgpack dialect: bytes to [`Value`] and back, without payload markers (those need frames: see
//! [`super::codec`]).
//!
//! `str` is UTF-8 text, `bin` is bytes, lists and tuples are one thing, map keys may be anything, and a map with
//! `__Set__` is a set. A map with `__Enum__` stays the map it is: sent on, it becomes that enum member in Python again.
//! `bin` values are slices of the input. Never recurses deeper than the limit, never reserves on a peer's word alone.
//!
//! Source: `distributed/protocol/serialize.py: msgpack_decode_default, msgpack_encode_default`.

use std::str::Utf8Error;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use rmp::Marker;
use rmp::decode::RmpRead;
use rmp::encode::{self, ByteBuf};

use super::{Error, Limits};
use crate::proto::{Payload, Value};

/// Most items to reserve room for before they are there.
const RESERVE: usize = 1024;
/// Longest text worth sharing between its occurrences in a message, in bytes.
const SHARED_TEXT: usize = 64;
/// Slots of the table of shared texts.
const SLOTS: usize = 64;
/// Nesting of values that we write.
const ENCODE_DEPTH: usize = 512;

/// Decodes the one value that `input` holds.
///
/// # Errors
/// The [`Error`] says at which byte the input is no such value, or which limit it breaks.
pub fn decode(input: &Bytes, limits: &Limits) -> Result<Value, Error> {
    let mut at = 0;
    let value = decode_at(input, &mut at, limits)?;
    match input.len() - at {
        0 => Ok(value),
        bytes => Err(Error::Trailing { offset: at, bytes }),
    }
}

/// Decodes the value that begins at byte `at`, and moves `at` behind it.
///
/// # Errors
/// As [`decode`]; bytes after the value are none.
pub fn decode_at(input: &Bytes, at: &mut usize, limits: &Limits) -> Result<Value, Error> {
    let mut decoder = Decoder::new(input, *at, limits, NoPayloads);
    let value = decoder.value(0)?;
    *at = decoder.reader.offset();
    Ok(value)
}

/// Appends `value` to `out`.
///
/// # Errors
/// [`Error::Integer`] and [`Error::TooDeep`] for what msgpack cannot hold, [`Error::Payload`] for a payload.
pub fn encode(value: &Value, out: &mut BytesMut) -> Result<(), Error> {
    let mut written = ByteBuf::new();
    encode_with(value, &mut written, &mut |_, _| Err(Error::Payload), 0)?;
    out.extend_from_slice(written.as_slice());
    Ok(())
}

/// Where a map that marks a payload is looked up.
pub(super) trait Payloads {
    /// The payload that a map with a marker key stands for; `None` if it is a map like any other.
    fn resolve(&mut self, items: &[(Value, Value)]) -> Result<Option<Value>, Error>;
}

/// Leaves payload markers as they are.
struct NoPayloads;

impl Payloads for NoPayloads {
    fn resolve(&mut self, _: &[(Value, Value)]) -> Result<Option<Value>, Error> {
        Ok(None)
    }
}

/// Bytes being read, with errors that say where.
pub(super) struct Reader<'a> {
    bytes: rmp::decode::Bytes<'a>,
    start: usize,
}

impl<'a> Reader<'a> {
    /// Reads `input` from byte `start` on.
    pub(super) fn new(input: &'a [u8], start: usize) -> Self {
        Reader { bytes: rmp::decode::Bytes::new(input.get(start..).unwrap_or_default()), start }
    }

    /// Position in the whole input.
    pub(super) fn offset(&self) -> usize {
        self.start + self.bytes.position() as usize
    }

    pub(super) fn remaining(&self) -> usize {
        self.bytes.remaining_slice().len()
    }

    fn cut(&self, what: &'static str) -> Error {
        Error::Truncated { what, offset: self.offset() }
    }

    /// The next `len` bytes.
    pub(super) fn take(&mut self, what: &'static str, len: usize) -> Result<&'a [u8], Error> {
        let rest = self.bytes.remaining_slice();
        let (taken, rest) = rest.split_at_checked(len).ok_or_else(|| self.cut(what))?;
        self.start = self.offset() + len;
        self.bytes = rmp::decode::Bytes::new(rest);
        Ok(taken)
    }

    fn u8(&mut self) -> Result<u8, Error> {
        self.bytes.read_data_u8().map_err(|_| self.cut("number"))
    }

    fn u16(&mut self) -> Result<u16, Error> {
        self.bytes.read_data_u16().map_err(|_| self.cut("number"))
    }

    fn u32(&mut self) -> Result<u32, Error> {
        self.bytes.read_data_u32().map_err(|_| self.cut("number"))
    }

    fn u64(&mut self) -> Result<u64, Error> {
        self.bytes.read_data_u64().map_err(|_| self.cut("number"))
    }

    /// The next scalar, or the length of what comes next.
    #[inline]
    pub(super) fn token(&mut self) -> Result<Token, Error> {
        let marker = rmp::decode::read_marker(&mut self.bytes).map_err(|_| self.cut("value"))?;
        Ok(match marker {
            Marker::Null => Token::Nil,
            Marker::False => Token::Bool(false),
            Marker::True => Token::Bool(true),
            Marker::FixPos(n) => Token::Int(i128::from(n)),
            Marker::FixNeg(n) => Token::Int(i128::from(n)),
            Marker::U8 => Token::Int(i128::from(self.u8()?)),
            Marker::U16 => Token::Int(i128::from(self.u16()?)),
            Marker::U32 => Token::Int(i128::from(self.u32()?)),
            Marker::U64 => Token::Int(i128::from(self.u64()?)),
            Marker::I8 => Token::Int(i128::from(self.u8()? as i8)),
            Marker::I16 => Token::Int(i128::from(self.u16()? as i16)),
            Marker::I32 => Token::Int(i128::from(self.u32()? as i32)),
            Marker::I64 => Token::Int(i128::from(self.u64()? as i64)),
            Marker::F32 => Token::Float(f64::from(f32::from_bits(self.u32()?))),
            Marker::F64 => Token::Float(f64::from_bits(self.u64()?)),
            Marker::FixStr(n) => Token::Str(usize::from(n)),
            Marker::Str8 => Token::Str(usize::from(self.u8()?)),
            Marker::Str16 => Token::Str(usize::from(self.u16()?)),
            Marker::Str32 => Token::Str(self.u32()? as usize),
            Marker::Bin8 => Token::Bin(usize::from(self.u8()?)),
            Marker::Bin16 => Token::Bin(usize::from(self.u16()?)),
            Marker::Bin32 => Token::Bin(self.u32()? as usize),
            Marker::FixArray(n) => Token::Array(usize::from(n)),
            Marker::Array16 => Token::Array(usize::from(self.u16()?)),
            Marker::Array32 => Token::Array(self.u32()? as usize),
            Marker::FixMap(n) => Token::Map(usize::from(n)),
            Marker::Map16 => Token::Map(usize::from(self.u16()?)),
            Marker::Map32 => Token::Map(self.u32()? as usize),
            other => return Err(Error::Marker { marker: other.to_u8(), offset: self.offset() - 1 }),
        })
    }

    /// Skips one value of any depth without recursion.
    pub(super) fn skip(&mut self) -> Result<(), Error> {
        let mut left = 1u64;
        while left > 0 {
            left -= 1;
            match self.token()? {
                Token::Str(n) | Token::Bin(n) => {
                    self.take("text or bytes", n)?;
                }
                Token::Array(n) => left += n as u64,
                Token::Map(n) => left += 2 * n as u64,
                Token::Nil | Token::Bool(_) | Token::Int(_) | Token::Float(_) => {}
            }
        }
        Ok(())
    }

    /// A `str`.
    pub(super) fn text(&mut self, len: usize) -> Result<&'a str, Error> {
        let offset = self.offset();
        std::str::from_utf8(self.take("text", len)?).map_err(|_| Error::Utf8 { offset })
    }
}

/// A marker with its number: a whole scalar, or how much follows.
pub(super) enum Token {
    Nil,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(usize),
    Bin(usize),
    Array(usize),
    Map(usize),
}

/// Decodes values out of one message.
pub(super) struct Decoder<'a, P> {
    input: &'a Bytes,
    pub(super) reader: Reader<'a>,
    depth: usize,
    values: usize,
    limit: usize,
    texts: Texts,
    payloads: P,
}

impl<'a, P: Payloads> Decoder<'a, P> {
    pub(super) fn new(input: &'a Bytes, at: usize, limits: &Limits, payloads: P) -> Self {
        Decoder {
            input,
            reader: Reader::new(input, at),
            depth: limits.depth,
            values: limits.values,
            limit: limits.values,
            texts: Texts::default(),
            payloads,
        }
    }

    /// The next value, `depth` lists and maps down.
    pub(super) fn value(&mut self, depth: usize) -> Result<Value, Error> {
        Ok(match self.reader.token()? {
            Token::Nil => Value::Nil,
            Token::Bool(b) => Value::Bool(b),
            Token::Int(i) => Value::from(i),
            Token::Float(f) => Value::Float(f),
            Token::Str(len) => {
                let offset = self.reader.offset();
                let text = self.texts.share(self.reader.take("text", len)?);
                Value::Str(text.map_err(|_| Error::Utf8 { offset })?)
            }
            Token::Bin(len) => {
                let start = self.reader.offset();
                self.reader.take("bytes", len)?;
                Value::Bytes(self.input.slice(start..start + len))
            }
            Token::Array(len) => {
                self.enter("list", len, 1, depth)?;
                Value::List(self.list(len, depth + 1)?)
            }
            Token::Map(len) => {
                self.enter("map", len, 2, depth)?;
                self.map(len, depth + 1)?
            }
        })
    }

    /// Checks a list or map of `len` times `each` values before anything is reserved for it.
    fn enter(&mut self, what: &'static str, len: usize, each: usize, depth: usize) -> Result<(), Error> {
        if depth >= self.depth {
            return Err(Error::TooDeep { offset: self.reader.offset(), limit: self.depth });
        }
        let count = len.saturating_mul(each);
        // every value takes a byte at least
        if count > self.reader.remaining() {
            return Err(self.reader.cut(what));
        }
        self.values = self.values.checked_sub(count).ok_or(Error::TooMany {
            what: "values",
            count: count as u64,
            limit: self.limit as u64,
        })?;
        Ok(())
    }

    fn list(&mut self, len: usize, depth: usize) -> Result<Vec<Value>, Error> {
        let mut items = Vec::with_capacity(len.min(RESERVE));
        for _ in 0..len {
            items.push(self.value(depth)?);
        }
        Ok(items)
    }

    fn map(&mut self, len: usize, depth: usize) -> Result<Value, Error> {
        if len == 1 {
            return self.single(depth);
        }
        let mut items = Vec::with_capacity(len.min(RESERVE));
        let mut marked = false;
        for _ in 0..len {
            let key = self.value(depth)?;
            marked |= is_marker(&key);
            items.push((key, self.value(depth)?));
        }
        if !marked {
            return Ok(Value::Map(items));
        }
        if let Some(payload) = self.payloads.resolve(&items)? {
            return Ok(payload);
        }
        Ok(into_set(items))
    }

    /// A map of one pair, which most payload markers are: those need no memory.
    fn single(&mut self, depth: usize) -> Result<Value, Error> {
        let key = self.value(depth)?;
        let pair = [(key, self.value(depth)?)];
        if is_marker(&pair[0].0)
            && let Some(payload) = self.payloads.resolve(&pair)?
        {
            return Ok(payload);
        }
        Ok(Value::Map(pair.into()))
    }
}

/// Whether a map with this key may stand for something else.
fn is_marker(key: &Value) -> bool {
    matches!(key, Value::Str(name) if name.starts_with("__"))
}

/// A map that marks a set as the set, any other as it is.
fn into_set(items: Vec<(Value, Value)>) -> Value {
    let mut map = Value::Map(items);
    if map.field("__Enum__").is_some() || map.field("__Set__").is_none() {
        return map;
    }
    match map.field("as-list").and_then(Value::as_list) {
        None => map,
        Some(_) => match map.take_field("as-list") {
            Some(Value::List(items) | Value::Set(items)) => Value::Set(items),
            _ => map,
        },
    }
}

/// Short texts seen in a message. Messages repeat field names, ops, addresses and stimuli: an occurrence costs a
/// reference count then, not an allocation. A slot forgets its text when another comes.
#[derive(Default)]
struct Texts {
    slots: Vec<Option<Arc<str>>>,
}

impl Texts {
    fn share(&mut self, text: &[u8]) -> Result<Arc<str>, Utf8Error> {
        if text.len() > SHARED_TEXT {
            return Ok(std::str::from_utf8(text)?.into());
        }
        if self.slots.is_empty() {
            self.slots.resize(SLOTS, None);
        }
        let slot = &mut self.slots[slot_of(text)];
        match slot {
            // what equals a text is one: no need to look at it again
            Some(known) if known.as_bytes() == text => Ok(known.clone()),
            _ => Ok(slot.insert(std::str::from_utf8(text)?.into()).clone()),
        }
    }
}

/// A slot by length, ends and middle: enough to keep field names apart.
fn slot_of(text: &[u8]) -> usize {
    let at = |i: usize| usize::from(text.get(i).copied().unwrap_or(0));
    let len = text.len();
    let mixed = len
        .wrapping_mul(0x9e37)
        .wrapping_add(at(0).wrapping_mul(0x85eb))
        .wrapping_add(at(len / 2).wrapping_mul(0xc2b3))
        .wrapping_add(at(len.wrapping_sub(1)).wrapping_mul(0x27d5));
    (mixed ^ (mixed >> 7)) % SLOTS
}

/// Writes `value`; `payload` writes what stands for a payload.
pub(super) fn encode_with(
    value: &Value,
    out: &mut ByteBuf,
    payload: &mut impl FnMut(&Payload, &mut ByteBuf) -> Result<(), Error>,
    depth: usize,
) -> Result<(), Error> {
    if depth > ENCODE_DEPTH {
        return Err(Error::TooDeep { offset: out.as_slice().len(), limit: ENCODE_DEPTH });
    }
    match value {
        Value::Nil => {
            let Ok(()) = encode::write_nil(out);
        }
        Value::Bool(b) => {
            let Ok(()) = encode::write_bool(out, *b);
        }
        Value::Int(i) => write_int(i.get(), out)?,
        Value::Float(f) => {
            let Ok(()) = encode::write_f64(out, *f);
        }
        Value::Str(s) => {
            len32(s.len(), "text")?;
            let Ok(()) = encode::write_str(out, s);
        }
        Value::Bytes(b) => {
            len32(b.len(), "bytes")?;
            let Ok(()) = encode::write_bin(out, b);
        }
        Value::List(items) => write_list(items, out, payload, depth)?,
        Value::Map(items) => {
            let Ok(_) = encode::write_map_len(out, len32(items.len(), "map")?);
            for (key, item) in items {
                encode_with(key, out, payload, depth + 1)?;
                encode_with(item, out, payload, depth + 1)?;
            }
        }
        Value::Set(items) => {
            let Ok(_) = encode::write_map_len(out, 2);
            let Ok(()) = encode::write_str(out, "__Set__");
            let Ok(()) = encode::write_bool(out, true);
            let Ok(()) = encode::write_str(out, "as-list");
            write_list(items, out, payload, depth)?;
        }
        Value::Payload(p) => payload(p, out)?,
    }
    Ok(())
}

fn write_list(
    items: &[Value],
    out: &mut ByteBuf,
    payload: &mut impl FnMut(&Payload, &mut ByteBuf) -> Result<(), Error>,
    depth: usize,
) -> Result<(), Error> {
    let Ok(_) = encode::write_array_len(out, len32(items.len(), "list")?);
    items.iter().try_for_each(|item| encode_with(item, out, payload, depth + 1))
}

/// An `int` in its shortest form, as Python's msgpack writes it.
pub(super) fn write_int(value: i128, out: &mut ByteBuf) -> Result<(), Error> {
    if let Ok(n) = i64::try_from(value) {
        let Ok(_) = encode::write_sint(out, n);
    } else if let Ok(n) = u64::try_from(value) {
        let Ok(_) = encode::write_uint(out, n);
    } else {
        return Err(Error::Integer { value });
    }
    Ok(())
}

/// A length as msgpack holds it.
pub(super) fn len32(len: usize, what: &'static str) -> Result<u32, Error> {
    u32::try_from(len).map_err(|_| Error::TooLong { what, bytes: len as u64, limit: u32::MAX.into() })
}
