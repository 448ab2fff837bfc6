//! What two ends of a connection tell each other first, and what follows from it.
//!
//! Source: `distributed/comm/core.py: Comm.handshake_info, handshake_configuration`.

use super::{Compression, Error};
use crate::proto::Value;

/// One end's side of the handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Configured compression; [`Compression::None`] between two ends on one host.
    pub compression: Compression,
    /// Version of the Python that opens payloads at this end.
    pub python: [u64; 3],
    /// Highest pickle protocol of that Python.
    pub pickle_protocol: u64,
}

/// What both ends can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// How frames may be compressed.
    pub compression: Compression,
    /// Highest pickle protocol that both read.
    pub pickle_protocol: u64,
}

impl Info {
    /// Our side, for an interpreter of that version.
    pub fn new(compression: Compression, python: [u64; 3]) -> Self {
        Info { compression, python, pickle_protocol: 5 }
    }

    /// The message to send.
    pub fn to_value(&self) -> Value {
        Value::map([
            ("compression", Value::from(self.compression.name())),
            ("python", Value::from(self.python.to_vec())),
            ("pickle-protocol", Value::from(self.pickle_protocol)),
        ])
    }

    /// Understands the other end's message. A compression we do not know counts as none, since both ends must name
    /// the same one to use it.
    ///
    /// # Errors
    /// [`Error::Handshake`] names the field that is missing or malformed.
    pub fn from_value(value: &Value) -> Result<Self, Error> {
        let bad = |field| Error::Handshake { field };
        let compression = match value.field("compression").ok_or(bad("compression"))? {
            Value::Nil | Value::Bool(false) => Compression::None,
            Value::Str(name) => Compression::from_name(name).unwrap_or(Compression::None),
            _ => return Err(bad("compression")),
        };
        let number = |v: &Value| v.as_i64().and_then(|n| u64::try_from(n).ok());
        let python = match value.field("python").and_then(Value::as_list) {
            Some([a, b, c]) => match (number(a), number(b), number(c)) {
                (Some(a), Some(b), Some(c)) => [a, b, c],
                _ => return Err(bad("python")),
            },
            _ => return Err(bad("python")),
        };
        let pickle_protocol =
            value.field("pickle-protocol").and_then(number).ok_or(bad("pickle-protocol"))?;
        Ok(Info { compression, python, pickle_protocol })
    }

    /// The configuration that suits both ends.
    pub fn negotiate(&self, remote: &Info) -> Agreed {
        let same = self.compression == remote.compression;
        Agreed {
            compression: if same { self.compression } else { Compression::None },
            pickle_protocol: self.pickle_protocol.min(remote.pickle_protocol),
        }
    }
}
