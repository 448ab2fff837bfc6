//! Runners that die: who pays, and what the caller is told.

use super::fixture::*;
use super::forge;

#[tokio::test]
async fn a_crash_costs_its_task_two_attempts_and_nobody_else_anything() {
    let mut fixture = Fixture::new(1);
    fixture
        .pool
        .submit(job("x", "def f():\n  import os, sys\n  print('last words', file=sys.stderr)\n  os.abort()"));
    let mut pids = Vec::new();
    for _ in 0..2 {
        match fixture.next().await {
            Event::RunnerDied { pid, key, .. } => {
                assert_eq!(key, Some("x".into()));
                pids.push(pid);
            }
            Event::Failed(failed) => {
                for part in ["'x'", "signal 6 (SIGABRT)", "attempt 2", "last words"] {
                    assert!(failed.exception_text.contains(part), "{}", failed.exception_text);
                }
                assert!(forge::raised(&failed.exception, "type(x)").contains("RuntimeError"));
                pids.push(None);
            }
            other => panic!("{other:?}"),
        }
    }
    let Event::RunnerDied { .. } = fixture.next().await else { panic!("a second death") };
    assert_eq!(forge::result(&fixture.run("def f(): return 5").await.object.to_payload(), "x"), "5");
    fixture.pool.shutdown().await;
}

/// Ends of a runner that a job caused, up to the job's own event.
pub async fn deaths(fixture: &mut Fixture, code: &str) -> (Vec<Cause>, Failed) {
    fixture.pool.submit(job("x", code));
    let mut causes = Vec::new();
    let failed = loop {
        match fixture.next().await {
            Event::RunnerDied { cause, key, .. } => {
                assert_eq!(key, Some("x".into()));
                causes.push(cause);
            }
            Event::Failed(failed) => break *failed,
            other => panic!("{other:?}"),
        }
    };
    match fixture.next().await {
        Event::RunnerDied { cause, .. } => causes.push(cause),
        other => panic!("{other:?}"),
    }
    (causes, failed)
}

#[tokio::test]
async fn every_way_to_die_is_named() {
    let mut fixture = Fixture::new(1);
    for (code, cause, text) in [
        ("import os\ndef f(): os._exit(3)", Cause::Exit { code: 3 }, "exited with code 3"),
        ("import sys\ndef f(): sys.exit('bye')", Cause::Exit { code: 1 }, "bye"),
        ("import sys\ndef f(): sys.exit()", Cause::Exit { code: 0 }, "exited with code 0"),
        ("def f(): raise KeyboardInterrupt", Cause::Signal { number: 2 }, "SIGINT"),
        ("import os\ndef f(): os.kill(os.getpid(), 9)", Cause::Signal { number: 9 }, "SIGKILL"),
    ] {
        let (causes, failed) = deaths(&mut fixture, code).await;
        assert_eq!(causes, [cause.clone(), cause], "{code}");
        assert!(failed.exception_text.contains(text), "{}", failed.exception_text);
    }
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn a_task_that_closes_every_descriptor_harms_only_itself() {
    let mut fixture = Fixture::new(1);
    let (causes, _) = deaths(&mut fixture, "import os\ndef f(): os.closerange(0, 100)").await;
    assert_eq!(causes.len(), 2);
    fixture.run("def f(): return 1").await;
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn a_task_that_succeeds_at_its_second_attempt_is_a_success() {
    let mut fixture = Fixture::new(2);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tried").display().to_string();
    let code = format!(
        "import os\ndef f():\n  try: open({path:?}, 'x')\n  except FileExistsError: return 'again'\n  os.abort()"
    );
    fixture.pool.submit(job("x", &code));
    let Event::RunnerDied { cause, requeued, .. } = fixture.next().await else { panic!("a death") };
    assert_eq!((cause, requeued), (Cause::Signal { number: 6 }, vec![]));
    assert_eq!(forge::result(&fixture.finished().await.object.to_payload(), "x"), "'again'");
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn running_out_of_memory_is_a_memory_error_and_not_tried_again() {
    let mut fixture = Fixture::new(1);
    fixture.pool.submit(job("x", "import time\ndef f(): print('up', flush=True); time.sleep(60)"));
    fixture.wait_for_output("up").await;
    assert!(fixture.pool.kill_out_of_memory(&"x".into(), 3 << 30, 2 << 30));
    let failed = fixture.failed().await;
    for part in ["MemoryError", "3.00 GiB", "2.00 GiB"] {
        assert!(failed.exception_text.contains(part), "{}", failed.exception_text);
    }
    assert!(matches!(fixture.next().await, Event::RunnerDied { cause: Cause::OutOfMemory { .. }, .. }));
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn what_waits_behind_a_crash_goes_elsewhere_without_blame() {
    let mut fixture = Fixture::with(Config { attempts: 1, ..config(1) });
    let gate = Gate::new();
    fixture.pool.submit(job("x", &gate.code("import os; os.abort()")));
    gate.entered().await;
    fixture.pool.prefetch(job("y", "def f(): return 1")).unwrap();
    fixture.pool.prefetch(job("z", "def f(): return 1")).unwrap();
    assert!(fixture.pool.prefetch(job("full", "def f(): return 1")).is_err());
    gate.open();
    assert_eq!(fixture.failed().await.key, "x".into());
    let Event::RunnerDied { requeued, .. } = fixture.next().await else { panic!("a death") };
    let requeued: Vec<Key> = requeued.into_iter().map(|(key, _)| key).collect();
    assert_eq!(requeued, ["y".into(), "z".into()]);
    assert_eq!(fixture.pool.try_recall(&"y".into()), Recall::Unknown);
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn nonsense_on_the_socket_costs_the_runner_its_life() {
    let mut fixture = Fixture::with(Config { attempts: 1, ..config(1) });
    let code = "import os, socket, stat, struct, time\n\
        def f(data):\n  for fd in range(3, 20):\n    try:\n      s = socket.socket(fileno=os.dup(fd))\n    \
        except OSError: continue\n    s.send(data)\n  time.sleep(60)\n";
    for garbage in [
        "struct.pack('<II', 0xffffffff, 0)",
        "struct.pack('<II', 5, 200)",
        "struct.pack('<II', 5, 0) + b'xxxxx'",
        // a result of a task that is not there, and one in a descriptor that did not come
        "struct.pack('<II', 3, 0) + bytes([0x92, 22, 99])",
        "struct.pack('<II', 6, 1) + bytes([0x92, 22, 1, 1, 1, 1])",
    ] {
        let (causes, failed) = deaths(&mut fixture, &format!("{code}args = ({garbage},)")).await;
        assert!(matches!(causes[..], [Cause::Nonsense { .. }]), "{causes:?}");
        assert!(failed.exception_text.contains("broke the protocol"), "{}", failed.exception_text);
    }
    // an object in memory that is not sealed
    let unsealed = "import array, os, msgpack, socket, struct, time\ndef f():\n  fd = os.memfd_create('x')\n  \
        os.truncate(fd, 100)\n  now = time.time()\n  \
        body = msgpack.packb([20, 1, [0, b'h', [[0, 0, 100]]], 1, b't', 'int', now, now, 1, 0.0])\n  \
        for i in range(3, 20):\n    try:\n      s = socket.socket(fileno=os.dup(i))\n    \
        except OSError: continue\n    socket.send_fds(s, [struct.pack('<II', len(body), 1) + body], [fd])\n  \
        time.sleep(60)";
    let (causes, _) = deaths(&mut fixture, unsealed).await;
    assert!(matches!(&causes[..], [Cause::Nonsense { text }] if text.contains("sealed")), "{causes:?}");
    fixture.run("def f(): return 1").await;
    fixture.pool.shutdown().await;
}
