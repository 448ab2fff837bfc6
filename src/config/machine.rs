//! What this process may use of the machine: cores and bytes of memory.
//!
//! A mapping from files under `/proc` and `/sys` to two numbers, so that a test can lay the files out itself. Unlike
//! Dask's, it follows the process to the cgroup it is really in and takes the nearest limit up the tree.

use std::path::{Path, PathBuf};

/// What may be used, as `dask.system.CPU_COUNT` and `distributed.system.MEMORY_LIMIT` say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Cores: allowed by affinity and by the cgroups' quota, rounded up; at least 1.
    pub cores: usize,
    /// Bytes: the least of the host's memory, the cgroups' limits and `RLIMIT_RSS`.
    pub memory: u64,
}

impl Machine {
    /// Reads the files of the running system.
    pub fn detect() -> Self {
        Self::detect_under(Path::new("/"))
    }

    /// Reads the files below `root`.
    pub fn detect_under(root: &Path) -> Self {
        let cgroups = Cgroups::read(root);
        Machine { cores: cores(root, &cgroups), memory: memory(root, &cgroups) }
    }
}

fn cores(root: &Path, cgroups: &Cgroups) -> usize {
    let status = std::fs::read_to_string(root.join("proc/self/status")).unwrap_or_default();
    let allowed = field(&status, "Cpus_allowed_list:").and_then(list_length);
    let online = || std::thread::available_parallelism().map_or(1, usize::from);
    let quota = [cgroups.v2_cores(), cgroups.v1_cores()].into_iter().flatten().min();
    allowed.unwrap_or_else(online).min(quota.unwrap_or(usize::MAX)).max(1)
}

fn memory(root: &Path, cgroups: &Cgroups) -> u64 {
    let meminfo = std::fs::read_to_string(root.join("proc/meminfo")).unwrap_or_default();
    let kib = field(&meminfo, "MemTotal:").and_then(|v| v.split_whitespace().next()?.parse::<u64>().ok());
    let host = kib.map(|kib| kib * 1024);
    let limits = std::fs::read_to_string(root.join("proc/self/limits")).unwrap_or_default();
    // soft limit, hard limit, unit; the kernel enforces neither, but an administrator may have meant it
    let rss = field(&limits, "Max resident set").and_then(|v| v.split_whitespace().nth(1)?.parse().ok());
    let all = [host, cgroups.v2_memory(), cgroups.v1_memory(), rss.filter(|n| *n > 0)];
    all.into_iter().flatten().min().unwrap_or(u64::MAX)
}

/// The rest of the line that begins so.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

/// Number of items in a list of ranges like `0-3,8`.
fn list_length(list: &str) -> Option<usize> {
    list.split(',').try_fold(0, |total, range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        Some(total + last.checked_sub(first)? + 1)
    })
}

/// The folders of this process's cgroup in each hierarchy that matters, innermost first.
#[derive(Debug, Default)]
struct Cgroups {
    v2: Vec<PathBuf>,
    v1_cpu: Vec<PathBuf>,
    v1_memory: Vec<PathBuf>,
}

impl Cgroups {
    fn read(root: &Path) -> Self {
        let read = |name: &str| std::fs::read_to_string(root.join(name)).unwrap_or_default();
        let mounts: Vec<Mount> = read("proc/self/mountinfo").lines().filter_map(Mount::parse).collect();
        let mut cgroups = Cgroups::default();
        for line in read("proc/self/cgroup").lines() {
            // hierarchy:controllers:path, and the path may hold colons
            let mut parts = line.splitn(3, ':');
            let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
                continue;
            };
            let tree = |controller: Option<&str>| {
                let mount = mounts.iter().find(|mount| mount.holds(controller));
                mount.map(|mount| mount.folders(root, path)).unwrap_or_default()
            };
            if controllers.is_empty() {
                cgroups.v2 = tree(None);
            }
            for controller in controllers.split(',') {
                match controller {
                    "cpu" => cgroups.v1_cpu = tree(Some("cpu")),
                    "memory" => cgroups.v1_memory = tree(Some("memory")),
                    _ => {}
                }
            }
        }
        cgroups
    }

    fn v2_cores(&self) -> Option<usize> {
        self.v2.iter().filter_map(|folder| quota(&content(folder, "cpu.max")?)).min()
    }

    fn v1_cores(&self) -> Option<usize> {
        let pair = |folder: &PathBuf| {
            let (quota, period) =
                (content(folder, "cpu.cfs_quota_us")?, content(folder, "cpu.cfs_period_us")?);
            self::quota(&format!("{quota} {period}"))
        };
        self.v1_cpu.iter().filter_map(pair).min()
    }

    /// `memory.low`, which Dask takes for a limit too, is a guarantee and left out.
    fn v2_memory(&self) -> Option<u64> {
        least(&self.v2, &["memory.max", "memory.high"])
    }

    fn v1_memory(&self) -> Option<u64> {
        least(&self.v1_memory, &["memory.limit_in_bytes", "memory.soft_limit_in_bytes"])
    }
}

fn content(folder: &Path, name: &str) -> Option<String> {
    Some(std::fs::read_to_string(folder.join(name)).ok()?.trim().to_owned())
}

/// Cores of "quota period", rounded up as Dask does; `max` and -1 are no limit.
fn quota(text: &str) -> Option<usize> {
    let (quota, period) = text.split_once(' ')?;
    let (quota, period): (u64, u64) = (quota.parse().ok()?, period.trim().parse().ok()?);
    let cores = quota.checked_add(period.checked_sub(1)?)?.checked_div(period)?;
    usize::try_from(cores).ok().filter(|n| *n > 0)
}

/// The least positive number in these files of these folders; `max` is no number.
fn least(folders: &[PathBuf], names: &[&str]) -> Option<u64> {
    let files = folders.iter().flat_map(|folder| names.iter().map(move |name| content(folder, name)));
    files.flatten().filter_map(|text| text.parse().ok()).filter(|n| *n > 0).min()
}

/// A cgroup mount of `/proc/self/mountinfo`.
#[derive(Debug)]
struct Mount {
    /// Folder of the hierarchy that is mounted.
    root: String,
    /// Where.
    point: String,
    /// Controllers of a v1 hierarchy; `None` for v2.
    controllers: Option<Vec<String>>,
}

impl Mount {
    fn parse(line: &str) -> Option<Self> {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(3);
        let (root, point) = (unescape(left.next()?), unescape(left.next()?));
        let mut right = right.split(' ');
        let controllers = match right.next()? {
            "cgroup2" => None,
            "cgroup" => Some(right.nth(1)?.split(',').map(str::to_owned).collect()),
            _ => return None,
        };
        Some(Mount { root, point, controllers })
    }

    /// Holds the v1 controller, or is the v2 hierarchy.
    fn holds(&self, controller: Option<&str>) -> bool {
        match (&self.controllers, controller) {
            (None, None) => true,
            (Some(held), Some(wanted)) => held.iter().any(|held| held == wanted),
            _ => false,
        }
    }

    /// The folder of the cgroup at `path` and those above it, as far as they are mounted.
    ///
    /// In a container the path may lie outside of what is mounted; its own cgroup is the mount itself then.
    fn folders(&self, root: &Path, path: &str) -> Vec<PathBuf> {
        let base = root.join(self.point.trim_start_matches('/'));
        let below = Path::new(path).strip_prefix(&self.root).unwrap_or(Path::new(""));
        let folder = base.join(below);
        if !folder.is_dir() {
            return vec![base];
        }
        folder.ancestors().take_while(|folder| folder.starts_with(&base)).map(Path::to_owned).collect()
    }
}

/// Undoes the octal escapes of `/proc` (`\040` for a blank).
fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                out.push(char::from(byte));
                out.push_str(&part[3..]);
            }
            None => {
                out.push('\\');
                out.push_str(part);
            }
        }
    }
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// A system of 16 cores and 64 GiB with the given files on top.
    fn machine(files: &[(&str, &str)]) -> Machine {
        let dir = tempfile::tempdir().unwrap();
        let base = [
            ("proc/meminfo", "MemTotal:       67108864 kB\nMemFree: 1 kB\n"),
            ("proc/self/status", "Name:\tx\nCpus_allowed:\tffff\nCpus_allowed_list:\t0-15\n"),
            (
                "proc/self/limits",
                "Max resident set          unlimited            unlimited            bytes     \n",
            ),
        ];
        for (name, text) in base.iter().chain(files) {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        Machine::detect_under(dir.path())
    }

    const V2: &str = "31 23 0:28 / /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
    const GIB: u64 = 1 << 30;

    #[test]
    fn without_cgroups_the_host_counts() {
        assert_eq!(machine(&[]), Machine { cores: 16, memory: 64 * GIB });
        let pinned = machine(&[("proc/self/status", "Cpus_allowed_list:\t0,2-3\n")]);
        assert_eq!(pinned.cores, 3);
        let limited = machine(&[(
            "proc/self/limits",
            "Max resident set          unlimited            1073741824           bytes\n",
        )]);
        assert_eq!(limited.memory, GIB);
    }

    #[test]
    fn the_nearest_limit_up_a_v2_tree_counts() {
        let found = machine(&[
            ("proc/self/mountinfo", V2),
            ("proc/self/cgroup", "0::/user.slice/job.scope/inner\n"),
            ("sys/fs/cgroup/user.slice/cpu.max", "250000 100000\n"),
            ("sys/fs/cgroup/user.slice/memory.max", "17179869184\n"),
            ("sys/fs/cgroup/user.slice/job.scope/memory.high", "8589934592\n"),
            ("sys/fs/cgroup/user.slice/job.scope/cpu.max", "max 100000\n"),
            ("sys/fs/cgroup/user.slice/job.scope/inner/memory.max", "max\n"),
            ("sys/fs/cgroup/user.slice/job.scope/inner/memory.low", "1048576\n"),
        ]);
        assert_eq!(found, Machine { cores: 3, memory: 8 * GIB });
    }

    #[test]
    fn a_neighbours_limit_does_not_count() {
        let found = machine(&[
            ("proc/self/mountinfo", V2),
            ("proc/self/cgroup", "0::/a\n"),
            ("sys/fs/cgroup/a/memory.max", "max\n"),
            ("sys/fs/cgroup/b/memory.max", "1024\n"),
        ]);
        assert_eq!(found.memory, 64 * GIB);
    }

    #[test]
    fn v1_controllers_each_have_their_own_path() {
        let found = machine(&[
            (
                "proc/self/mountinfo",
                "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                 35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
                 41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n",
            ),
            ("proc/self/cgroup", "4:memory:/jobs/7\n2:cpu,cpuacct:/limited\n0::/\n"),
            ("sys/fs/cgroup/memory/jobs/memory.limit_in_bytes", "4294967296\n"),
            ("sys/fs/cgroup/memory/jobs/7/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/cpu,cpuacct/limited/cpu.cfs_quota_us", "150000\n"),
            ("sys/fs/cgroup/cpu,cpuacct/limited/cpu.cfs_period_us", "100000\n"),
            ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n"),
            ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n"),
        ]);
        assert_eq!(found, Machine { cores: 2, memory: 4 * GIB });
    }

    #[test]
    fn in_a_container_the_mount_is_the_cgroup() {
        // path as the host sees it, mount as the container does
        let found = machine(&[
            (
                "proc/self/mountinfo",
                "1 2 0:3 /docker/abc /sys/fs/cgroup/my\\040memory ro - cgroup cgroup rw,memory\n",
            ),
            ("proc/self/cgroup", "4:memory:/docker/abc\n"),
            ("sys/fs/cgroup/my memory/memory.limit_in_bytes", "1073741824\n"),
        ]);
        assert_eq!(found.memory, GIB);
        let elsewhere = machine(&[
            ("proc/self/mountinfo", "1 2 0:3 /../../x /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n"),
            ("proc/self/cgroup", "0::/not/mounted/here\n"),
            ("sys/fs/cgroup/memory.max", "2147483648\n"),
        ]);
        assert_eq!(elsewhere.memory, 2 * GIB);
    }
}
