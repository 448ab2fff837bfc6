//! The command line: `dask worker`'s options, ours, and the exit codes. A contract with scripts; see `docs/cli.md`.
//!
//! Only what the shell said is read here; what it means is `config`'s.

pub mod check;
mod exit;
mod pid_file;
mod serve;

use std::path::PathBuf;

use clap::Parser;
use indexmap::IndexMap;

use crate::config::{Node, Source, Value};

pub use exit::Exit;
pub use serve::serve;

const EXIT_CODES: &str = "\
Exit codes (sysexits.h):
   0  closed as asked, by a signal, the scheduler or --lifetime
  64  a bad option, or options that contradict each other
  69  no scheduler was found, or it was lost, for --death-timeout
  70  an error of this program
  71  the system refused what a worker needs
  73  a file or directory could not be created
  76  the scheduler refused this worker, or does not speak Dask's protocol
  77  a permission is missing
  78  a bad value in a file or in the environment, or an unusable interpreter
 128+n  a second signal n ended it at once

Every option can also be set in /etc/iqoqo/dask-worker.toml (or --config FILE) by its name without dashes, and as a \
variable IQOQO_NAME. DASK_* variables and Dask's YAML files count too. An option counts more than IQOQO_*, that more \
than our file, that more than DASK_*, that more than Dask's files.";

/// A worker for a standard Dask scheduler: one small daemon, tasks in Python subprocesses.
#[derive(Debug, Parser)]
#[command(
    name = "iqoqo-dask-worker",
    version,
    args_override_self = true,
    args_conflicts_with_subcommands = true,
    after_help = EXIT_CODES,
    max_term_width = 110
)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Subcommand>,
    #[command(flatten)]
    options: Options,
}

#[derive(Debug, clap::Subcommand)]
enum Subcommand {
    /// Check the configuration, the interpreter and what this kernel offers a sandbox; start nothing
    Check(Options),
}

/// What the command line asks for.
#[derive(Debug)]
pub enum Command {
    /// Join the scheduler.
    Run,
    /// Say what would be run.
    Check,
}

impl Cli {
    /// Splits into what to do and with which options.
    pub fn split(self) -> (Command, Options) {
        match self.command {
            None => (Command::Run, self.options),
            Some(Subcommand::Check(options)) => (Command::Check, options),
        }
    }
}

/// Options as they were given; none of them is looked into here.
#[derive(Debug, clap::Args)]
#[command(args_override_self = true)]
pub struct Options {
    /// Address of the scheduler, like tcp://192.168.0.1:8786
    #[arg(value_name = "SCHEDULER")]
    scheduler: Option<String>,
    /// File with the scheduler's address, written by dask scheduler --scheduler-file; waited for
    #[arg(long, value_name = "FILE")]
    scheduler_file: Option<String>,
    /// Number of tasks at once in each worker; 0 shares the cores out among the workers [default: 0]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    nthreads: Option<String>,
    /// Number of workers; below zero CPU_COUNT + 1 + N; 'auto' sets --nthreads too [default: 1]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    nworkers: Option<String>,
    /// A unique name; with --nworkers the workers are NAME-0, NAME-1, ...
    #[arg(long)]
    name: Option<String>,
    /// Memory for each worker: bytes, a size like 5GB, a fraction of the system's, 0 for no limit [default: auto]
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    memory_limit: Option<String>,
    /// Resources for task constraints of each worker, like "GPU=2 MEM=10e9"
    #[arg(long)]
    resources: Option<String>,
    /// Directory for worker files; a folder dask-scratch-space is made there
    #[arg(long, value_name = "DIR")]
    local_directory: Option<String>,
    /// Serving host, visible to the scheduler and the other workers
    #[arg(long)]
    host: Option<String>,
    /// Network interface like eth0 or ib0
    #[arg(long)]
    interface: Option<String>,
    /// Protocol: tcp
    #[arg(long)]
    protocol: Option<String>,
    /// Serving port, or a range like 3000:3026 that is shared out among workers [default: any free one]
    #[arg(long, value_name = "PORT")]
    worker_port: Option<String>,
    /// Serving port of the nanny's address, or a range [default: any free one]
    #[arg(long, value_name = "PORT")]
    nanny_port: Option<String>,
    /// Address to bind, like tcp://0.0.0.0:9000 or tcp://:9000
    #[arg(long, value_name = "ADDRESS")]
    listen_address: Option<String>,
    /// Address told to the scheduler and the other workers, like tcp://127.0.0.1:9000
    #[arg(long, value_name = "ADDRESS")]
    contact_address: Option<String>,
    /// Answer at a nanny's address too, and take a nanny's part in restarts [default]
    #[arg(long, overrides_with = "no_nanny")]
    nanny: bool,
    /// Have no nanny
    #[arg(long, overrides_with = "nanny")]
    no_nanny: bool,
    /// Serve /health, /metrics and /info over HTTP [default]
    #[arg(long, overrides_with = "no_dashboard")]
    dashboard: bool,
    /// Serve no HTTP
    #[arg(long, overrides_with = "dashboard")]
    no_dashboard: bool,
    /// Address of the HTTP server [default: :0, any free port]
    #[arg(long, value_name = "ADDRESS")]
    dashboard_address: Option<String>,
    /// Prefix of the HTTP server's paths
    #[arg(long, value_name = "PREFIX")]
    dashboard_prefix: Option<String>,
    /// Time to look for a scheduler before giving up, in seconds or like 5m [default: for ever]
    #[arg(long, value_name = "TIME")]
    death_timeout: Option<String>,
    /// Time after which the worker closes gracefully
    #[arg(long, value_name = "TIME")]
    lifetime: Option<String>,
    /// Random shift of the lifetime, in both directions
    #[arg(long, value_name = "TIME")]
    lifetime_stagger: Option<String>,
    /// Start a new worker when the lifetime is over
    #[arg(long, overrides_with = "no_lifetime_restart")]
    lifetime_restart: bool,
    /// Start none [default]
    #[arg(long, overrides_with = "lifetime_restart")]
    no_lifetime_restart: bool,
    /// File to write the process number to; removed at the end
    #[arg(long, value_name = "FILE")]
    pid_file: Option<String>,
    /// Interpreter that runs the tasks; needs the package distributed [default: python3]
    #[arg(long, value_name = "PATH", help_heading = "Of this worker")]
    python: Option<String>,
    /// Configuration file to read instead of /etc/iqoqo/dask-worker.toml
    #[arg(long, value_name = "FILE", help_heading = "Of this worker")]
    config: Option<PathBuf>,
    /// Sandbox of tasks: off (standard and strict come later) [default: off]
    #[arg(long, value_name = "LEVEL", help_heading = "Of this worker")]
    sandbox: Option<String>,
    /// Threads in each runner process: 1 (more come later) [default: 1]
    #[arg(long, value_name = "N", help_heading = "Of this worker")]
    threads_per_runner: Option<String>,
    /// What tasks have a process of their own: slot (task comes later) [default: slot]
    #[arg(long, value_name = "UNIT", help_heading = "Of this worker")]
    isolation: Option<String>,
    /// Form of the log: auto (the journal under systemd, else text), text, json, journal [default: auto]
    #[arg(long, value_name = "FORM", help_heading = "Of this worker")]
    log_format: Option<String>,
    /// Module to load in each worker
    #[arg(long, help_heading = "Of dask worker, refused")]
    preload: Option<String>,
    /// Module to load in each nanny
    #[arg(long, help_heading = "Of dask worker, refused")]
    preload_nanny: Option<String>,
    /// File with CA certificates
    #[arg(long, value_name = "FILE", help_heading = "Of dask worker, refused")]
    tls_ca_file: Option<String>,
    /// File with this worker's certificate
    #[arg(long, value_name = "FILE", help_heading = "Of dask worker, refused")]
    tls_cert: Option<String>,
    /// File with this worker's private key
    #[arg(long, value_name = "FILE", help_heading = "Of dask worker, refused")]
    tls_key: Option<String>,
    /// Name in the scheduler's certificate
    #[arg(long, value_name = "NAME", help_heading = "Of dask worker, refused")]
    scheduler_sni: Option<String>,
    /// Class of the worker
    #[arg(long, value_name = "CLASS", help_heading = "Of dask worker, refused")]
    worker_class: Option<String>,
}

/// Pairs of a setting's name and its text, with the option it came from.
macro_rules! texts {
    ($options:expr, $($field:ident $name:literal),+ $(,)?) => {
        [$(($name, concat!("--", $name), $options.$field)),+]
    };
}

impl Options {
    /// What `--config` named, and the given options by the names of the settings.
    pub fn into_settings(self) -> (Option<PathBuf>, IndexMap<&'static str, Node>) {
        let config = self.config.clone();
        let switches = [
            ("nanny", "--nanny", self.nanny),
            ("dashboard", "--dashboard", self.dashboard),
            ("lifetime-restart", "--lifetime-restart", self.lifetime_restart),
        ];
        let off_switches = [
            ("nanny", "--no-nanny", self.no_nanny),
            ("dashboard", "--no-dashboard", self.no_dashboard),
            ("lifetime-restart", "--no-lifetime-restart", self.no_lifetime_restart),
        ];
        let switch = |on: bool| {
            move |(name, option, given): (&'static str, &'static str, bool)| {
                given.then(|| (name, Node::new(Value::Bool(on), Source::Option(option))))
            }
        };
        let mut settings: IndexMap<&'static str, Node> = switches
            .into_iter()
            .filter_map(switch(true))
            .chain(off_switches.into_iter().filter_map(switch(false)))
            .collect();
        let texts = texts!(
            self,
            scheduler_file "scheduler-file", nthreads "nthreads", nworkers "nworkers", name "name",
            memory_limit "memory-limit", resources "resources", local_directory "local-directory", host "host",
            interface "interface", protocol "protocol", worker_port "worker-port", nanny_port "nanny-port",
            listen_address "listen-address", contact_address "contact-address",
            dashboard_address "dashboard-address", dashboard_prefix "dashboard-prefix",
            death_timeout "death-timeout", lifetime "lifetime", lifetime_stagger "lifetime-stagger",
            pid_file "pid-file", python "python", sandbox "sandbox",
            threads_per_runner "threads-per-runner", isolation "isolation", log_format "log-format",
            preload "preload", preload_nanny "preload-nanny", tls_ca_file "tls-ca-file", tls_cert "tls-cert",
            tls_key "tls-key", scheduler_sni "scheduler-sni", worker_class "worker-class",
        );
        let text = |(name, option, text): (&'static str, &'static str, Option<String>)| {
            text.map(|text| (name, Node::new(Value::Str(text), Source::Option(option))))
        };
        settings.extend([("scheduler", "SCHEDULER", self.scheduler)].into_iter().filter_map(text));
        settings.extend(texts.into_iter().filter_map(text));
        (config, settings)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn settings(arguments: &[&str]) -> IndexMap<&'static str, Node> {
        let line = ["iqoqo-dask-worker"].iter().chain(arguments);
        Cli::try_parse_from(line).unwrap().split().1.into_settings().1
    }

    #[test]
    fn every_option_is_a_setting() {
        use clap::CommandFactory;
        let own = ["help", "version", "config"];
        for argument in Cli::command().get_arguments() {
            let name = argument.get_long().unwrap_or("scheduler");
            let name = name.strip_prefix("no-").unwrap_or(name);
            assert!(own.contains(&name) || crate::config::is_setting(name), "{name}");
        }
    }

    #[test]
    fn the_last_of_an_option_counts() {
        let given = settings(&["tcp://h:1", "--nthreads", "1", "--nthreads=2", "--no-nanny", "--nanny"]);
        assert_eq!(given["nthreads"].value, Value::Str("2".into()));
        assert_eq!(given["nanny"].value, Value::Bool(true));
        assert_eq!(given["scheduler"].source, Source::Option("SCHEDULER"));
    }

    #[test]
    fn numbers_below_zero_are_values() {
        assert_eq!(settings(&["--nworkers", "-1"])["nworkers"].value, Value::Str("-1".into()));
    }

    #[test]
    fn check_takes_the_same_options() {
        let cli =
            Cli::try_parse_from(["iqoqo-dask-worker", "check", "tcp://h:1", "--nthreads", "3"]).unwrap();
        let (command, options) = cli.split();
        assert!(matches!(command, Command::Check));
        assert_eq!(options.into_settings().1.len(), 2);
    }
}
