//! One configuration value and where it came from: what every source is read into.
//!
//! Plain data. Reading files and giving values a meaning happen elsewhere.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use indexmap::IndexMap;

/// A table of values, in the order of the source.
pub type Table = IndexMap<String, Node>;

/// A value as YAML, TOML, JSON and Python literals know it.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// YAML's `null`, Python's `None`
    Null,
    /// A boolean
    Bool(bool),
    /// An integer
    Int(i64),
    /// A floating-point number
    Float(f64),
    /// Text
    Str(String),
    /// A list, tuple or set
    List(Vec<Node>),
    /// A table
    Map(Table),
}

/// A value with its source.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// What was said.
    pub value: Value,
    /// Who said it.
    pub source: Source,
}

/// Where a value stands, for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// An option of the command line, or its positional argument: `--nthreads`.
    Option(&'static str),
    /// An environment variable.
    Env(Arc<str>),
    /// A file; lines count from 1, 0 where the format does not tell.
    File { path: Arc<Path>, line: usize },
    /// Nobody said anything.
    Default,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Option(name) => write!(f, "option {name}"),
            Source::Env(name) => write!(f, "environment variable {name}"),
            Source::File { path, line: 0 } => write!(f, "{}", path.display()),
            Source::File { path, line } => write!(f, "{}, line {line}", path.display()),
            Source::Default => f.write_str("the defaults"),
        }
    }
}

/// The value as a message quotes it, close to how it was written.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Null => f.write_str("null"),
            Value::Bool(b) => write!(f, "{b}"),
            Value::Int(i) => write!(f, "{i}"),
            Value::Float(x) => write!(f, "{x}"),
            Value::Str(s) => write!(f, "'{s}'"),
            Value::List(items) => {
                f.write_str("[")?;
                for (i, item) in items.iter().enumerate() {
                    write!(f, "{}{}", if i > 0 { ", " } else { "" }, item.value)?;
                }
                f.write_str("]")
            }
            Value::Map(table) => {
                f.write_str("{")?;
                for (i, (key, item)) in table.iter().enumerate() {
                    write!(f, "{}{key}: {}", if i > 0 { ", " } else { "" }, item.value)?;
                }
                f.write_str("}")
            }
        }
    }
}

impl Node {
    /// A value of a source.
    pub fn new(value: Value, source: Source) -> Self {
        Node { value, source }
    }
}

/// The other spelling of a key: Dask takes `-` and `_` for one another.
fn alternative(key: &str) -> String {
    if key.contains('_') { key.replace('_', "-") } else { key.replace('-', "_") }
}

/// The spelling under which `key` is known in `table`, as `dask.config.canonical_name`.
pub fn canonical_name(key: &str, table: &Table) -> String {
    if !table.contains_key(key) {
        let other = alternative(key);
        if table.contains_key(&other) {
            return other;
        }
    }
    key.to_owned()
}

/// The value at a dotted path, either spelling of each step.
pub fn lookup<'a>(table: &'a Table, path: &str) -> Option<&'a Node> {
    let (first, rest) = path.split_once('.').map_or((path, None), |(f, r)| (f, Some(r)));
    let node = table.get(&canonical_name(first, table))?;
    match (rest, &node.value) {
        (None, _) => Some(node),
        (Some(rest), Value::Map(inner)) => lookup(inner, rest),
        (Some(_), _) => None,
    }
}

/// Merges `new` into `old` as `dask.config.update` with priority "old": what `old` says stays.
pub fn merge_below(old: &mut Table, new: Table) {
    for (key, node) in new {
        let key = canonical_name(&key, old);
        match (old.get_mut(&key), node.value) {
            (None, value) => {
                old.insert(key, Node { value, source: node.source });
            }
            (Some(Node { value: Value::Map(inner), .. }), Value::Map(below)) => merge_below(inner, below),
            // Dask replaces a plain value by a table of lower priority; it would be an error later on in either case
            (Some(slot), Value::Map(below)) => *slot = Node { value: Value::Map(below), source: node.source },
            (Some(_), _) => {}
        }
    }
}

/// Assigns at a dotted path, making tables on the way, as `dask.config.set`.
///
/// # Errors
/// The part of the path that is a plain value and can hold nothing.
pub fn assign(table: &mut Table, path: &str, node: Node) -> Result<(), String> {
    let Some((first, rest)) = path.split_once('.') else {
        table.insert(canonical_name(path, table), node);
        return Ok(());
    };
    let key = canonical_name(first, table);
    let slot = table.entry(key).or_insert_with(|| Node::new(Value::Map(Table::new()), node.source.clone()));
    match &mut slot.value {
        Value::Map(inner) => assign(inner, rest, node),
        other => Err(format!("'{first}' is {other}, which cannot hold '{rest}'")),
    }
}

/// Removes and returns the value at a dotted path, as `dask.config.pop`.
pub fn pop(table: &mut Table, path: &str) -> Option<Node> {
    let Some((first, rest)) = path.split_once('.') else {
        return table.shift_remove(&canonical_name(path, table));
    };
    match &mut table.get_mut(&canonical_name(first, table))?.value {
        Value::Map(inner) => pop(inner, rest),
        _ => None,
    }
}
