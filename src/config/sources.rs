//! All sources in their order, and typed reading of one setting with the place of a bad value.
//!
//! Option over `IQOQO_*` variable over our file over Dask's configuration (its variables over its files).

use std::fmt;
use std::time::Duration;

use indexmap::IndexMap;

use super::Error;
use super::keys::{SETTINGS, Setting, setting};
use super::own::Own;
use super::parse::{
    Unit, parse_bytes, parse_duration, parse_ports, parse_resources, python_float, python_int, whole_bytes,
};
use super::value::{Node, Source, Table, Value, lookup};

/// Where a value stands, and under which name there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Who said it.
    pub source: Source,
    /// Its key there.
    pub key: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            file @ Source::File { .. } => write!(f, "{} in {file}", self.key),
            Source::Default => write!(f, "{} by default", self.key),
            named => write!(f, "{named}"),
        }
    }
}

/// What every source says.
#[derive(Debug, Default)]
pub struct Sources {
    /// Options of the command line, by our names.
    pub options: IndexMap<&'static str, Node>,
    /// Our file and variables.
    pub own: Own,
    /// Dask's files and variables.
    pub dask: Table,
}

/// The value that counts for a setting.
#[derive(Clone, Copy, Debug)]
pub struct Found<'a> {
    /// The value and its source.
    pub node: &'a Node,
    /// Its key there.
    pub key: &'static str,
}

impl Found<'_> {
    /// Where it stands.
    pub fn place(&self) -> Place {
        Place { source: self.node.source.clone(), key: self.key.to_owned() }
    }

    /// An error about it.
    pub fn wrong(&self, reason: impl Into<String>) -> Error {
        Error::Value { place: self.place(), value: self.node.value.to_string(), reason: reason.into() }
    }
}

impl Sources {
    /// The value that counts, if anybody says one; `null` and empty text say nothing.
    pub fn find(&self, name: &'static str) -> Option<Found<'_>> {
        let silent = |node: &Node| match &node.value {
            Value::Null => true,
            Value::Str(text) => text.is_empty() && name != "name",
            _ => false,
        };
        let mut ours = self.options.get(name).into_iter().chain(self.own.values.get(name));
        if let Some(node) = ours.find(|node| !silent(node)) {
            return Some(Found { node, key: name });
        }
        debug_assert!(setting(name).is_some(), "{name} is not in the table of settings");
        let known: &'static Setting = setting(name)?;
        let mut in_dask =
            known.dask.iter().filter_map(|key| Some(Found { node: lookup(&self.dask, key)?, key }));
        in_dask.find(|found| !silent(found.node))
    }

    /// Reads a setting.
    ///
    /// # Errors
    /// [`Error::Value`] with the reason that `read` gives, and the place.
    pub fn read<T>(
        &self,
        name: &'static str,
        read: impl FnOnce(&Value) -> Result<T, String>,
    ) -> Result<Option<T>, Error> {
        match self.find(name) {
            None => Ok(None),
            Some(found) => read(&found.node.value).map(Some).map_err(|reason| found.wrong(reason)),
        }
    }

    /// Refuses what is set and not supported, saying what brings it.
    ///
    /// # Errors
    /// [`Error::Refused`] for the first of them.
    pub fn refuse_unsupported(&self) -> Result<(), Error> {
        for known in SETTINGS {
            let (Some(why), Some(found)) = (known.refused, self.find(known.name)) else { continue };
            let unset = match &found.node.value {
                Value::Bool(false) => true,
                Value::List(items) => items.is_empty(),
                _ => false,
            };
            if !unset {
                return Err(Error::Refused { place: found.place(), why });
            }
        }
        Ok(())
    }
}

/// A truth value; text as people write it.
///
/// # Errors
/// Anything else.
pub fn boolean(value: &Value) -> Result<bool, String> {
    match value {
        Value::Bool(b) => Ok(*b),
        Value::Int(0) => Ok(false),
        Value::Int(1) => Ok(true),
        Value::Str(text) => match text.to_lowercase().as_str() {
            "true" | "yes" | "on" | "1" => Ok(true),
            "false" | "no" | "off" | "0" => Ok(false),
            _ => Err("expected true or false".into()),
        },
        _ => Err("expected true or false".into()),
    }
}

/// Text; a number stands for its digits.
///
/// # Errors
/// Anything that is neither.
pub fn text(value: &Value) -> Result<String, String> {
    match value {
        Value::Str(text) => Ok(text.clone()),
        Value::Int(_) | Value::Float(_) => Ok(value.to_string()),
        _ => Err("expected text".into()),
    }
}

/// An integer.
///
/// # Errors
/// Anything else.
pub fn integer(value: &Value) -> Result<i64, String> {
    match value {
        Value::Int(i) => Some(*i),
        Value::Str(text) => python_int(text),
        _ => None,
    }
    .ok_or_else(|| "expected an integer".into())
}

/// An integer from `least` up.
///
/// # Errors
/// Anything else.
pub fn count(least: usize) -> impl Fn(&Value) -> Result<usize, String> {
    move |value| {
        let n = usize::try_from(integer(value)?).ok().filter(|n| *n >= least);
        n.ok_or_else(|| format!("expected an integer from {least} up"))
    }
}

/// A size in bytes, as `dask.utils.parse_bytes` takes it.
///
/// # Errors
/// Anything else.
pub fn bytes(value: &Value) -> Result<u64, String> {
    match value {
        Value::Int(i) => u64::try_from(*i).map_err(|_| "a size cannot be negative".into()),
        Value::Float(x) => whole_bytes(*x),
        Value::Str(text) => parse_bytes(text),
        _ => Err("expected a size like 4GB".into()),
    }
}

/// A duration, as `dask.utils.parse_timedelta` takes it.
///
/// # Errors
/// Anything else.
pub fn duration(default: Unit) -> impl Fn(&Value) -> Result<Duration, String> {
    move |value| match value {
        Value::Int(_) | Value::Float(_) => parse_duration(&value.to_string(), default),
        Value::Str(text) => parse_duration(text, default),
        _ => Err("expected a duration like 30s".into()),
    }
}

/// A fraction of the memory limit, or `false` for never.
///
/// # Errors
/// Anything else.
pub fn threshold(value: &Value) -> Result<Option<f64>, String> {
    let number = match value {
        Value::Int(i) => Some(*i as f64),
        Value::Float(x) => Some(*x),
        Value::Str(text) => python_float(text),
        _ => None,
    };
    match number {
        Some(x) if (0.0..=1.0).contains(&x) => Ok(Some(x)),
        Some(_) => Err("expected a fraction from 0 to 1, or false".into()),
        None => match boolean(value) {
            Ok(false) => Ok(None),
            _ => Err("expected a fraction from 0 to 1, or false".into()),
        },
    }
}

/// Ports, as `distributed.utils.parse_ports` takes them.
///
/// # Errors
/// Anything else.
pub fn ports(value: &Value) -> Result<Vec<u16>, String> {
    match value {
        Value::Int(_) | Value::Str(_) => parse_ports(&text(value)?),
        _ => Err("expected a port or a range like 3000:3026".into()),
    }
}

/// A list of texts.
///
/// # Errors
/// Anything else.
pub fn texts(value: &Value) -> Result<Vec<String>, String> {
    match value {
        Value::List(items) => items.iter().map(|item| text(&item.value)).collect(),
        _ => Err("expected a list of texts".into()),
    }
}

/// A table of names to numbers, or `--resources`' text.
///
/// # Errors
/// Anything else.
pub fn resources(value: &Value) -> Result<Vec<(String, f64)>, String> {
    match value {
        Value::Str(text) => parse_resources(text),
        Value::Map(table) => table
            .iter()
            .map(|(name, node)| match &node.value {
                Value::Int(i) => Ok((name.clone(), *i as f64)),
                Value::Float(x) => Ok((name.clone(), *x)),
                other => Err(format!("resource {name} is {other}, expected a number")),
            })
            .collect(),
        _ => Err("expected a table of numbers".into()),
    }
}

/// A table of names to texts as Python's `str()` writes them; `null` takes a name out.
///
/// # Errors
/// Anything else.
pub fn variables(value: &Value) -> Result<Vec<(String, Option<String>)>, String> {
    let Value::Map(table) = value else { return Err("expected a table of environment variables".into()) };
    let python_str = |value: &Value| match value {
        Value::Null => Ok(None),
        Value::Bool(true) => Ok(Some("True".to_owned())),
        Value::Bool(false) => Ok(Some("False".to_owned())),
        other => text(other).map(Some),
    };
    table.iter().map(|(name, node)| Ok((name.clone(), python_str(&node.value)?))).collect()
}
