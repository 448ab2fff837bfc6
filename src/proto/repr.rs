//! Text as Python's `repr` gives it, and Python's notion of a letter.
//!
//! Rust's standard library has no Unicode categories: where Python asks for one, what std tells comes close enough
//! (the exceptions are spacing marks and characters younger than one of the two Unicode versions).

use std::fmt::{Formatter, Result, Write};

/// `repr` of a `str`.
pub(super) fn text(s: &str, f: &mut Formatter<'_>) -> Result {
    let quote = if s.contains('\'') && !s.contains('"') { '"' } else { '\'' };
    f.write_char(quote)?;
    for c in s.chars() {
        match c {
            c if c == quote => write!(f, "\\{c}")?,
            '\\' => f.write_str("\\\\")?,
            '\n' => f.write_str("\\n")?,
            '\r' => f.write_str("\\r")?,
            '\t' => f.write_str("\\t")?,
            ' '..='~' => f.write_char(c)?,
            c if is_printable(c) => f.write_char(c)?,
            c => match c as u32 {
                n @ ..0x100 => write!(f, "\\x{n:02x}")?,
                n @ ..0x1_0000 => write!(f, "\\u{n:04x}")?,
                n => write!(f, "\\U{n:08x}")?,
            },
        }
    }
    f.write_char(quote)
}

/// `repr` of a `bytes`.
pub(super) fn bytes(b: &[u8], f: &mut Formatter<'_>) -> Result {
    let quote = if b.contains(&b'\'') && !b.contains(&b'"') { b'"' } else { b'\'' };
    write!(f, "b{}", quote as char)?;
    for &c in b {
        match c {
            b'\\' => f.write_str("\\\\")?,
            b'\n' => f.write_str("\\n")?,
            b'\r' => f.write_str("\\r")?,
            b'\t' => f.write_str("\\t")?,
            c if c == quote => write!(f, "\\{}", c as char)?,
            0x20..0x7f => f.write_char(c as char)?,
            _ => write!(f, "\\x{c:02x}")?,
        }
    }
    f.write_char(quote as char)
}

/// `repr` of a `float`: the shortest digits that give it back.
pub(super) fn float(x: f64, f: &mut Formatter<'_>) -> Result {
    if x.is_nan() {
        return f.write_str("nan");
    }
    if x.is_infinite() {
        return f.write_str(if x > 0.0 { "inf" } else { "-inf" });
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>().unwrap_or(0) {
        -4..16 => write!(f, "{x:?}"),
        exponent => {
            let sign = if exponent < 0 { '-' } else { '+' };
            write!(f, "{digits}e{sign}{:02}", exponent.unsigned_abs())
        }
    }
}

/// `str.isprintable`. The escapes of `Debug` go by the same categories, but for combining marks at the beginning.
fn is_printable(c: char) -> bool {
    let mut buffer = [b'a'; 5];
    let len = 1 + c.encode_utf8(&mut buffer[1..]).len();
    std::str::from_utf8(&buffer[..len]).is_ok_and(|s| s.escape_debug().nth(1) == Some(c))
}

/// `str.isalpha`: letters alone, where Rust's `is_alphabetic` also takes letter-like numbers and symbols.
pub(super) fn is_alpha(c: char) -> bool {
    let circled = matches!(c, 'Ⓐ'..='ⓩ' | '\u{1f130}'..='\u{1f149}' | '\u{1f150}'..='\u{1f169}' | '\u{1f170}'..='\u{1f189}');
    c.is_alphabetic() && !c.is_numeric() && !circled
}

/// White space to `str.split`.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}
