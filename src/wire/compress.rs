//! Compression of single frames, byte for byte what Dask's compressors read and write.
//!
//! Decompression never writes more than it is allowed to, whatever a frame claims.
//!
//! Source: `distributed/protocol/compression.py`.

use std::fmt;
use std::io::Read;

use bytes::Bytes;

use super::Error;

/// How frames are compressed; the names are Dask's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// `lz4`: a block behind its decompressed length (`lz4.block.compress`).
    Lz4,
    /// `zstd`: a frame that holds its decompressed length.
    Zstd,
    /// `snappy`: the raw format.
    Snappy,
    /// `zlib`: what Python can do without any package.
    Zlib,
}

/// Frames below this many bytes are not worth compressing.
const MIN_SIZE: usize = 10_000;
/// Frames above this many bytes are too much for the libraries.
const MAX_SIZE: usize = 1 << 31;
/// Bytes of each sample.
const SAMPLE_SIZE: usize = 10_000;
/// Samples taken from a frame.
const SAMPLES: usize = 5;
/// Compressed to original size that a frame must come down to.
const MIN_RATIO: f64 = 0.7;
/// `distributed.comm.zstd.level`
const ZSTD_LEVEL: i32 = 3;

type Source = Box<dyn std::error::Error + Send + Sync>;

impl Compression {
    /// The name in a handshake or header, if there is something to name.
    pub fn name(self) -> Option<&'static str> {
        match self {
            Compression::None => None,
            Compression::Lz4 => Some("lz4"),
            Compression::Zstd => Some("zstd"),
            Compression::Snappy => Some("snappy"),
            Compression::Zlib => Some("zlib"),
        }
    }

    /// The compression of that name in a handshake, header or `distributed.comm.compression`.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            // what Dask takes when it has lz4
            "auto" | "lz4" => Compression::Lz4,
            "zstd" => Compression::Zstd,
            "snappy" => Compression::Snappy,
            "zlib" => Compression::Zlib,
            _ => return None,
        })
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name().unwrap_or("uncompressed"))
    }
}

/// `frame` compressed, if that is worth it: tried on samples first, then on the whole (`maybe_compress`).
///
/// Takes milliseconds for megabytes: large frames do not belong on an IO thread.
pub fn maybe_compress(frame: &[u8], compression: Compression) -> Option<Bytes> {
    if compression == Compression::None || !(MIN_SIZE..=MAX_SIZE).contains(&frame.len()) {
        return None;
    }
    let worth = |compressed: &[u8], original: usize| compressed.len() as f64 <= MIN_RATIO * original as f64;
    let sample = sample(frame);
    if !worth(&compress(&sample, compression)?, sample.len()) {
        return None;
    }
    let compressed = compress(frame, compression)?;
    worth(&compressed, frame.len()).then(|| compressed.into())
}

/// Bytes from several places of `frame`; places that overlap are cut, as `byte_sample` does.
fn sample(frame: &[u8]) -> Vec<u8> {
    let last = frame.len() - SAMPLE_SIZE;
    let mut starts = [0; SAMPLES];
    starts.fill_with(|| fastrand::usize(0..=last));
    let mut out = Vec::with_capacity(SAMPLES * SAMPLE_SIZE);
    for (i, &start) in starts.iter().enumerate() {
        let end = starts.get(i + 1).map_or(start + SAMPLE_SIZE, |next| (start + SAMPLE_SIZE).min(*next));
        out.extend_from_slice(frame.get(start..end).unwrap_or_default());
    }
    out
}

/// `None` where the library fails, which is a reason not to compress.
fn compress(data: &[u8], compression: Compression) -> Option<Vec<u8>> {
    match compression {
        Compression::None => None,
        Compression::Lz4 => Some(lz4_flex::block::compress_prepend_size(data)),
        Compression::Zstd => zstd::bulk::compress(data, ZSTD_LEVEL).ok(),
        Compression::Snappy => snap::raw::Encoder::new().compress_vec(data).ok(),
        Compression::Zlib => {
            let mut out = Vec::with_capacity(data.len() / 2);
            flate2::bufread::ZlibEncoder::new(data, flate2::Compression::default())
                .read_to_end(&mut out)
                .ok()?;
            Some(out)
        }
    }
}

/// The original of `frame`, if that has no more than `limit` bytes.
///
/// # Errors
/// [`Error::Decompress`] for a damaged frame, [`Error::TooLong`] for one that decompresses to more than `limit` bytes.
pub fn decompress(frame: &Bytes, compression: Compression, limit: u64) -> Result<Bytes, Error> {
    let failed = |source: Source| Error::Decompress { compression, bytes: frame.len(), source };
    let check = |bytes: u64| match usize::try_from(bytes) {
        Ok(bytes) if bytes as u64 <= limit => Ok(bytes),
        _ => Err(Error::TooLong { what: "decompressed frame", bytes, limit }),
    };
    let original = match compression {
        Compression::None => return Ok(frame.clone()),
        Compression::Lz4 => {
            let (size, block) = frame.split_first_chunk().ok_or_else(|| failed("no length".into()))?;
            let size = check(u32::from_le_bytes(*size).into())?;
            // a byte of a block stands for 255 at most
            if size / 255 > block.len() {
                return Err(failed("claims more than it can hold".into()));
            }
            lz4_flex::block::decompress(block, size).map_err(|e| failed(e.into()))?
        }
        Compression::Snappy => {
            let size = check(snap::raw::decompress_len(frame).map_err(|e| failed(e.into()))? as u64)?;
            // three bytes stand for 64 at most
            if size / 32 > frame.len() {
                return Err(failed("claims more than it can hold".into()));
            }
            snap::raw::Decoder::new().decompress_vec(frame).map_err(|e| failed(e.into()))?
        }
        Compression::Zstd => match zstd::zstd_safe::get_frame_content_size(frame) {
            Ok(Some(size)) => zstd::bulk::decompress(frame, check(size)?).map_err(|e| failed(e.into()))?,
            Ok(None) => {
                let reader = zstd::Decoder::with_buffer(&frame[..]).map_err(|e| failed(e.into()))?;
                read_capped(reader, limit, failed)?
            }
            Err(_) => return Err(failed("not a zstd frame".into())),
        },
        Compression::Zlib => read_capped(flate2::bufread::ZlibDecoder::new(&frame[..]), limit, failed)?,
    };
    Ok(original.into())
}

/// Reads a stream that does not tell its length.
fn read_capped(
    reader: impl Read,
    limit: u64,
    failed: impl FnOnce(Source) -> Error,
) -> Result<Vec<u8>, Error> {
    let mut out = Vec::new();
    reader.take(limit.saturating_add(1)).read_to_end(&mut out).map_err(|e| failed(e.into()))?;
    match out.len() as u64 {
        bytes if bytes > limit => Err(Error::TooLong { what: "decompressed frame", bytes, limit }),
        _ => Ok(out),
    }
}
