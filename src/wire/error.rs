//! Why bytes from a peer are no message, or a value cannot be written as one.

use super::compress::Compression;

/// Why bytes could not be read as a Dask message (a peer's fault: end that connection), or a value could not be
/// written as one (ours).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// More bytes than [`super::Limits`] allow.
    #[error("{what} of {bytes} bytes is over the limit of {limit}")]
    TooLong { what: &'static str, bytes: u64, limit: u64 },
    /// More things than [`super::Limits`] allow.
    #[error("{count} {what} are over the limit of {limit}")]
    TooMany { what: &'static str, count: u64, limit: u64 },
    /// Lists and maps nested too deeply.
    #[error("nesting at byte {offset} is over the limit of {limit}")]
    TooDeep { offset: usize, limit: usize },
    /// The length before the prelude does not agree with the frames' lengths.
    #[error("first part of {bytes} bytes does not end where a frame ends")]
    Split { bytes: u64 },
    /// A message has at least one frame.
    #[error("message has no frames")]
    NoFrames,
    /// The bytes end inside of a value.
    #[error("{what} at byte {offset} is cut short")]
    Truncated { what: &'static str, offset: usize },
    /// A `str` is not UTF-8.
    #[error("text at byte {offset} is not utf-8")]
    Utf8 { offset: usize },
    /// An extension type or the reserved marker: Dask sends neither.
    #[error("unsupported msgpack marker 0x{marker:02x} at byte {offset}")]
    Marker { marker: u8, offset: usize },
    /// Bytes after the end of the one value.
    #[error("{bytes} bytes follow the value that ends at byte {offset}")]
    Trailing { offset: usize, bytes: usize },
    /// A payload marker points at a frame that is not there.
    #[error("payload points at frame {index} of {frames}")]
    FrameIndex { index: i128, frames: usize },
    /// Two payload markers point at one frame.
    #[error("two payloads claim frame {index}")]
    FrameReused { index: usize },
    /// The header of a payload is not what it must be.
    #[error("payload header has a malformed {field}")]
    Header { field: &'static str },
    /// A frame is compressed in a way this build does not know.
    #[error("unknown compression {name:?}")]
    UnknownCompression { name: String },
    /// A frame does not decompress.
    #[error("{compression} frame of {bytes} bytes does not decompress")]
    Decompress {
        compression: Compression,
        bytes: usize,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A handshake lacks a field that every Dask version sends.
    #[error("handshake field {field:?} is missing or malformed: versions of dask may not be in sync")]
    Handshake { field: &'static str },
    /// An integer that msgpack cannot hold.
    #[error("integer {value} does not fit msgpack")]
    Integer { value: i128 },
    /// A payload in a value that travels without frames.
    #[error("a payload cannot be part of a plain value")]
    Payload,
}
