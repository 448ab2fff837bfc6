//! What the fuzz targets share: limits, and seeds out of the captured messages.
//!
//! One target for each parser of bytes that a peer sends: `frame msgpack codec handshake decompress stimulus`. From
//! this folder, on the stable toolchain (`.cargo/config.toml` has the flags):
//!
//! ```sh
//! cargo run --release --bin codec -- corpus/codec -max_total_time=20 -rss_limit_mb=1024 -timeout=10 \
//!     -artifact_prefix=artifacts/
//! ```
//!
//! For a long run, `-max_total_time=3600 -fork=2`; to see a crash again, the artifact's path as the only argument. A
//! target writes its seeds, from the captured messages, into `corpus/<target>` when it finds nothing there.

use std::fs;
use std::path::Path;

use bytes::Bytes;
use iqoqo_dask_worker::wire::frame::{Deframer, Step};
use iqoqo_dask_worker::wire::{Error, Limits};

/// Room for any input, not for what it may claim.
pub fn limits() -> Limits {
    Limits {
        message_bytes: 1 << 24,
        frames: 10_000,
        depth: 100,
        values: 1 << 20,
        decompressed_bytes: 1 << 20,
    }
}

/// The messages at the front of `stream`, fed in pieces, and what ended them if the stream did not.
pub fn deframe(stream: &[u8], piece: usize) -> (Vec<Vec<Bytes>>, Option<Error>) {
    let mut deframer = Deframer::new(limits());
    let mut messages = Vec::new();
    let mut large: Option<(usize, Vec<u8>)> = None;
    for mut part in stream.chunks(piece.max(1)) {
        loop {
            if let Some((len, frame)) = &mut large {
                let n = part.len().min(*len - frame.len());
                frame.extend_from_slice(&part[..n]);
                part = &part[n..];
                if frame.len() < *len {
                    break;
                }
                if let Err(error) = deframer.supply(std::mem::take(frame).into()) {
                    return (messages, Some(error));
                }
                large = None;
            }
            match deframer.advance(&mut part) {
                Ok(Step::More) => break,
                Ok(Step::Large { len }) => large = Some((len as usize, Vec::new())),
                Ok(Step::Message(frames)) => messages.push(frames),
                Err(error) => return (messages, Some(error)),
            }
        }
    }
    (messages, None)
}

/// Fills `corpus/<target>` with what `of` makes of each captured stream, unless something is there.
///
/// # Panics
/// When the folder cannot be written: a fuzzer without seeds finds little.
pub fn seed(target: &str, of: impl Fn(&[u8]) -> Vec<Vec<u8>>) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let corpus = root.join("corpus").join(target);
    for folder in [&corpus, &root.join("artifacts")] {
        fs::create_dir_all(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    }
    if fs::read_dir(&corpus).is_ok_and(|mut files| files.next().is_some()) {
        return;
    }
    let captures = root.join("../tests/data/wire");
    let files = fs::read_dir(&captures).unwrap_or_else(|e| panic!("{}: {e}", captures.display()));
    for file in files.flatten() {
        let stream = fs::read(file.path()).unwrap_or_default();
        for (i, input) in of(&stream).into_iter().enumerate() {
            let name = format!("{}-{i}", file.path().file_stem().unwrap_or_default().to_string_lossy());
            fs::write(corpus.join(name), input).unwrap_or_else(|e| panic!("{}: {e}", corpus.display()));
        }
    }
}

/// The frames of a captured stream.
pub fn frames(stream: &[u8]) -> Vec<Bytes> {
    deframe(stream, stream.len()).0.into_iter().flatten().collect()
}
