//! Identifiers that travel on the wire: keys, addresses, priorities, run ids, statuses.
//!
//! Pure values. Nothing here parses frames or knows a socket.

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use smallvec::SmallVec;

use super::repr::{self, is_alpha, is_space};

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
    let mut result = if is_alpha(initial) {
        first.to_owned()
    } else {
        let head = first.split(',').next().unwrap_or("");
        head.trim_matches(|c| "_'()\"".contains(c)).to_owned()
    };
    for word in words {
        // Dask looks only at the first letter of an eight letter word to call it hexadecimal
        let looks_hex = word.chars().count() == 8 && word.starts_with(|c| ('a'..='f').contains(&c));
        if word.is_empty() || !word.chars().all(is_alpha) || looks_hex {
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
            match inner.split(is_space).find(|word| !word.is_empty()) {
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

/// Compares exactly: a float in between two integers, or beyond all of them, keeps its place. NaN is at either end.
fn cmp_int_float(a: i128, b: f64) -> Ordering {
    if b.is_nan() {
        return if b.is_sign_positive() { Ordering::Less } else { Ordering::Greater };
    }
    // a cast saturates, beyond the integers of any key
    a.cmp(&(b.floor() as i128)).then(if b.fract() == 0.0 { Ordering::Equal } else { Ordering::Less })
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
            (Key::Int(a), Key::Float(b)) => cmp_int_float(*a, *b),
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
            Key::Str(s) => repr::text(s, f),
            Key::Bytes(b) => repr::bytes(b, f),
            Key::Int(i) => write!(f, "{i}"),
            Key::Float(x) => repr::float(*x, f),
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn integers_and_floats_have_one_order() {
        let big = 1i128 << 53;
        let sorted = [
            Key::Float(-f64::NAN),
            Key::Float(f64::NEG_INFINITY),
            Key::Int(i64::MIN.into()),
            Key::Float(-0.5),
            Key::Int(0),
            Key::Float(0.5),
            Key::Float(big as f64),
            Key::Int(big + 1),
            Key::Float(big as f64 + 2.0),
            Key::Int(u64::MAX.into()),
            Key::Float(1e300),
            Key::Float(f64::INFINITY),
            Key::Float(f64::NAN),
            Key::from(""),
        ];
        for (i, a) in sorted.iter().enumerate() {
            for (j, b) in sorted.iter().enumerate() {
                assert_eq!(a.cmp(b), i.cmp(&j), "{a:?} {b:?}");
                assert_eq!(a == b, i == j, "{a:?} {b:?}");
            }
        }
        assert_eq!(Key::Int(big).cmp(&Key::Float(big as f64)), Ordering::Equal);
        assert_eq!(Key::Float(0.0).cmp(&Key::Float(-0.0)), Ordering::Equal);
    }

    #[test]
    fn addresses_are_normalised() {
        for (text, normal, host, port) in [
            ("tcp://127.0.0.1:8786", "tcp://127.0.0.1:8786", "127.0.0.1", 8786),
            ("scheduler:1", "tcp://scheduler:1", "scheduler", 1),
            (" tls://[::1]:65535/ ", "tls://[::1]:65535", "::1", 65535),
            ("[fe80::1%eth0]:08786", "tcp://[fe80::1%eth0]:8786", "fe80::1%eth0", 8786),
        ] {
            let address = Address::parse(text).unwrap();
            assert_eq!(address.as_str(), normal);
            assert_eq!((address.host(), address.port()), (host, port));
            assert_eq!(address.scheme(), &normal[..3]);
            assert_eq!(format!("{}://{}", address.scheme(), address.host_port()), normal);
            assert_eq!(Address::parse(address.as_str()).unwrap(), address);
        }
    }

    #[test]
    fn malformed_addresses_are_refused() {
        for text in [
            "",
            ":",
            "tcp://",
            "tcp://:1",
            "host",
            "host:",
            "host:x",
            "host:65536",
            "host:-1",
            "::1:80",
            "[::1:80",
        ] {
            assert!(matches!(Address::parse(text), Err(AddressError::Form { .. })), "{text:?}");
        }
        for text in ["ucx://host:1", "inproc://1.2.3.4/5/6", "://host:1", "tcp://tcp://host:1x"] {
            assert!(Address::parse(text).is_err(), "{text:?}");
        }
        let error = Address::parse("http://host:1").unwrap_err();
        assert_eq!(
            error.to_string(),
            "unsupported scheme \"http\" in address \"http://host:1\": use tcp://host:port"
        );
    }

    #[test]
    fn priorities_compare_as_tuples_do() {
        let of = |p: &[f64]| Priority(p.into());
        let sorted =
            [of(&[]), of(&[-1.0, 9.0]), of(&[0.0]), of(&[0.0, 1.0]), of(&[0.0, 1.0, -3.0]), of(&[0.0, 2.0])];
        for (i, a) in sorted.iter().enumerate() {
            for (j, b) in sorted.iter().enumerate() {
                assert_eq!(a.cmp(b), i.cmp(&j), "{a:?} {b:?}");
            }
        }
        assert_eq!(of(&[0.0]), of(&[-0.0]));
    }

    #[test]
    fn statuses_have_names() {
        for status in [
            Status::Init,
            Status::Running,
            Status::Paused,
            Status::ClosingGracefully,
            Status::Closing,
            Status::Closed,
        ] {
            assert_eq!(Status::from_name(status.as_str()), Some(status));
        }
        assert_eq!(Status::from_name("dont_reply"), None);
    }
}
