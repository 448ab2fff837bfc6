//! Our own file (TOML) and the `IQOQO_*` variables over it, through the `config` crate.
//!
//! Gives settings by our names with their places. An unknown key in the file is an error; an unknown variable is only
//! reported, since other iqoqo software may own it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use config::{FileFormat, ValueKind};
use indexmap::IndexMap;

use super::Error;
use super::env::Environment;
use super::keys::{closest, setting};
use super::value::{Node, Source, Table, Value};

/// Where our own file is looked for when nobody names one.
pub const DEFAULT_FILE: &str = "/etc/iqoqo/dask-worker.toml";

const PREFIX: &str = "IQOQO_";
/// Names the file; like `--config`.
const FILE_VARIABLE: &str = "IQOQO_CONFIG";

/// What our own file and variables say, by our names.
#[derive(Debug, Default)]
pub struct Own {
    /// Settings with their places.
    pub values: IndexMap<String, Node>,
    /// `IQOQO_*` variables that are no setting of ours.
    pub unknown_variables: Vec<String>,
}

/// The file to read: `--config`, `IQOQO_CONFIG`, or the default one if it is there.
fn file(option: Option<&Path>, env: &Environment) -> Option<PathBuf> {
    let named = option.map(Path::to_owned).or_else(|| env.get(FILE_VARIABLE).map(PathBuf::from));
    named.or_else(|| Some(PathBuf::from(DEFAULT_FILE)).filter(|path| path.exists()))
}

/// Reads the file and the variables.
///
/// # Errors
/// A file that cannot be read or is no TOML, and keys in it that nobody knows.
pub fn read(option: Option<&Path>, env: &Environment) -> Result<Own, Error> {
    let mut builder = config::Config::builder();
    let path = file(option, env);
    if let Some(path) = &path {
        let text = std::fs::read_to_string(path)
            .map_err(|source| Error::Unreadable { path: path.clone(), source })?;
        builder = builder.add_source(config::File::from_str(&text, FileFormat::Toml));
    }
    let variables = env.with_prefix(PREFIX).filter(|(name, _)| *name != FILE_VARIABLE);
    let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    let environment = config::Environment::with_prefix("IQOQO")
        .prefix_separator("_")
        .separator("__")
        .source(Some(variables));
    // `config` marks what came from a file given as text with no origin, and variables with one
    let place = path.as_deref().unwrap_or(Path::new(DEFAULT_FILE));
    let built = builder
        .add_source(Dashed(environment))
        .build()
        .map_err(|error| Error::Malformed { path: place.to_owned(), reason: error.to_string() })?;
    let mut own = Own::default();
    if let ValueKind::Table(table) = built.cache.kind {
        own.flatten("", table, &Arc::from(place))?;
    }
    own.unknown_variables.sort();
    Ok(own)
}

impl Own {
    fn flatten(
        &mut self,
        prefix: &str,
        table: config::Map<String, config::Value>,
        path: &Arc<Path>,
    ) -> Result<(), Error> {
        for (key, value) in table {
            let name = format!("{prefix}{key}");
            let from_variable = value.origin().is_some();
            if setting(&name).is_some() {
                let source = if from_variable {
                    Source::Env(variable(&name).into())
                } else {
                    Source::File { path: path.clone(), line: 0 }
                };
                self.values.insert(name, node(value, &source));
                continue;
            }
            match value.kind {
                ValueKind::Table(inner) => self.flatten(&format!("{name}."), inner, path)?,
                _ if from_variable => self.unknown_variables.push(variable(&name)),
                _ => {
                    let path = path.to_path_buf();
                    return Err(Error::UnknownKey { path, suggestion: closest(&name), key: name });
                }
            }
        }
        Ok(())
    }
}

/// The variable of a setting.
pub fn variable(name: &str) -> String {
    format!("{PREFIX}{}", name.to_uppercase().replace('.', "__").replace('-', "_"))
}

fn node(value: config::Value, source: &Source) -> Node {
    let kind = match value.kind {
        ValueKind::Nil => Value::Null,
        ValueKind::Boolean(b) => Value::Bool(b),
        ValueKind::I64(i) => Value::Int(i),
        // TOML has no integers beyond 64 bits signed; these come of other formats only
        ValueKind::I128(i) => Value::Float(i as f64),
        ValueKind::U64(i) => Value::Float(i as f64),
        ValueKind::U128(i) => Value::Float(i as f64),
        ValueKind::Float(x) => Value::Float(x),
        ValueKind::String(s) => Value::Str(s),
        ValueKind::Array(items) => Value::List(items.into_iter().map(|item| node(item, source)).collect()),
        ValueKind::Table(table) => {
            let mut pairs: Table = table.into_iter().map(|(key, item)| (key, node(item, source))).collect();
            // the crate's tables have no order
            pairs.sort_keys();
            Value::Map(pairs)
        }
    };
    Node::new(kind, source.clone())
}

/// Variables whose names have dashes where the shell wants underscores.
#[derive(Clone, Debug)]
struct Dashed(config::Environment);

impl config::Source for Dashed {
    fn clone_into_box(&self) -> Box<dyn config::Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<config::Map<String, config::Value>, config::ConfigError> {
        let pairs = self.0.collect()?;
        Ok(pairs.into_iter().map(|(key, value)| (key.replace('_', "-"), value)).collect())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn read_text(text: &str, variables: &[(&str, &str)]) -> Result<Own, Error> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        read(Some(file.path()), &Environment::of(variables.iter().copied()))
    }

    #[test]
    fn variables_lie_over_the_file() {
        let text = "nthreads = 4\nmemory-limit = '1GB'\n[memory]\ntarget = 0.5\nspill = false\n[resources]\nGPU = 2\n";
        let own = read_text(text, &[("IQOQO_MEMORY_LIMIT", "2GB"), ("IQOQO_MEMORY__TARGET", "0.6")]).unwrap();
        let show = |name: &str| own.values[name].value.to_string();
        assert_eq!(show("nthreads"), "4");
        assert_eq!(show("memory-limit"), "'2GB'");
        assert_eq!(show("memory.target"), "'0.6'");
        assert_eq!(show("memory.spill"), "false");
        assert_eq!(show("resources"), "{GPU: 2}");
        assert_eq!(own.values["memory.target"].source, Source::Env("IQOQO_MEMORY__TARGET".into()));
        assert!(matches!(own.values["memory.spill"].source, Source::File { .. }));
    }

    #[test]
    fn unknown_keys_are_errors_in_the_file_and_remarks_in_the_environment() {
        let message = read_text("memory_limit = 3", &[]).unwrap_err().to_string();
        assert!(
            message.contains("memory_limit") && message.contains("did you mean memory-limit"),
            "{message}"
        );
        assert!(read_text("[memory]\ncolour = 3", &[]).unwrap_err().to_string().contains("memory.colour"));
        let own = read_text("", &[("IQOQO_JOB_ID", "7")]).unwrap();
        assert_eq!(own.unknown_variables, ["IQOQO_JOB_ID"]);
    }

    #[test]
    fn a_malformed_or_missing_file_names_itself() {
        let message = read_text("nthreads = \n", &[]).unwrap_err().to_string();
        assert!(message.contains("line 1"), "{message}");
        let message =
            read(Some(Path::new("/nonexistent/x.toml")), &Environment::default()).unwrap_err().to_string();
        assert!(message.contains("/nonexistent/x.toml"), "{message}");
    }
}
