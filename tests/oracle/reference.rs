//! The Python process that runs `reference.py`, and what it answers.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::{Value as Json, json};

use crate::world::World;

/// How often each transition was made: from, to, and what the task was doing.
pub type Coverage = BTreeMap<(String, String, String), u64>;

/// Dask's own state machine behind a pipe. It ends with this value.
pub struct Reference {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// Dask's transition table.
    pub table: Vec<(String, String)>,
    pub version: String,
}

/// What Dask's side says to a sequence.
pub struct Answer {
    /// One for each event up to an error: a digest, or the text itself where it was asked for.
    pub steps: Vec<Json>,
    /// What the event after those raised.
    pub error: Option<String>,
}

impl Reference {
    /// Starts the interpreter that `PYTHON` names, or the one of `.venv`.
    pub fn start() -> Reference {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let python = std::env::var_os("PYTHON").map_or_else(|| root.join(".venv/bin/python"), PathBuf::from);
        let child = Command::new(&python)
            .arg(root.join("tests/oracle/reference.py"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let mut child = child.unwrap_or_else(|error| {
            panic!(
                "the oracle needs a Python with distributed: {} does not run ({error}); \
                 make .venv, or name an interpreter in PYTHON",
                python.display()
            )
        });
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut reference = Reference { child, input, output, table: Vec::new(), version: String::new() };
        let hello = reference.read();
        reference.table = serde_json::from_value(hello["table"].clone()).unwrap();
        reference.version = hello["version"].as_str().unwrap().to_owned();
        reference
    }

    /// Hands it a sequence; the answer is read later.
    pub fn send(&mut self, world: &World, events: &[Json], verbose: bool) {
        let request = json!({"setup": world.to_json(), "events": events, "verbose": verbose});
        writeln!(self.input, "{request}").expect("the Python side has ended; see its error above");
    }

    pub fn receive(&mut self, coverage: &mut Coverage) -> Answer {
        let mut answer = self.read();
        for item in answer["coverage"].as_array().unwrap() {
            let (start, finish, detail, n): (String, String, String, u64) =
                serde_json::from_value(item.clone()).unwrap();
            *coverage.entry((start, finish, detail)).or_default() += n;
        }
        let steps = match answer["answers"].take() {
            Json::Array(steps) => steps,
            other => panic!("no list of answers: {other}"),
        };
        Answer { steps, error: answer["error"].as_str().map(str::to_owned) }
    }

    fn read(&mut self) -> Json {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "the Python side has ended without an answer; see its error above");
        serde_json::from_str(&line).unwrap()
    }
}

impl Drop for Reference {
    fn drop(&mut self) {
        // it may have ended by itself
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
