//! A Python process that makes tasks as the scheduler sends them, and opens what comes back.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bytes::Bytes;
use iqoqo_dask_worker::proto::{Payload, PayloadKind};
use serde_json::{Value, json};

/// The interpreter under test.
pub fn python() -> String {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/.venv/bin/python");
    std::env::var("PYTHON").unwrap_or_else(|_| default.to_owned())
}

const SERVER: &str = r#"
import json, sys, pickle
import msgpack
from dask._task_spec import Task, TaskRef
from distributed.protocol import dumps, loads
from distributed.protocol.serialize import ToPickle, Serialize, Serialized, deserialize, merge_and_deserialize
from distributed.protocol.utils import msgpack_opts

def opened(item):
    header = msgpack.loads(bytes.fromhex(item["header"]), use_list=False, **msgpack_opts)
    return merge_and_deserialize(header, [bytearray.fromhex(f) for f in item["frames"]])

def hexed(frames):
    return [bytes(f).hex() for f in frames]

def answer(ask):
    names = {"__name__": "__main__", "TaskRef": TaskRef}
    exec(ask.get("code", ""), names)
    if ask["do"] == "task":
        f = names["f"]
        args, kwargs = names.get("args", ()), names.get("kwargs", {})
        return hexed(dumps({"run_spec": ToPickle(Task("k", f, *args, **kwargs))})[1:])
    if ask["do"] == "dumps":
        return hexed(dumps(names["message"]))
    if ask["do"] == "loads":
        names["message"] = loads([bytes.fromhex(f) for f in ask["frames"]])
        return repr(eval(ask["expression"], names))
    names["x"] = opened(ask["object"])
    if ask.get("pickled"):
        names["x"] = pickle.loads(names["x"])
    return repr(eval(ask["expression"], names))

for line in sys.stdin:
    try:
        done = {"answer": answer(json.loads(line))}
    except BaseException as error:
        done = {"error": repr(error)}
    print(json.dumps(done), flush=True)
"#;

struct Forge {
    _child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

fn ask(question: Value) -> Value {
    static FORGE: OnceLock<Mutex<Forge>> = OnceLock::new();
    let start = || {
        let mut child = Command::new(python())
            .args(["-c", SERVER])
            .env("PYTHONHASHSEED", "6640")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Mutex::new(Forge { _child: child, stdin, stdout })
    };
    let mut forge = FORGE.get_or_init(start).lock().unwrap_or_else(PoisonError::into_inner);
    writeln!(forge.stdin, "{question}").unwrap();
    let mut line = String::new();
    forge.stdout.read_line(&mut line).unwrap();
    let mut done: Value = serde_json::from_str(&line).unwrap();
    assert!(done.get("error").is_none(), "the forge could not: {}", done["error"]);
    done["answer"].take()
}

fn frames(answer: Value) -> Vec<Bytes> {
    let hex = |frame: &Value| {
        let text = frame.as_str().unwrap();
        let byte = |at| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
        (0..text.len()).step_by(2).map(byte).collect::<Vec<u8>>().into()
    };
    answer.as_array().unwrap().iter().map(hex).collect()
}

fn hexed(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The task that Python code describes by `f`, and maybe `args` and `kwargs`.
pub fn task(code: &str) -> Arc<Payload> {
    let mut frames = frames(ask(json!({"do": "task", "code": code}))).into_iter();
    let header = frames.next().unwrap();
    Arc::new(Payload { kind: PayloadKind::Pickled, header, frames: frames.collect() })
}

/// The frames of the comm message that Python code calls `message`.
pub fn dumps(code: &str) -> Vec<Bytes> {
    frames(ask(json!({"do": "dumps", "code": code})))
}

/// `repr` of an expression about `message`, a comm message.
pub fn loads(frames: &[Bytes], expression: &str) -> String {
    let frames: Vec<String> = frames.iter().map(|frame| hexed(frame)).collect();
    let answer = ask(json!({"do": "loads", "frames": frames, "expression": expression}));
    answer.as_str().unwrap().to_owned()
}

fn check(payload: &Payload, pickled: bool, expression: &str) -> String {
    let frames: Vec<String> = payload.frames.iter().map(|frame| hexed(frame)).collect();
    let object = json!({"header": hexed(&payload.header), "frames": frames});
    let answer = ask(json!({"do": "check", "object": object, "pickled": pickled, "expression": expression}));
    answer.as_str().unwrap().to_owned()
}

/// `repr` of an expression about `x`, a result.
pub fn result(payload: &Payload, expression: &str) -> String {
    check(payload, false, expression)
}

/// `repr` of an expression about `x`, an exception or a traceback.
pub fn raised(payload: &Payload, expression: &str) -> String {
    check(payload, true, expression)
}
