//! `iqoqo-dask-worker check`: what would be run here, and what this kernel offers a sandbox. Starts nothing.

use std::fmt::Display;
use std::io::{self, Write};
use std::path::Path;

use crate::config::{Gathered, Settings};
use crate::scheduler::Location;
use crate::sys;

/// Writes the report on a configuration that is right.
///
/// # Errors
/// `out` cannot be written to.
pub fn report(out: &mut dyn Write, gathered: &Gathered, settings: Option<&Settings>) -> io::Result<()> {
    let python = gathered.python();
    let [major, minor, micro] = python.interpreter.version_triple();
    let machine = gathered.machine();
    line(
        out,
        "interpreter",
        format_args!("{}, Python {major}.{minor}.{micro}", python.interpreter.python.display()),
    )?;
    line(out, "distributed", &python.distributed)?;
    line(out, "cores", machine.cores)?;
    line(out, "memory", format_args!("{} bytes", machine.memory))?;
    match settings {
        Some(settings) => configuration(out, settings)?,
        None => line(out, "scheduler", "none given: only what needs none was checked")?,
    }
    for remark in gathered.remarks() {
        line(out, "remark", remark)?;
    }
    sandbox(out, Path::new("/"))
}

fn line(out: &mut dyn Write, name: &str, value: impl Display) -> io::Result<()> {
    writeln!(out, "{name:>18}: {value}")
}

fn configuration(out: &mut dyn Write, settings: &Settings) -> io::Result<()> {
    match &settings.scheduler {
        Location::Address(address) => line(out, "scheduler", address)?,
        Location::File(path) => line(out, "scheduler file", path.display())?,
    }
    for worker in &settings.workers {
        let limit = worker.memory_limit.map_or("no limit".to_owned(), |bytes| format!("{bytes} bytes"));
        let name = worker.name.as_ref().map_or("(its address)".to_owned(), ToString::to_string);
        line(out, "worker", format_args!("{name}, {} threads, {limit}", worker.nthreads))?;
    }
    for (name, amount) in &settings.resources {
        line(out, "resource", format_args!("{name} = {amount}"))?;
    }
    line(out, "scratch", settings.scratch.display())?;
    if let Some(dashboard) = &settings.dashboard {
        line(out, "HTTP", dashboard.address)?;
    }
    line(out, "configuration", "ok")
}

/// The level in force, and each of the kernel's means for the others.
fn sandbox(out: &mut dyn Write, root: &Path) -> io::Result<()> {
    line(out, "sandbox", "off: tasks run with this user's rights")?;
    let read = |name: &str| std::fs::read_to_string(root.join(name)).unwrap_or_default();
    let landlock = sys::landlock_abi().map_or("no".to_owned(), |abi| format!("yes, ABI {abi}"));
    line(out, "kernel: Landlock", landlock)?;
    let seccomp = read("proc/sys/kernel/seccomp/actions_avail");
    line(out, "kernel: seccomp", yes(seccomp.split_whitespace().any(|action| action == "errno")))?;
    let namespaces = read("proc/sys/user/max_user_namespaces").trim().parse::<u64>().is_ok_and(|n| n > 0);
    // only Debian's kernels have this switch
    let unprivileged = read("proc/sys/kernel/unprivileged_userns_clone").trim() != "0";
    line(out, "user namespaces", yes(namespaces && unprivileged))?;
    line(out, "cgroups", cgroups(&read("proc/self/mountinfo")))
}

fn yes(is: bool) -> &'static str {
    if is { "yes" } else { "no" }
}

fn cgroups(mountinfo: &str) -> &'static str {
    let has = |kind: &str| mountinfo.lines().any(|line| line.contains(&format!(" - {kind} ")));
    match (has("cgroup2"), has("cgroup")) {
        (true, false) => "v2",
        (false, true) => "v1",
        (true, true) => "v1 and v2",
        (false, false) => "none",
    }
}
