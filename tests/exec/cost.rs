//! What a trivial task costs. Run alone, in release: `cargo test --release --test exec -- --ignored --nocapture cost`.

use std::fs;
use std::time::Instant;

use super::fixture::*;

const TASKS: u32 = 20_000;

/// Nanoseconds a process was on a CPU, all its threads together.
fn cpu(pid: u32) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let on_cpu = |task: fs::DirEntry| -> u64 {
        let text = fs::read_to_string(task.path().join("schedstat")).unwrap();
        text.split(' ').next().unwrap().parse().unwrap()
    };
    tasks.map(|task| on_cpu(task.unwrap())).sum()
}

#[tokio::test]
#[ignore = "a measurement"]
async fn cost_of_a_trivial_task() {
    let mut fixture = Fixture::new(1);
    fixture.run("def f(): return 1").await;
    let template = job("x", "from operator import add as f\nargs = (1, 2)");
    let make = |i: u32| Job { key: format!("add-{i}").into(), ..template.clone() };
    let processes = fixture.pool.processes();
    let runner = processes.iter().find(|process| process.kind == ProcessKind::Runner).unwrap().pid;

    for in_flight in [1, 3] {
        let (start, runner_cpu, daemon_cpu) = (Instant::now(), cpu(runner), cpu(std::process::id()));
        let mut sent = 0;
        fixture.pool.submit(make(sent));
        sent += 1;
        for done in 0..TASKS {
            while sent < TASKS && sent < done + in_flight && fixture.pool.prefetch(make(sent)).is_ok() {
                sent += 1;
            }
            loop {
                match fixture.next().await {
                    Event::Finished(_) => break,
                    Event::Started { .. } => {}
                    other => panic!("{other:?}"),
                }
            }
            if sent == done + 1 && sent < TASKS {
                fixture.pool.submit(make(sent));
                sent += 1;
            }
        }
        let each = |nanoseconds: u64| nanoseconds as f64 / 1e3 / f64::from(TASKS);
        println!(
            "{in_flight} in flight: wall {:.1} µs, runner {:.1} µs, daemon and test {:.1} µs a task",
            each(start.elapsed().as_nanos() as u64),
            each(cpu(runner) - runner_cpu),
            each(cpu(std::process::id()) - daemon_cpu),
        );
    }
    fixture.pool.shutdown().await;
}

/// What it costs to make and to read one array, by its size.
#[tokio::test]
#[ignore = "a measurement"]
async fn cost_of_an_array() {
    const ROUNDS: u32 = 1000;
    let mut fixture = Fixture::new(1);
    fixture.run("import numpy\ndef f(): return 1").await;
    let runner = fixture.runner();
    for kib in [1, 70, 120, 250, 500, 1000, 4000] {
        let rounds = (ROUNDS * 100 / kib).clamp(20, ROUNDS);
        let code = format!("from numpy import ones as f\nargs = ({kib} * 1024, 'u1')");
        let template = job("x", &code);
        let mut object = None;
        let reader = job_with("y", "from numpy import sum as f\nargs = (TaskRef('in'),)", Vec::new());
        let mut cost = [0.0; 6];
        for part in [0, 3] {
            let (start, there, here) = (Instant::now(), cpu(runner), cpu(std::process::id()));
            for _ in 0..rounds {
                if part == 0 {
                    fixture.pool.submit(template.clone());
                    object = Some(fixture.finished().await.object);
                } else {
                    let inputs = vec![("in".into(), object.clone().unwrap())];

                    fixture.pool.submit(Job { inputs, ..reader.clone() });
                    fixture.finished().await;
                }
            }
            let each = |nanoseconds: u64| nanoseconds as f64 / 1e3 / f64::from(rounds);
            cost[part] = each(start.elapsed().as_nanos() as u64);
            cost[part + 1] = each(cpu(runner) - there);
            cost[part + 2] = each(cpu(std::process::id()) - here);
        }
        println!("{kib} KiB: made, then read: wall, runner, daemon and test: {cost:.0?} µs");
    }
    fixture.pool.shutdown().await;
}
