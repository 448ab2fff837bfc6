//! Bytes to messages and back: framing, Dask's msgpack dialect, payload markers, compression, handshake.
//!
//! Sans-IO: everything here works on bytes that somebody else has read. Nothing here opens a payload (only Python
//! does), and nothing here panics, recurses without bound or allocates on a peer's word: whatever a peer announces
//! is checked against [`Limits`] and against the bytes that are really there first.
//!
//! Source: `distributed/protocol/` and `distributed/comm/`.

pub mod codec;
pub mod compress;
mod error;
pub mod frame;
pub mod handshake;
mod header;
pub mod msgpack;
pub mod payload;

pub use codec::{decode_message, encode_message};
pub use compress::Compression;
pub use error::Error;

/// What one message from a peer may cost at most. All are checked before memory is allocated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all frames of a message together, as they lie on the wire.
    pub message_bytes: u64,
    /// Frames in a message.
    pub frames: usize,
    /// Nesting of lists and maps. Python's msgpack stops at 1024, the rest of Dask earlier.
    pub depth: usize,
    /// Items (of lists, maps, and their nested ones) in a message.
    pub values: usize,
    /// Bytes that all compressed frames of a message may decompress to.
    pub decompressed_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            message_bytes: 64 << 30,
            frames: 4 << 20,
            depth: 512,
            values: 16 << 20,
            decompressed_bytes: 16 << 30,
        }
    }
}
