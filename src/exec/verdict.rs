//! How a Python process ended, and what its task's caller is told.

use nix::sys::signal::Signal;

use crate::telemetry::format_bytes;
use crate::wire::payload::Exception;

/// Why a runner ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// It exited by itself.
    Exit {
        /// Exit code.
        code: i32,
    },
    /// A signal killed it.
    Signal {
        /// Signal number.
        number: i32,
    },
    /// It used more memory than it may, and was killed for that.
    OutOfMemory {
        /// What it may use, in bytes.
        limit: u64,
        /// The most it used, in bytes.
        peak: u64,
    },
    /// It was killed because its task was cancelled and did not end.
    Cancelled,
    /// It was killed because it sent what no runner sends.
    Nonsense {
        /// What was wrong.
        text: String,
    },
    /// It ended with the zygote, which all runners are forked from.
    ZygoteLost,
    /// It never came to life.
    NotForked {
        /// What went wrong.
        text: String,
    },
}

impl Cause {
    /// From the zygote's report: an exit code, or minus a signal.
    pub(super) fn from_code(code: i32) -> Self {
        if code < 0 { Cause::Signal { number: -code } } else { Cause::Exit { code } }
    }

    /// Whether another attempt at the task makes sense.
    pub(super) fn may_retry(&self) -> bool {
        !matches!(self, Cause::OutOfMemory { .. } | Cause::Cancelled)
    }
}

impl std::fmt::Display for Cause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Cause::Exit { code } => write!(f, "exited with code {code}"),
            Cause::Signal { number } => match Signal::try_from(*number) {
                Ok(signal) => write!(f, "was killed by signal {number} ({signal})"),
                Err(_) => write!(f, "was killed by signal {number}"),
            },
            Cause::OutOfMemory { limit, peak } => {
                write!(
                    f,
                    "ran out of memory: it used {}, the limit is {}",
                    format_bytes(*peak),
                    format_bytes(*limit)
                )
            }
            Cause::Cancelled => f.write_str("was killed because its task was cancelled"),
            Cause::Nonsense { text } => write!(f, "broke the protocol ({text})"),
            Cause::ZygoteLost => f.write_str("ended together with the process it was forked from"),
            Cause::NotForked { text } => write!(f, "could not be forked ({text})"),
        }
    }
}

/// The exception a task ends with when its process died under it `attempts` times, the last time of `cause`, and
/// `tail` is what it wrote last.
pub(super) fn exception(task: &str, cause: &Cause, attempts: u32, tail: &str) -> Exception {
    let times = if attempts == 1 { String::new() } else { format!(" (attempt {attempts})") };
    let mut text = format!("the process that ran {task} {cause}{times}");
    if !tail.is_empty() {
        text.push_str("; its last output was:\n");
        text.push_str(tail);
    }
    let name = if matches!(cause, Cause::OutOfMemory { .. }) { "MemoryError" } else { "RuntimeError" };
    Exception::builtin(name, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exception_tells_what_happened() {
        let died = exception("'x'", &Cause::from_code(-11), 2, "Fatal Python error");
        let text = died.text();
        assert!(text.starts_with("RuntimeError("), "{text}");
        for part in ["'x'", "signal 11 (SIGSEGV)", "attempt 2", "Fatal Python error"] {
            assert!(text.contains(part), "{text}");
        }
        let cause = Cause::OutOfMemory { limit: 1 << 30, peak: 3 << 29 };
        let text = exception("'x'", &cause, 1, "").text();
        assert!(text.starts_with("MemoryError(") && text.contains("1.50 GiB") && text.contains("1.00 GiB"));
    }
}
