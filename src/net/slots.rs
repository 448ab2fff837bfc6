//! A bound on open incoming connections: when it is reached, the connection that has been idle longest is closed.
//!
//! Peers keep idle connections for later use, so a plain bound would lock newcomers out for good.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// The slots of one listener.
#[derive(Clone)]
pub(super) struct Slots {
    limit: usize,
    free: Arc<Semaphore>,
    idle: Arc<Idle>,
}

/// Connections between two requests, the longest idle first.
#[derive(Default)]
struct Idle {
    queue: Mutex<VecDeque<Arc<Notify>>>,
    /// Somebody became idle.
    arrived: Notify,
}

impl Idle {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Arc<Notify>>> {
        // The queue is whole at every point where a panic could happen.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Leave to hold one connection open; given back on drop.
pub(super) struct Slot {
    _permit: OwnedSemaphorePermit,
    idle: Arc<Idle>,
    evicted: Arc<Notify>,
}

impl Slots {
    pub(super) fn new(limit: usize) -> Self {
        let limit = limit.clamp(1, Semaphore::MAX_PERMITS);
        Slots { limit, free: Arc::new(Semaphore::new(limit)), idle: Arc::default() }
    }

    /// How many connections are open.
    pub(super) fn taken(&self) -> usize {
        self.limit - self.free.available_permits()
    }

    /// A slot; takes it from the longest idle connection when there is none left.
    pub(super) async fn take(&self) -> Slot {
        let permit = loop {
            if let Ok(permit) = self.free.clone().try_acquire_owned() {
                break permit;
            }
            let longest_idle = self.idle.lock().pop_front();
            match longest_idle {
                Some(victim) => {
                    victim.notify_one();
                    break self.permit().await;
                }
                None => tokio::select! {
                    permit = self.permit() => break permit,
                    () = self.idle.arrived.notified() => {}
                },
            }
        };
        Slot { _permit: permit, idle: self.idle.clone(), evicted: Arc::new(Notify::new()) }
    }

    async fn permit(&self) -> OwnedSemaphorePermit {
        match self.free.clone().acquire_owned().await {
            Ok(permit) => permit,
            // The semaphore is never closed.
            Err(_) => std::future::pending().await,
        }
    }
}

impl Slot {
    /// Marks the connection idle until the guard is dropped.
    pub(super) fn idle(&self) -> IdleGuard<'_> {
        self.idle.lock().push_back(self.evicted.clone());
        self.idle.arrived.notify_one();
        IdleGuard(self)
    }
}

/// While this lives, its connection may be asked to leave.
pub(super) struct IdleGuard<'a>(&'a Slot);

impl IdleGuard<'_> {
    /// Resolves when this connection has to make room.
    pub(super) async fn evicted(&self) {
        self.0.evicted.notified().await;
    }
}

impl Drop for IdleGuard<'_> {
    fn drop(&mut self) {
        let mut queue = self.0.idle.lock();
        if let Some(at) = queue.iter().rposition(|n| Arc::ptr_eq(n, &self.0.evicted)) {
            queue.remove(at);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    const SHORT: Duration = Duration::from_millis(20);
    const LONG: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn a_busy_connection_keeps_its_slot() {
        let slots = Slots::new(1);
        let held = slots.take().await;
        assert!(timeout(SHORT, slots.take()).await.is_err());
        assert_eq!(slots.taken(), 1);
        drop(held);
        timeout(LONG, slots.take()).await.unwrap();
    }

    #[tokio::test]
    async fn the_longest_idle_makes_room() {
        let slots = Slots::new(2);
        let (first, second) = (slots.take().await, slots.take().await);
        let idle_second = second.idle();
        let idle_first = first.idle();
        let newcomer = tokio::spawn(async move { slots.take().await });
        timeout(LONG, idle_second.evicted()).await.unwrap();
        assert!(timeout(SHORT, idle_first.evicted()).await.is_err());
        drop(idle_second);
        drop(second);
        timeout(LONG, newcomer).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_connection_that_becomes_idle_later_makes_room() {
        let slots = Slots::new(1);
        let held = slots.take().await;
        let waiting = slots.clone();
        let newcomer = tokio::spawn(async move { waiting.take().await });
        assert!(timeout(SHORT, std::future::pending::<()>()).await.is_err());
        let idle = held.idle();
        timeout(LONG, idle.evicted()).await.unwrap();
        drop(idle);
        drop(held);
        timeout(LONG, newcomer).await.unwrap().unwrap();
    }
}
