//! The one dynamic value: what a Dask message is made of after decoding, before it is understood.
//!
//! Mirrors msgpack plus Dask's markers (`__Serialized__`, `__Pickled__`, `__Set__`). Payloads stay opaque.

use std::sync::Arc;

use bytes::Bytes;

use super::ids::Key;

/// How a [`Payload`] was marked on the wire, which decides how Python opens it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PayloadKind {
    /// `{"__Serialized__": i}`: header for `distributed.protocol.serialize.deserialize`.
    Serialized,
    /// `{"__Pickled__": i}`: header holds `pickled-obj`, frames are its out-of-band buffers.
    Pickled,
}

/// An object only Python can open: a msgpack header (with `num-sub-frames`) and its frames, uncompressed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Payload {
    /// Marker it travels under.
    pub kind: PayloadKind,
    /// The msgpack-encoded sub-header, as it lay on the wire (without a `compression` that no longer holds).
    pub header: Bytes,
    /// The frames the header speaks of.
    pub frames: Vec<Bytes>,
}

impl Payload {
    /// Bytes of header and frames together.
    pub fn len(&self) -> u64 {
        (self.header.len() + self.frames.iter().map(Bytes::len).sum::<usize>()) as u64
    }

    /// True when header and frames hold nothing at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// An `int`, aligned like a pointer: as it is, an `i128` would make every [`Value`] a fifth larger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(Rust, packed(8))]
pub struct Int(i128);

impl Int {
    /// The number.
    pub fn get(self) -> i128 {
        self.0
    }
}

impl From<i128> for Int {
    fn from(i: i128) -> Self {
        Int(i)
    }
}

/// A decoded message, or a part of one.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Value {
    /// `None`
    #[default]
    Nil,
    /// `bool`
    Bool(bool),
    /// `int`; msgpack's range is `i64::MIN..=u64::MAX`
    Int(Int),
    /// `float`
    Float(f64),
    /// `str`
    Str(Arc<str>),
    /// `bytes`
    Bytes(Bytes),
    /// `list` or `tuple`: msgpack does not tell them apart
    List(Vec<Value>),
    /// `dict`, in wire order
    Map(Vec<(Value, Value)>),
    /// `set` (`{"__Set__": true, "as-list": [...]}`)
    Set(Vec<Value>),
    /// A `__Serialized__` or `__Pickled__` object
    Payload(Box<Payload>),
}

// a map as long as a `compute-task` then still fits what allocators keep at hand
const _: () = assert!(size_of::<Value>() == 40);

impl Value {
    /// The value under a string key, if this is a map that has it.
    pub fn field(&self, name: &str) -> Option<&Value> {
        match self {
            Value::Map(items) => {
                items.iter().find(|(k, _)| matches!(k, Value::Str(s) if &**s == name)).map(|(_, v)| v)
            }
            _ => None,
        }
    }

    /// Takes the value under a string key out of a map, leaving `Nil`.
    pub fn take_field(&mut self, name: &str) -> Option<Value> {
        match self {
            Value::Map(items) => items
                .iter_mut()
                .find(|(k, _)| matches!(k, Value::Str(s) if &**s == name))
                .map(|(_, v)| std::mem::replace(v, Value::Nil)),
            _ => None,
        }
    }

    /// A map from string keys.
    pub fn map<'a>(items: impl IntoIterator<Item = (&'a str, Value)>) -> Value {
        Value::Map(items.into_iter().map(|(k, v)| (Value::from(k), v)).collect())
    }

    /// The text of a `str`.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::Str(s) => Some(s),
            _ => None,
        }
    }

    /// An `int` that fits.
    pub fn as_i64(&self) -> Option<i64> {
        match self {
            Value::Int(i) => i64::try_from(i.get()).ok(),
            Value::Bool(b) => Some(i64::from(*b)),
            _ => None,
        }
    }

    /// A `float`, or an `int` as one.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Value::Float(f) => Some(*f),
            Value::Int(i) => Some(i.get() as f64),
            _ => None,
        }
    }

    /// A `bool`.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Value::Bool(b) => Some(*b),
            _ => None,
        }
    }

    /// The items of a list or set.
    pub fn as_list(&self) -> Option<&[Value]> {
        match self {
            Value::List(l) | Value::Set(l) => Some(l),
            _ => None,
        }
    }

    /// The pairs of a map.
    pub fn as_map(&self) -> Option<&[(Value, Value)]> {
        match self {
            Value::Map(m) => Some(m),
            _ => None,
        }
    }

    /// This value as a task key, if it has the type of one.
    pub fn to_key(&self) -> Option<Key> {
        Some(match self {
            Value::Str(s) => Key::Str(s.clone()),
            Value::Bytes(b) => Key::Bytes(b[..].into()),
            Value::Int(i) => Key::Int(i.get()),
            Value::Bool(b) => Key::Int(i128::from(*b)),
            Value::Float(f) => Key::Float(*f),
            Value::List(items) => Key::Tuple(items.iter().map(Value::to_key).collect::<Option<_>>()?),
            _ => return None,
        })
    }
}

impl From<&Key> for Value {
    fn from(key: &Key) -> Self {
        match key {
            Key::Str(s) => Value::Str(s.clone()),
            Key::Bytes(b) => Value::Bytes(Bytes::copy_from_slice(b)),
            Key::Int(i) => Value::from(*i),
            Key::Float(f) => Value::Float(*f),
            Key::Tuple(t) => Value::List(t.iter().map(Value::from).collect()),
        }
    }
}

impl From<&str> for Value {
    fn from(s: &str) -> Self {
        Value::Str(s.into())
    }
}

impl From<String> for Value {
    fn from(s: String) -> Self {
        Value::Str(s.into())
    }
}

impl From<Arc<str>> for Value {
    fn from(s: Arc<str>) -> Self {
        Value::Str(s)
    }
}

impl From<bool> for Value {
    fn from(b: bool) -> Self {
        Value::Bool(b)
    }
}

impl From<f64> for Value {
    fn from(f: f64) -> Self {
        Value::Float(f)
    }
}

macro_rules! value_from_int {
    ($($t:ty),*) => {$(
        impl From<$t> for Value {
            fn from(i: $t) -> Self {
                Value::Int(Int(i as i128))
            }
        }
    )*};
}
value_from_int!(i32, u16, u32, i64, u64, i128, usize);

impl From<Bytes> for Value {
    fn from(b: Bytes) -> Self {
        Value::Bytes(b)
    }
}

impl From<Payload> for Value {
    fn from(p: Payload) -> Self {
        Value::Payload(Box::new(p))
    }
}

impl<T: Into<Value>> From<Option<T>> for Value {
    fn from(v: Option<T>) -> Self {
        v.map_or(Value::Nil, Into::into)
    }
}

impl<T: Into<Value>> From<Vec<T>> for Value {
    fn from(v: Vec<T>) -> Self {
        Value::List(v.into_iter().map(Into::into).collect())
    }
}
