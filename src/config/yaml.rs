//! YAML as PyYAML's `safe_load` reads it, with the line of each value.
//!
//! Dask's files are read by PyYAML, which speaks YAML 1.1: `on` is true, `0o17` and `1e6` are text, `1:30` is ninety.
//! The parser below speaks 1.2, so it is used for events only and plain scalars are resolved here.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use yaml_rust2::parser::{Event, Parser, Tag};
use yaml_rust2::scanner::{Marker, ScanError, TScalarStyle};

use super::value::{Node, Source, Table, Value};

/// How deep a document may nest.
const MAX_DEPTH: usize = 64;
/// How many values a document may have once its aliases are spelled out.
const MAX_VALUES: usize = 100_000;

/// Reads one document; an empty one is `null`.
///
/// # Errors
/// A text with the line of what is wrong: bad syntax, more than one document, unknown tags, endless nesting.
pub fn read(text: &str, path: &Arc<Path>) -> Result<Node, String> {
    // PyYAML takes a byte order mark as the encoding's, not the document's
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut reader = Reader { events: Parser::new_from_str(text), path, anchors: HashMap::new(), values: 0 };
    let mut document = None;
    loop {
        match reader.next()? {
            (Event::StreamEnd, _) => break,
            (Event::DocumentStart, mark) => {
                if document.is_some() {
                    return Err(at(mark, "expected a single document, but found another"));
                }
                let (event, mark) = reader.next()?;
                document = Some(reader.node(event, mark, 0)?);
            }
            _ => {}
        }
    }
    let source = Source::File { path: path.clone(), line: 0 };
    Ok(document.unwrap_or(Node::new(Value::Null, source)))
}

fn at(mark: Marker, what: &str) -> String {
    format!("line {}: {what}", mark.line())
}

struct Reader<'a> {
    events: Parser<std::str::Chars<'a>>,
    path: &'a Arc<Path>,
    anchors: HashMap<usize, Node>,
    values: usize,
}

impl Reader<'_> {
    fn next(&mut self) -> Result<(Event, Marker), String> {
        self.events.next_token().map_err(|error: ScanError| at(*error.marker(), error.info()))
    }

    fn source(&self, mark: Marker) -> Source {
        Source::File { path: self.path.clone(), line: mark.line() }
    }

    fn node(&mut self, event: Event, mark: Marker, depth: usize) -> Result<Node, String> {
        self.values += 1;
        if depth > MAX_DEPTH || self.values > MAX_VALUES {
            return Err(at(mark, "the document is too deep or too large"));
        }
        let source = self.source(mark);
        let (value, anchor) = match event {
            Event::Alias(anchor) => {
                let node = self.anchors.get(&anchor).ok_or_else(|| at(mark, "found undefined alias"))?;
                self.values += size(&node.value);
                return Ok(node.clone());
            }
            Event::Scalar(text, style, anchor, tag) => {
                let plain = style == TScalarStyle::Plain;
                (scalar(text, plain, tag.as_ref()).map_err(|e| at(mark, &e))?, anchor)
            }
            Event::SequenceStart(anchor, _) => (self.sequence(depth)?, anchor),
            Event::MappingStart(anchor, _) => (self.mapping(depth)?, anchor),
            _ => return Err(at(mark, "expected a value")),
        };
        let node = Node::new(value, source);
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        Ok(node)
    }

    fn sequence(&mut self, depth: usize) -> Result<Value, String> {
        let mut items = Vec::new();
        loop {
            match self.next()? {
                (Event::SequenceEnd, _) => return Ok(Value::List(items)),
                (event, mark) => items.push(self.node(event, mark, depth + 1)?),
            }
        }
    }

    fn mapping(&mut self, depth: usize) -> Result<Value, String> {
        let (mut table, mut merged) = (Table::new(), Vec::new());
        loop {
            let (event, mark) = self.next()?;
            if event == Event::MappingEnd {
                break;
            }
            let merge = matches!(&event, Event::Scalar(key, TScalarStyle::Plain, _, None) if key == "<<");
            let key = self.node(event, mark, depth + 1)?;
            let (event, value_mark) = self.next()?;
            let mut value = self.node(event, value_mark, depth + 1)?;
            if merge {
                merged.push((value, value_mark));
                continue;
            }
            let key = match key.value {
                Value::Str(text) => text,
                Value::List(_) | Value::Map(_) => return Err(at(mark, "found unhashable key")),
                other => other.to_string(),
            };
            // the place to point at is the key's line: the value may begin further down, or be an alias
            value.source = self.source(mark);
            table.insert(key, value);
        }
        for (value, mark) in merged {
            merge_into(&mut table, value).map_err(|e| at(mark, e))?;
        }
        Ok(Value::Map(table))
    }
}

/// The merge key `<<`: what the table itself says stays.
fn merge_into(table: &mut Table, merged: Node) -> Result<(), &'static str> {
    match merged.value {
        Value::Map(inner) => {
            for (key, node) in inner {
                table.entry(key).or_insert(node);
            }
            Ok(())
        }
        Value::List(items) => items.into_iter().try_for_each(|item| merge_into(table, item)),
        _ => Err("expected a mapping or list of mappings for merging"),
    }
}

/// Number of values in `value`.
fn size(value: &Value) -> usize {
    match value {
        Value::List(items) => 1 + items.iter().map(|n| size(&n.value)).sum::<usize>(),
        Value::Map(table) => 1 + table.values().map(|n| size(&n.value)).sum::<usize>(),
        _ => 1,
    }
}

/// A scalar with its tag, as PyYAML's `SafeConstructor`.
fn scalar(text: String, plain: bool, tag: Option<&Tag>) -> Result<Value, String> {
    let Some(tag) = tag else {
        return Ok(if plain { resolve(&text) } else { Value::Str(text) });
    };
    let resolved = resolve(&text);
    let value = match (tag.suffix.as_str(), resolved) {
        ("str", _) => Value::Str(text),
        ("null", Value::Null) => Value::Null,
        ("bool", value @ Value::Bool(_)) | ("int", value @ Value::Int(_)) => value,
        ("float", Value::Int(i)) => Value::Float(i as f64),
        ("float", value @ Value::Float(_)) => value,
        ("timestamp" | "binary", _) => Value::Str(text),
        _ => {
            return Err(format!(
                "could not determine a constructor for the tag '{}{}'",
                tag.handle, tag.suffix
            ));
        }
    };
    Ok(value)
}

/// A plain scalar, as PyYAML's implicit resolvers decide.
fn resolve(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On" | "ON" => return Value::Bool(true),
        "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off" | "OFF" => {
            return Value::Bool(false);
        }
        _ => {}
    }
    let (negative, signed, number) = match text.as_bytes().first() {
        Some(b'-') => (true, true, &text[1..]),
        Some(b'+') => (false, true, &text[1..]),
        _ => (false, false, text),
    };
    if let Some(x) = float(number, signed) {
        return Value::Float(if negative { -x } else { x });
    }
    match integer(number) {
        Some(i) => Value::Int(if negative { -i } else { i }),
        None => Value::Str(text.to_owned()),
    }
}

fn digits(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_digit()) && text.chars().all(|c| c.is_ascii_digit() || c == '_')
}

/// Two digits below sixty: the later parts of a sexagesimal number.
fn sixtieth(text: &str) -> bool {
    matches!(text.as_bytes(), [b'0'..=b'9'] | [b'0'..=b'5', b'0'..=b'9'])
}

fn integer(text: &str) -> Option<i64> {
    let radix = |digits: &str, radix: u32, allowed: fn(char) -> bool| {
        let fits = !digits.is_empty() && digits.chars().all(|c| allowed(c) || c == '_');
        fits.then(|| i64::from_str_radix(&digits.replace('_', ""), radix).ok()).flatten()
    };
    if let Some(rest) = text.strip_prefix("0b") {
        return radix(rest, 2, |c| matches!(c, '0' | '1'));
    }
    if let Some(rest) = text.strip_prefix("0x") {
        return radix(rest, 16, |c| c.is_ascii_hexdigit());
    }
    if let Some(rest) = text.strip_prefix('0') {
        if rest.chars().all(|c| c == '_') {
            return Some(0);
        }
        return radix(rest, 8, |c| ('0'..='7').contains(&c));
    }
    let mut parts = text.split(':');
    let first = parts.next().filter(|p| digits(p))?;
    let mut total: i64 = first.replace('_', "").parse().ok()?;
    for part in parts {
        let part = Some(part).filter(|p| sixtieth(p))?;
        total = total.checked_mul(60)?.checked_add(part.parse().ok()?)?;
    }
    Some(total)
}

/// A floating-point number without its sign; forms that begin with a point and digits allow no sign at all.
fn float(text: &str, signed: bool) -> Option<f64> {
    match text {
        ".inf" | ".Inf" | ".INF" => return Some(f64::INFINITY),
        ".nan" | ".NaN" | ".NAN" if !signed => return Some(f64::NAN),
        _ => {}
    }
    let (mantissa, exponent) = match text.find(['e', 'E']) {
        Some(at) => (&text[..at], Some(&text[at + 1..])),
        None => (text, None),
    };
    if let Some(exponent) = exponent {
        let after_sign = exponent.strip_prefix(['-', '+'])?;
        if after_sign.is_empty() || !after_sign.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
    }
    let (whole, fraction) = mantissa.split_once('.')?;
    if !fraction.chars().all(|c| c.is_ascii_digit() || c == '_') {
        return None;
    }
    let clean = |s: &str| s.replace('_', "");
    if whole.is_empty() {
        let fits = !signed && digits(fraction);
        return fits.then(|| clean(text).parse().ok()).flatten();
    }
    let mut parts = whole.split(':');
    let first = parts.next().filter(|p| digits(p))?;
    let parts: Vec<&str> = parts.collect();
    if parts.is_empty() {
        return clean(text).parse().ok();
    }
    if exponent.is_some() || !parts.iter().all(|p| sixtieth(p)) {
        return None;
    }
    let last = parts.last()?;
    let mut total: f64 = clean(first).parse().ok()?;
    for part in &parts[..parts.len() - 1] {
        total = total * 60.0 + part.parse::<f64>().ok()?;
    }
    Some(total * 60.0 + format!("{last}.{}", clean(fraction)).parse::<f64>().ok()?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Node, String> {
        read(text, &Arc::from(Path::new("test.yaml")))
    }

    #[test]
    fn scalars_are_those_of_yaml_1_1() {
        let text = "[on, No, 1e6, 1.0e+6, 010, 0o17, 1:30, '3', 1_000, .5, -.5, ~, .inf, 2020-01-01, 08]";
        assert_eq!(
            parse(text).unwrap().value.to_string(),
            "[true, false, '1e6', 1000000, 8, '0o17', 90, '3', 1000, 0.5, '-.5', null, inf, '2020-01-01', '08']"
        );
    }

    #[test]
    fn values_know_the_line_of_their_key() {
        let node = parse("distributed:\n  worker:\n    memory:\n      target: 0.5\n").unwrap();
        let Value::Map(table) = &node.value else { panic!("no table") };
        let target = crate::config::value::lookup(table, "distributed.worker.memory.target").unwrap();
        assert_eq!(target.source.to_string(), "test.yaml, line 4");
    }

    #[test]
    fn anchors_and_merge_keys() {
        let node = parse("base: &b {a: 1, b: 2}\nuse:\n  <<: *b\n  b: 3\n").unwrap();
        assert_eq!(node.value.to_string(), "{base: {a: 1, b: 2}, use: {b: 3, a: 1}}");
    }

    #[test]
    fn what_pyyaml_refuses() {
        assert!(parse("a: b: c").unwrap_err().contains("line 1"));
        assert!(parse("a: 1\n---\nb: 2\n").is_err());
        assert!(parse("!!python/object:os.system x").is_err());
        assert_eq!(parse("").unwrap().value, Value::Null);
    }

    #[test]
    fn a_document_that_unfolds_without_end_is_refused() {
        let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for i in 1..9 {
            let previous = format!("*a{}, ", i - 1).repeat(10);
            text.push_str(&format!("a{i}: &a{i} [{}]\n", previous.trim_end_matches(", ")));
        }
        assert!(parse(&text).unwrap_err().contains("too large"));
    }
}
