//! A Python process on the other end of a test: started with the project's interpreter, gone when the test is.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// How long a script may take for one line.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Python {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: mpsc::Receiver<String>,
}

impl Python {
    /// Runs `tests/net/<script>` with the given arguments.
    pub fn start(script: &str, args: &[&str]) -> Python {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut child = Command::new(root.join(".venv/bin/python"))
            .arg(root.join("tests/net").join(script))
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect(".venv/bin/python exists: make it with the pinned test requirements");
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().expect("stdout is piped");
        Python { child, stdin, lines: read_lines(stdout) }
    }

    /// The next line the script prints.
    pub async fn line(&mut self) -> String {
        let lines = std::mem::replace(&mut self.lines, mpsc::channel().1);
        let (line, lines) = tokio::task::spawn_blocking(move || (lines.recv_timeout(PATIENCE), lines))
            .await
            .expect("the reader does not panic");
        self.lines = lines;
        line.expect("the script prints a line in time")
    }

    /// Tells the script to go on.
    #[allow(dead_code)] // not every test binary has a dialogue
    pub fn tell(&mut self, text: &str) {
        let stdin = self.stdin.as_mut().expect("stdin is piped");
        writeln!(stdin, "{text}").expect("the script reads");
    }

    /// Waits until the script has printed `ok`, the sign that all its own checks held.
    pub async fn succeeds(mut self) {
        assert_eq!(self.line().await, "ok");
    }
}

impl Drop for Python {
    fn drop(&mut self) {
        // It may have ended by itself; either way nothing is left of it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_lines(stdout: ChildStdout) -> mpsc::Receiver<String> {
    let (send, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if send.send(line).is_err() {
                break;
            }
        }
    });
    lines
}
