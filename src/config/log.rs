//! Settings of the log, read apart from the rest: logs start before anything else is checked.

use crate::telemetry;
use crate::telemetry::log::{Config, Format};
use crate::telemetry::record::Pattern;

use super::Error;
use super::sources::{Found, Sources, count, text};
use super::value::{Table, Value};

/// Form, pattern, length and levels of the log; `remarks` collects what is not taken over.
///
/// # Errors
/// A value that makes no sense.
pub fn read(sources: &Sources, remarks: &mut Vec<String>) -> Result<Config, Error> {
    let mut config = Config::default();
    let format = |value: &Value| match text(value)?.as_str() {
        "auto" => Ok(Format::Auto),
        "text" => Ok(Format::Text),
        "json" => Ok(Format::Json),
        "journal" => Ok(Format::Journal),
        _ => Err("expected auto, text, json or journal".to_owned()),
    };
    config.format = sources.read("log-format", format)?.unwrap_or_default();
    let pattern = |value: &Value| Pattern::parse(&text(value)?).map_err(|error| error.to_string());
    if let Some(pattern) = sources.read("log.pattern", pattern)? {
        config.pattern = pattern;
    }
    if let Some(kept) = sources.read("log.kept", count(1))? {
        config.kept = kept;
    }
    let Some(found) = sources.find("log.levels") else { return Ok(config) };
    match &found.node.value {
        Value::Map(table) if table.contains_key("version") => {
            remarks.push(format!("{} configures Python's logging and has no meaning here", found.place()));
        }
        Value::Map(table) => levels(&mut config, table, found)?,
        _ => return Err(found.wrong("expected a table of levels by logger")),
    }
    Ok(config)
}

fn levels(config: &mut Config, table: &Table, found: Found) -> Result<(), Error> {
    for (logger, node) in table {
        let wrong =
            |reason: String| Found { node, key: found.key }.wrong(format!("logger {logger}: {reason}"));
        let level = match &node.value {
            Value::Int(number) => level_name(*number).to_owned(),
            other => text(other).map_err(wrong)?,
        };
        config.levels.set(logger, &level).map_err(|error: telemetry::Error| wrong(error.to_string()))?;
    }
    Ok(())
}

/// The level at or below a number of Python's `logging`.
fn level_name(number: i64) -> &'static str {
    match number {
        ..=0 => "notset",
        1..=10 => "debug",
        11..=20 => "info",
        21..=30 => "warning",
        _ => "error",
    }
}
