//! The wire room against the real thing: bytes captured from `distributed`, a live Python at the other end, damage.
#![allow(clippy::unwrap_used)]

mod captures;
mod damage;
mod keys;
mod python;

use bytes::Bytes;
use iqoqo_dask_worker::wire::frame::{Deframer, Step, prelude};
use iqoqo_dask_worker::wire::{Error, Limits};

/// The messages in `stream`, given to the deframer in pieces of `piece` bytes.
fn deframe(stream: &[u8], piece: usize, limits: &Limits) -> Result<Vec<Vec<Bytes>>, Error> {
    let mut deframer = Deframer::new(limits.clone());
    let mut messages = Vec::new();
    let mut large: Option<(u64, Vec<u8>)> = None;
    for mut part in stream.chunks(piece.max(1)) {
        loop {
            if let Some((len, frame)) = &mut large {
                let n = part.len().min(*len as usize - frame.len());
                frame.extend_from_slice(&part[..n]);
                part = &part[n..];
                if (frame.len() as u64) < *len {
                    break;
                }
                deframer.supply(std::mem::take(frame).into())?;
                large = None;
            }
            match deframer.advance(&mut part)? {
                Step::More => break,
                Step::Large { len } => large = Some((len, Vec::new())),
                Step::Message(frames) => messages.push(frames),
            }
        }
    }
    assert!(!messages.is_empty() || !deframer.is_idle() || stream.is_empty());
    Ok(messages)
}

/// The frames as they go on a stream.
fn enframe(frames: &[Bytes]) -> Vec<u8> {
    let mut stream = prelude(frames).to_vec();
    frames.iter().for_each(|frame| stream.extend_from_slice(frame));
    stream
}

/// All captured messages: name and bytes of the stream.
fn captured() -> Vec<(String, Vec<u8>)> {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/wire");
    let mut all: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.file_stem().unwrap().to_str().unwrap().to_owned(), std::fs::read(&path).unwrap()))
        .collect();
    all.sort();
    assert!(all.len() > 80, "captures are missing");
    all
}
