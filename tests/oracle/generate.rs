//! Draws the next event: any kind, about any key, as long as it is legal; biased towards what makes things move.

use fastrand::Rng;
use iqoqo_dask_worker::state::StateName as S;

use crate::event::{Ev, K, W};
use crate::world::{Worker, World, pick};

/// Draws events until a legal one comes up.
pub fn next(rng: &mut Rng, worker: &Worker<'_>) -> Ev {
    for _ in 0..50 {
        if let Some(event) = draw(rng, worker)
            && worker.is_legal(&event)
            // would end the sequence
            && (rng.u8(..10) == 0 || !worker.fails_in_dask(&event))
        {
            return event;
        }
    }
    Ev::FindMissing
}

fn draw(rng: &mut Rng, worker: &Worker<'_>) -> Option<Ev> {
    let world = worker.world;
    Some(match rng.u8(..100) {
        0..22 => compute(rng, worker),
        22..26 => change_of_mind(rng, worker)?,
        26..42 => end_of_execution(rng, worker)?,
        42..58 => end_of_transfer(rng, worker)?,
        58..66 => free(rng, worker),
        66..72 => {
            let keys = some_keys(rng, world, 3);
            Ev::Acquire(keys.into_iter().map(|k| (k, holders(rng, 1), size(rng))).collect())
        }
        72..76 => Ev::Refresh(some_keys(rng, world, 4).into_iter().map(|k| (k, holders(rng, 0))).collect()),
        76..80 => Ev::Steal(key(rng, world)),
        80..82 => Ev::Cancel(key(rng, world)),
        82..85 => Ev::RemoveReplicas(in_state(rng, worker, S::Memory, 3)),
        85..87 => Ev::RemoveWorker(rng.usize(1..world.workers.len())),
        87..89 => Ev::UpdateData(some_keys(rng, world, 2).into_iter().map(|k| (k, size(rng))).collect()),
        89..93 => Ev::RetryBusyWorker(*worker.retries.iter().nth(rng.usize(..6))?),
        93..96 => Ev::Secede(running(rng, worker)?),
        96 if rng.bool() => Ev::Pause,
        96..99 => Ev::Unpause,
        _ => Ev::FindMissing,
    })
}

fn compute(rng: &mut Rng, worker: &Worker<'_>) -> Ev {
    let world = worker.world;
    let key = key(rng, world);
    let deps = world.dependencies[key].iter().map(|dep| (*dep, holders(rng, 1), size(rng))).collect();
    // few different ones, so that ties are common
    let priority = vec![rng.i64(-1..=1), rng.i64(0..2), rng.i64(0..4)];
    Ev::Compute { key, deps, priority }
}

/// Cancels what goes on, wants back what was cancelled, in the same way or in the other.
fn change_of_mind(rng: &mut Rng, worker: &Worker<'_>) -> Option<Ev> {
    let state =
        *pick(rng, &[S::Executing, S::LongRunning, S::Flight, S::Cancelled, S::Cancelled, S::Resumed]);
    let key = *in_state(rng, worker, state, 1).first()?;
    Some(match state {
        S::Cancelled if rng.bool() => {
            let deps = worker.world.dependencies[key].iter();
            let deps = deps.map(|dep| (*dep, holders(rng, 1), size(rng))).collect();
            Ev::Compute { key, deps, priority: vec![0, 0, 0] }
        }
        S::Cancelled => Ev::Acquire(vec![(key, holders(rng, 1), size(rng))]),
        S::Resumed if rng.bool() => Ev::Secede(key),
        _ => Ev::Free(vec![key]),
    })
}

fn end_of_execution(rng: &mut Rng, worker: &Worker<'_>) -> Option<Ev> {
    let key = running(rng, worker)?;
    Some(match rng.u8(..10) {
        0 | 1 => Ev::ExecuteFailure(key, rng.bool()),
        2 | 3 => Ev::Reschedule(key),
        _ => Ev::ExecuteSuccess(key, size(rng)),
    })
}

fn end_of_transfer(rng: &mut Rng, worker: &Worker<'_>) -> Option<Ev> {
    let mut peers: Vec<W> = worker.gathering.keys().copied().collect();
    peers.sort_unstable();
    if peers.is_empty() {
        return None;
    }
    let peer = *pick(rng, &peers);
    Some(match rng.u8(..10) {
        0 | 1 => Ev::GatherBusy(peer),
        2 => Ev::GatherNetworkFailure(peer),
        3 => Ev::GatherFailure(peer),
        fate => {
            let asked = &worker.gathering[&peer].0;
            let came: Vec<K> = asked.iter().filter(|_| fate > 5 || rng.bool()).copied().collect();
            Ev::GatherSuccess(peer, came.into_iter().map(|k| (k, size(rng))).collect())
        }
    })
}

/// Keys at random, or all that would have to be freed together.
fn free(rng: &mut Rng, worker: &Worker<'_>) -> Ev {
    let world = worker.world;
    let mut keys = some_keys(rng, world, 3);
    if rng.bool() {
        let mut at = 0;
        while at < keys.len() {
            let task = worker.state.task(&world.keys[keys[at]]);
            let dependents = task.into_iter().flat_map(|task| worker.state.dependents(task));
            let more: Vec<K> =
                dependents.map(|key| world.number(key)).filter(|k| !keys.contains(k)).collect();
            keys.extend(more);
            at += 1;
        }
    }
    Ev::Free(keys)
}

fn key(rng: &mut Rng, world: &World) -> K {
    rng.usize(..world.keys.len())
}

fn some_keys(rng: &mut Rng, world: &World, most: usize) -> Vec<K> {
    let mut keys: Vec<K> = (0..rng.usize(1..=most)).map(|_| key(rng, world)).collect();
    let mut seen = Vec::new();
    keys.retain(|k| {
        !seen.contains(k) && {
            seen.push(*k);
            true
        }
    });
    keys
}

fn in_state(rng: &mut Rng, worker: &Worker<'_>, state: S, most: usize) -> Vec<K> {
    let mut keys: Vec<K> =
        (0..worker.world.keys.len()).filter(|k| worker.state_of(*k) == Some(state)).collect();
    rng.shuffle(&mut keys);
    keys.truncate(rng.usize(1..=most));
    keys
}

fn running(rng: &mut Rng, worker: &Worker<'_>) -> Option<K> {
    let running = worker.state.executing().chain(worker.state.long_running());
    let keys: Vec<K> = running.map(|key| worker.world.number(key)).collect();
    (!keys.is_empty()).then(|| *pick(rng, &keys))
}

/// Some workers, seldom with the one under test among them.
fn holders(rng: &mut Rng, least: usize) -> Vec<W> {
    let mut workers: Vec<W> = (1..6).collect();
    rng.shuffle(&mut workers);
    workers.truncate(*pick(rng, &[least, 1, 1, 2, 2, 3]));
    if rng.u8(..20) == 0 {
        workers.push(0);
    }
    workers
}

fn size(rng: &mut Rng) -> u64 {
    *pick(rng, &[0, 1, 10, 10, 25, 50, 101, 300])
}
