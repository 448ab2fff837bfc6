//! The shared memory through which a queued task is taken back before its runner starts it.
//!
//! Word 0 is the sequence number of the task the runner started last, written by the runner. Word `1 + seq % RING` is
//! `seq` once the daemon has revoked that task. The runner says "started", then looks at "revoked"; the daemon says
//! "revoked", then looks at "started". With a full barrier between on both sides at least one of them sees the other.
//! The daemon's `membarrier` call supplies the runner's barrier too, so that a task costs the runner two plain accesses.
//!
//! Behind the words is room in which the runner leaves results that are too large for a message and too small for a memfd
//! of their own. The daemon copies them before it believes anything about them, and counts in word `1 + RING` how many
//! messages' worth it has taken; once that is all, the runner begins at the front again.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;

use crate::sys::{self, SharedWords};

/// Words for revoked tasks, as in runner/task.py. More than a runner ever has queued.
pub(super) const RING: u64 = 64;

/// Bytes of room for results, as in runner/channel.py.
const ROOM: usize = 1024 * 1024;

/// The daemon's end.
#[derive(Debug)]
pub(super) struct Mailbox(SharedWords);

impl Mailbox {
    pub(super) fn create() -> Result<Self, sys::Error> {
        Ok(Mailbox(SharedWords::create_with_room("iqoqo-mailbox", 2 + RING as usize, ROOM)?))
    }

    /// The task the runner started last; 0 before its first.
    pub(super) fn started(&self) -> u64 {
        self.0.word(0).load(Ordering::SeqCst)
    }

    /// Copies a region that the runner left in the room.
    pub(super) fn copy(&self, offset: u64, place: &mut [u8]) -> Result<(), sys::Error> {
        self.0.copy_from_room(offset, place)
    }

    /// What one more message spoke of has been copied.
    pub(super) fn taken(&self) {
        self.0.word(1 + RING as usize).fetch_add(1, Ordering::SeqCst);
    }

    /// Revokes task `seq`. True: the runner will skip it. False: the runner had begun to look, and its next word
    /// about the task tells whether it saw.
    pub(super) fn revoke(&self, seq: u64) -> bool {
        self.0.word(1 + (seq % RING) as usize).store(seq, Ordering::SeqCst);
        sys::barrier_between_processes();
        self.started() < seq
    }
}

impl AsFd for Mailbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_task_is_revoked_until_it_has_started() {
        let mailbox = Mailbox::create().unwrap();
        assert!(mailbox.revoke(3));
        mailbox.0.word(0).store(4, Ordering::SeqCst);
        assert!(!mailbox.revoke(4));
        assert!(mailbox.revoke(5));
    }
}
