//! Dask's own parsers of sizes, durations, limits, ports and resources, oddities included.
//!
//! Pure functions from text to values; what they accept and give is held to the Python originals by a test.
//! Nothing here knows where a value came from.

use std::time::Duration;

/// Parses a size in bytes, as `dask.utils.parse_bytes`: `"100 MB"`, `"5.4 kB"`, `"1e6 kB"`, `"MB"`.
///
/// # Errors
/// What could not be read as a number or as a unit, or a size outside 0..2^64.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let compact = text.replace(' ', "");
    let compact = if compact.chars().any(char::is_numeric) { compact } else { format!("1{compact}") };
    let (number, unit) = split_unit(&compact);
    let n = python_float(number).ok_or_else(|| format!("could not interpret '{number}' as a number"))?;
    let multiplier = byte_unit(&unit.to_lowercase())
        .ok_or_else(|| format!("could not interpret '{unit}' as a byte unit"))?;
    whole_bytes(n * multiplier)
}

/// A number of bytes as Python's `int()` makes it of a float; 2^64 - 1 stands for any more than that.
///
/// # Errors
/// Negative, infinite or not a number.
pub fn whole_bytes(n: f64) -> Result<u64, String> {
    // the cast rounds towards zero and stops at the ends of the type
    if n.is_finite() && n > -1.0 { Ok(n as u64) } else { Err(format!("{n} bytes is not a possible size")) }
}

/// `dask.utils.byte_sizes`, keyed in lower case.
fn byte_unit(unit: &str) -> Option<f64> {
    Some(match unit {
        "" | "b" => 1.0,
        "kb" | "k" => 1e3,
        "mb" | "m" => 1e6,
        "gb" | "g" => 1e9,
        "tb" | "t" => 1e12,
        "pb" | "p" => 1e15,
        "kib" | "ki" => 1024.0,
        "mib" | "mi" => 1024f64.powi(2),
        "gib" | "gi" => 1024f64.powi(3),
        "tib" | "ti" => 1024f64.powi(4),
        "pib" | "pi" => 1024f64.powi(5),
        _ => return None,
    })
}

/// What a duration without a unit means: the `default` argument of `dask.utils.parse_timedelta`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// `default="seconds"`
    Seconds,
    /// `default="ms"`
    Milliseconds,
    /// `default=False`: a unit must be given
    Required,
}

/// Parses a duration in seconds, as `dask.utils.parse_timedelta`: `"3s"`, `"3.5 seconds"`, `"300ms"`, `"hour"`.
///
/// # Errors
/// An empty text, a bad number, an unknown or missing unit, or a duration that does not fit.
pub fn parse_timedelta(text: &str, default: Unit) -> Result<f64, String> {
    let compact = text.replace(' ', "");
    let first = compact.chars().next().ok_or("an empty duration")?;
    let compact = if first.is_numeric() { compact } else { format!("1{compact}") };
    let (number, unit) = split_unit(&compact);
    let multiplier = if unit.is_empty() {
        match default {
            Unit::Seconds => 1.0,
            Unit::Milliseconds => 1e-3,
            Unit::Required => return Err(format!("missing time unit: {compact}")),
        }
    } else {
        time_unit(&unit.to_lowercase())
            .ok_or_else(|| format!("invalid time unit: {unit}; valid units are s, ms, us, ns, m, h, d, w"))?
    };
    let n = python_float(number).ok_or_else(|| format!("could not interpret '{number}' as a number"))?;
    let seconds = n * multiplier;
    if seconds.is_finite() { Ok(seconds) } else { Err(format!("{text} is not a possible duration")) }
}

/// [`parse_timedelta`] as a [`Duration`].
///
/// # Errors
/// As [`parse_timedelta`], and for negative durations.
pub fn parse_duration(text: &str, default: Unit) -> Result<Duration, String> {
    let seconds = parse_timedelta(text, default)?;
    Duration::try_from_secs_f64(seconds).map_err(|_| format!("{text} is not a possible duration"))
}

/// `dask.utils.timedelta_sizes`, keyed in lower case.
fn time_unit(unit: &str) -> Option<f64> {
    Some(match unit {
        "s" | "second" | "seconds" => 1.0,
        "ms" | "millisecond" | "milliseconds" => 1e-3,
        "us" | "microsecond" | "microseconds" => 1e-6,
        "ns" | "nanosecond" | "nanoseconds" => 1e-9,
        "m" | "minute" | "minutes" => 60.0,
        "h" | "hour" | "hours" => 3600.0,
        "d" | "day" | "days" => 86400.0,
        "w" | "week" | "weeks" => 7.0 * 86400.0,
        _ => return None,
    })
}

/// What the memory limit of a worker came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryLimit {
    /// Bytes for each worker; `None` turns memory management off.
    pub bytes: Option<u64>,
    /// More was asked for than the system has, and the system's limit was taken instead.
    pub capped: bool,
}

/// A worker's memory limit, as `distributed.worker_memory.parse_memory_limit`.
///
/// `system` is the memory this process may use, in bytes; `auto` is the worker's share of it by threads.
/// Negative limits, which Dask takes at their word, are refused.
///
/// # Errors
/// What is neither `auto`, a number, a fraction, nor a size.
pub fn parse_memory_limit(
    text: &str,
    nthreads: usize,
    total_cores: usize,
    system: u64,
) -> Result<MemoryLimit, String> {
    let share = |fraction: f64| whole_bytes(fraction * system as f64);
    let bytes = if text == "auto" {
        share((nthreads as f64 / total_cores.max(1) as f64).min(1.0))?
    } else {
        match python_float(text) {
            Some(n) if n < 0.0 => return Err("a memory limit cannot be negative".into()),
            Some(n) if n <= 1.0 => share(n)?,
            Some(n) => whole_bytes(n)?,
            None => parse_bytes(text)?,
        }
    };
    Ok(match bytes {
        0 => MemoryLimit { bytes: None, capped: false },
        n if n > system => MemoryLimit { bytes: Some(system), capped: true },
        n => MemoryLimit { bytes: Some(n), capped: false },
    })
}

/// A port or a range `first:last`, as `distributed.utils.parse_ports`; 0 means any free port.
///
/// # Errors
/// Not a number, a range that does not rise, or a port above 65535.
pub fn parse_ports(text: &str) -> Result<Vec<u16>, String> {
    let port = |s: &str| {
        let n = python_int(s).ok_or_else(|| format!("'{s}' is not a port number"))?;
        u16::try_from(n).map_err(|_| format!("port {n} is outside 0..65535"))
    };
    let Some((first, last)) = text.split_once(':') else { return Ok(vec![port(text)?]) };
    if last.contains(':') {
        return Err("a range of ports is first:last, like 3000:3026".into());
    }
    let (first, last) = (port(first)?, port(last)?);
    if last <= first {
        return Err(format!(
            "in a range of ports first:last, last must be greater than first, but got {first} and {last}"
        ));
    }
    Ok((first..=last).collect())
}

/// Resources as `dask worker --resources` takes them: `"GPU=2 MEM=10e9"`, separated by blanks or commas.
///
/// # Errors
/// A pair that is not `name=number`.
pub fn parse_resources(text: &str) -> Result<Vec<(String, f64)>, String> {
    let mut resources: Vec<(String, f64)> = Vec::new();
    for pair in text.replace(',', " ").split_whitespace() {
        let (name, value) = pair
            .split_once('=')
            .filter(|(_, value)| !value.contains('='))
            .ok_or_else(|| format!("'{pair}' is not of the form NAME=NUMBER, like GPU=2"))?;
        let number =
            python_float(value).ok_or_else(|| format!("'{value}' is not a number, in resource '{pair}'"))?;
        match resources.iter_mut().find(|(known, _)| known == name) {
            Some(known) => known.1 = number,
            None => resources.push((name.to_owned(), number)),
        }
    }
    Ok(resources)
}

/// The default split of `n` cores into (workers, threads for each), as `distributed.deploy.utils.nprocesses_nthreads`.
pub fn nprocesses_nthreads(n: usize) -> (usize, usize) {
    let n = n.max(1);
    let processes =
        if n <= 4 { n } else { (1..=n).find(|f| n.is_multiple_of(*f) && f * f >= n).unwrap_or(n) };
    (processes, n / processes)
}

/// Splits a text before its trailing letters: `"5.4kB"` gives `("5.4", "kB")`.
///
/// A text of letters alone keeps its first one in the number, as the loop in Dask does.
fn split_unit(text: &str) -> (&str, &str) {
    let letters = text.chars().rev().take_while(|c| c.is_alphabetic()).map(char::len_utf8).sum::<usize>();
    let at = if letters == text.len() {
        text.chars().next().map_or(0, char::len_utf8)
    } else {
        text.len() - letters
    };
    text.split_at(at)
}

/// Python's `float(text)` for ASCII digits.
pub fn python_float(text: &str) -> Option<f64> {
    let digits = without_underscores(python_strip(text))?;
    digits.parse().ok()
}

/// Python's `int(text)` for ASCII digits, within 64 bits.
pub fn python_int(text: &str) -> Option<i64> {
    let digits = without_underscores(python_strip(text))?;
    digits.parse().ok()
}

fn python_strip(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || ('\x1c'..='\x1f').contains(&c))
}

/// Drops underscores between digits; `None` where one stands elsewhere.
fn without_underscores(text: &str) -> Option<String> {
    let bytes = text.as_bytes();
    let digit = |at: Option<usize>| at.and_then(|i| bytes.get(i)).is_some_and(u8::is_ascii_digit);
    let fits = |(i, b): (usize, &u8)| *b != b'_' || (digit(i.checked_sub(1)) && digit(Some(i + 1)));
    bytes.iter().enumerate().all(fits).then(|| text.replace('_', ""))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn sizes_in_every_unit() {
        assert_eq!(parse_bytes("100 MB"), Ok(100_000_000));
        assert_eq!(parse_bytes("5.4 kB"), Ok(5400));
        assert_eq!(parse_bytes("1kiB"), Ok(1024));
        assert_eq!(parse_bytes("MB"), Ok(1_000_000));
        assert_eq!(parse_bytes("5 foos").unwrap_err(), "could not interpret 'foos' as a byte unit");
        assert_eq!(parse_bytes("x.5 MB").unwrap_err(), "could not interpret 'x.5' as a number");
    }

    #[test]
    fn durations_with_and_without_a_unit() {
        assert_eq!(parse_timedelta("300ms", Unit::Seconds), Ok(0.3));
        assert_eq!(parse_timedelta("7", Unit::Milliseconds), Ok(0.007));
        assert!(parse_timedelta("7", Unit::Required).unwrap_err().contains("missing time unit"));
        assert!(parse_timedelta("", Unit::Seconds).is_err());
        assert_eq!(parse_duration("2 minutes", Unit::Seconds), Ok(Duration::from_secs(120)));
    }

    #[test]
    fn a_limit_above_the_system_is_capped() {
        assert_eq!(
            parse_memory_limit("auto", 1, 4, 4000),
            Ok(MemoryLimit { bytes: Some(1000), capped: false })
        );
        assert_eq!(parse_memory_limit("0", 1, 4, 4000), Ok(MemoryLimit { bytes: None, capped: false }));
        assert_eq!(
            parse_memory_limit("1GB", 1, 4, 4000),
            Ok(MemoryLimit { bytes: Some(4000), capped: true })
        );
        assert!(parse_memory_limit("-1", 1, 4, 4000).is_err());
    }

    #[test]
    fn ports_and_ranges() {
        assert_eq!(parse_ports("3000:3002"), Ok(vec![3000, 3001, 3002]));
        assert_eq!(parse_ports("0"), Ok(vec![0]));
        assert!(parse_ports("3000:3000").unwrap_err().contains("greater than"));
        assert!(parse_ports("70000").unwrap_err().contains("outside"));
        assert!(parse_ports("1:2:3").is_err());
    }
}
