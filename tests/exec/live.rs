//! Results that stay in the runner that made them until somebody else needs them.

use iqoqo_dask_worker::exec::Kept;
use iqoqo_dask_worker::store::Live;

use super::fixture::*;
use super::forge;

const MADE: &str = "def f():\n  import numpy\n  return numpy.ones(1_000_000)";
const USED: &str = "def f(a):\n  import os\n  a += 1\n  return os.getpid(), a.sum()\nargs = (TaskRef('in'),)";

async fn kept(fixture: &mut Fixture) -> Kept {
    match fixture.next().await {
        Event::Kept(kept) => *kept,
        other => panic!("{other:?}"),
    }
}

/// A job that uses a kept result.
fn user(key: &str, code: &str, live: &Live) -> Job {
    let live = Live::clone(live);
    let code = code.replace("'in'", &format!("{:?}", live.key().to_string().trim_matches('\'')));
    Job { live: vec![live], ..job(key, &code) }
}

fn keeping(slots: usize) -> Fixture {
    let fixture = Fixture::new(slots);
    fixture.pool.let_keep(100_000_000);
    fixture
}

async fn make(fixture: &mut Fixture, key: &str) -> Live {
    fixture.pool.submit(job(key, MADE));
    let kept = kept(fixture).await;
    assert_eq!((kept.live.key(), kept.live.nbytes(), kept.run_id), (&key.into(), 8_000_000, RunId(7)));
    kept.live
}

#[tokio::test]
async fn a_kept_result_is_used_where_it_is() {
    let mut fixture = keeping(2);
    let live = make(&mut fixture, "in").await;
    let mut answers = Vec::new();
    for _ in 0..2 {
        fixture.pool.submit(user("y", USED, &live));
        answers.push(forge::result(&fixture.finished().await.object.to_payload(), "x"));
    }
    // the same array each time, as in a worker of Dask's: what a task writes to its input is seen by the next
    assert!(answers[0].ends_with("2000000.0))") && answers[1].ends_with("3000000.0))"), "{answers:?}");
    assert!(live.is_only_there());
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn a_kept_result_is_published_for_another_runner() {
    let mut fixture = keeping(2);
    let live = make(&mut fixture, "in").await;
    let gate = Gate::new();
    fixture.pool.submit(Job { live: vec![live.clone()], ..job("busy", &gate.code("return 0")) });
    gate.entered().await;
    fixture.pool.submit(user("y", USED, &live));
    assert!(matches!(fixture.next().await, Event::Published { live: published } if published.is_same(&live)));
    let elsewhere = fixture.finished().await;
    assert!(forge::result(&elsewhere.object.to_payload(), "x").ends_with("2000000.0))"));
    // what others have seen does not change
    let published = live.object().unwrap();
    assert_eq!(forge::result(&published.to_payload(), "float(x.sum())"), "1000000.0");
    gate.open();
    fixture.finished().await;
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn a_kept_result_is_published_while_its_runner_is_busy_and_then_forgotten() {
    let mut fixture = keeping(1);
    let live = make(&mut fixture, "in").await;
    let gate = Gate::new();
    fixture.pool.submit(job("busy", &gate.code("return 0")));
    gate.entered().await;
    let object = live.published().await.unwrap();
    assert_eq!(object.shared_bytes(), 8_000_000);
    assert!(matches!(fixture.next().await, Event::Published { .. }));
    gate.open();
    fixture.finished().await;
    drop(live);
    // it is told by another connection than that of its tasks
    let wait = "def f():\n  import gc, time\n  runner, = (o for o in gc.get_objects() if hasattr(type(o), '_forget'))\n  \
        while runner.kept: time.sleep(0.001)\n  return runner.kept_bytes";
    let left = fixture.run(wait).await.object.to_payload();
    assert_eq!(forge::result(&left, "x"), "0");
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn kept_results_die_with_their_runner_and_their_users_go_back() {
    let mut fixture = keeping(1);
    let (live, other) = (make(&mut fixture, "in").await, make(&mut fixture, "other").await);
    live.published().await.unwrap();
    assert!(matches!(fixture.next().await, Event::Published { .. }));
    let job = |key: &str| Job { live: vec![other.clone()], ..job(key, "def f(): import os; os._exit(3)") };
    fixture.pool.submit(job("y"));
    fixture.pool.prefetch(job("z")).unwrap();
    match fixture.next().await {
        Event::Lost { results } => assert!(results.len() == 1 && results[0].is_same(&other)),
        event => panic!("{event:?}"),
    }
    assert!(matches!(fixture.next().await, Event::Reschedule { key, .. } if key == "y".into()));
    assert!(matches!(fixture.next().await, Event::RunnerDied { requeued, .. } if requeued.len() == 1));
    assert!(other.is_lost() && live.object().is_some());

    // made again, it meets the same job, which has crashed once already
    let again = make(&mut fixture, "other").await;
    fixture.pool.submit(Job { live: vec![again], ..job("y") });
    loop {
        match fixture.next().await {
            Event::Failed(failed) => {
                assert!(failed.exception_text.contains("attempt 2"), "{}", failed.exception_text);
                break;
            }
            Event::Lost { .. } | Event::RunnerDied { .. } => {}
            event => panic!("{event:?}"),
        }
    }
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn runners_keep_no_more_than_they_may_and_only_what_is_large() {
    let mut fixture = Fixture::new(1);
    assert_eq!(fixture.run(MADE).await.object.shared_bytes(), 8_000_000);
    fixture.pool.let_keep(10_000_000);
    let first = make(&mut fixture, "in").await;
    assert_eq!(fixture.run(MADE).await.object.shared_bytes(), 8_000_000);
    assert_eq!(fixture.run("def f(): return b'x' * 1_000_000").await.object.shared_bytes(), 1_000_000);
    drop(first);
    // the runner hears of it beside its tasks, perhaps after the next one
    let second = loop {
        fixture.pool.submit(job("again", MADE));
        match fixture.next().await {
            Event::Kept(kept) => break kept.live,
            Event::Finished(_) => {}
            other => panic!("{other:?}"),
        }
    };
    fixture.pool.publish(None);
    assert_eq!(second.published().await.unwrap().nbytes(), 8_000_000);
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn a_result_that_cannot_be_serialized_serves_those_who_are_there() {
    let mut fixture = keeping(1);
    let code = "import threading, array\nclass Odd:\n  def __init__(self): self.lock = threading.Lock()\n  \
        def __sizeof__(self): return 2_000_000\ndef f(): return Odd()";
    fixture.pool.submit(job("in", code));
    let live = kept(&mut fixture).await.live;
    fixture.pool.submit(user("y", "def f(a): return a.lock.locked()\nargs = (TaskRef('in'),)", &live));
    assert_eq!(forge::result(&fixture.finished().await.object.to_payload(), "x"), "False");
    // to others it is an object that raises when it is opened, as with Dask
    assert!(live.published().await.is_some());
    fixture.pool.shutdown().await;
}
