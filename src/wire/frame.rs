//! Frames in a byte stream: the prelude that announces them, and their way out of the stream.
//!
//! `u64 n`, then n bytes (`u64 count`, `u64 length[count]`, the first frames), then the other frames; all little
//! endian. `n` only tells a Python receiver how much to read at once: on the stream all frames lie back to back, so
//! the [`Deframer`] checks it and goes by the lengths. Knows nothing of what is in a frame.
//!
//! Source: `distributed/comm/tcp.py: TCP.read, _add_frames_header`, `distributed/protocol/utils.py: unpack_frames`.

use bytes::{Buf, Bytes};

use super::{Error, Limits};

/// Frames from this many bytes on are left to the caller, who reads them straight into their final place.
pub const LARGE_FRAME: u64 = 64 << 10;
/// Frames below this many bytes share one buffer with their neighbours.
const SHARED_FRAME: u64 = 4 << 10;
/// Most bytes that frames keep alive by sharing a buffer.
const SHARED_BUFFER: u64 = 64 << 10;
/// Bytes of `n`.
const LENGTH: usize = 8;
/// Bytes of `n` and `count`.
const HEAD: usize = 16;
/// Bytes reserved on the peer's word; more comes as bytes come.
const RESERVE: usize = 64 << 10;

/// What the [`Deframer`] came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// All input is used up; bring more.
    More,
    /// The next `len` bytes of the stream are one frame. Put them (first what is left of the input) into a buffer of
    /// your own and hand it to [`Deframer::supply`].
    Large {
        /// Bytes of that frame.
        len: u64,
    },
    /// One whole message.
    Message(Vec<Bytes>),
}

/// Cuts a byte stream into messages of frames. Input comes as it comes; nothing is read ahead of the message.
#[derive(Debug)]
pub struct Deframer {
    limits: Limits,
    stage: Stage,
    /// Collects what the stage waits for.
    part: Vec<u8>,
}

#[derive(Debug)]
enum Stage {
    /// Waits for `n` and `count`.
    Head,
    /// Waits for the lengths.
    Lengths { first: u64, count: usize },
    /// Waits for the frames from `frames.len()` on.
    Frames { lengths: Vec<u64>, frames: Vec<Bytes>, run: Run },
}

/// Frames that the deframer collects itself, next to each other.
#[derive(Clone, Copy, Debug)]
struct Run {
    frames: usize,
    bytes: usize,
}

impl Deframer {
    /// A deframer at the beginning of a stream.
    pub fn new(limits: Limits) -> Self {
        Deframer { limits, stage: Stage::Head, part: Vec::new() }
    }

    /// True between two messages: a stream that ends here ends well.
    pub fn is_idle(&self) -> bool {
        matches!(self.stage, Stage::Head) && self.part.is_empty()
    }

    /// Takes bytes from `input` until there is something to say. After an error the stream is beyond repair.
    ///
    /// After [`Step::Large`] call [`Deframer::supply`] first; what `input` holds then belongs to that frame.
    ///
    /// # Errors
    /// [`Error::TooLong`], [`Error::TooMany`], [`Error::NoFrames`], [`Error::Split`]: the peer does not speak Dask's
    /// protocol, or says more than it may.
    pub fn advance(&mut self, input: &mut impl Buf) -> Result<Step, Error> {
        loop {
            match &mut self.stage {
                Stage::Head => {
                    if !fill(&mut self.part, LENGTH, input) {
                        return Ok(Step::More);
                    }
                    check_length((&self.part[..]).get_u64_le(), &self.limits)?;
                    if !fill(&mut self.part, HEAD, input) {
                        return Ok(Step::More);
                    }
                    let mut head = &self.part[..];
                    let (first, count) = (head.get_u64_le(), head.get_u64_le());
                    self.part.clear();
                    let count = check_head(first, count, &self.limits)?;
                    self.stage = Stage::Lengths { first, count };
                }
                Stage::Lengths { first, count } => {
                    if !fill(&mut self.part, *count * 8, input) {
                        return Ok(Step::More);
                    }
                    let lengths: Vec<u64> = self.part.chunks_exact(8).map(|mut b| b.get_u64_le()).collect();
                    self.part = Vec::new();
                    check_lengths(*first, &lengths, &self.limits)?;
                    let frames = Vec::with_capacity(lengths.len());
                    let run = next_run(&lengths);
                    self.stage = Stage::Frames { lengths, frames, run };
                }
                Stage::Frames { lengths, frames, run } => {
                    if frames.len() == lengths.len() {
                        let message = std::mem::take(frames);
                        self.stage = Stage::Head;
                        return Ok(Step::Message(message));
                    }
                    if run.frames == 0 {
                        return Ok(Step::Large { len: lengths[frames.len()] });
                    }
                    if !fill(&mut self.part, run.bytes, input) {
                        return Ok(Step::More);
                    }
                    let mut shared = Bytes::from(std::mem::take(&mut self.part));
                    for _ in 0..run.frames {
                        // at most SHARED_BUFFER or LARGE_FRAME, and all of them together are `run.bytes`
                        let len = lengths[frames.len()] as usize;
                        frames.push(shared.split_to(len));
                    }
                    *run = next_run(&lengths[frames.len()..]);
                }
            }
        }
    }

    /// Hands over the frame that [`Step::Large`] asked for.
    ///
    /// # Errors
    /// [`Error::Split`] when none was asked for or the length is another.
    pub fn supply(&mut self, frame: Bytes) -> Result<(), Error> {
        match &mut self.stage {
            Stage::Frames { lengths, frames, run }
                if run.frames == 0 && lengths.get(frames.len()) == Some(&(frame.len() as u64)) =>
            {
                frames.push(frame);
                *run = next_run(&lengths[frames.len()..]);
                Ok(())
            }
            _ => Err(Error::Split { bytes: frame.len() as u64 }),
        }
    }
}

/// Moves bytes from `input` until `part` holds `want`; true when it does.
fn fill(part: &mut Vec<u8>, want: usize, input: &mut impl Buf) -> bool {
    if part.capacity() == 0 {
        part.reserve_exact(want.min(RESERVE));
    }
    while part.len() < want && input.has_remaining() {
        let chunk = input.chunk();
        let n = chunk.len().min(want - part.len());
        part.extend_from_slice(&chunk[..n]);
        input.advance(n);
    }
    part.len() >= want
}

/// A length past the limit is refused as soon as it is there; whoever sends it may send nothing else.
fn check_length(first: u64, limits: &Limits) -> Result<(), Error> {
    if first > limits.message_bytes {
        return Err(Error::TooLong { what: "message", bytes: first, limit: limits.message_bytes });
    }
    Ok(())
}

fn check_head(first: u64, count: u64, limits: &Limits) -> Result<usize, Error> {
    if count == 0 {
        return Err(Error::NoFrames);
    }
    if count > limits.frames as u64 {
        return Err(Error::TooMany { what: "frames", count, limit: limits.frames as u64 });
    }
    // the prelude itself is always in the first part
    if first / 8 <= count {
        return Err(Error::Split { bytes: first });
    }
    Ok(count as usize)
}

fn check_lengths(first: u64, lengths: &[u64], limits: &Limits) -> Result<(), Error> {
    let mut total = 8 * (1 + lengths.len() as u64);
    let mut splits = total == first;
    for len in lengths {
        total = total.saturating_add(*len);
        splits |= total == first;
    }
    if total > limits.message_bytes {
        return Err(Error::TooLong { what: "message", bytes: total, limit: limits.message_bytes });
    }
    if splits { Ok(()) } else { Err(Error::Split { bytes: first }) }
}

/// The frames at the front of `lengths` to collect in one buffer; none if the first is large.
fn next_run(lengths: &[u64]) -> Run {
    let mut run = Run { frames: 0, bytes: 0 };
    for &len in lengths {
        let alone = run.frames == 0 && len < LARGE_FRAME;
        let shared = len < SHARED_FRAME && run.bytes as u64 + len <= SHARED_BUFFER;
        if !(alone || shared) {
            break;
        }
        run.frames += 1;
        run.bytes += len as usize;
        if len >= SHARED_FRAME {
            break;
        }
    }
    run
}

/// What goes before the frames on the stream.
///
/// Splits them as Dask does, so that a Python receiver gets small frames and the first buffer with one read, and
/// every other buffer in memory of its own, which it can free alone (`_add_frames_header`). Dask tells buffers from
/// other frames by their type; here a frame of 2 KiB or more is one, and frames that follow each other in memory are
/// shards of one.
pub fn prelude(frames: &[Bytes]) -> Bytes {
    const SMALL: usize = 2048;
    let mut first = 8 * (1 + frames.len());
    let mut inside = 0usize;
    let mut buffer: Option<&Bytes> = None;
    for frame in frames {
        if frame.len() >= SMALL {
            let fits = match buffer {
                None => inside <= SMALL.max(frame.len() / 20),
                Some(previous) => previous.as_ptr_range().end == frame.as_ptr(),
            };
            if !fits {
                break;
            }
            buffer = Some(frame);
        }
        inside += frame.len();
    }
    first += inside;
    let mut out = Vec::with_capacity(HEAD + 8 * frames.len());
    out.extend_from_slice(&(first as u64).to_le_bytes());
    out.extend_from_slice(&(frames.len() as u64).to_le_bytes());
    for frame in frames {
        out.extend_from_slice(&(frame.len() as u64).to_le_bytes());
    }
    Bytes::from(out)
}
