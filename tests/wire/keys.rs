//! Keys are equal, named and printed as Python does it.

use std::collections::HashMap;

use iqoqo_dask_worker::proto::{Key, Value};
use iqoqo_dask_worker::wire::Compression;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use crate::python::{Peer, key};

/// Keys that look like those of real graphs, and those that trip parsers.
fn chosen() -> Vec<Key> {
    let texts = "x x-1 x-1-2-3 hello-world-1 ae05086432ca935f6eba409a8ecd4896 x-abcdefab x-abcdefgh x-bcdefghi _(x)
        ('x-2',1) ('x',1) ('x',) <module.submodule.myclass <a.b> <> <.> -x x- - -- _-a '' \" (( sum-aggregate-5f3 getitem-0 1-x é-ü-1
        日本-語 a-ß-b read-parquet-0a1b2c a-b-c-d-abcdefab-e A-B Ab-12345678 x-ABCDEFAB x-zbcdefab 0123456789abcdef0123456789abcdef
        aaaaaaaa-bbbbbbbb-cccccccc-dddd aaaaaaa-bbbbbbbbb-cccccccccccccc ²-x Ⅷ-x x-² x-Ⅷ x-Ⓐ ªa-º _1 (a-b"
        .split_whitespace()
        .map(str::to_owned);
    let odd = [
        "",
        " ",
        "<module.submodule.myclass object at 0xdaf372",
        "< a.b >",
        "<a\u{a0}b.c>",
        "it's",
        "it's \"both\"",
        "tab\tnewline\nreturn\rnull\0bell\u{7}delete\u{7f}back\\slash",
        "zero\u{200b}width",
        "nbsp\u{a0}",
        "line\u{2028}sep",
        "nel\u{85}",
        "soft\u{ad}hyphen",
        "bom\u{feff}",
        "private\u{e000}",
        "combining e\u{301}",
        "astral \u{1f642} tag \u{e0001} noncharacter \u{10ffff} \u{fffe}",
    ];
    let mut keys: Vec<Key> = texts.map(Key::from).chain(odd.map(Key::from)).collect();
    let bytes: [&[u8]; 8] =
        [b"", b"hello-world-1", b"it's", b"\"q\"", b"it's \"both\"", b"\t\n\r\0\\\x7f\xff", b"(x", b"1"];
    keys.extend(bytes.map(|b| Key::Bytes(b.into())));
    let floats = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.1,
        1.5,
        1e15,
        1e16,
        1.5e16,
        123456789012345680.0,
        1e22,
        1e-4,
        1e-5,
        1.5e-7,
        2.5e-310,
        5e-324,
        1e100,
        1.7976931348623157e308,
        f64::INFINITY,
        f64::NEG_INFINITY,
        9007199254740993.0,
        9.223372036854776e18,
        1.8446744073709552e19,
        3e38,
        2e38,
        1.7e38,
        1.70141183460469e38,
    ];
    keys.extend(floats.map(Key::Float));
    let ints: [i128; 9] =
        [0, 1, -1, 2, 1 << 53, (1 << 53) + 1, i64::MIN.into(), i64::MAX.into(), u64::MAX.into()];
    keys.extend(ints.map(Key::Int));
    let parts = keys.clone();
    keys.push(Key::Tuple([].into()));
    keys.extend(parts.iter().map(|k| Key::Tuple([k.clone()].into())));
    keys.extend(parts.iter().map(|k| Key::Tuple([k.clone(), Key::Int(1)].into())));
    keys.extend(
        parts
            .iter()
            .map(|k| Key::Tuple([Key::Tuple([k.clone(), Key::Float(1.0)].into()), "x".into()].into())),
    );
    keys
}

#[test]
fn keys_are_equal_named_and_printed_as_in_python() {
    let mut keys = chosen();
    let mut runner = TestRunner::deterministic();
    keys.extend(prop::collection::vec(key(), 3000).new_tree(&mut runner).unwrap().current());
    let values = keys.iter().map(Value::from).collect();
    let request = Value::map([("do", "keys".into()), ("keys", Value::List(values))]);
    let answer = Peer::start().ask(&request, Compression::None);
    let list = |field| answer.field(field).and_then(Value::as_list).unwrap();
    let mut wrong = Vec::new();
    for (key, python) in keys.iter().zip(list("keys")) {
        let expect = |field| python.field(field).and_then(Value::as_str).unwrap();
        let ours = [format!("{key:?}"), key.to_string(), key.prefix()];
        let theirs = ["repr", "str", "prefix"].map(expect);
        if ours != theirs {
            wrong.push((ours, theirs));
        }
    }
    assert!(wrong.is_empty(), "{} of {} (ours, python's): {wrong:#?}", wrong.len(), keys.len());

    let mut first = HashMap::new();
    for (i, key) in keys.iter().enumerate() {
        let class = *first.entry(key.clone()).or_insert(i);
        assert_eq!(list("classes")[i], Value::from(class), "{key:?} is like {:?}", keys[class]);
    }
}

proptest! {
    #[test]
    fn the_order_of_keys_is_total_and_agrees_with_equality(a in key(), b in key(), c in key()) {
        use std::cmp::Ordering;
        prop_assert_eq!(a.cmp(&b), b.cmp(&a).reverse());
        prop_assert_eq!(a == b, a.cmp(&b) == Ordering::Equal);
        let mut sorted = [&a, &b, &c];
        sorted.sort();
        prop_assert!(sorted[0] <= sorted[1] && sorted[1] <= sorted[2] && sorted[0] <= sorted[2]);
    }

    #[test]
    fn a_key_survives_as_a_value(key in key()) {
        prop_assert_eq!(Value::from(&key).to_key(), Some(key));
    }
}
