//! The processes themselves: their end, their replacement, what they hold.

use super::deaths::deaths;
use super::fixture::*;
use super::forge;

#[tokio::test]
async fn nothing_leaks_descriptors() {
    let mut fixture = Fixture::new(1);
    let code = "def f(a):\n  import os\n  return b'z' * 200_000 + a[:0]\nargs = (TaskRef('in'),)";
    let count = "def f():\n  import os\n  return len(os.listdir('/proc/self/fd'))";
    let made = fixture.run("def f(): return b'x' * 100_000").await.object;
    let mut counts = Vec::new();
    for _ in 0..2 {
        for _ in 0..50 {
            let inputs = vec![("in".into(), made.clone())];
            fixture.pool.submit(job_with("y", code, inputs));
            fixture.finished().await;
        }
        deaths(&mut fixture, "import os\ndef f(): os.abort()").await;
        let there = fixture.run(count).await.object.to_payload();
        let here = std::fs::read_dir("/proc/self/fd").unwrap().count();
        counts.push((here, forge::result(&there, "x")));
    }
    // other tests of this process come and go: the daemon's own count may differ by their descriptors
    assert_eq!(counts[0].1, counts[1].1);
    assert!(counts[1].0 < counts[0].0 + 60, "{counts:?}");
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn an_idle_runner_exits_in_good_order() {
    let mut fixture = Fixture::new(1);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("left").display().to_string();
    fixture.run(&format!("import atexit\ndef f(): atexit.register(lambda: open({path:?}, 'x'))")).await;
    let pid = fixture.runner();
    fixture.pool.shutdown().await;
    assert!(std::path::Path::new(&path).exists());
    assert!(!is_alive(pid));
}

#[tokio::test]
async fn an_idle_runner_is_replaced_when_told_so() {
    let mut fixture = Fixture::new(1);
    let gate = Gate::new();
    fixture.pool.submit(job("busy", &gate.code("return 1")));
    gate.entered().await;
    let old = fixture.runner();
    assert!(!fixture.pool.replace(old), "it is busy");
    gate.open();
    fixture.finished().await;
    assert!(fixture.pool.replace(old) && !fixture.pool.replace(old));
    assert!(!fixture.pool.replace(fixture.process(ProcessKind::Zygote)));
    // no event tells of its end, and the next job finds another one
    assert_eq!(fixture.run("def f(): return 2").await.key, "x".into());
    assert!(fixture.pool.processes().iter().any(|p| p.kind == ProcessKind::Runner && p.pid != old));
    fixture.pool.shutdown().await;
    assert!(!is_alive(old));
}

#[tokio::test]
async fn a_dead_zygote_is_replaced() {
    let mut fixture = Fixture::new(1);
    fixture.run("def f(): return 1").await;
    let zygote = fixture.process(ProcessKind::Zygote);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(zygote as i32), nix::sys::signal::Signal::SIGKILL)
        .unwrap();
    loop {
        match fixture.next().await {
            Event::InterpreterFailed { text, attempts } => {
                assert!(text.contains("signal: 9") && attempts == 1, "{text} {attempts}");
                break;
            }
            Event::RunnerDied { cause, .. } => assert_eq!(cause, Cause::ZygoteLost),
            other => panic!("{other:?}"),
        }
    }
    fixture.pool.submit(job("x", "def f(): return 2"));
    loop {
        match fixture.next().await {
            Event::Finished(done) => break assert_eq!(done.key, "x".into()),
            Event::RunnerDied { cause, .. } => assert_eq!(cause, Cause::ZygoteLost),
            other => panic!("{other:?}"),
        }
    }
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn a_zygote_that_does_not_end_is_killed() {
    let mut fixture = Fixture::new(1);
    fixture.run("def f(): return 1").await;
    let (zygote, runner) = (fixture.process(ProcessKind::Zygote), fixture.runner());
    let stop = nix::sys::signal::Signal::SIGSTOP;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(zygote as i32), stop).unwrap();
    tokio::time::timeout(TIMEOUT, fixture.pool.shutdown()).await.unwrap();
    assert!(!is_alive(zygote));
    while is_alive(runner) {
        // its parent's death is what kills it
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn an_interpreter_without_distributed_is_reported() {
    let (sender, mut events) = mpsc::unbounded_channel();
    for (python, expected) in [("/nonexistent/python", "could not execute"), ("/bin/cat", "")] {
        let pool =
            Pool::start(Config { python: python.into(), ..config(1) }, Arena::new(), sender.clone()).unwrap();
        loop {
            match tokio::time::timeout(TIMEOUT, events.recv()).await.unwrap().unwrap() {
                Event::InterpreterFailed { text, .. } => break assert!(text.contains(expected), "{text}"),
                Event::Output(_) => {}
                other => panic!("{other:?}"),
            }
        }
        pool.shutdown().await;
    }
}

/// Not a test of its own: the daemon that the next one kills.
#[tokio::test]
#[ignore = "a process of another test"]
async fn doomed_daemon() {
    let mut fixture = Fixture::new(2);
    // a subprocess, and one that left its parent's session
    let code = "def f():\n  import subprocess, time\n  subprocess.Popen(['sleep', '987'])\n  \
subprocess.run(['sh', '-c', 'setsid sleep 987 &'])\n  \
        print('up', flush=True)\n  while True: pass";
    fixture.pool.submit(job("x", code));
    let ask =
        "import cloudpickle\ndef g(): return 1\nmessage = {'op': 'run', 'function': cloudpickle.dumps(g)}";
    fixture.pool.service_request(forge::dumps(ask), Target::Worker).await;
    fixture.wait_for_output("up").await;
    println!("ready");
    std::future::pending::<()>().await;
}

#[test]
fn nothing_outlives_a_killed_daemon() {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};

    let mut daemon = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "processes::doomed_daemon", "--ignored", "--nocapture"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(daemon.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("ready")));
    // all but the forge, which is the test's and not the pool's
    let expected = ["iqoqo-runner", "iqoqo-service", "iqoqo-zygote", "sleep", "sleep"];
    let patience = std::time::Instant::now() + TIMEOUT;
    let family = loop {
        let mut family = descendants(daemon.id());
        family.retain(|pid| name_of(*pid) != "python");
        let mut names: Vec<String> = family.iter().map(|pid| name_of(*pid)).collect();
        names.sort();
        if names == expected {
            break family;
        }
        // the shell's grandchild takes a moment to become what it is
        assert!(std::time::Instant::now() < patience, "{names:?}");
        std::thread::sleep(Duration::from_millis(10));
    };
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    let end = std::time::Instant::now() + Duration::from_secs(1);
    let mut left = family;
    while !left.is_empty() {
        assert!(
            std::time::Instant::now() < end,
            "left: {:?}",
            left.iter().map(|pid| name_of(*pid)).collect::<Vec<_>>()
        );
        std::thread::sleep(Duration::from_millis(5));
        left.retain(|pid| is_alive(*pid));
    }
}

/// Whether a process does anything yet; nobody may have taken note of its end.
fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(['Z', 'X']))
}

fn name_of(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}

/// Every process under `pid`.
fn descendants(pid: u32) -> Vec<u32> {
    let mut found = Vec::new();
    let mut parents = vec![pid];
    while let Some(parent) = parents.pop() {
        let tasks = std::fs::read_dir(format!("/proc/{parent}/task"));
        for task in tasks.into_iter().flatten().flatten() {
            let children = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
            parents.extend(children.split_whitespace().map(|pid| pid.parse::<u32>().unwrap()));
            found.extend(children.split_whitespace().map(|pid| pid.parse::<u32>().unwrap()));
        }
    }
    found
}
