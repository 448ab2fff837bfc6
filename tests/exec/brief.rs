//! Brief tasks: several in one runner, several results in one message, and what happens when one is not brief.

use super::fixture::*;

const NOTHING: &str = "def f(): return 1";

fn brief(key: &str, code: &str) -> Job {
    Job { brief: true, ..job(key, code) }
}

/// Submits jobs as one turn of the driver does.
fn submit(fixture: &Fixture, jobs: impl IntoIterator<Item = Job>) {
    jobs.into_iter().for_each(|job| fixture.pool.submit(job));
    fixture.pool.flush();
}

#[tokio::test]
async fn brief_tasks_share_a_runner_up_to_a_number() {
    let mut fixture = Fixture::new(2);
    fixture.run(NOTHING).await;
    submit(&fixture, ["a", "b", "c"].map(|key| brief(key, NOTHING)));
    let mut threads = Vec::new();
    for key in ["a", "b", "c"] {
        let finished = fixture.finished().await;
        assert_eq!(finished.key, key.into());
        threads.push(finished.thread);
    }
    assert_eq!(threads, [threads[0]; 3]);

    submit(&fixture, (0..6).map(|i| brief(&format!("d{i}"), NOTHING)));
    let mut threads = std::collections::HashSet::new();
    for _ in 0..6 {
        threads.insert(fixture.finished().await.thread);
    }
    assert_eq!(threads.len(), 2, "six are enough for two runners");
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn a_task_behind_one_that_is_not_brief_runs_elsewhere() {
    let mut fixture = Fixture::new(2);
    fixture.run(NOTHING).await;
    let gate = Gate::new();
    submit(&fixture, [brief("slow", &gate.code("return 0")), brief("quick", NOTHING)]);
    gate.entered().await;
    assert_eq!(fixture.finished().await.key, "quick".into());
    gate.open();
    assert_eq!(fixture.finished().await.key, "slow".into());
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn a_result_does_not_wait_for_a_task_that_is_not_brief() {
    let mut fixture = Fixture::new(1);
    fixture.run(NOTHING).await;
    let gate = Gate::new();
    submit(&fixture, [brief("quick", NOTHING), brief("slow", &gate.code("return 0"))]);
    gate.entered().await;
    assert_eq!(fixture.finished().await.key, "quick".into());
    gate.open();
    assert_eq!(fixture.finished().await.key, "slow".into());
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn a_result_does_not_wait_either_when_the_tasks_came_behind_a_long_one() {
    let mut fixture = Fixture::new(1);
    let (first, second) = (Gate::new(), Gate::new());
    fixture.pool.submit(job("long", &first.code("return 0")));
    first.entered().await;
    for job in [brief("quick", NOTHING), brief("slow", &second.code("return 0"))] {
        fixture.pool.prefetch(job).unwrap();
    }
    fixture.pool.flush();
    first.open();
    second.entered().await;
    let mut finished = Vec::new();
    while finished.len() < 2 {
        match fixture.next().await {
            Event::Finished(done) => finished.push(done.key),
            Event::Started { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(finished, ["long".into(), "quick".into()]);
    second.open();
    while !matches!(fixture.next().await, Event::Finished(done) if done.key == "slow".into()) {}
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn a_crash_costs_the_results_that_waited_for_it_nothing_but_time() {
    let mut fixture = Fixture::with(Config { attempts: 1, ..config(1) });
    fixture.run(NOTHING).await;
    let crash = brief("crash", "import os\ndef f(): os.abort()");
    submit(&fixture, [brief("before", NOTHING), crash, brief("after", NOTHING)]);
    let failed = fixture.failed().await;
    assert_eq!(failed.key, "crash".into());
    assert!(matches!(fixture.next().await, Event::RunnerDied { key, .. } if key == Some("crash".into())));
    assert_eq!(fixture.finished().await.key, "before".into());
    assert_eq!(fixture.finished().await.key, "after".into());
    fixture.pool.shutdown().await;
}
