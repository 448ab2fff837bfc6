//! How many tasks are in each state, and for how long, by prefix.
//!
//! Counting only. Source: `distributed/worker_state_machine.py: TaskCounter`; the times are brought up to date where a
//! count changes instead of everywhere on every event.

use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::task::StateName;

/// Tasks of one prefix in one state.
#[derive(Clone, Copy, Debug, Default)]
struct Cell {
    count: u64,
    /// Task-seconds until `since`.
    elapsed: f64,
    since: f64,
}

impl Cell {
    fn elapsed_at(&self, now: f64) -> f64 {
        // the clock may be set back
        self.elapsed + self.count as f64 * (now - self.since).max(0.0)
    }

    fn settle(&mut self, now: f64) -> &mut u64 {
        self.elapsed = self.elapsed_at(now);
        self.since = now;
        &mut self.count
    }
}

type Cells = [Cell; StateName::COUNT];

/// Current counts and cumulative times.
#[derive(Clone, Debug, Default)]
pub(super) struct TaskCounter {
    cells: FxHashMap<Arc<str>, Box<Cells>>,
    total: [u64; StateName::COUNT],
}

impl TaskCounter {
    /// The shared copy of a prefix.
    pub(super) fn intern(&mut self, prefix: String) -> Arc<str> {
        match self.cells.get_key_value(prefix.as_str()) {
            Some((known, _)) => known.clone(),
            None => {
                let prefix: Arc<str> = prefix.into();
                self.cells.insert(prefix.clone(), Box::default());
                prefix
            }
        }
    }

    fn cells(&mut self, prefix: &Arc<str>) -> &mut Cells {
        self.cells.entry(prefix.clone()).or_default()
    }

    /// A task has entered a state.
    pub(super) fn enter(&mut self, now: f64, prefix: &Arc<str>, state: StateName) {
        *self.cells(prefix)[state as usize].settle(now) += 1;
        self.total[state as usize] += 1;
    }

    /// A task has left a state.
    pub(super) fn leave(&mut self, now: f64, prefix: &Arc<str>, state: StateName) {
        let count = self.cells(prefix)[state as usize].settle(now);
        debug_assert!(*count > 0, "{prefix} {state}");
        *count = count.saturating_sub(1);
        self.total[state as usize] = self.total[state as usize].saturating_sub(1);
    }

    /// Tasks in each state that has any. Dask's `current_count(by_prefix=False)`.
    pub(super) fn by_state(&self) -> Vec<(StateName, u64)> {
        StateName::ALL.into_iter().zip(self.total).filter(|(_, count)| *count > 0).collect()
    }

    /// Tasks for each prefix and state that has any. Dask's `current_count()`.
    pub(super) fn by_prefix(&self) -> Vec<(Arc<str>, StateName, u64)> {
        self.each().filter(|(_, _, c)| c.count > 0).map(|(p, s, c)| (p.clone(), s, c.count)).collect()
    }

    /// Task-seconds for each prefix and state that ever had any. Dask's `cumulative_elapsed()`.
    pub(super) fn elapsed(&self, now: f64) -> Vec<(Arc<str>, StateName, f64)> {
        self.each()
            .map(|(p, s, c)| (p.clone(), s, c.elapsed_at(now)))
            .filter(|(_, _, seconds)| *seconds > 0.0)
            .collect()
    }

    fn each(&self) -> impl Iterator<Item = (&Arc<str>, StateName, &Cell)> {
        self.cells
            .iter()
            .flat_map(|(p, cells)| StateName::ALL.into_iter().zip(&**cells).map(move |(s, c)| (p, s, c)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_integrates() {
        let mut counter = TaskCounter::default();
        let x = counter.intern("x".into());
        counter.enter(10.0, &x, StateName::Executing);
        counter.enter(12.0, &x, StateName::Executing);
        counter.leave(15.0, &x, StateName::Executing);
        counter.enter(15.0, &x, StateName::Memory);
        assert_eq!(counter.by_state(), [(StateName::Executing, 1), (StateName::Memory, 1)]);
        let elapsed = counter.elapsed(20.0);
        assert!(elapsed.contains(&(x.clone(), StateName::Executing, 2.0 + 6.0 + 5.0)));
        assert!(elapsed.contains(&(x, StateName::Memory, 5.0)));
    }
}
