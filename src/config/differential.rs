//! The parsers of this room against Dask's own and PyYAML: the same texts to both, the same answers from both.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, LazyLock, Mutex};

use serde_json::{Value as Json, json};

use super::addresses::test_apportion;
use super::env::Environment;
use super::keys::SETTINGS;
use super::literal::interpret;
use super::parse::*;
use super::sources::Sources;
use super::value::{Source, Table, Value, lookup};
use super::{dask, resolve, sources, yaml};

/// `tests/config/oracle.py` in the virtual environment of this repository; it ends when its standard input does.
struct Oracle {
    _process: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Oracle {
    fn start() -> Mutex<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let python = root.join(".venv/bin/python");
        let child = Command::new(&python)
            .args(["-W", "ignore"])
            .arg(root.join("tests/config/oracle.py"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let mut process = child.unwrap_or_else(|error| {
            panic!("{}: {error}; make it with the pinned test requirements", python.display())
        });
        let (requests, answers) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        Mutex::new(Oracle { _process: process, requests, answers: BufReader::new(answers) })
    }
}

/// The oracle's answers.
fn ask(requests: &[Json]) -> Vec<Json> {
    static ORACLE: LazyLock<Mutex<Oracle>> = LazyLock::new(Oracle::start);
    let mut oracle = ORACLE.lock().unwrap();
    let text = serde_json::to_string(requests).unwrap();
    writeln!(oracle.requests, "{text}").unwrap();
    let mut answers = String::new();
    oracle.answers.read_line(&mut answers).unwrap();
    serde_json::from_str(&answers).unwrap()
}

fn ok<T>(result: Result<T, String>, show: impl FnOnce(T) -> Json) -> Json {
    result.map_or(json!(["error"]), |value| json!(["ok", show(value)]))
}

fn float(x: f64) -> Json {
    if x.is_nan() { json!("f:nan") } else { json!(format!("f:{:016x}", x.to_bits())) }
}

fn plain(value: &Value) -> Json {
    match value {
        Value::Null => Json::Null,
        Value::Bool(b) => json!(b),
        Value::Int(i) => json!(i),
        Value::Float(x) => float(*x),
        Value::Str(s) => json!(format!("s:{s}")),
        Value::List(items) => json!({"l": items.iter().map(|n| plain(&n.value)).collect::<Vec<_>>()}),
        Value::Map(table) => {
            json!({"m": table.iter().map(|(k, n)| json!([k, plain(&n.value)])).collect::<Vec<_>>()})
        }
    }
}

/// Asks the oracle and compares with `ours` for each request.
fn compare(requests: Vec<Json>, ours: impl Fn(&Json) -> Json) {
    let theirs = ask(&requests);
    assert_eq!(theirs.len(), requests.len());
    let pairs = requests.iter().zip(theirs).map(|(request, theirs)| (request, ours(request), theirs));
    let different: Vec<String> = pairs
        .filter(|(_, ours, theirs)| ours != theirs)
        .map(|(request, ours, theirs)| format!("{request}: ours {ours}, theirs {theirs}"))
        .collect();
    let shown = different.iter().take(20).map(String::as_str).collect::<Vec<_>>().join("\n");
    assert!(different.is_empty(), "{} of {} differ:\n{shown}", different.len(), requests.len());
}

/// Texts made of pieces that parsers care about, the same in each run.
fn texts(pieces: &[&str], n: usize) -> Vec<String> {
    let mut random = fastrand::Rng::with_seed(20_260_800);
    let mut text = || (0..random.usize(0..6)).map(|_| random.choice(pieces).unwrap()).copied().collect();
    (0..n).map(|_| text()).collect()
}

const NUMBERS: &[&str] =
    &["1", "2.5", "0", "07", "1_000", "_", "e3", "E-2", "-", "+", ".", " ", "inf", "nan", "\t", "9999"];

fn with<'a>(more: &[&'a str]) -> Vec<&'a str> {
    NUMBERS.iter().chain(more).copied().collect()
}

#[test]
fn sizes() {
    let units = ["kB", "MiB", "g", "b", "Ti", "foo", "Kb", "é", "pib"];
    // Dask lets a size be negative; nothing here can be
    let not_negative = |text: &String| !text.replace([' ', '\t'], "").starts_with('-');
    let requests = texts(&with(&units), 4000).into_iter().filter(not_negative).map(|s| json!(["bytes", s]));
    compare(requests.collect(), |r| ok(parse_bytes(r[1].as_str().unwrap()), |n| json!(n)));
}

#[test]
fn durations() {
    let units = ["s", "ms", "us", "hour", "Days", "minutes", "W", "fortnight", "NS"];
    let defaults = [
        (json!("seconds"), Unit::Seconds),
        (json!("ms"), Unit::Milliseconds),
        (json!(false), Unit::Required),
    ];
    let texts = texts(&with(&units), 1500);
    for (name, default) in defaults {
        let requests = texts.iter().map(|s| json!(["timedelta", s, name])).collect();
        compare(requests, |r| ok(parse_timedelta(r[1].as_str().unwrap(), default), float));
    }
}

#[test]
fn memory_limits() {
    let mut texts = texts(&with(&["GB", "MiB", "k"]), 3000);
    texts.extend(["auto", "0", "0.5", "1", "1.0", "1.5", "4GB", "none", "1e9"].map(str::to_owned));
    let not_negative = |text: &String| !text.replace([' ', '\t'], "").starts_with('-');
    let mut requests = Vec::new();
    for text in texts.into_iter().filter(not_negative) {
        for (nthreads, cores, system) in [(1, 4, 16_000_000_001u64), (8, 4, 1 << 20), (3, 7, 999)] {
            requests.push(json!(["memory", text, nthreads, cores, system]));
        }
    }
    compare(requests, |r| {
        let size = |i: usize| r[i].as_u64().unwrap() as usize;
        let limit = parse_memory_limit(r[1].as_str().unwrap(), size(2), size(3), r[4].as_u64().unwrap());
        ok(limit, |limit| json!(limit.bytes))
    });
}

#[test]
fn ports_and_their_shares() {
    let texts = texts(&["80", ":", "443", "1", " ", "0", "_", "+"], 1500);
    let in_range = |text: &&String| !text.split(':').any(|p| python_int(p).is_some_and(|n| n > 65535));
    let requests = texts.iter().filter(in_range).map(|s| json!(["ports", s])).collect();
    compare(requests, |r| ok(parse_ports(r[1].as_str().unwrap()), |ports| json!(ports)));

    let ranges = [None, Some("0"), Some("10"), Some("10:11"), Some("10:14"), Some("12:16"), Some("14:30")];
    let mut requests = Vec::new();
    for worker in ranges {
        for nanny in ranges {
            requests.extend((1..5).map(|n| json!(["apportion", worker, nanny, n])));
        }
    }
    compare(requests, |r| {
        let shares = test_apportion(r[1].as_str(), r[2].as_str(), r[3].as_u64().unwrap() as usize);
        ok(shares, |shares| json!(shares))
    });
    compare((1..200).map(|n| json!(["nprocesses", n])).collect(), |r| {
        json!(["ok", nprocesses_nthreads(r[1].as_u64().unwrap() as usize)])
    });
}

#[test]
fn resources_of_the_command_line() {
    let requests =
        texts(&with(&["GPU=", "MEM=", ",", "=", "x"]), 1500).into_iter().map(|s| json!(["resources", s]));
    compare(requests.collect(), |r| {
        ok(
            sources::resources(&Value::Str(r[1].as_str().unwrap().into())),
            |pairs| json!({"m": pairs.into_iter().map(|(name, x)| json!([name, float(x)])).collect::<Vec<_>>()}),
        )
    });
}

#[test]
fn python_literals() {
    let pieces = with(&[
        "'a'", "\"b\"", "[", "]", "(", ")", ",", "{", "}", "'k': ", "None", "True", "x", "0x1f", "#", "b'z'",
        "r'\\d'", "\\",
    ]);
    let mut texts = texts(&pieces, 6000);
    texts.extend(
        [
            "{'GPU': 2, 'b': [1, (2,)]}",
            "'\\x41\\n\\u20ac\\q'",
            "4GB",
            "None",
            "nULL",
            "0.60",
            "-1",
            "- 1",
            "--1",
            "1,",
            "[1, 2",
            "'''a\nb'''",
            "0o17",
            "0b11",
            "00",
            "01",
            "1__0",
            "tcp://a:1",
            "1e400",
            "u'x'",
            "rb'\\x'",
            "{1}",
            "b'a' 'b'",
        ]
        .map(str::to_owned),
    );
    let requests = texts.iter().map(|s| json!(["literal", s])).collect();
    compare(requests, |r| {
        let text = r[1].as_str().unwrap();
        match interpret(text, &Source::Default) {
            // the oracle gives complex numbers back without a mark
            Value::Str(same) if same == text && is_complex(text) => json!(["ok", text]),
            value => json!(["ok", plain(&value)]),
        }
    });
}

/// Texts that Python takes for a complex number or an ellipsis, which the generated pieces cannot make by chance.
fn is_complex(text: &str) -> bool {
    text.trim() == "..." || text.trim_end().ends_with('j')
}

#[test]
fn yaml_scalars_and_documents() {
    let scalars = with(&[
        "yes", "Off", "~", "null", "0x1F", "0b10", "017", ":30", ".5", "'q'", "\"d\"", "1:2", "!!str ",
    ]);
    let mut requests: Vec<Json> = texts(&scalars, 3000)
        .into_iter()
        // the 1.2 parser reads these few forms otherwise: a lone indicator, tabs, and a colon that ends a plain scalar
        .filter(|s| {
            !s.contains('\t') && !s.trim().ends_with(':') && !s.contains("!!") && !s.contains(['\'', '"'])
        })
        .map(|s| json!(["yaml", format!("key: {s}")]))
        .collect();
    let documents = [
        "",
        "a: 1\nb:\n  - x\n  - y: {z: 1}\n",
        "- 1\n- [a, 'b']\n",
        "a: &x {k: 1}\nb: *x\n",
        "a: {<<: {k: 1, l: 2}, k: 3}\n",
        "{\"json\": [true, null, 1.5]}",
        "a: |\n  text\n  more\nb: >\n  folded\n  text\n",
        "a: 1\na: 2\n",
        "a: b: c",
        "a: [1, 2",
        "--- 1\n--- 2\n",
        "1: x\n",
        "a: !!str 5\nb: !!float 3\n",
        "%YAML 1.1\n---\na: on\n",
    ];
    requests.extend(documents.map(|text| json!(["yaml", text])));
    let defaults = ask(&[json!(["defaults"])]).remove(0);
    requests.push(json!(["yaml", defaults[1]]));
    let path = Arc::from(Path::new("test.yaml"));
    compare(requests, |r| ok(yaml::read(r[1].as_str().unwrap(), &path), |node| plain(&node.value)));
}

/// Keys that Dask reads though its own defaults do not have them.
const NOT_IN_DEFAULTS: &[&str] =
    &["scheduler-address", "distributed.nanny.blocked-handlers", "distributed.logging", "logging"];

#[test]
fn without_configuration_everything_is_as_dasks_defaults_say() {
    let mut asked = vec![json!(["defaults"])];
    let keys = SETTINGS.iter().flat_map(|setting| setting.dask).filter(|key| !NOT_IN_DEFAULTS.contains(key));
    asked.extend(keys.map(|key| json!(["has", key])));
    let answers = ask(&asked);
    for (request, answer) in asked.iter().zip(&answers).skip(1) {
        assert_eq!(answer, &json!(["ok", true]), "Dask has no key {}", request[1]);
    }
    let text = answers[0][1].as_str().unwrap();
    let Value::Map(defaults) = yaml::read(text, &Arc::from(Path::new("distributed.yaml"))).unwrap().value
    else {
        panic!("no table")
    };
    let resolved = |dask: Table| resolve::tests::resolved(Sources { dask, ..Sources::default() });
    assert_eq!(format!("{:#?}", resolved(defaults)), format!("{:#?}", resolved(Table::new())));
}

#[test]
fn files_and_variables_together() {
    let folders = ["a/x.yaml", "a/y.json", "b/x.yml", "b/ignored.txt"];
    let contents = ["k: {x: 1, y-z: 2}", "k: {y_z: 3, w: null}", "k: 5", "{\"k\": {\"x\": [1]}}", ""];
    let variables: [&[(&str, &str)]; 4] = [
        &[],
        &[("DASK_K__X", "7"), ("DASK_K__Y_Z", "text")],
        &[("DASK_K", "{'x': 8}")],
        &[("DASK_INTERNAL_INHERIT_CONFIG", "eyJrIjogeyJ4IjogOSwgInktei46IDF9fQ=="), ("OTHER", "1")],
    ];
    let mut requests = Vec::new();
    for first in contents {
        for second in contents {
            for variables in variables {
                let files = json!([
                    [folders[0], first],
                    [folders[1], "{}"],
                    [folders[2], second],
                    [folders[3], "k: 0"]
                ]);
                let variables: serde_json::Map<_, _> =
                    variables.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
                requests.push(json!(["collect", files, variables, "k"]));
            }
        }
    }
    compare(requests, collected);
}

/// The same as the oracle's `collect`, on files of our own.
fn collected(request: &Json) -> Json {
    let dir = tempfile::tempdir().unwrap();
    for file in request[1].as_array().unwrap() {
        let path = dir.path().join(file[0].as_str().unwrap());
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, file[1].as_str().unwrap()).unwrap();
    }
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let mut variables = vec![("DASK_ROOT_CONFIG", a.to_str().unwrap()), ("HOME", "/nonexistent")];
    variables.push(("DASK_CONFIG", b.to_str().unwrap()));
    let given = request[2].as_object().unwrap();
    variables.extend(given.iter().map(|(name, value)| (name.as_str(), value.as_str().unwrap())));
    match dask::collect(&Environment::of(variables), Path::new("/nonexistent")) {
        Err(_) => json!(["error"]),
        Ok(table) => json!(["ok", lookup(&table, "k").map_or(Json::Null, |node| plain(&node.value))]),
    }
}
