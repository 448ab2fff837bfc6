//! Python literals as `ast.literal_eval` reads them, for the values of `DASK_*` environment variables.
//!
//! Numbers, strings, bytes, tuples, lists, sets, dictionaries, `None`, `True`, `False`. Complex numbers are text to us.

use super::parse::python_float;
use super::value::{Node, Source, Table, Value};

/// How deep literals may nest; Python's own parser gives up at about this depth too.
const MAX_DEPTH: usize = 90;

/// The value of an environment variable, as `dask.config.interpret_value`: a literal, a word for
/// none or a truth value in any case, else the text itself.
pub fn interpret(text: &str, source: &Source) -> Value {
    if let Some(value) = literal(text, source) {
        return value;
    }
    match text.to_lowercase().as_str() {
        "none" | "null" => Value::Null,
        "false" => Value::Bool(false),
        "true" => Value::Bool(true),
        _ => Value::Str(text.to_owned()),
    }
}

/// `ast.literal_eval(text)`, or `None` where Python raises.
fn literal(text: &str, source: &Source) -> Option<Value> {
    let text = text.trim_start_matches([' ', '\t']);
    let mut parser = Parser { rest: text, source, depth: 0 };
    let value = parser.tuple_or_value()?;
    // after the expression Python's grammar allows line ends
    parser.blank(true);
    parser.rest.is_empty().then_some(value)
}

struct Parser<'a> {
    rest: &'a str,
    source: &'a Source,
    /// Open brackets; line ends are blank inside of them.
    depth: usize,
}

impl Parser<'_> {
    /// Skips blanks, comments and, inside brackets, line ends.
    fn blank(&mut self, lines: bool) {
        loop {
            self.rest = self.rest.trim_start_matches(|c| {
                matches!(c, ' ' | '\t' | '\x0c') || ((lines || self.depth > 0) && matches!(c, '\n' | '\r'))
            });
            if let Some(after) = self.rest.strip_prefix("\\\n") {
                self.rest = after;
            } else if self.rest.starts_with('#') {
                self.rest = self.rest.find('\n').map_or("", |at| &self.rest[at..]);
            } else {
                return;
            }
        }
    }

    fn eat(&mut self, token: char) -> bool {
        self.blank(false);
        match self.rest.strip_prefix(token) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn node(&self, value: Value) -> Node {
        Node::new(value, self.source.clone())
    }

    /// The top level: a value, or a tuple without parentheses.
    fn tuple_or_value(&mut self) -> Option<Value> {
        let first = self.value()?;
        if !self.eat(',') {
            return Some(first);
        }
        let mut items = vec![self.node(first)];
        loop {
            self.blank(false);
            if self.rest.is_empty() || self.rest.starts_with(['\n', '\r']) {
                return Some(Value::List(items));
            }
            let item = self.value()?;
            items.push(self.node(item));
            if !self.eat(',') {
                return Some(Value::List(items));
            }
        }
    }

    fn value(&mut self) -> Option<Value> {
        if self.depth > MAX_DEPTH {
            return None;
        }
        self.blank(false);
        match self.rest.chars().next()? {
            '(' => self.parenthesised(),
            '[' => self.items('[', ']').map(|(items, _)| Value::List(items)),
            '{' => self.braced(),
            '+' | '-' => self.signed(),
            c if c.is_ascii_digit() || c == '.' => self.number(),
            _ => self.word_or_string(),
        }
    }

    /// Items up to the closing bracket, and whether a comma followed the last.
    fn items(&mut self, open: char, close: char) -> Option<(Vec<Node>, bool)> {
        self.eat(open);
        self.depth += 1;
        let (mut items, mut comma) = (Vec::new(), false);
        loop {
            self.blank(false);
            if self.rest.starts_with(close) {
                // the bracket closes before blanks after it are looked at: line ends count again
                self.depth -= 1;
                self.rest = &self.rest[close.len_utf8()..];
                return Some((items, comma));
            }
            if !items.is_empty() && !comma {
                return None;
            }
            let item = self.value()?;
            items.push(self.node(item));
            comma = self.eat(',');
        }
    }

    fn parenthesised(&mut self) -> Option<Value> {
        let (mut items, comma) = self.items('(', ')')?;
        if items.len() == 1 && !comma { items.pop().map(|only| only.value) } else { Some(Value::List(items)) }
    }

    fn braced(&mut self) -> Option<Value> {
        self.eat('{');
        self.depth += 1;
        let (mut table, mut set, mut comma) = (Table::new(), Vec::new(), true);
        loop {
            if self.eat('}') {
                self.depth -= 1;
                return Some(if set.is_empty() { Value::Map(table) } else { Value::List(set) });
            }
            if !comma {
                return None;
            }
            let first = self.value()?;
            if self.eat(':') {
                if !set.is_empty() {
                    return None;
                }
                let value = self.value()?;
                let key = match first {
                    Value::Str(text) => text,
                    other => other.to_string(),
                };
                table.insert(key, self.node(value));
            } else if table.is_empty() {
                set.push(self.node(first));
            } else {
                return None;
            }
            comma = self.eat(',');
        }
    }

    /// A sign before a number; `literal_eval` allows one only.
    fn signed(&mut self) -> Option<Value> {
        let negative = self.rest.starts_with('-');
        self.rest = &self.rest[1..];
        self.blank(false);
        if !self.rest.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
            return None;
        }
        Some(match self.number()? {
            Value::Int(i) if negative => Value::Int(i.checked_neg()?),
            Value::Float(x) if negative => Value::Float(-x),
            other => other,
        })
    }

    fn number(&mut self) -> Option<Value> {
        let mut end = 0;
        let mut previous = '\0';
        for c in self.rest.chars() {
            let exponent = matches!(previous, 'e' | 'E') && !self.rest.starts_with("0x");
            if !(c.is_ascii_alphanumeric() || c == '_' || c == '.' || (exponent && (c == '+' || c == '-'))) {
                break;
            }
            end += 1;
            previous = c;
        }
        let (token, rest) = self.rest.split_at(end);
        self.rest = rest;
        number_token(token)
    }

    fn word_or_string(&mut self) -> Option<Value> {
        let word = self.rest.chars().take_while(char::is_ascii_alphabetic).count();
        let (name, after) = self.rest.split_at(word);
        if !after.starts_with(['"', '\'']) {
            self.rest = after;
            return match name {
                "None" => Some(Value::Null),
                "True" => Some(Value::Bool(true)),
                "False" => Some(Value::Bool(false)),
                _ => None,
            };
        }
        // strings that stand side by side are one
        let mut joined = String::new();
        let mut bytes = None;
        loop {
            let word = self.rest.chars().take_while(char::is_ascii_alphabetic).count();
            let (prefix, after) = self.rest.split_at(word);
            if !after.starts_with(['"', '\'']) {
                return Some(Value::Str(joined));
            }
            let prefix = prefix.to_ascii_lowercase();
            if !matches!(prefix.as_str(), "" | "r" | "u" | "b" | "br" | "rb") {
                return None;
            }
            let is_bytes = prefix.contains('b');
            if *bytes.get_or_insert(is_bytes) != is_bytes {
                return None;
            }
            self.rest = after;
            joined.push_str(&self.string(prefix.contains('r'))?);
            self.blank(false);
        }
    }

    /// One quoted string, the quotes included in `rest`.
    fn string(&mut self, raw: bool) -> Option<String> {
        let quote = &self.rest[..1];
        let triple = quote.repeat(3);
        let closing = if self.rest.starts_with(&triple) { triple.as_str() } else { quote };
        let mut text = String::new();
        let mut rest = &self.rest[closing.len()..];
        loop {
            if let Some(after) = rest.strip_prefix(closing) {
                self.rest = after;
                return Some(text);
            }
            let c = rest.chars().next()?;
            rest = &rest[c.len_utf8()..];
            match c {
                '\n' if closing.len() == 1 => return None,
                '\\' if raw => {
                    let next = rest.chars().next()?;
                    text.extend(['\\', next]);
                    rest = &rest[next.len_utf8()..];
                }
                '\\' => rest = escape(rest, &mut text)?,
                c => text.push(c),
            }
        }
    }
}

/// Reads one escape after its backslash; returns what follows it.
fn escape<'a>(rest: &'a str, text: &mut String) -> Option<&'a str> {
    let c = rest.chars().next()?;
    let after = &rest[c.len_utf8()..];
    let hex = |digits: usize| {
        let code = u32::from_str_radix(after.get(..digits)?, 16).ok()?;
        Some((char::from_u32(code)?, &after[digits..]))
    };
    let (c, after) = match c {
        '\n' => return Some(after),
        'n' => ('\n', after),
        't' => ('\t', after),
        'r' => ('\r', after),
        'a' => ('\x07', after),
        'b' => ('\x08', after),
        'f' => ('\x0c', after),
        'v' => ('\x0b', after),
        '\\' | '\'' | '"' => (c, after),
        'x' => hex(2)?,
        'u' => hex(4)?,
        'U' => hex(8)?,
        '0'..='7' => {
            let digits = rest.bytes().take(3).take_while(|b| (b'0'..=b'7').contains(b)).count();
            (char::from_u32(u32::from_str_radix(&rest[..digits], 8).ok()?)?, &rest[digits..])
        }
        // Python warns of an unknown escape and keeps the backslash
        other => {
            text.push('\\');
            (other, after)
        }
    };
    text.push(c);
    Some(after)
}

/// A whole number token of Python's grammar.
fn number_token(token: &str) -> Option<Value> {
    let radix = match token.get(..2).map(str::to_ascii_lowercase).as_deref() {
        Some("0x") => 16,
        Some("0o") => 8,
        Some("0b") => 2,
        _ => 10,
    };
    if radix != 10 {
        let digits = &token[2..];
        let stray = digits.ends_with('_') || digits.contains("__");
        return match i64::from_str_radix(&digits.replace('_', ""), radix) {
            Ok(i) if !stray => Some(Value::Int(i)),
            _ => None,
        };
    }
    if !token.contains(['.', 'e', 'E']) {
        let digits = token.replace('_', "");
        let leading_zero = digits.len() > 1 && digits.starts_with('0') && digits.contains(|c| c != '0');
        if leading_zero || python_float(token).is_none() {
            return None;
        }
        // past 64 bits a float is as good as an int for any setting
        return digits.parse().map(Value::Int).or_else(|_| digits.parse().map(Value::Float)).ok();
    }
    let word = token.contains(|c: char| c.is_ascii_alphabetic() && !matches!(c, 'e' | 'E'));
    if word { None } else { python_float(token).map(Value::Float) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn show(text: &str) -> String {
        interpret(text, &Source::Default).to_string()
    }

    #[test]
    fn literals_words_and_plain_text() {
        assert_eq!(show("0.6"), "0.6");
        assert_eq!(show("-3"), "-3");
        assert_eq!(show("TRUE"), "true");
        assert_eq!(show("none"), "null");
        assert_eq!(show("4GB"), "'4GB'");
        assert_eq!(show("tcp://1.2.3.4:8786"), "'tcp://1.2.3.4:8786'");
        assert_eq!(show("{'GPU': 2, 'MEM': 10e9}"), "{GPU: 2, MEM: 10000000000}");
        assert_eq!(show("('a', \"b\" 'c',)"), "['a', 'bc']");
        assert_eq!(show("007"), "'007'");
    }

    #[test]
    fn nesting_has_an_end() {
        let deep = "[".repeat(100_000);
        assert_eq!(interpret(&deep, &Source::Default), Value::Str(deep.clone()));
    }
}
