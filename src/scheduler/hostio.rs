//! Host-wide counters that `sysinfo` lacks or reads dearly: network and disk bytes, processor times, open descriptors.
//!
//! One `pread` of one kept-open file in /proc for each. Counts as `psutil` does, so that our figures stand beside a stock worker's.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes of a sector in /proc/diskstats, whatever the device's own sector size.
const SECTOR: u64 = 512;

/// Names of the columns of `psutil.cpu_times()`, in the order of /proc/stat.
pub(super) const CPU_TIMES: [&str; 10] =
    ["user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice"];

/// Clock ticks a second in /proc/stat: fixed at 100 towards user space on every Linux that Dask runs on.
const TICKS: f64 = 100.0;

/// A file of /proc, kept open and read again from its start.
#[derive(Debug)]
struct ProcFile {
    file: File,
    buffer: Vec<u8>,
}

impl ProcFile {
    fn open(path: &str) -> Option<Self> {
        Some(ProcFile { file: File::open(path).ok()?, buffer: vec![0; 4096] })
    }

    /// The whole content; `None` when the kernel no longer gives it.
    fn read(&mut self) -> Option<&str> {
        let mut length = 0;
        loop {
            if length == self.buffer.len() {
                self.buffer.resize(length * 2, 0);
            }
            match self.file.read_at(&mut self.buffer[length..], length as u64).ok()? {
                0 => break,
                n => length += n,
            }
        }
        std::str::from_utf8(&self.buffer[..length]).ok()
    }
}

/// Bytes in and out since the host started.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Bytes {
    /// Received, or read.
    pub read: u64,
    /// Sent, or written.
    pub written: u64,
}

/// `psutil.net_io_counters()`: all interfaces together.
#[derive(Debug)]
pub(super) struct Network(ProcFile);

impl Network {
    pub(super) fn open() -> Option<Self> {
        ProcFile::open("/proc/net/dev").map(Network)
    }

    pub(super) fn read(&mut self) -> Option<Bytes> {
        self.0.read().map(sum_interfaces)
    }
}

fn sum_interfaces(text: &str) -> Bytes {
    let mut total = Bytes::default();
    for line in text.lines() {
        // the two lines of heading have no colon
        let Some((_, counters)) = line.split_once(':') else { continue };
        let mut counters = counters.split_ascii_whitespace().map(|n| n.parse::<u64>().unwrap_or(0));
        total.read += counters.next().unwrap_or(0);
        total.written += counters.nth(7).unwrap_or(0);
    }
    total
}

/// `psutil.disk_io_counters()`: all whole disks together.
#[derive(Debug)]
pub(super) struct Disks {
    file: ProcFile,
    /// Whether a name of /proc/diskstats is a disk and not a partition of one.
    whole: HashMap<String, bool>,
}

impl Disks {
    pub(super) fn open() -> Option<Self> {
        let mut disks = Disks { file: ProcFile::open("/proc/diskstats")?, whole: HashMap::new() };
        // a machine without disks has an empty file, and a stock worker then has no such metric
        disks.file.read().is_some_and(|text| !text.is_empty()).then_some(disks)
    }

    pub(super) fn read(&mut self) -> Option<Bytes> {
        let text = self.file.read()?;
        Some(sum_disks(text, &mut self.whole, |name| {
            Path::new("/sys/block").join(name.replace('/', "!")).exists()
        }))
    }
}

fn sum_disks(text: &str, known: &mut HashMap<String, bool>, is_disk: impl Fn(&str) -> bool) -> Bytes {
    let mut total = Bytes::default();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace().skip(2);
        let Some(name) = words.next() else { continue };
        let whole = match known.get(name) {
            Some(whole) => *whole,
            None => *known.entry(name.to_owned()).or_insert(is_disk(name)),
        };
        if whole {
            let mut counters = words.map(|n| n.parse::<u64>().unwrap_or(0));
            total.read += counters.nth(2).unwrap_or(0) * SECTOR;
            total.written += counters.nth(3).unwrap_or(0) * SECTOR;
        }
    }
    total
}

/// `psutil.cpu_times()`: seconds of all processors together, by [`CPU_TIMES`].
#[derive(Debug)]
pub(super) struct Processors(ProcFile);

impl Processors {
    pub(super) fn open() -> Option<Self> {
        ProcFile::open("/proc/stat").map(Processors)
    }

    pub(super) fn read(&mut self) -> Option<[f64; CPU_TIMES.len()]> {
        self.0.read().map(cpu_times)
    }
}

fn cpu_times(text: &str) -> [f64; CPU_TIMES.len()] {
    let mut times = [0.0; CPU_TIMES.len()];
    let words = text.lines().next().unwrap_or_default().split_ascii_whitespace().skip(1);
    for (time, word) in times.iter_mut().zip(words) {
        *time = word.parse::<f64>().unwrap_or(0.0) / TICKS;
    }
    times
}

/// Descriptors this process has open.
pub(super) fn open_descriptors() -> u64 {
    let path = Path::new("/proc/self/fd");
    // since Linux 6.2 the directory's size is their number; before that it is 0 and they must be listed
    match path.metadata().map(|m| m.len()) {
        Ok(count) if count > 0 => count,
        // less the one that lists them
        _ => std::fs::read_dir(path).map_or(0, |entries| entries.count().saturating_sub(1) as u64),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_are_summed() {
        let text = "Inter-|   Receive  |  Transmit\n face |bytes packets|bytes packets\n    \
                    lo:    3193  29 0 0 0 0 0 0     3190      29    0    0    0     0       0          0\n  \
                    eth0: 360712450   14030    0    0    0     0          0         0   973869    8400 0 0 0 0 0 0\n";
        assert_eq!(sum_interfaces(text), Bytes { read: 360715643, written: 977059 });
    }

    #[test]
    fn partitions_are_not_counted_twice() {
        let text = "254 0 vda 1 0 10 0 5 0 20 0 0 0 0\n254 1 vda1 1 0 9 0 5 0 19 0 0 0 0\n\n";
        let mut known = HashMap::new();
        let total = sum_disks(text, &mut known, |name| name == "vda");
        assert_eq!(total, Bytes { read: 5120, written: 10240 });
        assert_eq!(known.len(), 2);
        assert_eq!(sum_disks(text, &mut known, |_| unreachable!()), total);
    }

    #[test]
    fn processor_times_in_seconds() {
        let times = cpu_times("cpu  100 200 0 50 0 0 0 0 7 0\ncpu0 1 2 3\n");
        assert_eq!((times[0], times[1], times[3], times[8]), (1.0, 2.0, 0.5, 0.07));
    }

    #[test]
    fn this_host_can_be_read_again_and_again() {
        let mut network = Network::open().unwrap();
        let first = network.read().unwrap();
        assert!(network.read().unwrap().read >= first.read);
        let mut processors = Processors::open().unwrap();
        assert!(processors.read().unwrap().iter().sum::<f64>() > 0.0);
        let before = open_descriptors();
        let _more = File::open("/proc/self/stat").unwrap();
        assert!(before >= 3);
    }
}
