//! Identifiers that travel on the wire: keys, addresses, priorities, run ids, statuses.
//!
//! Pure values. Nothing here parses frames or knows a socket.

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use smallvec::SmallVec;

/// A task key: what `dask.typing.Key` allows (str, bytes, int, float, or a tuple of keys).
///
/// Two keys are equal exactly when Python says so: `1 == 1.0`, and both hash alike; `"a" != b"a"`.
/// Cloning is a reference count.
#[derive(Clone)]
pub enum Key {
    /// `str`
    Str(Arc<str>),
    /// `bytes`
    Bytes(Arc<[u8]>),
    /// `int` (and `bool`, which Python counts as one) within msgpack's 64 bit range
    Int(i128),
    /// `float`
    Float(f64),
    /// `tuple` of keys
    Tuple(Arc<[Key]>),
}

impl Key {
    /// Leftmost part of the key, as `dask.utils.key_split` (cached nowhere: callers keep it per task).
    ///
    /// `("x-2", 1)` gives `x`, `"sum-1a2b3c4d..."` gives `sum`; anything unnameable is `Other`.
    pub fn prefix(&self) -> String {
        match self {
            Key::Str(s) => split_name(s),
            Key::Bytes(b) => match std::str::from_utf8(b) {
                Ok(s) => split_name(s),
                Err(_) => "Other".into(),
            },
            Key::Tuple(parts) => match parts.first() {
                Some(first) => first.prefix(),
                None => "Other".into(),
            },
            Key::Int(_) | Key::Float(_) => "Other".into(),
        }
    }
}

/// The string case of `dask.utils.key_split`, its oddities included.
fn split_name(s: &str) -> String {
    let mut words = s.split('-');
    let first = words.next().unwrap_or("");
    let Some(initial) = first.chars().next() else { return "Other".into() };
    let mut result = if initial.is_alphabetic() {
        first.to_owned()
    } else {
        let head = first.split(',').next().unwrap_or("");
        head.trim_matches(|c| "_'()\"".contains(c)).to_owned()
    };
    for word in words {
        // Dask looks only at the first letter of an eight letter word to call it hexadecimal
        let looks_hex = word.chars().count() == 8 && word.starts_with(|c| ('a'..='f').contains(&c));
        if word.is_empty() || !word.chars().all(char::is_alphabetic) || looks_hex {
            break;
        }
        result.push('-');
        result.push_str(word);
    }
    if result.len() == 32 && result.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
        return "data".into();
    }
    match result.chars().next() {
        None => "Other".into(),
        Some('<') => {
            let inner = result.trim_matches(|c| "<>".contains(c));
            match inner.split_whitespace().next() {
                Some(word) => word.rsplit('.').next().unwrap_or("").to_owned(),
                None => "Other".into(),
            }
        }
        Some(_) => result,
    }
}

/// The integer that equals `f` in Python's sense, if there is one in range.
fn integral(f: f64) -> Option<i128> {
    // 2^127 is the first float past i128::MAX
    (f.fract() == 0.0 && f.abs() < 1.7e38).then_some(f as i128)
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Key::Str(a), Key::Str(b)) => a == b,
            (Key::Bytes(a), Key::Bytes(b)) => a == b,
            (Key::Int(a), Key::Int(b)) => a == b,
            // Python looks at identity first, so a NaN that came in once equals itself; on the wire
            // only the bits are left of that.
            (Key::Float(a), Key::Float(b)) => a == b || a.to_bits() == b.to_bits(),
            (Key::Int(i), Key::Float(f)) | (Key::Float(f), Key::Int(i)) => integral(*f) == Some(*i),
            (Key::Tuple(a), Key::Tuple(b)) => a == b,
            _ => false,
        }
    }
}

impl Eq for Key {}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        match self {
            Key::Str(s) => {
                state.write_u8(0);
                s.hash(state);
            }
            Key::Bytes(b) => {
                state.write_u8(1);
                b.hash(state);
            }
            Key::Int(i) => {
                state.write_u8(2);
                i.hash(state);
            }
            Key::Float(f) => match integral(*f) {
                Some(i) => {
                    state.write_u8(2);
                    i.hash(state);
                }
                None => {
                    state.write_u8(3);
                    f.to_bits().hash(state);
                }
            },
            Key::Tuple(t) => {
                state.write_u8(4);
                t.hash(state);
            }
        }
    }
}

impl PartialOrd for Key {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// A total order for canonical choices and for tests; Python has none across types.
impl Ord for Key {
    fn cmp(&self, other: &Self) -> Ordering {
        fn rank(k: &Key) -> u8 {
            match k {
                Key::Int(_) | Key::Float(_) => 0,
                Key::Str(_) => 1,
                Key::Bytes(_) => 2,
                Key::Tuple(_) => 3,
            }
        }
        match (self, other) {
            (Key::Str(a), Key::Str(b)) => a.cmp(b),
            (Key::Bytes(a), Key::Bytes(b)) => a.cmp(b),
            (Key::Int(a), Key::Int(b)) => a.cmp(b),
            (Key::Float(a), Key::Float(b)) => {
                if self == other {
                    Ordering::Equal
                } else {
                    a.total_cmp(b)
                }
            }
            (Key::Int(a), Key::Float(b)) => {
                if self == other {
                    Ordering::Equal
                } else {
                    (*a as f64).total_cmp(b).then(Ordering::Less)
                }
            }
            (Key::Float(_), Key::Int(_)) => other.cmp(self).reverse(),
            (Key::Tuple(a), Key::Tuple(b)) => a.cmp(b),
            _ => rank(self).cmp(&rank(other)),
        }
    }
}

impl From<&str> for Key {
    fn from(s: &str) -> Self {
        Key::Str(s.into())
    }
}

impl From<String> for Key {
    fn from(s: String) -> Self {
        Key::Str(s.into())
    }
}

/// Python's `str(key)`: what Dask prints in logs.
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Key::Str(s) => f.write_str(s),
            other => fmt::Debug::fmt(other, f),
        }
    }
}

/// Python's `repr(key)`.
impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Key::Str(s) => {
                let quote = if s.contains('\'') && !s.contains('"') { '"' } else { '\'' };
                write!(f, "{quote}")?;
                for c in s.chars() {
                    match c {
                        c if c == quote => write!(f, "\\{c}")?,
                        '\\' => f.write_str("\\\\")?,
                        '\n' => f.write_str("\\n")?,
                        '\r' => f.write_str("\\r")?,
                        '\t' => f.write_str("\\t")?,
                        c if (c as u32) < 0x20 || c as u32 == 0x7f => write!(f, "\\x{:02x}", c as u32)?,
                        c => write!(f, "{c}")?,
                    }
                }
                write!(f, "{quote}")
            }
            Key::Bytes(b) => {
                f.write_str("b'")?;
                for &c in b.iter() {
                    match c {
                        b'\'' | b'\\' => write!(f, "\\{}", c as char)?,
                        0x20..0x7f => write!(f, "{}", c as char)?,
                        _ => write!(f, "\\x{c:02x}")?,
                    }
                }
                f.write_str("'")
            }
            Key::Int(i) => write!(f, "{i}"),
            Key::Float(x) => write!(f, "{x:?}"),
            Key::Tuple(t) => {
                f.write_str("(")?;
                for (i, k) in t.iter().enumerate() {
                    if i > 0 {
                        f.write_str(", ")?;
                    }
                    fmt::Debug::fmt(k, f)?;
                }
                f.write_str(if t.len() == 1 { ",)" } else { ")" })
            }
        }
    }
}

/// A comm address as Dask writes it: `scheme://host:port`. Cloning is a reference count.
///
/// Always normalised: the scheme is there (`tcp` when none was given).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address(Arc<str>);

/// Why a string is no comm address.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum AddressError {
    /// Neither `tcp` nor `tls`.
    #[error("unsupported scheme {scheme:?} in address {address:?}: use tcp://host:port")]
    Scheme { scheme: String, address: String },
    /// No `host:port` after the scheme.
    #[error("address {address:?} is not of the form tcp://host:port")]
    Form { address: String },
}

impl Address {
    /// Parses and normalises, like `distributed.comm.addressing.normalize_address`.
    ///
    /// # Errors
    /// [`AddressError`] when the scheme is unknown or the port is missing or not a number.
    pub fn parse(text: &str) -> Result<Self, AddressError> {
        let text = text.trim();
        let (scheme, loc) = text.split_once("://").unwrap_or(("tcp", text));
        if !matches!(scheme, "tcp" | "tls") {
            return Err(AddressError::Scheme { scheme: scheme.into(), address: text.into() });
        }
        let form = || AddressError::Form { address: text.into() };
        let (host, port) = loc.trim_end_matches('/').rsplit_once(':').ok_or_else(form)?;
        if host.is_empty() || (host.contains(':') && !(host.starts_with('[') && host.ends_with(']'))) {
            return Err(form());
        }
        let port: u16 = port.parse().map_err(|_| form())?;
        Ok(Address(format!("{scheme}://{host}:{port}").into()))
    }

    /// `tcp` or `tls`.
    pub fn scheme(&self) -> &str {
        self.0.split_once("://").map_or("tcp", |(s, _)| s)
    }

    /// Host without brackets.
    pub fn host(&self) -> &str {
        let loc = self.host_port();
        loc.rsplit_once(':').map_or(loc, |(h, _)| h).trim_matches(|c| c == '[' || c == ']')
    }

    /// TCP port.
    pub fn port(&self) -> u16 {
        self.0.rsplit_once(':').and_then(|(_, p)| p.parse().ok()).unwrap_or(0)
    }

    /// `host:port`, with brackets around an IPv6 host: what a resolver takes.
    pub fn host_port(&self) -> &str {
        self.0.split_once("://").map_or(&*self.0, |(_, l)| l)
    }

    /// The whole address.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The `tcp` address of a socket.
impl From<SocketAddr> for Address {
    fn from(socket: SocketAddr) -> Self {
        // a scope id, which `SocketAddr` would print, is no part of a comm address
        Address(match socket.ip() {
            IpAddr::V4(ip) => format!("tcp://{ip}:{}", socket.port()).into(),
            IpAddr::V6(ip) => format!("tcp://[{ip}]:{}", socket.port()).into(),
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &*self.0)
    }
}

/// A task's priority tuple; the smallest runs first. Compared like a Python tuple of numbers.
#[derive(Clone, Debug, Default)]
pub struct Priority(pub SmallVec<[f64; 4]>);

impl PartialEq for Priority {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Priority {}

impl PartialOrd for Priority {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Priority {
    fn cmp(&self, other: &Self) -> Ordering {
        for (a, b) in self.0.iter().zip(&other.0) {
            match a.partial_cmp(b).unwrap_or(Ordering::Equal) {
                Ordering::Equal => {}
                unequal => return unequal,
            }
        }
        self.0.len().cmp(&other.0.len())
    }
}

/// The scheduler's number for one attempt at a task; echoed in every answer about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RunId(pub i64);

impl RunId {
    /// `distributed.worker_state_machine.RUN_ID_SENTINEL`: no attempt was asked for here.
    pub const NONE: RunId = RunId(-1);
}

/// `distributed.core.Status`, the values a worker takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// Created, not started.
    Init,
    /// Takes and runs tasks.
    Running,
    /// Runs no new tasks, serves data (memory above `pause`).
    Paused,
    /// Leaving by `close_gracefully`: runs no new tasks, serves data.
    ClosingGracefully,
    /// Shutting down.
    Closing,
    /// Down.
    Closed,
}

impl Status {
    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Init => "init",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::ClosingGracefully => "closing_gracefully",
            Status::Closing => "closing",
            Status::Closed => "closed",
        }
    }

    /// The status of that name, if a worker can have it.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "init" => Status::Init,
            "running" => Status::Running,
            "paused" => Status::Paused,
            "closing_gracefully" => Status::ClosingGracefully,
            "closing" => Status::Closing,
            "closed" => Status::Closed,
            _ => return None,
        })
    }
}
