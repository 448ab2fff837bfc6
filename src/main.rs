//! Boot order: command line, configuration, logs, pid file and directories, runtime, signals, drain.
//!
//! Everything before the runtime is checked before a port is bound. No work is done here.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use iqoqo_dask_worker::cli::{Cli, Command, Exit, check, serve};
use iqoqo_dask_worker::config::{self, Environment, Gathered};
use iqoqo_dask_worker::{sandbox, sys, telemetry};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_some_and(|first| first == sandbox::SUBCOMMAND) {
        sandbox::init_main(arguments);
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(answer) => {
            // help and version are answers too, and a closed standard output is no reason to fail
            let _ = answer.print();
            let asked = matches!(answer.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
            return if asked { Exit::Ok } else { Exit::Usage }.into();
        }
    };
    let (command, options) = cli.split();
    let (file, options) = options.into_settings();
    let gathered = config::gather(options, file.as_deref(), Environment::of_process());
    let exit = gathered.map_err(|error| complain(&error)).and_then(|gathered| match command {
        Command::Check => check(gathered),
        Command::Run => run(gathered),
    });
    exit.unwrap_or_else(|exit| exit).into()
}

/// One line about what is wrong, before there is a log.
fn complain(error: &config::Error) -> Exit {
    let _ = writeln!(std::io::stderr(), "iqoqo-dask-worker: {}", telemetry::chain(error));
    error.into()
}

fn check(mut gathered: Gathered) -> Result<Exit, Exit> {
    gathered.log().map_err(|error| complain(&error))?;
    let settings = match gathered.settings() {
        Ok(settings) => Some(settings),
        // a machine can be checked before there is a scheduler
        Err(config::Error::NoScheduler) => None,
        Err(error) => return Err(complain(&error)),
    };
    check::report(&mut std::io::stdout(), &gathered, settings.as_ref()).map_err(|_| Exit::System)?;
    Ok(Exit::Ok)
}

fn run(mut gathered: Gathered) -> Result<Exit, Exit> {
    let log = gathered.log().map_err(|error| complain(&error))?;
    let settings = gathered.settings().map_err(|error| complain(&error))?;
    let recent = telemetry::log::start(log).map_err(|error| {
        // there is no log to say it in
        let _ = writeln!(std::io::stderr(), "iqoqo-dask-worker: {}", telemetry::chain(&error));
        Exit::System
    })?;
    if let Err(error) = sys::raise_descriptor_limit() {
        tracing::warn!("the limit of open files stays as it is: {}", telemetry::chain(&error));
    }
    if let Err(error) = sys::survive_file_size_limit() {
        tracing::warn!("a limit of file sizes ends this program: {}", telemetry::chain(&error));
    }
    let python = gathered.python();
    tracing::info!(
        "iqoqo-dask-worker {}, Python {}, distributed {}, sandbox off",
        env!("CARGO_PKG_VERSION"),
        python.interpreter.version,
        python.distributed
    );
    for remark in gathered.remarks() {
        tracing::warn!("{remark}");
    }
    serve(&settings, &recent)
}
