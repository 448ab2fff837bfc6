//! The command line as a shell sees it: answers, refusals, exit codes, and the place of every bad value.
//!
//! Runs the binary; what it does once it has joined a scheduler is tested elsewhere.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A folder with nothing configured, and the binary run in it.
struct Shell {
    dir: tempfile::TempDir,
    variables: Vec<(String, String)>,
}

impl Shell {
    fn new() -> Self {
        Shell { dir: tempfile::tempdir().unwrap(), variables: Vec::new() }
    }

    fn with(mut self, name: &str, value: &str) -> Self {
        self.variables.push((name.into(), value.into()));
        self
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Runs with the tests' own interpreter, unless `arguments` name another.
    fn run(&self, arguments: &[&str]) -> Answer {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_iqoqo-dask-worker"));
        command.args(arguments).env_clear().env("HOME", self.dir.path()).env("PATH", "/usr/bin:/bin");
        command.env("IQOQO_PYTHON", root.join(".venv/bin/python"));
        command.env("DASK_ROOT_CONFIG", self.dir.path().join("none"));
        command.envs(self.variables.iter().map(|(n, v)| (n, v))).current_dir(self.dir.path());
        Answer::from(command.stdin(Stdio::null()).output().unwrap())
    }
}

#[derive(Debug)]
struct Answer {
    code: i32,
    out: String,
    err: String,
}

impl From<Output> for Answer {
    fn from(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Answer { code: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) }
    }
}

impl Answer {
    /// Ended with this code and one line that holds all the parts.
    #[track_caller]
    fn says(&self, code: i32, parts: &[&str]) {
        assert_eq!(self.code, code, "{self:?}");
        assert_eq!(self.err.trim_end().lines().count(), 1, "{self:?}");
        for part in parts {
            assert!(self.err.contains(part), "no {part:?} in {self:?}");
        }
    }
}

const SCHEDULER: &str = "tcp://127.0.0.1:9";

#[test]
fn help_and_version() {
    let help = Shell::new().run(&["--help"]);
    assert_eq!(help.code, 0);
    for option in ["--nthreads", "--memory-limit", "--no-nanny", "--python", "Exit codes"] {
        assert!(help.out.contains(option), "{option}");
    }
    let version = Shell::new().run(&["--version"]);
    assert_eq!(
        (version.code, version.out),
        (0, format!("iqoqo-dask-worker {}\n", env!("CARGO_PKG_VERSION")))
    );
}

#[test]
fn options_that_are_not_there_yet_say_what_brings_them() {
    let refused: &[(&[&str], &str)] = &[
        (&["--tls-ca-file", "x.pem"], "option --tls-ca-file: not yet: encrypted"),
        (&["--tls-cert", "x.pem"], "option --tls-cert: not yet: encrypted"),
        (&["--tls-key", "x.pem"], "option --tls-key: not yet: encrypted"),
        (&["--scheduler-sni", "x"], "option --scheduler-sni: not yet: encrypted"),
        (&["--protocol", "tls"], "option --protocol: not yet: encrypted"),
        (&["--host", "tls://127.0.0.1"], "option --host: not yet: encrypted"),
        (&["--preload", "x.py"], "option --preload: not yet: preload"),
        (&["--preload-nanny", "x.py"], "option --preload-nanny: not yet: preload"),
        (&["--worker-class", "dask.distributed.Worker"], "option --worker-class: not supported"),
        (&["--sandbox", "standard"], "option --sandbox: not yet: sandbox"),
        (&["--sandbox", "strict"], "option --sandbox: not yet: sandbox"),
        (&["--isolation", "task"], "option --isolation: not yet: a fresh process"),
        (&["--threads-per-runner", "2"], "option --threads-per-runner: not yet: more than one"),
    ];
    for (options, message) in refused {
        let arguments: Vec<&str> = [SCHEDULER].iter().chain(*options).copied().collect();
        Shell::new().run(&arguments).says(64, &[message]);
    }
    Shell::new().run(&["tls://127.0.0.1:9"]).says(64, &["option SCHEDULER: not yet: encrypted"]);
}

#[test]
fn the_same_is_refused_from_files_and_variables() {
    let shell = Shell::new().with("DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION", "true");
    shell.run(&[SCHEDULER]).says(78, &["DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION: not yet"]);
    let shell = Shell::new();
    shell.file(".config/dask/x.yaml", "distributed:\n  worker:\n    preload:\n      - mine.py\n");
    shell.run(&[SCHEDULER]).says(78, &["distributed.worker.preload in", "x.yaml, line 3: not yet"]);
    let shell = Shell::new();
    shell.file(
        ".config/dask/x.yaml",
        "distributed: {worker: {preload: []}, comm: {require-encryption: null}}\n",
    );
    assert_eq!(shell.run(&["check", SCHEDULER]).code, 0);
}

#[test]
fn bad_options_name_themselves() {
    let bad: &[(&[&str], &[&str])] = &[
        (&["--nthreads", "many"], &["bad value 'many' for option --nthreads"]),
        (&["--nthreads", "-1"], &["'-1' for option --nthreads"]),
        (&["--nworkers", "0"], &["option --nworkers", "at least one worker"]),
        (&["--nworkers", "2", "--no-nanny"], &["--no-nanny"]),
        (&["--nworkers", "2", "--listen-address", "tcp://:9000"], &["--listen-address when --nworkers"]),
        (&["--memory-limit", "4XB"], &["option --memory-limit", "'XB' as a byte unit"]),
        (&["--resources", "GPU"], &["option --resources", "NAME=NUMBER"]),
        (&["--worker-port", "3:2"], &["option --worker-port", "greater than"]),
        (&["--worker-port", "3000", "--nworkers", "2"], &["not enough ports"]),
        (&["--death-timeout", "soon"], &["option --death-timeout", "time unit"]),
        (&["--contact-address", "tcp://h:1"], &["--listen-address when --contact-address"]),
        (&["--listen-address", "h:1"], &["option --listen-address", "must include the protocol"]),
        (&["--listen-address", "tcp://h:1", "--host", "h"], &["when --worker-port or --host"]),
        (&["--host", "::1"], &["option --host", "brackets"]),
        (&["--interface", "nope0"], &["option --interface", "no such network interface", "lo"]),
        (&["--protocol", "ucx"], &["option --protocol", "tcp only"]),
        (&["--dashboard-address", "::1"], &["option --dashboard-address", "brackets"]),
        (&["--sandbox", "some"], &["option --sandbox", "off, standard, strict"]),
        (&["--log-format", "loud"], &["option --log-format", "auto, text, json or journal"]),
    ];
    for (options, parts) in bad {
        let arguments: Vec<&str> = [SCHEDULER].iter().chain(*options).copied().collect();
        Shell::new().run(&arguments).says(64, parts);
    }
    Shell::new().run(&["nowhere"]).says(64, &["option SCHEDULER", "tcp://host:port"]);
    Shell::new().run(&[]).says(64, &["need a scheduler address"]);
    let unknown = Shell::new().run(&[SCHEDULER, "--nthread", "3"]);
    assert!(unknown.code == 64 && unknown.err.contains("--nthreads"), "{unknown:?}");
}

#[test]
fn bad_values_elsewhere_name_their_place() {
    let shell = Shell::new().with("IQOQO_MEMORY_LIMIT", "lots");
    shell.run(&[SCHEDULER]).says(78, &["'lots' for environment variable IQOQO_MEMORY_LIMIT"]);
    let shell = Shell::new().with("DASK_DISTRIBUTED__WORKER__MEMORY__TARGET", "2");
    shell.run(&[SCHEDULER]).says(78, &["DASK_DISTRIBUTED__WORKER__MEMORY__TARGET", "fraction"]);
    let shell = Shell::new();
    let path =
        shell.file(".config/dask/x.yaml", "distributed:\n  comm:\n    timeouts:\n      connect: soon\n");
    let place = format!("distributed.comm.timeouts.connect in {}, line 4", path.display());
    shell.run(&[SCHEDULER]).says(78, &[&place]);
    let shell = Shell::new();
    let path = shell.file("own.toml", "nthreads = 2\nmemory-limmit = '4GB'\n");
    let place = format!("unknown key memory-limmit in {}: did you mean memory-limit?", path.display());
    shell.run(&[SCHEDULER, "--config", path.to_str().unwrap()]).says(78, &[&place]);
    let path = shell.file("own.toml", "nthreads = 'x'\n");
    let place = format!("'x' for nthreads in {}", path.display());
    shell.run(&[SCHEDULER, "--config", path.to_str().unwrap()]).says(78, &[&place]);
    let shell = Shell::new().with("IQOQO_CONFIG", "/nonexistent.toml");
    shell.run(&[SCHEDULER]).says(78, &["cannot read /nonexistent.toml"]);
}

#[test]
fn an_unusable_interpreter_says_what_to_do() {
    let run = |python: &str| Shell::new().run(&[SCHEDULER, "--python", python]);
    run("/nonexistent/python").says(78, &["no Python interpreter /nonexistent/python", "--python"]);
    run("/etc/passwd").says(78, &["not an executable file"]);
    run("/bin/true").says(78, &["interpreter /bin/true", "failed", "--python"]);
    let shell = Shell::new();
    let bare = shell.dir.path().join("venv");
    let made = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/python"))
        .args(["-m", "venv", "--without-pip", bare.to_str().unwrap()])
        .status();
    assert!(made.unwrap().success());
    run(bare.join("bin/python").to_str().unwrap()).says(78, &["has no package distributed", "pip install"]);
}

#[test]
fn an_option_counts_more_than_a_variable_more_than_a_file_more_than_dasks() {
    let shell =
        Shell::new().with("IQOQO_RESOURCES", "A=2").with("DASK_DISTRIBUTED__WORKER__RESOURCES", "{'A': 4}");
    let file = shell.file("own.toml", "resources = { A = 3 }\n");
    let file = file.to_str().unwrap();
    let resource = |shell: &Shell, arguments: &[&str]| {
        let answer = shell.run(arguments);
        let line = answer.out.lines().find(|line| line.contains("resource:")).unwrap_or_default();
        line.rsplit(' ').next().unwrap().to_owned()
    };
    assert_eq!(resource(&shell, &["check", SCHEDULER, "--config", file, "--resources", "A=1"]), "1");
    assert_eq!(resource(&shell, &["check", SCHEDULER, "--config", file]), "2");
    let shell = Shell::new().with("DASK_DISTRIBUTED__WORKER__RESOURCES", "{'A': 4}");
    shell.file("own.toml", "resources = { A = 3 }\n");
    assert_eq!(resource(&shell, &["check", SCHEDULER, "--config", "own.toml"]), "3");
    assert_eq!(resource(&shell, &["check", SCHEDULER]), "4");
}

#[test]
fn check_tells_what_would_run() {
    let answer = Shell::new().run(&["check", SCHEDULER, "--nworkers", "2", "--name", "w", "--nthreads", "3"]);
    assert_eq!(answer.code, 0, "{answer:?}");
    let parts = [
        SCHEDULER,
        "w-0, 3 threads",
        "w-1, 3 threads",
        "configuration: ok",
        "sandbox: off",
        "distributed: 2026",
    ];
    for part in parts {
        assert!(answer.out.contains(part), "no {part:?} in {answer:?}");
    }
    let answer = Shell::new().with("IQOQO_JOB", "1").run(&["check"]);
    assert_eq!(answer.code, 0, "{answer:?}");
    assert!(answer.out.contains("none given") && answer.out.contains("IQOQO_JOB"), "{answer:?}");
    Shell::new().run(&["check", SCHEDULER, "--nthreads", "x"]).says(64, &["--nthreads"]);
}
