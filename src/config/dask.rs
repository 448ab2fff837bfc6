//! Dask's own configuration: YAML files, `DASK_*` variables, the configuration a parent process handed down.
//!
//! Mirrors `dask/config.py: collect` (and the renamed keys of `distributed/config.py`). Says what is configured and
//! where; what a key means to this worker is decided in `keys` and `settings`.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine as _;

use super::env::Environment;
use super::literal::interpret;
use super::value::{Node, Source, Table, Value, assign, merge_below, pop};
use super::{Error, yaml};

/// Old names of keys that this worker reads, as `distributed.config.deprecations`.
const RENAMED: &[(&str, &str)] = &[
    ("bandwidth", "distributed.scheduler.bandwidth"),
    ("default-data-size", "distributed.scheduler.default-data-size"),
    ("use-file-locking", "distributed.worker.use-file-locking"),
    ("worker-memory-target", "distributed.worker.memory.target"),
    ("worker-memory-spill", "distributed.worker.memory.spill"),
    ("worker-memory-pause", "distributed.worker.memory.pause"),
    ("worker-memory-terminate", "distributed.worker.memory.terminate"),
    ("compression", "distributed.comm.compression"),
    ("connect-timeout", "distributed.comm.timeouts.connect"),
    ("tcp-timeout", "distributed.comm.timeouts.tcp"),
    ("default-scheme", "distributed.comm.default-scheme"),
    ("socket-backlog", "distributed.comm.socket-backlog"),
    ("log-length", "distributed.admin.log-length"),
    ("transition-log-length", "distributed.admin.low-level-log-length"),
    ("distributed.scheduler.transition-log-length", "distributed.admin.low-level-log-length"),
    ("distributed.scheduler.events-log-length", "distributed.admin.low-level-log-length"),
    ("recent-messages-log-length", "distributed.admin.low-level-log-length"),
    ("distributed.comm.recent-messages-log-length", "distributed.admin.low-level-log-length"),
];

/// Everything Dask would read, merged: variables over files, later files over earlier ones.
///
/// `prefix` is the interpreter's `sys.prefix`.
///
/// # Errors
/// A file that is there and is not YAML with a table at the top, or a variable that contradicts another.
pub fn collect(env: &Environment, prefix: &Path) -> Result<Table, Error> {
    let mut merged = from_environment(env)?;
    for path in files(&search_path(env, prefix)).into_iter().rev() {
        if let Some(table) = read_file(&path)? {
            merge_below(&mut merged, table);
        }
    }
    for (old, new) in RENAMED {
        if let Some(node) = pop(&mut merged, old) {
            let source = node.source.clone();
            assign(&mut merged, new, node).map_err(|reason| Error::Conflict { place: source, reason })?;
        }
    }
    Ok(merged)
}

/// Where Dask looks for files, lowest priority first, as `dask.config._get_paths`.
fn search_path(env: &Environment, prefix: &Path) -> Vec<PathBuf> {
    let mut paths = vec![PathBuf::from(env.get("DASK_ROOT_CONFIG").unwrap_or("/etc/dask"))];
    paths.push(prefix.join("etc/dask"));
    paths.extend(env.home().map(|home| home.join(".config/dask")));
    paths.extend(env.get("DASK_CONFIG").map(PathBuf::from));
    // of a path that is there twice, the last place counts
    let later = paths.clone();
    let mut at = 0;
    paths.retain(|path| {
        at += 1;
        !later[at..].contains(path)
    });
    paths
}

/// The files of a search path: a folder stands for its YAML and JSON files in order of name.
fn files(search_path: &[PathBuf]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for path in search_path {
        if !path.is_dir() {
            found.extend(path.exists().then(|| path.clone()));
            continue;
        }
        // as Dask does, pass by what may not be read
        let Ok(entries) = std::fs::read_dir(path) else { continue };
        let mut names: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        names.retain(|name| {
            let extension = name.extension().map(|e| e.to_string_lossy().to_lowercase());
            matches!(extension.as_deref(), Some("json" | "yaml" | "yml"))
        });
        names.sort();
        found.extend(names);
    }
    found
}

fn read_file(path: &Path) -> Result<Option<Table>, Error> {
    let malformed = |reason: String| Error::Malformed { path: path.to_owned(), reason };
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::InvalidData => return Err(malformed(error.to_string())),
        // as Dask does, pass by what may not be read
        Err(_) => return Ok(None),
    };
    let shared: Arc<Path> = Arc::from(path);
    match yaml::read(&text, &shared).map_err(malformed)?.value {
        Value::Map(table) => Ok(Some(table)),
        Value::Null => Ok(None),
        other => Err(malformed(format!("the top level must be a table of keys, but is {other}"))),
    }
}

/// The `DASK_*` variables, as `dask.config.collect_env`.
fn from_environment(env: &Environment) -> Result<Table, Error> {
    const INHERITED: &str = "DASK_INTERNAL_INHERIT_CONFIG";
    let mut table = match env.get(INHERITED) {
        Some(text) => inherited(text, &Source::Env(INHERITED.into()))?,
        None => Table::new(),
    };
    for (name, text) in env.with_prefix("DASK_") {
        if name == INHERITED {
            continue;
        }
        let source = Source::Env(name.into());
        let path = name["DASK_".len()..].to_lowercase().replace("__", ".");
        let node = Node::new(interpret(text, &source), source.clone());
        assign(&mut table, &path, node).map_err(|reason| Error::Conflict { place: source, reason })?;
    }
    Ok(table)
}

/// The configuration of a parent process: JSON in URL-safe base64, as `dask.config.deserialize`.
fn inherited(text: &str, source: &Source) -> Result<Table, Error> {
    let wrong = |reason: String| Error::Conflict { place: source.clone(), reason };
    let engine = base64::engine::GeneralPurpose::new(
        &base64::alphabet::URL_SAFE,
        base64::engine::GeneralPurposeConfig::new()
            .with_decode_padding_mode(base64::engine::DecodePaddingMode::Indifferent),
    );
    let json = engine.decode(text.trim()).map_err(|e| wrong(format!("not base64: {e}")))?;
    let json: serde_json::Value =
        serde_json::from_slice(&json).map_err(|e| wrong(format!("not JSON in base64: {e}")))?;
    match from_json(json, source) {
        Value::Map(table) => Ok(table),
        other => Err(wrong(format!("expected a table of keys, but got {other}"))),
    }
}

fn from_json(json: serde_json::Value, source: &Source) -> Value {
    let node = |json| Node::new(from_json(json, source), source.clone());
    match json {
        serde_json::Value::Null => Value::Null,
        serde_json::Value::Bool(b) => Value::Bool(b),
        serde_json::Value::Number(n) => match n.as_i64() {
            Some(i) => Value::Int(i),
            // every JSON number that is no i64 is a float here, serde_json's arbitrary precision being off
            None => Value::Float(n.as_f64().unwrap_or(f64::NAN)),
        },
        serde_json::Value::String(s) => Value::Str(s),
        serde_json::Value::Array(items) => Value::List(items.into_iter().map(node).collect()),
        serde_json::Value::Object(map) => Value::Map(map.into_iter().map(|(k, v)| (k, node(v))).collect()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::value::lookup;

    fn write(path: &Path, text: &str) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn show(table: &Table, key: &str) -> String {
        let node = lookup(table, key).unwrap();
        format!("{} from {}", node.value, node.source)
    }

    #[test]
    fn variables_over_the_users_files_over_the_interpreters_over_the_systems() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        write(
            &root.join("etc/a.yaml"),
            "distributed: {worker: {memory: {target: 0.1, spill: 0.1, pause: 0.1}}}",
        );
        write(&root.join("etc/b.yml"), "distributed: {worker: {memory: {pause: 0.15}}}");
        write(&root.join("etc/ignored.txt"), "}");
        write(
            &root.join("prefix/etc/dask/x.yaml"),
            "distributed:\n  worker:\n    memory:\n      spill: 0.2\n",
        );
        write(
            &root.join("home/.config/dask/x.json"),
            "{\"distributed\": {\"worker\": {\"memory\": {\"transfer\": 0.3}}}}",
        );
        let env = Environment::of([
            ("DASK_ROOT_CONFIG", root.join("etc").to_str().unwrap()),
            ("HOME", root.join("home").to_str().unwrap()),
            ("DASK_DISTRIBUTED__WORKER__MEMORY__TARGET", "0.4"),
            ("DASK_SCHEDULER_ADDRESS", "tcp://h:1"),
        ]);
        let table = collect(&env, &root.join("prefix")).unwrap();
        let at = |name: &str| root.join(name).display().to_string();
        let memory = |key| show(&table, &format!("distributed.worker.memory.{key}"));
        assert_eq!(
            memory("target"),
            "0.4 from environment variable DASK_DISTRIBUTED__WORKER__MEMORY__TARGET"
        );
        assert_eq!(memory("spill"), format!("0.2 from {}, line 4", at("prefix/etc/dask/x.yaml")));
        assert_eq!(memory("pause"), format!("0.15 from {}, line 1", at("etc/b.yml")));
        assert_eq!(memory("transfer"), format!("0.3 from {}, line 1", at("home/.config/dask/x.json")));
        assert_eq!(
            show(&table, "scheduler-address"),
            "'tcp://h:1' from environment variable DASK_SCHEDULER_ADDRESS"
        );
    }

    #[test]
    fn the_inherited_configuration_lies_below_the_other_variables() {
        let json = r#"{"distributed": {"comm": {"timeouts": {"connect": "5s", "tcp": "6s"}}}}"#;
        let text = base64::engine::general_purpose::URL_SAFE.encode(json);
        let env = Environment::of([
            ("DASK_INTERNAL_INHERIT_CONFIG", text.as_str()),
            ("DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP", "7s"),
            ("DASK_ROOT_CONFIG", "/nonexistent"),
        ]);
        let table = collect(&env, Path::new("/nonexistent")).unwrap();
        assert!(show(&table, "distributed.comm.timeouts.connect").starts_with("'5s'"));
        assert!(show(&table, "distributed.comm.timeouts.tcp").starts_with("'7s'"));
    }

    #[test]
    fn old_names_still_count() {
        let env = Environment::of([("DASK_CONNECT_TIMEOUT", "5s"), ("DASK_ROOT_CONFIG", "/nonexistent")]);
        let table = collect(&env, Path::new("/nonexistent")).unwrap();
        assert!(show(&table, "distributed.comm.timeouts.connect").starts_with("'5s'"));
    }

    #[test]
    fn what_is_malformed_names_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bad.yaml");
        write(&path, "a: b\n c: d\n");
        let env =
            Environment::of([("DASK_CONFIG", path.to_str().unwrap()), ("DASK_ROOT_CONFIG", "/nonexistent")]);
        let message = collect(&env, Path::new("/nonexistent")).unwrap_err().to_string();
        assert!(message.contains("bad.yaml") && message.contains("line 2"), "{message}");
        write(&path, "[1, 2]");
        assert!(collect(&env, Path::new("/nonexistent")).unwrap_err().to_string().contains("top level"));
        let env =
            Environment::of([("DASK_A", "1"), ("DASK_A__B", "2"), ("DASK_ROOT_CONFIG", "/nonexistent")]);
        assert!(collect(&env, Path::new("/nonexistent")).unwrap_err().to_string().contains("DASK_A__B"));
    }
}
