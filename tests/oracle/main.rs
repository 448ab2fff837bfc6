//! The oracle: our state machine and Dask's own, event by event.
//!
//! Random but legal sequences of events go to both. After each event the instructions (as multisets), the new lines of
//! the transition log and the whole observable state must be the same, and the invariants must hold on both sides.
//! `ORACLE_EVENTS` sets how many events (100,000), `ORACLE_SEED` the seed (a number, or `random`), `PYTHON` the interpreter.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod compare;
mod event;
mod generate;
mod legal;
mod lost;
mod reference;
mod text;
mod world;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use fastrand::Rng;

use compare::{Run, report};
use reference::{Coverage, Reference};
use world::{Outcome, Worker, World};

/// Events of one sequence, that is, of one worker's life.
const SEQUENCE: usize = 250;

/// Transitions of Dask's table that no legal sequence reaches, and why.
const UNREACHABLE: &[(&str, &str, &str)] = &[
    (
        "cancelled",
        "missing",
        "missing is recommended for tasks in fetch, and in flight when their transfer has ended, and nothing comes in between",
    ),
    ("missing", "error", "errors come from computations and transfers, and a missing task has neither"),
    (
        "released",
        "error",
        "only through memory, when a transfer fails over which the key was scattered; Dask's invariants do not hold then",
    ),
];

#[test]
fn same_as_dask() {
    let wanted: usize = std::env::var("ORACLE_EVENTS").map_or(100_000, |n| n.parse().unwrap());
    let seed: u64 = match std::env::var("ORACLE_SEED").as_deref() {
        Ok("random") => Rng::new().u64(..),
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => 1,
    };
    println!("ORACLE_SEED={seed}");
    let began = Instant::now();
    let totals = Totals::default();
    let threads = std::thread::available_parallelism().map_or(2, |n| n.get().min(8));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| compare_sequences(seed, wanted, &totals));
        }
    });
    let failure = totals.failure.into_inner().unwrap();
    assert!(failure.is_none(), "ORACLE_SEED={seed}: {}", failure.unwrap());
    let events = totals.events.into_inner();
    println!(
        "{events} events in {} sequences, no difference, {:.0} s",
        totals.sequences.into_inner(),
        began.elapsed().as_secs_f64()
    );
    println!("dead ends, where Dask raises: {:?}", totals.dead_ends.into_inner().unwrap());
    check_coverage(&totals.coverage.into_inner().unwrap(), &totals.table.into_inner().unwrap());
}

#[derive(Default)]
struct Totals {
    sequences: AtomicU64,
    events: AtomicUsize,
    failure: Mutex<Option<String>>,
    coverage: Mutex<Coverage>,
    table: Mutex<Vec<(String, String)>>,
    dead_ends: Mutex<BTreeMap<&'static str, usize>>,
}

/// One thread's share: draws a sequence while Python works on the one before.
fn compare_sequences(seed: u64, wanted: usize, totals: &Totals) {
    let mut reference = Reference::start();
    totals.table.lock().unwrap().clone_from(&reference.table);
    let mut coverage = Coverage::new();
    let mut pending: Option<(u64, World, Run)> = None;
    loop {
        let enough =
            totals.events.load(Ordering::Relaxed) >= wanted || totals.failure.lock().unwrap().is_some();
        let next = (!enough).then(|| {
            let number = totals.sequences.fetch_add(1, Ordering::Relaxed);
            let (world, run) = draw(seed, number, totals);
            totals.events.fetch_add(run.events.len(), Ordering::Relaxed);
            (number, world, run)
        });
        if let Some((number, world, run)) = pending.take() {
            let answer = reference.receive(&mut coverage);
            if let Some(at) = run.difference(&answer.steps, answer.error.as_deref()) {
                let story = report(&mut reference, &world, &run.events[..=at]);
                totals
                    .failure
                    .lock()
                    .unwrap()
                    .get_or_insert(format!("sequence {number}, step {at}\n{story}"));
            }
        }
        pending = next;
        let Some((_, world, run)) = &pending else { break };
        reference.send(world, &run.requests, false);
    }
    let mut all = totals.coverage.lock().unwrap();
    for (transition, n) in coverage {
        *all.entry(transition).or_default() += n;
    }
}

fn draw(seed: u64, number: u64, totals: &Totals) -> (World, Run) {
    let mut rng = Rng::with_seed(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(number));
    let world = World::random(&mut rng);
    let mut worker = Worker::new(&world);
    let mut run = Run::default();
    while run.events.len() < SEQUENCE {
        let event = generate::next(&mut rng, &worker);
        let outcome = worker.apply(&event);
        if let Outcome::Dead(_, why) = &outcome {
            let kind =
                if why.contains("Repaired") { "repaired here" } else { "broken invariant on both sides" };
            *totals.dead_ends.lock().unwrap().entry(kind).or_default() += 1;
            run.push(event, outcome);
            break;
        }
        run.push(event, outcome);
    }
    (world, run)
}

/// Every transition of Dask's table must have been made, but those that can't be.
fn check_coverage(coverage: &Coverage, table: &[(String, String)]) {
    let made = |start: &str, finish: &str| coverage.keys().any(|(s, f, _)| s == start && f == finish);
    let missed: Vec<_> = table
        .iter()
        .filter(|(start, finish)| !made(start, finish))
        .filter(|(start, finish)| !UNREACHABLE.iter().any(|(s, f, _)| s == start && f == finish))
        .collect();
    println!("{} transitions in Dask's table, {} kinds of them made", table.len(), coverage.len());
    for ((start, finish, detail), n) in coverage {
        println!("  {start} -> {finish} {detail}: {n}");
    }
    for (start, finish, why) in UNREACHABLE {
        println!("  {start} -> {finish}: {why}");
        assert!(!made(start, finish), "{start} -> {finish} can be reached after all");
    }
    assert!(missed.is_empty(), "never made: {missed:?}");
}
