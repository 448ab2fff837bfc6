//! Where log records go: standard error (text or JSON), the systemd journal, and a ring of recent ones for `get_logs`.
//!
//! One tracing layer builds each record once and hands it to both. Filtering is by dotted logger name, as Python's `logging` does.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use systemd_journal_logger::JournalLog;
use tracing::field::{Field, Visit};
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::filter::{FilterFn, LevelFilter, filter_fn};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::Registry;

use super::Error;
use super::record::{DASK_FORMAT, Level, Pattern, Record};

/// Form of what is written to standard error, or the journal instead of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Format {
    /// The journal when standard error is connected to it (`JOURNAL_STREAM`), else text.
    #[default]
    Auto,
    /// Lines as `dask worker` writes them.
    Text,
    /// One JSON object a line.
    Json,
    /// Structured entries sent to journald.
    Journal,
}

/// Settings of the log.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where and how.
    pub format: Format,
    /// Pattern of text lines (`distributed.admin.log-format`); also what `get_logs` answers with.
    pub pattern: Pattern,
    /// Records kept for `get_logs` (`distributed.admin.log-length`).
    pub kept: usize,
    /// What is let through.
    pub levels: Levels,
}

impl Default for Config {
    fn default() -> Self {
        // the default pattern is a constant that the tests parse
        let pattern = Pattern::parse(DASK_FORMAT).unwrap_or_else(|_| unreachable!());
        Config { format: Format::Auto, pattern, kept: 10_000, levels: Levels::default() }
    }
}

/// Least severity let through, by logger; the longest dotted prefix decides (`logging:` in Dask's configuration).
#[derive(Clone, Debug, PartialEq)]
pub struct Levels {
    root: LevelFilter,
    loggers: Vec<(String, LevelFilter)>,
}

impl Default for Levels {
    /// `info` for what is Dask's and ours, `warning` for libraries.
    fn default() -> Self {
        let loggers = ["distributed", "iqoqo"].map(|name| (name.to_owned(), LevelFilter::INFO)).into();
        Levels { root: LevelFilter::WARN, loggers }
    }
}

impl Levels {
    /// Sets the level of one logger and those below it; an empty name is the root.
    ///
    /// # Errors
    /// [`Error::Level`] when `level` is not a name of Python's `logging`.
    pub fn set(&mut self, logger: &str, level: &str) -> Result<(), Error> {
        let filter = match level.to_ascii_lowercase().as_str() {
            "notset" | "trace" => LevelFilter::TRACE,
            "debug" => LevelFilter::DEBUG,
            "info" => LevelFilter::INFO,
            "warning" | "warn" => LevelFilter::WARN,
            "error" | "critical" | "fatal" => LevelFilter::ERROR,
            _ => return Err(Error::Level { level: level.to_owned() }),
        };
        if matches!(logger, "" | "root") {
            self.root = filter;
            return Ok(());
        }
        self.loggers.retain(|(name, _)| name != logger);
        self.loggers.push((logger.to_owned(), filter));
        Ok(())
    }

    fn of(&self, logger: &str) -> LevelFilter {
        let applies = |name: &str| {
            logger.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        let rules = self.loggers.iter().filter(|(name, _)| applies(name));
        rules.max_by_key(|(name, _)| name.len()).map_or(self.root, |(_, filter)| *filter)
    }

    fn lowest(&self) -> LevelFilter {
        self.loggers.iter().map(|(_, filter)| *filter).max().unwrap_or(self.root).max(self.root)
    }
}

/// Recent log records, shared between the layer that adds them and `get_logs`.
#[derive(Clone, Debug)]
pub struct Recent {
    records: Arc<Mutex<VecDeque<Record>>>,
    kept: usize,
    pattern: Arc<Pattern>,
}

/// One answer line of `get_logs`: `(created, levelname, text)`; the caller leaves `created` out unless asked for it.
pub type Line = (f64, &'static str, String);

impl Recent {
    fn new(kept: usize, pattern: Pattern) -> Self {
        Recent { records: Arc::default(), kept: kept.max(1), pattern: Arc::new(pattern) }
    }

    fn push(&self, record: Record) {
        // a panic while the lock was held leaves a whole queue behind: records go in and out in one step
        let mut records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        if records.len() >= self.kept {
            records.pop_front();
        }
        records.push_back(record);
    }

    /// Newest first, none older than `start` (unix seconds), at most `n`, of `logger` and those below it (all, when empty).
    ///
    /// Mirrors `distributed/node.py: ServerNode.get_logs`, where `n = 0` also means no limit.
    pub fn lines(&self, logger: &str, start: f64, n: Option<usize>) -> Vec<Line> {
        let records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        let limit = n.filter(|n| *n > 0).unwrap_or(usize::MAX);
        let newest = records.iter().rev().filter(|r| r.logger.starts_with(logger));
        newest
            .take(limit)
            .take_while(|r| r.created >= start)
            .map(|r| (r.created, r.level.name(), self.pattern.render(r)))
            .collect()
    }
}

/// Where records leave the process.
enum Sink {
    Text(Arc<Pattern>),
    Json,
    Journal(Box<JournalLog>),
}

impl Sink {
    fn open(format: Format, pattern: Arc<Pattern>) -> Result<Self, Error> {
        let journal = || JournalLog::new().map(|j| Sink::Journal(Box::new(j)));
        match format {
            Format::Text => Ok(Sink::Text(pattern)),
            Format::Json => Ok(Sink::Json),
            Format::Journal => journal().map_err(|source| Error::Journal { source }),
            // a journal that is announced and not there leaves standard error, which systemd reads as well
            Format::Auto if systemd_journal_logger::connected_to_journal() => {
                Ok(journal().unwrap_or(Sink::Text(pattern)))
            }
            Format::Auto => Ok(Sink::Text(pattern)),
        }
    }

    fn write(&self, record: &Record) {
        // nobody is left to tell when standard error or the journal fail
        let _ = match self {
            Sink::Text(pattern) => line(&pattern.render(record)),
            Sink::Json => line(&record.json()),
            Sink::Journal(journal) => as_log_record(record, |r| journal.journal_send(r)),
        };
    }
}

/// One write, so that lines of several processes on one terminal do not mix.
fn line(text: &str) -> std::io::Result<()> {
    std::io::stderr().lock().write_all(format!("{text}\n").as_bytes())
}

/// Shows a record in the `log` crate's form, which the journal client takes: fields become journal fields.
fn as_log_record<T>(record: &Record, send: impl FnOnce(&log::Record) -> T) -> T {
    let level = match record.level {
        Level::Debug => log::Level::Debug,
        Level::Info => log::Level::Info,
        Level::Warning => log::Level::Warn,
        Level::Error => log::Level::Error,
    };
    let fields: Vec<(&str, &str)> = record.fields.iter().map(|(k, v)| (*k, v.as_str())).collect();
    send(
        &log::Record::builder()
            .level(level)
            .target(&record.logger)
            .args(format_args!("{}", record.message))
            .file_static(record.source.map(|(file, _)| file))
            .line(record.source.map(|(_, line)| line))
            .key_values(&fields.as_slice())
            .build(),
    )
}

/// The tracing layer: builds a [`Record`] of each event.
struct Output {
    sink: Sink,
    recent: Recent,
}

impl<S: Subscriber> Layer<S> for Output {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let meta = event.metadata();
        let mut collected = Collected::default();
        event.record(&mut collected);
        let record = Record {
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64()),
            level: (*meta.level()).into(),
            logger: logger_name(meta).into(),
            message: collected.message,
            fields: collected.fields,
            source: meta.file().zip(meta.line()),
        };
        self.sink.write(&record);
        self.recent.push(record);
    }
}

/// The dotted name of an event's logger: Dask's own names pass, our modules become `iqoqo.room.file`.
fn logger_name(meta: &Metadata<'_>) -> String {
    let target = meta.target();
    match target.strip_prefix(env!("CARGO_CRATE_NAME")) {
        Some(rest) => format!("iqoqo{}", rest.replace("::", ".")),
        None => target.replace("::", "."),
    }
}

/// Takes an event's message and fields apart.
#[derive(Default)]
struct Collected {
    message: String,
    fields: Vec<(&'static str, String)>,
}

impl Visit for Collected {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => value.clone_into(&mut self.message),
            name => self.fields.push((name, value.to_owned())),
        }
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        let mut text = value.to_string();
        let mut source = value.source();
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        self.fields.push((field.name(), text));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
}

fn filter(levels: Levels) -> FilterFn<impl Fn(&Metadata<'_>) -> bool> {
    let lowest = levels.lowest();
    filter_fn(move |meta| *meta.level() <= levels.of(&logger_name(meta))).with_max_level_hint(lowest)
}

/// Starts logging for the whole process; call once, first of all.
///
/// # Errors
/// [`Error::Journal`] when the journal is demanded and not there, [`Error::AlreadyStarted`] on a second call.
pub fn start(config: Config) -> Result<Recent, Error> {
    let recent = Recent::new(config.kept, config.pattern);
    let sink = Sink::open(config.format, recent.pattern.clone())?;
    let output = Output { sink, recent: recent.clone() }.with_filter(filter(config.levels));
    let subscriber = Registry::default().with(output);
    tracing::subscriber::set_global_default(subscriber).map_err(|_| Error::AlreadyStarted)?;
    Ok(recent)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn logged(levels: Levels, kept: usize, body: impl FnOnce()) -> Recent {
        let pattern = Pattern::parse("%(name)s %(levelname)s %(message)s").unwrap();
        let recent = Recent::new(kept, pattern);
        let output = Output { sink: Sink::Json, recent: recent.clone() }.with_filter(filter(levels));
        tracing::subscriber::with_default(Registry::default().with(output), body);
        recent
    }

    fn texts(recent: &Recent, logger: &str, n: Option<usize>) -> Vec<String> {
        recent.lines(logger, 0.0, n).into_iter().map(|(_, _, text)| text).collect()
    }

    #[test]
    fn newest_first_with_limits() {
        let recent = logged(Levels::default(), 3, || {
            for i in 0..5 {
                tracing::info!(target: "distributed.worker", "record {i}");
            }
        });
        let all = texts(&recent, "", None);
        assert_eq!(all[0], "distributed.worker INFO record 4");
        assert_eq!(all.len(), 3);
        assert_eq!(texts(&recent, "", Some(1)), all[..1]);
        assert_eq!(texts(&recent, "", Some(0)), all);
        assert!(texts(&recent, "distributed.nanny", None).is_empty());
        assert!(recent.lines("", f64::MAX, None).is_empty());
    }

    #[test]
    fn fields_errors_and_own_modules() {
        let recent = logged(Levels::default(), 10, || {
            let error = Error::Journal { source: std::io::Error::other("no socket") };
            tracing::warn!(error = &error as &dyn std::error::Error, attempt = 2, "failed");
        });
        assert_eq!(
            texts(&recent, "iqoqo", None),
            [
                "iqoqo.telemetry.log.tests WARNING failed error=\"the systemd journal cannot be reached: no socket\" attempt=2"
            ]
        );
    }

    #[test]
    fn longest_logger_name_decides() {
        let mut levels = Levels::default();
        levels.set("distributed.worker", "DEBUG").unwrap();
        levels.set("", "error").unwrap();
        assert!(matches!(levels.set("x", "loud"), Err(Error::Level { .. })));
        let recent = logged(levels, 10, || {
            tracing::debug!(target: "distributed.worker", "a");
            tracing::debug!(target: "distributed.workers", "b");
            tracing::debug!(target: "distributed", "c");
            tracing::warn!(target: "h2::client", "d");
            tracing::error!(target: "h2::client", "e");
        });
        assert_eq!(texts(&recent, "", None), ["h2.client ERROR e", "distributed.worker DEBUG a"]);
    }

    #[test]
    fn journal_gets_fields_apart() {
        let record = Record {
            created: 0.0,
            level: Level::Warning,
            logger: "distributed.worker".into(),
            message: "hello".into(),
            fields: vec![("task_key", "x".into())],
            source: Some(("src/a.rs", 3)),
        };
        as_log_record(&record, |r| {
            assert_eq!((r.level(), r.target(), r.line()), (log::Level::Warn, "distributed.worker", Some(3)));
            assert_eq!(r.args().to_string(), "hello");
            let value = r.key_values().get(log::kv::Key::from("task_key"));
            assert_eq!(value.unwrap().to_string(), "x");
        });
    }
}
