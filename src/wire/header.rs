//! The header of a payload: the two fields that concern frames are read and replaced, the rest is carried untouched.

use std::ops::Range;

use bytes::Bytes;
use rmp::encode::{self, ByteBuf};

use super::msgpack::{Reader, Token, len32};
use super::{Compression, Error};

const COMPRESSION: &str = "compression";
const FRAMES: &str = "num-sub-frames";

/// What a payload header says about the payload's frames.
pub(super) struct SubHeader<'a> {
    bytes: &'a Bytes,
    /// Pairs in the map.
    pairs: usize,
    /// Where the pairs begin.
    start: usize,
    /// `num-sub-frames`
    pub(super) frames: Option<usize>,
    /// How each frame is compressed; empty if none is.
    pub(super) compression: Vec<Compression>,
    /// The pairs that speak of frames.
    spans: [Option<Range<usize>>; 2],
}

impl<'a> SubHeader<'a> {
    /// Reads the map in `bytes`, without opening what it need not know.
    pub(super) fn parse(bytes: &'a Bytes) -> Result<Self, Error> {
        let mut reader = Reader::new(bytes, 0);
        let Token::Map(pairs) = reader.token()? else { return Err(Error::Header { field: "type" }) };
        let start = reader.offset();
        let mut header =
            SubHeader { bytes, pairs, start, frames: None, compression: Vec::new(), spans: [None, None] };
        for _ in 0..pairs {
            header.pair(&mut reader)?;
        }
        match reader.remaining() {
            0 => Ok(header),
            bytes => Err(Error::Trailing { offset: reader.offset(), bytes }),
        }
    }

    fn pair(&mut self, reader: &mut Reader<'_>) -> Result<(), Error> {
        let start = reader.offset();
        let name = match reader.token()? {
            Token::Str(len) => reader.text(len)?,
            _ => return Err(Error::Header { field: "key" }),
        };
        let (field, slot) = match name {
            COMPRESSION => (COMPRESSION, 0),
            FRAMES => (FRAMES, 1),
            _ => return reader.skip(),
        };
        if self.spans[slot].is_some() {
            return Err(Error::Header { field });
        }
        if slot == 0 {
            self.compression = compressions(reader)?;
        } else {
            let Token::Int(count) = reader.token()? else { return Err(Error::Header { field }) };
            self.frames = Some(usize::try_from(count).map_err(|_| Error::Header { field })?);
        }
        self.spans[slot] = Some(start..reader.offset());
        Ok(())
    }

    /// The header with these two fields instead; as it is if they say the same.
    pub(super) fn with(&self, frames: usize, compression: &[Compression]) -> Result<Bytes, Error> {
        let plain = compression.iter().all(|c| *c == Compression::None);
        if self.frames == Some(frames)
            && (self.compression == compression || plain && self.compression.is_empty())
        {
            return Ok(self.bytes.clone());
        }
        let mut out = ByteBuf::with_capacity(self.bytes.len() + 32 + 8 * compression.len());
        let kept = self.pairs - self.spans.iter().flatten().count();
        let Ok(_) = encode::write_map_len(&mut out, len32(kept + 2, "map")?);
        let mut spans: Vec<_> = self.spans.iter().flatten().cloned().collect();
        spans.sort_by_key(|span| span.start);
        let mut at = self.start;
        for span in spans {
            out.as_mut_vec().extend_from_slice(&self.bytes[at..span.start]);
            at = span.end;
        }
        out.as_mut_vec().extend_from_slice(&self.bytes[at..]);
        let Ok(()) = encode::write_str(&mut out, COMPRESSION);
        let Ok(_) = encode::write_array_len(&mut out, len32(compression.len(), "list")?);
        for c in compression {
            match c.name() {
                None => {
                    let Ok(()) = encode::write_nil(&mut out);
                }
                Some(name) => {
                    let Ok(()) = encode::write_str(&mut out, name);
                }
            }
        }
        let Ok(()) = encode::write_str(&mut out, FRAMES);
        let Ok(_) = encode::write_uint(&mut out, frames as u64);
        Ok(out.into_vec().into())
    }
}

/// The list under `compression`; empty if it is all `None`.
fn compressions(reader: &mut Reader<'_>) -> Result<Vec<Compression>, Error> {
    let field = COMPRESSION;
    let count = match reader.token()? {
        Token::Array(count) => count,
        Token::Nil => return Ok(Vec::new()),
        _ => return Err(Error::Header { field }),
    };
    let mut list = Vec::new();
    for i in 0..count {
        match reader.token()? {
            Token::Nil | Token::Bool(false) => {
                if !list.is_empty() {
                    list.push(Compression::None);
                }
            }
            Token::Str(len) => {
                let name = reader.text(len)?;
                let known = Compression::from_name(name).filter(|c| c.name() == Some(name));
                let known = known.ok_or_else(|| Error::UnknownCompression { name: name.into() })?;
                list.resize(i, Compression::None);
                list.push(known);
            }
            _ => return Err(Error::Header { field }),
        }
    }
    Ok(list)
}
