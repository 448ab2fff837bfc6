//! One request as it came: its op, its arguments, and the complaints that Python would have about them.
//!
//! Source: `distributed/core.py: Server._handle_comm`.

use bytes::Bytes;

use crate::proto::{Address, Key, Value};
use crate::wire::payload::Exception;

/// A request to a server, with what `Server._handle_comm` takes out of it taken out.
pub struct Request {
    /// What is asked; `None` if that is not even a string, which no server knows.
    pub op: Option<String>,
    /// The arguments by name.
    pub arguments: Arguments,
    /// Whether an answer is expected.
    pub reply: bool,
    /// Whether the connection shall end afterwards.
    pub close: bool,
    /// Who asks.
    pub peer: Address,
    /// The whole message as it lay on the wire, to relay it.
    pub frames: Vec<Bytes>,
}

/// Why a message is no request.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum NoRequest {
    #[error("bad message type: expected a dict")]
    NoDict,
    #[error("received unexpected message without \"op\" key")]
    NoOp,
}

impl Request {
    pub(super) fn parse(message: Value, frames: Vec<Bytes>, peer: Address) -> Result<Self, NoRequest> {
        let Value::Map(items) = message else { return Err(NoRequest::NoDict) };
        let mut request = Request {
            op: None,
            arguments: Arguments(Vec::with_capacity(items.len())),
            reply: true,
            close: false,
            peer,
            frames,
        };
        let mut has_op = false;
        for (name, value) in items {
            match name.as_str() {
                Some("op") => {
                    has_op = true;
                    request.op = value.as_str().map(str::to_owned);
                }
                Some("reply") => request.reply = is_true(&value),
                Some("close") => request.close = is_true(&value),
                // what we answer is msgpack and serialized already, whatever the other side can open
                Some("serializers") => {}
                Some(name) => request.arguments.0.push((name.to_owned(), value)),
                None => return Err(NoRequest::NoDict),
            }
        }
        if has_op { Ok(request) } else { Err(NoRequest::NoOp) }
    }
}

/// Python's `bool(value)`.
fn is_true(value: &Value) -> bool {
    match value {
        Value::Nil => false,
        Value::Bool(b) => *b,
        Value::Int(i) => i.get() != 0,
        Value::Float(f) => *f != 0.0,
        Value::Str(s) => !s.is_empty(),
        Value::Bytes(b) => !b.is_empty(),
        Value::List(items) | Value::Set(items) => !items.is_empty(),
        Value::Map(items) => !items.is_empty(),
        Value::Payload(_) => true,
    }
}

/// The arguments of a request, by name.
#[derive(Debug, Default)]
pub struct Arguments(Vec<(String, Value)>);

/// What a handler takes, for the same complaints that Python makes when it is called.
pub(super) struct Signature {
    /// Name in complaints.
    pub(super) name: &'static str,
    pub(super) required: &'static [&'static str],
    pub(super) optional: &'static [&'static str],
}

impl Signature {
    /// Complains as Python does about arguments that do not fit.
    pub(super) fn check(&self, arguments: &Arguments) -> Result<(), Exception> {
        let complain = |text: String| Err(type_error(format!("{}() {text}", self.name)));
        for (name, _) in &arguments.0 {
            let name = name.as_str();
            if matches!(name, "self" | "comm") && !self.optional.contains(&name) {
                return complain(format!("got multiple values for argument '{name}'"));
            }
            if !self.required.contains(&name) && !self.optional.contains(&name) {
                return complain(format!("got an unexpected keyword argument '{name}'"));
            }
        }
        let missing: Vec<String> = self
            .required
            .iter()
            .filter(|name| arguments.get(name).is_none())
            .map(|name| format!("'{name}'"))
            .collect();
        match missing.as_slice() {
            [] => Ok(()),
            [one] => complain(format!("missing 1 required positional argument: {one}")),
            [one, two] => complain(format!("missing 2 required positional arguments: {one} and {two}")),
            [init @ .., last] => {
                let count = missing.len();
                complain(format!(
                    "missing {count} required positional arguments: {}, and {last}",
                    init.join(", ")
                ))
            }
        }
    }
}

fn type_error(text: String) -> Exception {
    Exception::builtin("TypeError", text)
}

/// Name of the Python type that this was.
fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Nil => "NoneType",
        Value::Bool(_) => "bool",
        Value::Int(_) => "int",
        Value::Float(_) => "float",
        Value::Str(_) => "str",
        Value::Bytes(_) => "bytes",
        Value::List(_) => "tuple",
        Value::Map(_) => "dict",
        Value::Set(_) => "set",
        Value::Payload(_) => "Serialized",
    }
}

impl Arguments {
    /// The argument of that name.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, v)| v)
    }

    /// Takes the argument of that name; `None` in Python is `None` here.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        let (_, value) = self.0.iter_mut().find(|(n, _)| n == name)?;
        match std::mem::replace(value, Value::Nil) {
            Value::Nil => None,
            value => Some(value),
        }
    }

    /// `for key in argument`, with its complaints.
    pub(super) fn keys(&self, name: &str) -> Result<Vec<Key>, Exception> {
        iterate(self.get(name).unwrap_or(&Value::Nil))
    }

    /// As [`Arguments::keys`], where `None` stands for no restriction.
    pub(super) fn optional_keys(&self, name: &str) -> Result<Option<Vec<Key>>, Exception> {
        match self.get(name) {
            None | Some(Value::Nil) => Ok(None),
            Some(value) => iterate(value).map(Some),
        }
    }

    /// Pairs of a dict with their keys as task keys.
    pub(super) fn dict(&mut self, name: &str) -> Result<Vec<(Key, Value)>, Exception> {
        match self.take(name).unwrap_or(Value::Nil) {
            Value::Map(items) => items.into_iter().map(|(k, v)| Ok((key_of(&k)?, v))).collect(),
            other => {
                let text = format!("'{}' object has no attribute 'items'", type_of(&other));
                Err(Exception::builtin("AttributeError", text))
            }
        }
    }

    /// A number, with a default.
    pub(super) fn number(&self, name: &str, default: f64) -> Result<f64, Exception> {
        match self.get(name) {
            None | Some(Value::Nil) => Ok(default),
            Some(Value::Bool(b)) => Ok(f64::from(*b)),
            Some(value) => value.as_f64().ok_or_else(|| {
                type_error(format!("'<' not supported between instances of 'float' and '{}'", type_of(value)))
            }),
        }
    }

    /// Whether an argument is true in Python's sense, with a default.
    pub(super) fn flag(&self, name: &str, default: bool) -> bool {
        self.get(name).map_or(default, is_true)
    }

    /// A text, if it is one.
    pub(super) fn text(&self, name: &str) -> Option<&str> {
        self.get(name).and_then(Value::as_str)
    }
}

fn iterate(value: &Value) -> Result<Vec<Key>, Exception> {
    match value {
        Value::List(items) | Value::Set(items) => items.iter().map(key_of).collect(),
        Value::Map(items) => items.iter().map(|(k, _)| key_of(k)).collect(),
        Value::Str(s) => Ok(s.chars().map(|c| Key::from(c.to_string())).collect()),
        Value::Bytes(b) => Ok(b.iter().map(|byte| Key::Int(i128::from(*byte))).collect()),
        other => Err(type_error(format!("'{}' object is not iterable", type_of(other)))),
    }
}

fn key_of(value: &Value) -> Result<Key, Exception> {
    value.to_key().ok_or_else(|| type_error(format!("unhashable type: '{}'", type_of(value))))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const GET_DATA: Signature =
        Signature { name: "Worker.get_data", required: &["keys"], optional: &["who", "serializers"] };

    fn request(items: &[(&str, Value)]) -> Request {
        let peer = Address::parse("tcp://h:1").unwrap();
        Request::parse(Value::map(items.iter().cloned()), Vec::new(), peer).unwrap()
    }

    fn complaint(items: &[(&str, Value)]) -> String {
        let mut all = vec![("op", Value::from("get_data"))];
        all.extend_from_slice(items);
        GET_DATA.check(&request(&all).arguments).unwrap_err().text()
    }

    #[test]
    fn complaints_are_those_of_python() {
        // as a stock worker words them
        assert_eq!(
            complaint(&[]),
            "TypeError(\"Worker.get_data() missing 1 required positional argument: 'keys'\")"
        );
        assert_eq!(
            complaint(&[("keys", Value::Nil), ("bad", 1.into())]),
            "TypeError(\"Worker.get_data() got an unexpected keyword argument 'bad'\")"
        );
        assert_eq!(
            complaint(&[("keys", Value::Nil), ("comm", 1.into())]),
            "TypeError(\"Worker.get_data() got multiple values for argument 'comm'\")"
        );
        let three = Signature { name: "f", required: &["a", "b", "c"], optional: &[] };
        assert_eq!(
            three.check(&Arguments::default()).unwrap_err().text(),
            "TypeError(\"f() missing 3 required positional arguments: 'a', 'b', and 'c'\")"
        );
    }

    #[test]
    fn keys_are_what_python_iterates_over() {
        let keys = |value: Value| request(&[("op", Value::Nil), ("keys", value)]).arguments.keys("keys");
        let texts = |value| keys(value).map_err(|e| e.text());
        assert_eq!(texts("ab".into()).unwrap(), [Key::from("a"), Key::from("b")]);
        assert_eq!(texts(vec![Value::from("x")].into()).unwrap(), [Key::from("x")]);
        assert_eq!(texts(5.into()), Err("TypeError(\"'int' object is not iterable\")".into()));
        assert_eq!(texts(Value::Nil), Err("TypeError(\"'NoneType' object is not iterable\")".into()));
        let unhashable = vec![Value::Map(Vec::new())];
        assert_eq!(texts(unhashable.into()), Err("TypeError(\"unhashable type: 'dict'\")".into()));
    }

    #[test]
    fn what_the_server_itself_reads_is_no_argument() {
        let request = request(&[
            ("op", "x".into()),
            ("reply", false.into()),
            ("close", 1.into()),
            ("serializers", vec![Value::from("pickle")].into()),
            ("a", 1.into()),
        ]);
        assert_eq!((request.op.as_deref(), request.reply, request.close), (Some("x"), false, true));
        assert_eq!(request.arguments.0.len(), 1);
        let peer = Address::parse("tcp://h:1").unwrap();
        let no_op = Request::parse(Value::Map(Vec::new()), Vec::new(), peer.clone()).err();
        assert_eq!(no_op, Some(NoRequest::NoOp));
        assert_eq!(Request::parse(Value::Nil, Vec::new(), peer).err(), Some(NoRequest::NoDict));
    }
}
