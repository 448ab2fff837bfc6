//! A message as frames: frame 0 is msgpack, payloads lie in the frames behind it.
//!
//! `{"__Serialized__": i}` and `{"__Pickled__": i}` anywhere in the message point at frame i: a msgpack header that
//! says how many frames follow and how each is compressed. Payloads are carried whole, unopened and uncompressed.
//!
//! Source: `distributed/protocol/core.py: dumps, loads`.

use bytes::Bytes;
use rmp::encode::ByteBuf;

use super::compress::{decompress, maybe_compress};
use super::header::SubHeader;
use super::msgpack::{Decoder, Payloads, encode_with};
use super::{Compression, Error, Limits};
use crate::proto::{Payload, PayloadKind, Value};

/// Bytes reserved for frame 0.
const RESERVE: usize = 256;

/// Understands the frames of one message.
///
/// Payload frames are slices of what came in, unless they came compressed: decompressing takes milliseconds for
/// megabytes, so messages with large compressed frames do not belong on an IO thread.
///
/// # Errors
/// The [`Error`] says where the frames are malformed, or which limit they break.
pub fn decode_message(frames: Vec<Bytes>, limits: &Limits) -> Result<Value, Error> {
    let main = frames.first().ok_or(Error::NoFrames)?.clone();
    let payloads =
        Frames { frames: frames.into_iter().map(Some).collect(), budget: limits.decompressed_bytes };
    let mut decoder = Decoder::new(&main, 0, limits, payloads);
    let value = decoder.value(0)?;
    match decoder.reader.remaining() {
        0 => Ok(value),
        bytes => Err(Error::Trailing { offset: decoder.reader.offset(), bytes }),
    }
}

/// Writes `message` as frames, payload frames compressed where that is worth it.
///
/// # Errors
/// [`Error::Integer`], [`Error::TooLong`] and [`Error::TooDeep`] for what msgpack cannot hold, [`Error::Header`] for a
/// payload whose header is no msgpack map.
pub fn encode_message(message: &Value, compression: Compression) -> Result<Vec<Bytes>, Error> {
    let mut frames = vec![Bytes::new()];
    let mut main = ByteBuf::with_capacity(RESERVE);
    let mut append = |payload: &Payload, out: &mut ByteBuf| {
        let Ok(_) = rmp::encode::write_map_len(out, 1);
        let Ok(()) = rmp::encode::write_str(out, marker(payload.kind));
        let Ok(_) = rmp::encode::write_uint(out, frames.len() as u64);
        append_payload(payload, compression, &mut frames)
    };
    encode_with(message, &mut main, &mut append, 0)?;
    frames[0] = main.into_vec().into();
    Ok(frames)
}

fn marker(kind: PayloadKind) -> &'static str {
    match kind {
        PayloadKind::Serialized => "__Serialized__",
        PayloadKind::Pickled => "__Pickled__",
    }
}

/// Appends header and frames of one payload.
fn append_payload(payload: &Payload, compression: Compression, frames: &mut Vec<Bytes>) -> Result<(), Error> {
    let header = SubHeader::parse(&payload.header)?;
    let at = frames.len();
    frames.push(Bytes::new());
    let mut compressions = header.compression.clone();
    for (i, frame) in payload.frames.iter().enumerate() {
        let already = compressions.get(i).is_some_and(|c| *c != Compression::None);
        let compressed = if already { None } else { maybe_compress(frame, compression) };
        if compressed.is_some() {
            compressions.resize(payload.frames.len(), Compression::None);
            compressions[i] = compression;
        }
        frames.push(compressed.unwrap_or_else(|| frame.clone()));
    }
    frames[at] = header.with(payload.frames.len(), &compressions)?;
    Ok(())
}

/// The frames of a message, each taken at most once.
struct Frames {
    frames: Vec<Option<Bytes>>,
    /// Bytes that may still be decompressed.
    budget: u64,
}

impl Payloads for Frames {
    fn resolve(&mut self, items: &[(Value, Value)]) -> Result<Option<Value>, Error> {
        for kind in [PayloadKind::Serialized, PayloadKind::Pickled] {
            let name = marker(kind);
            let index = items.iter().find(|(key, _)| key.as_str() == Some(name)).map(|(_, index)| index);
            // Dask takes 0 for "no such marker"
            if let Some(Value::Int(index)) = index
                && index.get() > 0
            {
                return self.payload(kind, index.get()).map(|p| Some(p.into()));
            }
        }
        Ok(None)
    }
}

impl Frames {
    fn payload(&mut self, kind: PayloadKind, index: i128) -> Result<Payload, Error> {
        let count = self.frames.len();
        let missing = |index| Error::FrameIndex { index, frames: count };
        let at = usize::try_from(index).ok().filter(|at| *at < count).ok_or_else(|| missing(index))?;
        let header = self.take(at)?;
        let parsed = SubHeader::parse(&header)?;
        let frames = parsed.frames.ok_or(Error::Header { field: "num-sub-frames" })?;
        // counted against what is there before anything is reserved
        let end = frames.checked_add(at + 1).filter(|end| *end <= count);
        let end = end.ok_or_else(|| missing(frames as i128 + index))?;
        let mut frames = (at + 1..end).map(|i| self.take(i)).collect::<Result<Vec<_>, _>>()?;
        if parsed.compression.is_empty() {
            return Ok(Payload { kind, header, frames });
        }
        if parsed.compression.len() != frames.len() {
            return Err(Error::Header { field: "compression" });
        }
        for (frame, compression) in frames.iter_mut().zip(&parsed.compression) {
            if *compression != Compression::None {
                *frame = decompress(frame, *compression, self.budget)?;
                self.budget -= frame.len() as u64;
            }
        }
        let header = parsed.with(frames.len(), &vec![Compression::None; frames.len()])?;
        Ok(Payload { kind, header, frames })
    }

    fn take(&mut self, index: usize) -> Result<Bytes, Error> {
        self.frames[index].take().ok_or(Error::FrameReused { index })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::wire::frame::{Deframer, Step, prelude};
    use crate::wire::payload;

    fn message() -> Value {
        Value::List(vec![Value::map([
            ("op", "compute-task".into()),
            ("key", Value::List(vec!["x".into(), Value::from(1), Value::Float(0.5)])),
            ("run_spec", payload::to_pickle(b"pickle", vec![Bytes::from(vec![7; 100_000])]).into()),
            ("exception", payload::Exception::builtin("RuntimeError", "no").payload().into()),
            ("keys", Value::Set(vec![Value::from(-1), Value::Nil])),
            ("n", Value::from(u64::MAX)),
        ])])
    }

    #[test]
    fn a_message_survives_frames_compression_and_a_stream_cut_anywhere() {
        for compression in
            [Compression::None, Compression::Lz4, Compression::Zstd, Compression::Snappy, Compression::Zlib]
        {
            let frames = encode_message(&message(), compression).unwrap();
            assert_eq!(compression == Compression::None, frames[2].len() == 100_000);
            let mut stream = prelude(&frames).to_vec();
            frames.iter().for_each(|f| stream.extend_from_slice(f));
            for piece in [1, 7, 1000, stream.len()] {
                let mut deframer = Deframer::new(Limits::default());
                let mut got = Vec::new();
                let mut large = Vec::new();
                let mut want = None;
                for mut part in stream.chunks(piece) {
                    loop {
                        if let Some(len) = want {
                            let n = part.len().min(len as usize - large.len());
                            large.extend_from_slice(&part[..n]);
                            part = &part[n..];
                            if large.len() as u64 != len {
                                break;
                            }
                            deframer.supply(std::mem::take(&mut large).into()).unwrap();
                            want = None;
                        }
                        match deframer.advance(&mut part).unwrap() {
                            Step::More => break,
                            Step::Large { len } => want = Some(len),
                            Step::Message(frames) => got.push(frames),
                        }
                    }
                }
                assert!(deframer.is_idle());
                assert_eq!(got, std::slice::from_ref(&frames));
            }
            let back = decode_message(frames, &Limits::default()).unwrap();
            assert_eq!(back, message());
        }
    }
}
