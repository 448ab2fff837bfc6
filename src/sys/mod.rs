//! The only room with `unsafe`: shared memory, descriptors over sockets, processes.
//!
//! Thin and typed, one system call a function; policy (who may map what, who is killed when) belongs to the callers.
#![allow(unsafe_code)]

mod append;
mod file;
mod kernel;
mod memfd;
mod process;
mod socket;
mod words;

use std::io;

pub use append::{Appended, Appender};
pub use file::{FinalFile, survive_file_size_limit};
pub use kernel::landlock_abi;
pub use memfd::{Mapping, Memfd, MemfdMut, memory_is_crowded};
pub use process::{
    PidFd, close_descriptors_except, detach_stdin, die_with_parent, exec, forbid_core_dumps,
    keep_descriptor_on_exec, new_session, own_executable, pipe, raise_descriptor_limit, set_nonblocking,
};
pub use socket::{MAX_DESCRIPTORS, Received, receive, send, socket_pair, watch, watch_again};
pub use words::{ROOM_OFFSET, SharedWords, barrier_between_processes};

/// What the kernel refused, or what another process handed over that is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("{call} failed")]
    Call {
        /// Name of the call.
        call: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A descriptor is not a memfd, or is one that its maker can still change.
    #[error("descriptor is not a memfd sealed against writing and resizing")]
    NotSealed,
    /// A region reaches past the end of its memfd.
    #[error("region of {len} bytes at {offset} is outside a memfd of {size} bytes")]
    OutOfRange {
        /// First byte of the region.
        offset: u64,
        /// Bytes in the region.
        len: u64,
        /// Bytes in the memfd.
        size: u64,
    },
}

impl Error {
    /// For `map_err`: what `call` failed with.
    fn call<E: Into<io::Error>>(call: &'static str) -> impl FnOnce(E) -> Error {
        move |source| Error::Call { call, source: source.into() }
    }

    /// The kernel's error, where there is one.
    pub fn io(&self) -> Option<&io::Error> {
        match self {
            Error::Call { source, .. } => Some(source),
            _ => None,
        }
    }
}
