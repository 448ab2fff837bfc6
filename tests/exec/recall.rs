//! Taking back tasks: before they start, and while they run.

use super::fixture::*;
use super::forge;

#[tokio::test]
async fn prefetched_tasks_start_in_order_and_can_be_recalled() {
    let mut fixture = Fixture::new(1);
    let gate = Gate::new();
    fixture.pool.submit(job("a", &gate.code("return 0")));
    gate.entered().await;
    assert_eq!(fixture.pool.try_recall(&"a".into()), Recall::Started);
    for key in ["b", "c"] {
        fixture.pool.prefetch(job(key, "def f(): return 1")).unwrap();
    }
    assert_eq!(fixture.pool.prefetch_room(), 0);
    assert_eq!(fixture.pool.try_recall(&"b".into()), Recall::Recalled);
    assert_eq!(fixture.pool.try_recall(&"b".into()), Recall::Unknown);
    gate.open();
    assert!(matches!(fixture.next().await, Event::Started { key, .. } if key == "c".into()));
    assert_eq!(fixture.finished().await.key, "a".into());
    assert_eq!(fixture.finished().await.key, "c".into());
    // a recalled task may come again
    assert_eq!(forge::result(&fixture.run("def f(): return 8").await.object.to_payload(), "x"), "8");
    fixture.pool.shutdown().await;
}

/// Recalls hit tasks at every moment of their lives; each must either run or be recalled, never both, never neither.
#[tokio::test]
async fn a_recall_never_loses_or_doubles_a_task() {
    let mut fixture = Fixture::new(2);
    fixture.run("def f(): return 1").await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log").display().to_string();
    let code = "import os\ndef f(path, key):\n  fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)\n  \
        os.write(fd, key.encode() + b' ')\n  os.close(fd)\n";
    let template: Vec<Job> =
        (0..2000).map(|i| job(&format!("t{i}"), &format!("{code}args = ({path:?}, 't{i}')"))).collect();
    let mut waiting: std::collections::HashSet<Key> = std::collections::HashSet::new();
    let (mut ran, mut recalled, mut skipped) = (Vec::new(), Vec::new(), 0);
    let mut jobs = template.into_iter();
    loop {
        while waiting.len() < 6 {
            let Some(job) = jobs.next() else { break };
            let key = job.key.clone();
            if let Err(job) = fixture.pool.prefetch(job) {
                fixture.pool.submit(job);
            }
            waiting.insert(key.clone());
            if fastrand::bool() {
                std::thread::sleep(Duration::from_micros(fastrand::u64(0..300)));
                if fixture.pool.try_recall(&key) == Recall::Recalled {
                    waiting.remove(&key);
                    recalled.push(key);
                }
            }
        }
        if waiting.is_empty() {
            break;
        }
        match fixture.next().await {
            Event::Finished(done) => {
                assert!(waiting.remove(&done.key), "{:?} ran twice", done.key);
                ran.push(done.key);
            }
            Event::Skipped { key, .. } => {
                assert!(waiting.remove(&key), "{key:?} was skipped after its end");
                skipped += 1;
            }
            Event::Started { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    let log = std::fs::read_to_string(&path).unwrap();
    let mut logged: Vec<Key> = log.split_whitespace().map(Key::from).collect();
    logged.sort();
    ran.sort();
    println!("{} ran, {} were recalled, {skipped} skipped in time", ran.len(), recalled.len());
    assert_eq!(logged, ran);
    assert_eq!(ran.len() + recalled.len() + skipped, 2000);
    assert!(recalled.len() > 10 && ran.len() > 10, "the race was never run");
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn a_cancelled_task_is_interrupted_and_its_runner_lives_on() {
    let mut fixture = Fixture::new(1);
    fixture.pool.submit(job("x", "import time\ndef f(): print('up', flush=True); time.sleep(60)"));
    fixture.wait_for_output("up").await;
    let pid = fixture.runner();
    fixture.pool.cancel(&"x".into());
    assert!(
        matches!(fixture.next().await, Event::Skipped { key, run_id } if key == "x".into() && run_id == RunId(7))
    );
    fixture.run("def f(): return 1").await;
    assert_eq!(fixture.runner(), pid);
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn a_cancelled_task_that_will_not_stop_is_killed() {
    let mut fixture = Fixture::with(Config { cancel_grace: Duration::from_millis(50), ..config(1) });
    let code = "import time\ndef f():\n  while True:\n    try: print('up', flush=True); time.sleep(60)\n    \
        except BaseException: pass";
    fixture.pool.submit(job("x", code));
    fixture.wait_for_output("up").await;
    fixture.pool.cancel(&"x".into());
    assert!(matches!(fixture.next().await, Event::Skipped { .. }));
    assert!(matches!(fixture.next().await, Event::RunnerDied { cause: Cause::Cancelled, .. }));
    fixture.pool.shutdown().await;
}
