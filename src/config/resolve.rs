//! From what the sources say to [`Settings`]: defaults, checks of single values and of their combinations.
//!
//! Follows `distributed/cli/dask_worker.py` and the constructors of `Worker` and `Nanny`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::exec;
use crate::scheduler::{MonitorConfig, Name};
use crate::wire::Compression;

use super::Error;
use super::addresses;
use super::env::Environment;
use super::interpreter::Python;
use super::machine::Machine;
use super::parse::{Unit, nprocesses_nthreads, parse_memory_limit, python_int};
use super::settings::*;
use super::sources::{
    Sources, boolean, bytes, count, duration, integer, resources, text, texts, threshold, variables,
};
use super::value::Value;

/// Environment of a task before anything is configured (`distributed.nanny.pre-spawn-environ`).
const PRE_SPAWN: &[(&str, &str)] = &[
    ("MALLOC_TRIM_THRESHOLD_", "65536"),
    ("OMP_NUM_THREADS", "1"),
    ("MKL_NUM_THREADS", "1"),
    ("OPENBLAS_NUM_THREADS", "1"),
];
/// Time for moving data away before the daemon ends; `dask worker` gives none, a service manager some 90 s, Kubernetes 30.
const RETIRE_TIMEOUT: Duration = Duration::from_secs(25);
/// A task whose process died gets one more.
const TASK_ATTEMPTS: u32 = 2;

/// Resolves everything; `remarks` collects what an operator should know and no value is wrong about.
///
/// # Errors
/// The first value or combination that is wrong, or not supported.
pub fn resolve(
    sources: &Sources,
    env: &Environment,
    machine: Machine,
    python: Python,
    remarks: &mut Vec<String>,
) -> Result<Settings, Error> {
    sources.refuse_unsupported()?;
    refuse_modes(sources)?;
    let nanny = sources.read("nanny", boolean)?.unwrap_or(true);
    let addresses = addresses::read(sources)?;
    let workers = workers(sources, machine, nanny, &addresses, remarks)?;
    Ok(Settings {
        scheduler: addresses::scheduler(sources)?,
        workers,
        host: addresses.host,
        contact_address: addresses.contact,
        nanny,
        resources: resources_of(sources)?,
        death_timeout: sources.read("death-timeout", duration(Unit::Seconds))?.filter(|d| !d.is_zero()),
        lifetime: lifetime(sources)?,
        dashboard: addresses::dashboard(sources)?,
        pid_file: sources.read("pid-file", text)?.map(PathBuf::from),
        scratch: scratch(sources, env)?,
        use_file_locking: sources.read("worker.use-file-locking", boolean)?.unwrap_or(true),
        runner: Runner {
            python,
            environment: environment(sources, env, nanny)?,
            attempts: attempts(sources)?,
        },
        memory: memory(sources)?,
        transfer: transfer(sources)?,
        comm: comm(sources)?,
        tuning: tuning(sources)?,
        monitor: monitor(sources)?,
    })
}

/// Refuses what our own options will mean later.
fn refuse_modes(sources: &Sources) -> Result<(), Error> {
    const SANDBOX: &str = "not yet: sandbox levels standard and strict come with the sandbox; until then use off, \
                           and run only tasks you trust";
    const ISOLATION: &str =
        "not yet: a fresh process for each task comes with the sandbox; until then use slot";
    const THREADS: &str = "not yet: more than one thread for each runner comes later; until then use 1, and \
                           --nthreads for the number of tasks at once";
    let choice = |name, allowed: &'static [&'static str], why| {
        let Some(found) = sources.find(name) else { return Ok(()) };
        let chosen = text(&found.node.value).map_err(|reason| found.wrong(reason))?;
        match allowed.iter().position(|known| *known == chosen) {
            Some(0) => Ok(()),
            Some(_) => Err(Error::Refused { place: found.place(), why }),
            None => Err(found.wrong(format!("expected one of {}", allowed.join(", ")))),
        }
    };
    choice("sandbox", &["off", "standard", "strict"], SANDBOX)?;
    choice("isolation", &["slot", "task"], ISOLATION)?;
    let Some(found) = sources.find("threads-per-runner") else { return Ok(()) };
    match count(1)(&found.node.value).map_err(|reason| found.wrong(reason))? {
        1 => Ok(()),
        _ => Err(Error::Refused { place: found.place(), why: THREADS }),
    }
}

fn workers(
    sources: &Sources,
    machine: Machine,
    nanny: bool,
    addresses: &addresses::Listen,
    remarks: &mut Vec<String>,
) -> Result<Vec<Worker>, Error> {
    let mut nthreads = sources.read("nthreads", count(0))?.unwrap_or(0);
    let n = match sources.find("nworkers") {
        None => 1,
        Some(found) if found.node.value == Value::Str("auto".into()) => {
            let (n, threads) = nprocesses_nthreads(machine.cores);
            if nthreads != 0 && nthreads != threads {
                remarks.push(format!("--nworkers auto sets --nthreads to {threads}, whatever was asked for"));
            }
            nthreads = threads;
            n
        }
        Some(found) => {
            let n = integer(&found.node.value).map_err(|reason| found.wrong(format!("{reason}, or auto")))?;
            let n = if n < 0 { n.saturating_add_unsigned(machine.cores as u64 + 1) } else { n };
            let n = usize::try_from(n).ok().filter(|n| *n > 0);
            n.ok_or_else(|| found.wrong("must specify --nworkers so that there's at least one worker"))?
        }
    };
    let usage = |message: &str| Err(Error::Combination { message: message.to_owned() });
    if n > 1 && !nanny {
        return usage("you cannot use the --no-nanny argument when --nworkers is more than 1");
    }
    if n > 1 && addresses.listening {
        return usage("you cannot specify --listen-address when --nworkers is more than 1");
    }
    // as in Dask, more workers than cores get all the cores each
    let nthreads = match nthreads {
        0 => Some(machine.cores / n).filter(|share| *share > 0).unwrap_or(machine.cores),
        given => given,
    };
    let memory_limit = memory_limit(sources, nthreads, machine, remarks)?;
    let ports = addresses.apportion(n, nanny)?;
    let name = sources.read("name", text)?.map(|text| match python_int(&text) {
        Some(i) => Name::Number(i),
        None => Name::Text(text.into()),
    });
    let worker = |(i, (worker_ports, nanny_ports))| {
        let name = match &name {
            Some(Name::Number(number)) if n > 1 => Some(Name::Text(format!("{number}-{i}").into())),
            Some(Name::Text(text)) if n > 1 && !text.is_empty() => {
                Some(Name::Text(format!("{text}-{i}").into()))
            }
            alone => alone.clone(),
        };
        Worker { name, nthreads, memory_limit, worker_ports, nanny_ports }
    };
    Ok(ports.into_iter().enumerate().map(worker).collect())
}

fn memory_limit(
    sources: &Sources,
    nthreads: usize,
    machine: Machine,
    remarks: &mut Vec<String>,
) -> Result<Option<u64>, Error> {
    let parse = |value: &Value| parse_memory_limit(&text(value)?, nthreads, machine.cores, machine.memory);
    let found = sources.read("memory-limit", parse)?;
    let limit = match found {
        Some(limit) => limit,
        None => parse(&Value::Str("auto".into())).map_err(|reason| Error::Combination { message: reason })?,
    };
    if limit.capped {
        remarks
            .push(format!("the memory limit is above what this system has: {} bytes it is", machine.memory));
    }
    Ok(limit.bytes)
}

fn resources_of(sources: &Sources) -> Result<Vec<(Arc<str>, f64)>, Error> {
    let pairs = sources.read("resources", resources)?.unwrap_or_default();
    Ok(pairs.into_iter().map(|(name, amount)| (name.into(), amount)).collect())
}

fn lifetime(sources: &Sources) -> Result<Option<Lifetime>, Error> {
    let seconds = || duration(Unit::Seconds);
    let stagger = sources.read("lifetime-stagger", seconds())?.unwrap_or_default();
    let restart = sources.read("lifetime-restart", boolean)?.unwrap_or(false);
    let whole = sources.read("lifetime", seconds())?.filter(|d| !d.is_zero());
    Ok(whole.map(|duration| Lifetime { duration, stagger, restart }))
}

/// `local_directory`, ending in `dask-scratch-space` as `distributed/core.py: Server` makes it.
fn scratch(sources: &Sources, env: &Environment) -> Result<PathBuf, Error> {
    const NAME: &str = "dask-scratch-space";
    let given = sources.read("local-directory", text)?.map(PathBuf::from);
    // the folders Python's `tempfile.gettempdir` tries first
    let mut named = ["TMPDIR", "TEMP", "TMP"].into_iter().filter_map(|name| env.get(name)).map(PathBuf::from);
    let folder = given.or_else(|| named.find(|folder| folder.is_dir())).unwrap_or("/tmp".into());
    let folder = if folder.to_string_lossy().contains(NAME) { folder } else { folder.join(NAME) };
    Ok(std::path::absolute(&folder).unwrap_or(folder))
}

/// What `distributed.nanny.pre-spawn-environ` and `environ` set in Python processes; `null` takes a variable out.
/// Without a nanny they set nothing.
fn environment(
    sources: &Sources,
    env: &Environment,
    nanny: bool,
) -> Result<Vec<(OsString, OsString)>, Error> {
    if !nanny {
        return Ok(Vec::new());
    }
    let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    let mut configured: Vec<(String, String)> = PRE_SPAWN.iter().map(owned).collect();
    for name in ["nanny-pre-spawn-environ", "nanny-environ"] {
        for (variable, value) in sources.read(name, variables)?.unwrap_or_default() {
            configured.retain(|(known, _)| *known != variable);
            configured.extend(value.map(|value| (variable, value)));
        }
    }
    Ok(exec::nanny_environment(&configured, |name| env.get(name).map(OsString::from)))
}

fn memory(sources: &Sources) -> Result<Memory, Error> {
    let fraction = |name, default| sources.read(name, threshold).map(|read| read.unwrap_or(Some(default)));
    let limit = |value: &Value| match value {
        Value::Bool(false) => Ok(None),
        other => bytes(other).map(Some),
    };
    let interval = sources.read("memory.monitor-interval", duration(Unit::Required))?;
    let spill_compression = sources.read("memory.spill-compression", compression)?;
    Ok(Memory {
        transfer: fraction("memory.transfer", 0.10)?,
        target: fraction("memory.target", 0.60)?,
        spill: fraction("memory.spill", 0.70)?,
        pause: fraction("memory.pause", 0.80)?,
        terminate: fraction("memory.terminate", 0.95)?,
        max_spill: sources.read("memory.max-spill", limit)?.flatten(),
        // as `auto`
        spill_compression: spill_compression.unwrap_or(Compression::Lz4),
        monitor_interval: interval.unwrap_or(Duration::from_millis(100)),
    })
}

fn attempts(sources: &Sources) -> Result<u32, Error> {
    let small = |value: &Value| u32::try_from(count(1)(value)?).map_err(|_| "too large a number".to_owned());
    Ok(sources.read("worker.task-attempts", small)?.unwrap_or(TASK_ATTEMPTS))
}

fn transfer(sources: &Sources) -> Result<Transfer, Error> {
    Ok(Transfer {
        incoming_connections: sources.read("transfer.incoming-connections", count(1))?.unwrap_or(10),
        outgoing_connections: sources.read("transfer.outgoing-connections", count(1))?.unwrap_or(50),
        message_bytes_limit: sources.read("transfer.message-bytes-limit", bytes)?.unwrap_or(50_000_000),
        bandwidth: sources.read("transfer.bandwidth", bytes)?.unwrap_or(100_000_000),
    })
}

fn comm(sources: &Sources) -> Result<Comm, Error> {
    let seconds = |name, default| {
        let read = sources.read(name, duration(Unit::Seconds));
        read.map(|read| read.unwrap_or(Duration::from_secs(default)))
    };
    let small = |value: &Value| u32::try_from(count(0)(value)?).map_err(|_| "too large a number".to_owned());
    Ok(Comm {
        compression: sources.read("comm.compression", compression)?.unwrap_or_default(),
        connect_timeout: seconds("comm.connect-timeout", 30)?,
        tcp_timeout: seconds("comm.tcp-timeout", 30)?,
        socket_backlog: sources.read("comm.socket-backlog", small)?.unwrap_or(2048),
        retry_count: sources.read("comm.retry-count", small)?.unwrap_or(0),
        retry_delay: (seconds("comm.retry-delay-min", 1)?, seconds("comm.retry-delay-max", 20)?),
    })
}

fn compression(value: &Value) -> Result<Compression, String> {
    match value {
        Value::Bool(false) => Ok(Compression::None),
        other => Compression::from_name(&text(other)?)
            .ok_or_else(|| "expected false, auto, lz4, snappy, zlib or zstd".to_owned()),
    }
}

fn tuning(sources: &Sources) -> Result<Tuning, Error> {
    let retire = sources.read("worker.retire-timeout", duration(Unit::Seconds))?;
    Ok(Tuning {
        blocked_handlers: sources.read("worker.blocked-handlers", texts)?.unwrap_or_default(),
        nanny_blocked_handlers: sources.read("nanny-blocked-handlers", texts)?.unwrap_or_default(),
        retire_timeout: retire.unwrap_or(RETIRE_TIMEOUT),
        default_data_size: sources.read("worker.default-data-size", bytes)?.unwrap_or(1024),
        story_length: sources.read("worker.story-length", count(0))?.unwrap_or(1000),
        validate: sources.read("worker.validate", boolean)?.unwrap_or(false),
    })
}

fn monitor(sources: &Sources) -> Result<MonitorConfig, Error> {
    let interval = sources.read("monitor.interval", |value| match duration(Unit::Seconds)(value)? {
        Duration::ZERO => Err("expected more than nothing".to_owned()),
        interval => Ok(interval),
    })?;
    let kept = |value: &Value| count(1)(value).map(Some);
    Ok(MonitorConfig {
        interval: interval.unwrap_or(Duration::from_millis(500)),
        log_length: sources.read("monitor.log-length", kept)?.unwrap_or(Some(7200)),
        disk: sources.read("monitor.disk", boolean)?.unwrap_or(true),
        host_cpu: sources.read("monitor.host-cpu", boolean)?.unwrap_or(false),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(super) mod tests {
    use super::*;
    use crate::config::interpreter;
    use crate::config::keys::SETTINGS;
    use crate::config::log;
    use crate::config::value::{Node, Source, Table};

    const MACHINE: Machine = Machine { cores: 6, memory: 12_000_000_000 };

    fn said(value: Value) -> Node {
        Node::new(value, Source::Option("--test"))
    }

    fn texts(pairs: &[(&'static str, &str)]) -> Sources {
        let options = pairs.iter().map(|(name, text)| (*name, said(Value::Str((*text).to_owned()))));
        Sources { options: options.collect(), ..Sources::default() }
    }

    fn try_resolve(mut sources: Sources, remarks: &mut Vec<String>) -> Result<Settings, Error> {
        let python = concat!(env!("CARGO_MANIFEST_DIR"), "/.venv/bin/python");
        let python = interpreter::find(python, &Environment::default()).unwrap();
        sources.options.entry("scheduler").or_insert(said(Value::Str("host:1".into())));
        resolve(&sources, &Environment::default(), MACHINE, python, remarks)
    }

    /// Settings for these sources on a fixed machine, with a scheduler if they name none.
    pub fn resolved(sources: Sources) -> Settings {
        try_resolve(sources, &mut Vec::new()).unwrap()
    }

    /// Nothing may be accepted and ignored: nonsense for any setting is an error that names it.
    #[test]
    fn every_setting_is_read() {
        for setting in SETTINGS.iter().filter(|setting| setting.name != "python") {
            let nonsense = Table::from([("x".to_owned(), said(Value::List(vec![said(Value::Null)])))]);
            let mut sources = Sources::default();
            // our own file's values: options come before them, and are the same for most
            sources.own.values.insert(setting.name.to_owned(), said(Value::Map(nonsense)));
            if setting.name == "contact-address" {
                sources.options.insert("listen-address", said(Value::Str("tcp://h:1".into())));
            }
            if setting.name == "scheduler" {
                sources.options.insert("scheduler", said(Value::Map(Table::new())));
            }
            let error = match log::read(&sources, &mut Vec::new()) {
                Err(error) => error,
                Ok(_) => try_resolve(sources, &mut Vec::new()).expect_err(setting.name),
            };
            assert!(
                matches!(error, Error::Value { .. } | Error::Refused { .. }),
                "{}: {error}",
                setting.name
            );
        }
    }

    #[test]
    fn spilling_is_as_in_dask() {
        let memory = |pairs: &[(&'static str, &str)]| {
            let own = pairs.iter().map(|(name, text)| ((*name).to_owned(), said(Value::Str((*text).into()))));
            let mut sources = Sources::default();
            sources.own.values.extend(own);
            resolved(sources).memory
        };
        let usual = memory(&[]);
        assert_eq!((usual.target, usual.spill, usual.max_spill), (Some(0.6), Some(0.7), None));
        assert_eq!(usual.spill_compression, Compression::Lz4);
        assert_eq!(usual.monitor_interval, Duration::from_millis(100));
        let set = memory(&[("memory.max-spill", "2 GB"), ("memory.spill-compression", "zstd")]);
        assert_eq!((set.max_spill, set.spill_compression), (Some(2_000_000_000), Compression::Zstd));
    }

    #[test]
    fn threads_and_memory_are_shared_out() {
        let share = |pairs: &[(&'static str, &str)]| {
            let settings = resolved(texts(pairs));
            let first = &settings.workers[0];
            (settings.workers.len(), first.nthreads, first.memory_limit)
        };
        assert_eq!(share(&[]), (1, 6, Some(12_000_000_000)));
        assert_eq!(share(&[("nworkers", "2")]), (2, 3, Some(6_000_000_000)));
        assert_eq!(share(&[("nworkers", "-2")]), (5, 1, Some(2_000_000_000)));
        assert_eq!(share(&[("nworkers", "auto")]), (3, 2, Some(4_000_000_000)));
        // as in Dask, more workers than cores get all of them each
        assert_eq!(share(&[("nworkers", "7")]), (7, 6, Some(12_000_000_000)));
        assert_eq!(share(&[("nthreads", "2"), ("memory-limit", "0.5")]), (1, 2, Some(6_000_000_000)));
        assert_eq!(share(&[("memory-limit", "0")]), (1, 6, None));
    }

    #[test]
    fn what_is_overruled_is_remarked_on() {
        let mut remarks = Vec::new();
        let pairs = [("nworkers", "auto"), ("nthreads", "5"), ("memory-limit", "1TB")];
        let settings = try_resolve(texts(&pairs), &mut remarks).unwrap();
        assert_eq!(settings.workers[0].memory_limit, Some(MACHINE.memory));
        assert_eq!(remarks.len(), 2, "{remarks:?}");
    }

    #[test]
    fn names_are_numbered() {
        let names = |pairs: &[(&'static str, &str)]| {
            let workers = resolved(texts(pairs)).workers;
            workers.into_iter().map(|worker| worker.name).collect::<Vec<_>>()
        };
        let text = |text: &str| Some(Name::Text(text.into()));
        assert_eq!(names(&[]), [None]);
        assert_eq!(names(&[("name", "w")]), [text("w")]);
        assert_eq!(names(&[("name", " 07 ")]), [Some(Name::Number(7))]);
        assert_eq!(names(&[("name", "7"), ("nworkers", "2")]), [text("7-0"), text("7-1")]);
        assert_eq!(names(&[("name", "w"), ("nworkers", "2")]), [text("w-0"), text("w-1")]);
    }

    #[test]
    fn where_to_listen_and_what_to_tell() {
        let listen = |pairs: &[(&'static str, &str)]| {
            let settings = resolved(texts(pairs));
            let contact = settings.contact_address.map(|address| address.to_string());
            (settings.host, settings.workers[0].worker_ports.clone(), contact)
        };
        let host = |text: &str| Some(text.to_owned());
        assert_eq!(listen(&[]), (None, vec![0], None));
        assert_eq!(listen(&[("host", "10.0.0.1:80")]), (host("10.0.0.1"), vec![80], None));
        assert_eq!(listen(&[("host", "tcp://[::1]")]), (host("::1"), vec![0], None));
        assert_eq!(listen(&[("interface", "lo")]).0, host("127.0.0.1"));
        assert_eq!(listen(&[("listen-address", "tcp://:80")]), (None, vec![80], None));
        assert_eq!(listen(&[("listen-address", "tcp://0.0.0.0:80")]), (host("0.0.0.0"), vec![80], None));
        let told = Some("tcp://10.0.0.1:80".to_owned());
        assert_eq!(listen(&[("listen-address", "tcp://10.0.0.1:80")]), (host("10.0.0.1"), vec![80], told));
        let both = [("listen-address", "tcp://:80"), ("contact-address", "tcp://h:81")];
        assert_eq!(listen(&both).2.as_deref(), Some("tcp://h:81"));
    }

    #[test]
    fn variables_of_python_processes() {
        let table = |pairs: &[(&str, Value)]| {
            Value::Map(pairs.iter().map(|(name, value)| ((*name).to_owned(), said(value.clone()))).collect())
        };
        let mut sources = Sources::default();
        let pre_spawn = table(&[("OMP_NUM_THREADS", Value::Null), ("A", Value::Int(1))]);
        sources.own.values.insert("nanny-pre-spawn-environ".into(), said(pre_spawn));
        sources.own.values.insert("nanny-environ".into(), said(table(&[("A", Value::Bool(true))])));
        let environment = resolved(sources).runner.environment;
        let get = |name: &str| {
            environment.iter().find(|(known, _)| known == name).map(|(_, v)| v.to_str().unwrap())
        };
        assert_eq!(get("A"), Some("True"));
        assert_eq!(get("OMP_NUM_THREADS"), None);
        assert_eq!((get("MKL_NUM_THREADS"), get("PYTHONHASHSEED")), (Some("1"), Some("6640")));
    }

    #[test]
    fn scratch_space_has_dasks_name() {
        let scratch = |pairs: &[(&'static str, &str)]| resolved(texts(pairs)).scratch;
        assert_eq!(scratch(&[]), PathBuf::from("/tmp/dask-scratch-space"));
        assert_eq!(scratch(&[("local-directory", "/data")]), PathBuf::from("/data/dask-scratch-space"));
        let named = "/data/dask-scratch-space/x";
        assert_eq!(scratch(&[("local-directory", named)]), PathBuf::from(named));
    }
}
