//! The event that Dask lacks, mixed into random sequences: invariants hold, the scheduler hears of each loss, and
//! when the surroundings do their part in the end, every task that was wanted is done.

use fastrand::Rng;
use iqoqo_dask_worker::state::{Instruction, Report, StateName as S};
use proptest::prelude::*;

use crate::event::{Ev, K, W};
use crate::generate;
use crate::world::{Worker, World};

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Each number draws one event, so that proptest can leave events out when it looks for the smallest failure.
    #[test]
    fn data_can_be_lost_at_any_time(
        seed in any::<u64>(),
        draws in prop::collection::vec(any::<u64>(), 0..120),
    ) {
        let world = World::random(&mut Rng::with_seed(seed));
        let mut worker = Worker::new(&world);
        for draw in draws {
            let mut rng = Rng::with_seed(draw);
            if rng.u8(..8) == 0 {
                lose(&mut rng, &mut worker)?;
                continue;
            }
            let event = generate::next(&mut rng, &worker);
            if !worker.strands_a_missing_task(&event) {
                let outcome = worker.apply_ours(&event);
                prop_assert!(outcome.is_ok(), "{event:?}: {outcome:?}");
            }
        }
        settle(&mut worker)?;
        let unfinished = worker.state.tasks().filter(|task| {
            !matches!(task.state_name(), S::Memory | S::Released | S::Error)
        });
        let unfinished: Vec<String> = unfinished.map(ToString::to_string).collect();
        prop_assert!(unfinished.is_empty(), "{unfinished:?}");
    }
}

/// Loses some keys, whether they are held or not; the scheduler must hear of those that were, and of no other.
fn lose(rng: &mut Rng, worker: &mut Worker<'_>) -> Result<(), TestCaseError> {
    let n = worker.world.keys.len();
    let held: Vec<K> = (0..n).filter(|key| worker.state_of(*key) == Some(S::Memory)).collect();
    let mut keys: Vec<K> =
        (0..n).filter(|key| rng.u8(..4) == 0 || (held.contains(key) && rng.bool())).collect();
    rng.shuffle(&mut keys);
    let outcome = worker.apply_ours(&Ev::DataLost(keys.clone()));
    prop_assert!(outcome.is_ok(), "losing {keys:?}: {outcome:?}");
    let mut told: Vec<K> = Vec::new();
    for instruction in outcome.unwrap_or_default() {
        if let Instruction::Send(message) = instruction
            && let Report::ReleaseWorkerData { key } = message.report
        {
            told.push(worker.world.number(&key));
        }
    }
    told.sort_unstable();
    let lost: Vec<K> = held.into_iter().filter(|key| keys.contains(key)).collect();
    prop_assert_eq!(told, lost);
    Ok(())
}

/// Ends whatever goes on, well, until nothing does any more.
fn settle(worker: &mut Worker<'_>) -> Result<(), TestCaseError> {
    let mut due = vec![Ev::Unpause];
    for _ in 0..1000 {
        let Some(event) = due.pop() else { return Ok(()) };
        let outcome = worker.apply_ours(&event);
        prop_assert!(outcome.is_ok(), "{event:?}: {outcome:?}");
        due = what_is_due(worker);
    }
    prop_assert!(false, "there is no end: {due:?}");
    Ok(())
}

fn what_is_due(worker: &Worker<'_>) -> Vec<Ev> {
    let number = |key| worker.world.number(key);
    let mut due: Vec<Ev> =
        worker.state.missing().map(|key| Ev::Refresh(vec![(number(key), vec![1])])).collect();
    due.extend(worker.retries.iter().map(|peer| Ev::RetryBusyWorker(*peer)));
    let arrival = |(peer, (asked, _)): (&W, &(Vec<K>, u64))| {
        Ev::GatherSuccess(*peer, asked.iter().map(|key| (*key, 10)).collect())
    };
    due.extend(worker.gathering.iter().map(arrival));
    let running = worker.state.executing().chain(worker.state.long_running());
    due.extend(running.map(|key| Ev::ExecuteSuccess(number(key), 10)));
    due
}
