//! The table of settings: our name for each, Dask's key for it, and what is not there yet.
//!
//! Our name is the option's without dashes in front (`--memory-limit`), the key in our own file (`memory-limit`, or
//! `memory.target` in a table), and the variable's (`IQOQO_MEMORY_LIMIT`, `IQOQO_MEMORY__TARGET`).

/// One setting.
#[derive(Debug)]
pub struct Setting {
    /// Our name.
    pub name: &'static str,
    /// Dask's keys for the same thing; the first that says anything counts.
    pub dask: &'static [&'static str],
    /// Set for what is refused whatever its value: why, and what brings it.
    pub refused: Option<&'static str>,
}

const fn ours(name: &'static str) -> Setting {
    Setting { name, dask: &[], refused: None }
}

const fn shared(name: &'static str, dask: &'static [&'static str]) -> Setting {
    Setting { name, dask, refused: None }
}

const fn refused(name: &'static str, dask: &'static [&'static str], why: &'static str) -> Setting {
    Setting { name, dask, refused: Some(why) }
}

/// Why nothing about TLS is accepted.
pub const NO_TLS: &str = "not yet: encrypted connections come with TLS support; until then use tcp:// addresses on a \
                      network you trust";
const NO_PRELOAD: &str = "not yet: preload modules come with support for Python code that lives as long as the \
                          worker";
const NO_CLASS: &str =
    "not supported: this worker is not a Python class, so no other class can take its place";

/// Every setting there is.
pub const SETTINGS: &[Setting] = &[
    shared("scheduler", &["scheduler-address"]),
    ours("scheduler-file"),
    ours("nthreads"),
    ours("nworkers"),
    ours("name"),
    ours("memory-limit"),
    shared("resources", &["distributed.worker.resources"]),
    shared("local-directory", &["temporary-directory"]),
    ours("host"),
    ours("interface"),
    ours("protocol"),
    ours("worker-port"),
    ours("nanny-port"),
    ours("listen-address"),
    ours("contact-address"),
    ours("nanny"),
    ours("dashboard"),
    ours("dashboard-address"),
    ours("dashboard-prefix"),
    ours("death-timeout"),
    shared("lifetime", &["distributed.worker.lifetime.duration"]),
    shared("lifetime-stagger", &["distributed.worker.lifetime.stagger"]),
    shared("lifetime-restart", &["distributed.worker.lifetime.restart"]),
    refused("preload", &["distributed.worker.preload"], NO_PRELOAD),
    refused("preload-nanny", &["distributed.nanny.preload"], NO_PRELOAD),
    refused("tls-ca-file", &[], NO_TLS),
    refused("tls-cert", &[], NO_TLS),
    refused("tls-key", &[], NO_TLS),
    refused("scheduler-sni", &[], NO_TLS),
    refused("comm.require-encryption", &["distributed.comm.require-encryption"], NO_TLS),
    refused("worker-class", &[], NO_CLASS),
    ours("pid-file"),
    ours("python"),
    ours("sandbox"),
    ours("threads-per-runner"),
    ours("isolation"),
    ours("log-format"),
    shared("log.pattern", &["distributed.admin.log-format"]),
    shared("log.kept", &["distributed.admin.log-length"]),
    // Dask takes the table inside of `distributed` first
    shared("log.levels", &["distributed.logging", "logging"]),
    shared("memory.transfer", &["distributed.worker.memory.transfer"]),
    shared("memory.target", &["distributed.worker.memory.target"]),
    shared("memory.spill", &["distributed.worker.memory.spill"]),
    shared("memory.pause", &["distributed.worker.memory.pause"]),
    shared("memory.terminate", &["distributed.worker.memory.terminate"]),
    shared("memory.max-spill", &["distributed.worker.memory.max-spill"]),
    shared("memory.spill-compression", &["distributed.worker.memory.spill-compression"]),
    shared("memory.monitor-interval", &["distributed.worker.memory.monitor-interval"]),
    shared("transfer.incoming-connections", &["distributed.worker.connections.incoming"]),
    shared("transfer.outgoing-connections", &["distributed.worker.connections.outgoing"]),
    shared("transfer.message-bytes-limit", &["distributed.worker.transfer.message-bytes-limit"]),
    shared("transfer.bandwidth", &["distributed.scheduler.bandwidth"]),
    shared("comm.default-scheme", &["distributed.comm.default-scheme"]),
    shared("comm.compression", &["distributed.comm.compression"]),
    shared("comm.connect-timeout", &["distributed.comm.timeouts.connect"]),
    shared("comm.tcp-timeout", &["distributed.comm.timeouts.tcp"]),
    shared("comm.socket-backlog", &["distributed.comm.socket-backlog"]),
    shared("comm.retry-count", &["distributed.comm.retry.count"]),
    shared("comm.retry-delay-min", &["distributed.comm.retry.delay.min"]),
    shared("comm.retry-delay-max", &["distributed.comm.retry.delay.max"]),
    shared("worker.blocked-handlers", &["distributed.worker.blocked-handlers"]),
    ours("worker.retire-timeout"),
    ours("worker.task-attempts"),
    shared("worker.default-data-size", &["distributed.scheduler.default-data-size"]),
    shared("worker.story-length", &["distributed.admin.low-level-log-length"]),
    shared("worker.use-file-locking", &["distributed.worker.use-file-locking"]),
    shared("worker.validate", &["distributed.worker.validate"]),
    shared("nanny-blocked-handlers", &["distributed.nanny.blocked-handlers"]),
    shared("nanny-environ", &["distributed.nanny.environ"]),
    shared("nanny-pre-spawn-environ", &["distributed.nanny.pre-spawn-environ"]),
    shared("monitor.interval", &["distributed.admin.system-monitor.interval"]),
    shared("monitor.log-length", &["distributed.admin.system-monitor.log-length"]),
    shared("monitor.disk", &["distributed.admin.system-monitor.disk"]),
    shared("monitor.host-cpu", &["distributed.admin.system-monitor.host-cpu"]),
];

/// The setting of that name.
pub fn setting(name: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.name == name)
}

/// The known name that a misspelt one most likely meant.
pub fn closest(name: &str) -> Option<&'static str> {
    let plain = |s: &str| s.replace('_', "-").to_lowercase();
    let wanted = plain(name);
    let near = SETTINGS.iter().map(|setting| (distance(&wanted, setting.name), setting.name));
    near.filter(|(far, known)| *far <= known.len().div_ceil(4)).min().map(|(_, known)| known)
}

/// Number of letters to add, remove or replace.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_no_table_hides_a_setting() {
        for (i, a) in SETTINGS.iter().enumerate() {
            for b in &SETTINGS[i + 1..] {
                assert_ne!(a.name, b.name);
                let inside = |x: &str, y: &str| x.starts_with(&format!("{y}."));
                assert!(!inside(a.name, b.name) && !inside(b.name, a.name), "{} and {}", a.name, b.name);
            }
        }
    }

    #[test]
    fn a_misspelt_name_finds_its_neighbour() {
        assert_eq!(closest("memory_limit"), Some("memory-limit"));
        assert_eq!(closest("nthread"), Some("nthreads"));
        assert_eq!(closest("memory.tagret"), Some("memory.target"));
        assert_eq!(closest("colour"), None);
    }
}
