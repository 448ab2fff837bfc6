//! One sequence on both sides, and what to say when they differ.

use std::fmt::Write;

use serde_json::Value as Json;

use crate::event::Ev;
use crate::reference::{Coverage, Reference};
use crate::text::crc32;
use crate::world::{Outcome, Worker, World};

/// A sequence as our side has run it.
#[derive(Default)]
pub struct Run {
    pub events: Vec<Ev>,
    /// The events as the other side is to get them.
    pub requests: Vec<Json>,
    /// For each event what both must agree on, or why ours could not handle it (the last one only).
    pub steps: Vec<Result<String, String>>,
}

impl Run {
    pub fn push(&mut self, event: Ev, outcome: Outcome) {
        let (request, step) = match outcome {
            Outcome::Illegal => return,
            Outcome::Done(request, text) => (request, Ok(text)),
            Outcome::Dead(request, why) => (request, Err(why)),
        };
        self.events.push(event);
        self.requests.push(request);
        self.steps.push(step);
    }

    /// Runs those of the events that are legal.
    pub fn replay(world: &World, events: &[Ev]) -> Run {
        let mut worker = Worker::new(world);
        let mut run = Run::default();
        for event in events {
            let outcome = worker.apply(event);
            let dead = matches!(outcome, Outcome::Dead(..));
            run.push(event.clone(), outcome);
            if dead {
                break;
            }
        }
        run
    }

    /// The first step at which the two sides differ.
    pub fn difference(&self, steps: &[Json], error: Option<&str>) -> Option<usize> {
        let differs = |(i, ours): &(usize, &Result<String, String>)| match (ours, steps.get(*i)) {
            (Ok(ours), Some(Json::String(theirs))) => ours != theirs,
            (Ok(ours), Some(theirs)) => theirs.as_u64() != Some(crc32(ours).into()),
            (Err(_), None) => error.is_none(),
            (Ok(_), None) | (Err(_), Some(_)) => true,
        };
        self.steps.iter().enumerate().find(differs).map(|(i, _)| i)
    }
}

/// Cuts a sequence down, event by event, as long as the two sides still differ; tells all about what is left.
pub fn report(reference: &mut Reference, world: &World, events: &[Ev]) -> String {
    let mut run = Run::replay(world, events);
    let mut chunk = run.events.len().div_ceil(2);
    while chunk > 0 {
        let mut start = 0;
        while start < run.events.len() {
            let mut fewer = run.events.clone();
            fewer.drain(start..(start + chunk).min(fewer.len()));
            let candidate = Run::replay(world, &fewer);
            match differs(reference, world, &candidate) {
                Some(at) => run = Run::replay(world, &candidate.events[..=at]),
                None => start += chunk,
            }
        }
        chunk /= 2;
    }
    tell(reference, world, &run)
}

fn differs(reference: &mut Reference, world: &World, run: &Run) -> Option<usize> {
    reference.send(world, &run.requests, false);
    let answer = reference.receive(&mut Coverage::new());
    run.difference(&answer.steps, answer.error.as_deref())
}

fn tell(reference: &mut Reference, world: &World, run: &Run) -> String {
    reference.send(world, &run.requests, true);
    let answer = reference.receive(&mut Coverage::new());
    let mut text = String::from("keys:\n");
    for (i, key) in world.keys.iter().enumerate() {
        let (deps, needs) = (&world.dependencies[i], &world.restrictions[i]);
        writeln!(text, "  k{i} = {key:?}, depends on {deps:?}, needs {needs:?}, actor: {}", world.actors[i])
            .unwrap();
    }
    writeln!(text, "workers: {:?}\n{:#?}\nevents:", world.workers, world.config).unwrap();
    for (i, event) in run.events.iter().enumerate() {
        writeln!(text, "  {i}: {event:?}\n      {}", run.requests[i]).unwrap();
    }
    let Some(at) = run.difference(&answer.steps, answer.error.as_deref()) else {
        return text + "the two sides agree when it is run again: something depends on chance";
    };
    let ours = run.steps[at].clone().unwrap_or_else(|error| format!("error: {error}"));
    let theirs = match answer.steps.get(at) {
        Some(step) => step.as_str().unwrap_or_default().to_owned(),
        None => format!("error: {}", answer.error.unwrap_or_default()),
    };
    writeln!(text, "step {at}:").unwrap();
    let (ours, theirs): (Vec<_>, Vec<_>) = (ours.lines().collect(), theirs.lines().collect());
    for line in &theirs {
        writeln!(text, "  {} {line}", if ours.contains(line) { " dask    " } else { "-dask    " }).unwrap();
    }
    for line in ours.iter().filter(|line| !theirs.contains(line)) {
        writeln!(text, "  +ours     {line}").unwrap();
    }
    text
}
