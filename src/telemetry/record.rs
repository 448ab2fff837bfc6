//! One log record, and the pattern that turns it into the text `dask worker` would print.
//!
//! Understands the `%`-style of Python's `logging.Formatter` (`distributed.admin.log-format`). Writes nowhere.

use std::fmt::Write;
use std::sync::Arc;

use chrono::{DateTime, Local};

use super::Error;

/// `distributed.admin.log-format` as it stands in Dask's defaults.
pub const DASK_FORMAT: &str = "%(asctime)s - %(name)s - %(levelname)s - %(message)s";

/// Severity, under Python's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// `logging.DEBUG`; tracing's `TRACE` counts as this too.
    Debug,
    /// `logging.INFO`
    Info,
    /// `logging.WARNING`
    Warning,
    /// `logging.ERROR`
    Error,
}

impl Level {
    /// `record.levelname`
    pub fn name(self) -> &'static str {
        match self {
            Level::Debug => "DEBUG",
            Level::Info => "INFO",
            Level::Warning => "WARNING",
            Level::Error => "ERROR",
        }
    }

    /// `record.levelno`
    pub fn number(self) -> u8 {
        match self {
            Level::Debug => 10,
            Level::Info => 20,
            Level::Warning => 30,
            Level::Error => 40,
        }
    }
}

impl From<tracing::Level> for Level {
    fn from(level: tracing::Level) -> Self {
        match level {
            tracing::Level::ERROR => Level::Error,
            tracing::Level::WARN => Level::Warning,
            tracing::Level::INFO => Level::Info,
            _ => Level::Debug,
        }
    }
}

/// One thing that was logged.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Unix time in seconds.
    pub created: f64,
    /// Severity.
    pub level: Level,
    /// Logger, dotted as in Python: `distributed.worker`, `iqoqo.net`.
    pub logger: Arc<str>,
    /// The sentence.
    pub message: String,
    /// Structured fields that came with it.
    pub fields: Vec<(&'static str, String)>,
    /// Source file and line.
    pub source: Option<(&'static str, u32)>,
}

impl Record {
    /// The sentence with its fields behind it, as `message key=value`.
    pub fn text(&self) -> String {
        let mut text = self.message.clone();
        for (name, value) in &self.fields {
            // writing to a String cannot fail
            let _ = match value.contains([' ', '"', '\n']) {
                true => write!(text, " {name}={value:?}"),
                false => write!(text, " {name}={value}"),
            };
        }
        text
    }

    /// One line of JSON: `time` (RFC 3339, UTC), `level`, `logger`, `message`, and the fields under `fields`.
    pub fn json(&self) -> String {
        let time = DateTime::from_timestamp_micros((self.created * 1e6) as i64).unwrap_or_default();
        let mut object = serde_json::json!({
            "time": time.to_rfc3339_opts(chrono::SecondsFormat::Micros, true),
            "level": self.level.name(),
            "logger": &*self.logger,
            "message": self.message,
        });
        if !self.fields.is_empty() {
            let fields = self.fields.iter().map(|(name, value)| (name.to_string(), value.as_str()));
            object["fields"] = fields.collect();
        }
        object.to_string()
    }
}

/// What a `%(field)s` stands for.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Field {
    AscTime,
    Created,
    Msecs,
    Name,
    LevelName,
    LevelNumber,
    Message,
    Process,
    ProcessName,
    ThreadName,
    PathName,
    FileName,
    Module,
    Line,
}

impl Field {
    const ALL: [(&'static str, Field); 14] = [
        ("asctime", Field::AscTime),
        ("created", Field::Created),
        ("msecs", Field::Msecs),
        ("name", Field::Name),
        ("levelname", Field::LevelName),
        ("levelno", Field::LevelNumber),
        ("message", Field::Message),
        ("process", Field::Process),
        ("processName", Field::ProcessName),
        ("threadName", Field::ThreadName),
        ("pathname", Field::PathName),
        ("filename", Field::FileName),
        ("module", Field::Module),
        ("lineno", Field::Line),
    ];

    fn render(self, record: &Record, spec: &Spec) -> String {
        let path = record.source.map_or("", |(path, _)| path);
        let file = path.rsplit('/').next().unwrap_or(path);
        match self {
            Field::AscTime => local_time(record.created),
            Field::Created => spec.number(record.created),
            Field::Msecs => spec.number((record.created.fract() * 1000.0).floor()),
            Field::Name => record.logger.to_string(),
            Field::LevelName => record.level.name().to_owned(),
            Field::LevelNumber => spec.number(f64::from(record.level.number())),
            Field::Message => record.text(),
            Field::Process => spec.number(f64::from(std::process::id())),
            Field::ProcessName => "MainProcess".to_owned(),
            Field::ThreadName => "MainThread".to_owned(),
            Field::PathName => path.to_owned(),
            Field::FileName => file.to_owned(),
            Field::Module => file.strip_suffix(".rs").unwrap_or(file).to_owned(),
            Field::Line => spec.number(f64::from(record.source.map_or(0, |(_, line)| line))),
        }
    }
}

/// Flags, width, precision and conversion of one `%(field)-8s`.
#[derive(Clone, Debug, PartialEq)]
struct Spec {
    left: bool,
    zeros: bool,
    width: usize,
    precision: Option<usize>,
    conversion: char,
}

impl Spec {
    fn number(&self, n: f64) -> String {
        match self.conversion {
            'f' => format!("{n:.*}", self.precision.unwrap_or(6)),
            'd' => format!("{}", n as i64),
            _ => format!("{n}"),
        }
    }

    fn pad(&self, text: String, out: &mut String) {
        let missing = self.width.saturating_sub(text.chars().count());
        let fill = if self.zeros && !self.left && self.conversion != 's' { '0' } else { ' ' };
        if !self.left {
            out.extend(std::iter::repeat_n(fill, missing));
        }
        out.push_str(&text);
        if self.left {
            out.extend(std::iter::repeat_n(' ', missing));
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Part {
    Text(String),
    Field(Field, Spec),
}

/// A parsed `logging.Formatter` format string.
#[derive(Clone, Debug, PartialEq)]
pub struct Pattern(Vec<Part>);

impl Pattern {
    /// Parses Python's `%`-style format.
    ///
    /// # Errors
    /// [`Error::Format`] for a field we have no value for, or a malformed specifier.
    pub fn parse(format: &str) -> Result<Self, Error> {
        let error = |reason: String| Error::Format { format: format.to_owned(), reason };
        let mut parts = Vec::new();
        let mut text = String::new();
        let mut rest = format;
        while let Some(at) = rest.find('%') {
            text.push_str(&rest[..at]);
            rest = &rest[at + 1..];
            if let Some(after) = rest.strip_prefix('%') {
                text.push('%');
                rest = after;
                continue;
            }
            let (name, after) = rest
                .strip_prefix('(')
                .and_then(|r| r.split_once(')'))
                .ok_or_else(|| error("a % is not followed by (field)".into()))?;
            let field = Field::ALL.iter().find(|(n, _)| *n == name).map(|(_, f)| *f);
            let field = field.ok_or_else(|| error(format!("unknown field %({name})s")))?;
            let (spec, after) =
                parse_spec(after).ok_or_else(|| error(format!("%({name}) needs a conversion: s, d or f")))?;
            if !text.is_empty() {
                parts.push(Part::Text(std::mem::take(&mut text)));
            }
            parts.push(Part::Field(field, spec));
            rest = after;
        }
        text.push_str(rest);
        if !text.is_empty() {
            parts.push(Part::Text(text));
        }
        Ok(Pattern(parts))
    }

    /// The record as one entry of text, without a line end.
    pub fn render(&self, record: &Record) -> String {
        let mut out = String::with_capacity(record.message.len() + 64);
        for part in &self.0 {
            match part {
                Part::Text(text) => out.push_str(text),
                Part::Field(field, spec) => spec.pad(field.render(record, spec), &mut out),
            }
        }
        out
    }
}

/// `[flags][width][.precision]conversion`, and what follows it.
fn parse_spec(text: &str) -> Option<(Spec, &str)> {
    let after_flags = text.trim_start_matches(['-', '0', ' ', '+', '#']);
    let flags = &text[..text.len() - after_flags.len()];
    let number = |s: &str| s.find(|c: char| !c.is_ascii_digit()).unwrap_or(s.len());
    let (width, rest) = after_flags.split_at(number(after_flags));
    let (precision, rest) = match rest.strip_prefix('.') {
        Some(rest) => {
            let (digits, rest) = rest.split_at(number(rest));
            (Some(digits.parse().unwrap_or(0)), rest)
        }
        None => (None, rest),
    };
    let conversion = rest.chars().next().filter(|c| matches!(c, 's' | 'd' | 'f'))?;
    let spec = Spec {
        left: flags.contains('-'),
        zeros: flags.contains('0'),
        // a width that does not fit is a mistake nobody makes; no padding then
        width: width.parse().unwrap_or(0).min(200),
        precision,
        conversion,
    };
    Some((spec, &rest[1..]))
}

/// `logging.Formatter.formatTime`: local time with milliseconds behind a comma.
fn local_time(created: f64) -> String {
    let time = DateTime::from_timestamp_micros((created * 1e6) as i64).unwrap_or_default();
    time.with_timezone(&Local).format("%Y-%m-%d %H:%M:%S,%3f").to_string()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record {
            created: 1_700_000_000.25,
            level: Level::Warning,
            logger: "distributed.worker".into(),
            message: "Lost 50%".into(),
            fields: vec![("key", "x-1".into()), ("why", "no route".into())],
            source: Some(("src/net/mod.rs", 7)),
        }
    }

    #[test]
    fn dask_default_format() {
        let text = Pattern::parse(DASK_FORMAT).unwrap().render(&record());
        let (time, rest) = text.split_at(23);
        assert!(time.ends_with(",250"), "{time}");
        assert_eq!(rest, " - distributed.worker - WARNING - Lost 50% key=x-1 why=\"no route\"");
    }

    #[test]
    fn width_flags_and_numbers() {
        let render = |f: &str| Pattern::parse(f).unwrap().render(&record());
        assert_eq!(render("[%(levelname)-9s|%(levelname)9s]"), "[WARNING  |  WARNING]");
        assert_eq!(render("%(levelno)04d %(msecs)d %(created).1f 100%%"), "0030 250 1700000000.2 100%");
        assert_eq!(render("%(filename)s:%(lineno)d %(module)s"), "mod.rs:7 mod");
    }

    #[test]
    fn malformed_formats_name_the_fault() {
        for (format, fault) in
            [("%(nonsense)s", "unknown field"), ("50% of", "not followed"), ("%(name)", "needs a conversion")]
        {
            let error = Pattern::parse(format).unwrap_err().to_string();
            assert!(error.contains(fault), "{error}");
        }
    }

    #[test]
    fn json_has_fields_apart() {
        let value: serde_json::Value = serde_json::from_str(&record().json()).unwrap();
        assert_eq!(value["time"], "2023-11-14T22:13:20.250000Z");
        assert_eq!(value["fields"]["why"], "no route");
        assert_eq!(value["message"], "Lost 50%");
    }
}
