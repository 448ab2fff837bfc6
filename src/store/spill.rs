//! Results on disk: how one lies in its file, and how it is written and read back.
//!
//! Blocks, so it is for threads that may wait. What is spilled, and when, is decided elsewhere.

use std::fs::{DirBuilder, File};
use std::io::{BufWriter, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use flate2::Crc;
use tokio::sync::Notify;

use super::arena::Arena;
use super::object::ALIGNMENT;
use super::{Error, Frame, Object, SHARED_FRAME_MIN, Segment, is_worth_memfd};
use crate::proto::PayloadKind;
use crate::sys::FinalFile;

/// Bytes that are read at a time to see whether a file is whole.
const CHUNK: usize = 256 * 1024;

/// Compressed objects from this size on, in bytes, are read one at a time.
const ALONE_MIN: u64 = 1 << 20;

/// Compresses frames on their way to disk, and back.
pub trait Codec: std::fmt::Debug + Send + Sync {
    /// The frame compressed, if that is worth it.
    fn compress(&self, frame: &[u8]) -> Option<Bytes>;

    /// The original, which has `len` bytes; `None` for a damaged frame.
    fn decompress(&self, frame: &Bytes, len: u64) -> Option<Bytes>;
}

/// Where results are spilled to.
#[derive(Debug)]
pub(super) struct Files {
    directory: PathBuf,
    codec: Option<Arc<dyn Codec>>,
    next: AtomicU64,
    garbage: Arc<Garbage>,
}

/// Files that nobody needs any more, to be removed where waiting is allowed.
#[derive(Debug, Default)]
pub(super) struct Garbage {
    paths: Mutex<Vec<PathBuf>>,
    /// There are some, or something is to be spilled.
    pub(super) wake: Notify,
}

impl Garbage {
    fn add(&self, path: PathBuf) {
        self.paths.lock().unwrap_or_else(PoisonError::into_inner).push(path);
        self.wake.notify_one();
    }

    /// Takes all there are.
    pub(super) fn take(&self) -> Vec<PathBuf> {
        std::mem::take(&mut self.paths.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Removes files; what cannot be removed goes with the folder at the worker's end.
pub(super) fn remove(paths: Vec<PathBuf>) {
    for path in paths {
        if let Err(error) = std::fs::remove_file(&path)
            && error.kind() != ErrorKind::NotFound
        {
            tracing::warn!("cannot remove the spill file {}: {error}", path.display());
        }
    }
}

/// One region of a file: the header, or a frame.
#[derive(Clone, Copy, Debug)]
struct Part {
    /// Bytes in the file.
    stored: u64,
    /// Bytes it stands for, if it is compressed.
    original: Option<u64>,
}

/// A result in its file, which goes with this value.
#[derive(Debug)]
pub(super) struct SpillFile {
    path: PathBuf,
    /// Bytes in the file.
    pub(super) len: u64,
    checksum: u32,
    kind: PayloadKind,
    nbytes: u64,
    /// The header, then the frames, each aligned.
    parts: Vec<Part>,
    codec: Option<Arc<dyn Codec>>,
    garbage: Arc<Garbage>,
}

impl Drop for SpillFile {
    fn drop(&mut self) {
        self.garbage.add(std::mem::take(&mut self.path));
    }
}

impl Files {
    pub(super) fn new(directory: PathBuf, codec: Option<Arc<dyn Codec>>, garbage: Arc<Garbage>) -> Self {
        Files { directory, codec, next: AtomicU64::new(0), garbage }
    }

    /// Writes an object to a file of its own, of at most `room` bytes.
    ///
    /// # Errors
    /// [`Error::NoRoom`] when it takes more, [`Error::Write`] when the system refuses it; no file is left then.
    pub(super) fn write(&self, object: &Object, room: u64) -> Result<SpillFile, Error> {
        let size = object.heap_bytes() + object.shared_bytes();
        if self.codec.is_none() && size > room {
            return Err(Error::NoRoom);
        }
        let path = self.directory.join(self.next.fetch_add(1, Ordering::Relaxed).to_string());
        let failed = |source| Error::Write { path: path.clone(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(&self.directory).map_err(failed)?;
        let file = FinalFile::create(&path).map_err(failed)?;
        let mut out = Out { file: BufWriter::new(file), crc: Crc::new(), len: 0 };
        match self.fill(&mut out, object, room) {
            Ok(Some(parts)) => Ok(SpillFile {
                path,
                len: out.len,
                checksum: out.crc.sum(),
                kind: object.kind(),
                nbytes: object.nbytes(),
                parts,
                codec: self.codec.clone(),
                garbage: self.garbage.clone(),
            }),
            refused => {
                // what is still buffered is not to be written on the way
                drop(out.file.into_parts());
                remove(vec![path.clone()]);
                Err(refused.err().map_or(Error::NoRoom, failed))
            }
        }
    }

    /// Writes header and frames. `None` when there is no room for them.
    fn fill(&self, out: &mut Out, object: &Object, room: u64) -> std::io::Result<Option<Vec<Part>>> {
        let frames = object.frames().iter().map(Frame::bytes);
        let mut parts = Vec::with_capacity(1 + object.frames().len());
        for bytes in std::iter::once(object.header()).chain(frames) {
            let compressed = self.codec.as_ref().and_then(|codec| codec.compress(bytes));
            let original = compressed.as_ref().map(|_| bytes.len() as u64);
            let stored = compressed.as_ref().unwrap_or(bytes);
            out.align()?;
            if out.len + stored.len() as u64 > room {
                return Ok(None);
            }
            out.put(stored)?;
            parts.push(Part { stored: stored.len() as u64, original });
        }
        out.file.flush()?;
        Ok(Some(parts))
    }
}

/// A file being written.
struct Out {
    file: BufWriter<File>,
    crc: Crc,
    len: u64,
}

impl Out {
    fn put(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.crc.update(bytes);
        self.file.write_all(bytes)?;
        self.len += bytes.len() as u64;
        Ok(())
    }

    fn align(&mut self) -> std::io::Result<()> {
        let gap = self.len.next_multiple_of(ALIGNMENT as u64) - self.len;
        self.put(&[0; ALIGNMENT][..gap as usize])
    }
}

impl SpillFile {
    /// Reads the object back. One of large frames is mapped, and its file is needed for as long as it lives; any other
    /// is in memory again.
    ///
    /// # Errors
    /// [`Error::Read`] and [`Error::Damaged`] when the file is not what it was, [`Error::Share`] when there is no memory.
    pub(super) fn read(&self, arena: &Arena) -> Result<Object, Error> {
        let read = |source| Error::Read { path: self.path.clone(), source };
        let file = FinalFile::open(&self.path).map_err(read)?;
        if file.len() != self.len {
            return Err(self.damaged("it has another length"));
        }
        let frames = self.parts.get(1..).unwrap_or_default();
        let is_large = |part: &&Part| part.stored >= SHARED_FRAME_MIN as u64;
        let large: u64 = frames.iter().filter(is_large).map(|part| part.stored).sum();
        let compressed = self.parts.iter().any(|part| part.original.is_some());
        if compressed || !is_worth_memfd(usize::try_from(large).unwrap_or(usize::MAX)) {
            let mut bytes = Vec::with_capacity(self.len as usize);
            file.file().read_to_end(&mut bytes).map_err(read)?;
            let mut crc = Crc::new();
            crc.update(&bytes);
            self.check(&crc)?;
            return self.unpack(bytes.into(), arena);
        }
        self.verify(&file)?;
        let mapped = Bytes::from_owner(file.map().map_err(|source| Error::Map { source })?);
        let fd = Arc::new(file.share().map_err(read)?);
        self.frames_of(&mapped, &fd)
    }

    /// Reads all of it once: what is damaged is found now and not in a task, and what is whole lies in the page cache.
    fn verify(&self, file: &FinalFile) -> Result<(), Error> {
        let mut crc = Crc::new();
        let mut chunk = vec![0; CHUNK];
        loop {
            match file.file().read(&mut chunk) {
                Ok(0) => return self.check(&crc),
                Ok(n) => crc.update(&chunk[..n]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(source) => return Err(Error::Read { path: self.path.clone(), source }),
            }
        }
    }

    fn check(&self, crc: &Crc) -> Result<(), Error> {
        match crc.sum() == self.checksum {
            true => Ok(()),
            false => Err(self.damaged("its contents have changed")),
        }
    }

    fn damaged(&self, what: &'static str) -> Error {
        Error::Damaged { path: self.path.clone(), what }
    }

    /// The regions of the file's contents.
    fn regions(&self, contents: &Bytes) -> Result<Vec<(Bytes, u64, Part)>, Error> {
        let mut at = 0_u64;
        let cut = |part: &Part| {
            let start = at.next_multiple_of(ALIGNMENT as u64);
            at = start + part.stored;
            // the length was checked, so this always succeeds
            (at <= contents.len() as u64)
                .then(|| (contents.slice(start as usize..at as usize), start, *part))
                .ok_or_else(|| self.damaged("it is too short"))
        };
        self.parts.iter().map(cut).collect()
    }

    /// An object whose large frames lie in the file.
    fn frames_of(&self, mapped: &Bytes, fd: &Arc<OwnedFd>) -> Result<Object, Error> {
        let mut regions = self.regions(mapped)?.into_iter();
        let header = regions.next().map(|(bytes, ..)| Bytes::copy_from_slice(&bytes)).unwrap_or_default();
        let frame = |(bytes, start, _): (Bytes, u64, Part)| {
            if bytes.len() < SHARED_FRAME_MIN {
                return Frame::heap(Bytes::copy_from_slice(&bytes));
            }
            Frame::shared(bytes, Segment::of_file(fd.clone(), start))
        };
        Ok(Object::new(self.kind, header, regions.map(frame).collect(), self.nbytes))
    }

    /// An object in memory. Frames are decompressed one by one.
    fn unpack(&self, contents: Bytes, arena: &Arena) -> Result<Object, Error> {
        let mut regions = self.regions(&contents)?.into_iter();
        let open = |(bytes, part): (Bytes, Part)| match (part.original, &self.codec) {
            (Some(len), Some(codec)) => codec
                .decompress(&bytes, len)
                .filter(|original| original.len() as u64 == len)
                .ok_or_else(|| self.damaged("it cannot be decompressed")),
            _ => Ok(bytes),
        };
        let header = regions.next().map(|(bytes, _, part)| open((bytes, part))).transpose()?;
        // a length in memory: it was one before
        let length = |part: Part| part.original.unwrap_or(part.stored) as usize;
        let frames = regions.map(|(bytes, _, part)| (length(part), (bytes, part))).collect();
        Object::from_parts(self.kind, header.unwrap_or_default(), frames, self.nbytes, arena, open)
    }

    /// Whether reading it takes as much memory as it has bytes: then others should not be read besides.
    pub(super) fn takes_memory(&self) -> bool {
        self.nbytes >= ALONE_MIN && self.parts.iter().any(|part| part.original.is_some())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::super::MEMFD_MIN;
    use super::*;
    use crate::proto::Payload;

    const ROOM: u64 = u64::MAX;

    /// Drops every second byte: not a compression, but reversible for bytes in pairs.
    #[derive(Debug)]
    struct Halves;

    impl Codec for Halves {
        fn compress(&self, frame: &[u8]) -> Option<Bytes> {
            let paired = frame.chunks(2).all(|pair| pair.len() == 2 && pair[0] == pair[1]);
            (paired && !frame.is_empty()).then(|| frame.iter().step_by(2).copied().collect())
        }

        fn decompress(&self, frame: &Bytes, _len: u64) -> Option<Bytes> {
            Some(frame.iter().flat_map(|byte| [*byte, *byte]).collect())
        }
    }

    fn files(codec: Option<Arc<dyn Codec>>) -> (tempfile::TempDir, Files) {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::new(dir.path().join("storage"), codec, Arc::default());
        (dir, files)
    }

    fn object(sizes: &[usize]) -> Object {
        let frames =
            sizes.iter().enumerate().map(|(i, n)| Bytes::from(vec![(i % 250) as u8 + 1; *n])).collect();
        let payload = Payload { kind: PayloadKind::Pickled, header: "head".into(), frames };
        Object::from_payload(payload, 77, &Arena::new()).unwrap()
    }

    #[test]
    fn large_frames_are_mapped_from_the_file() {
        let (dir, files) = files(None);
        let object = object(&[3, SHARED_FRAME_MIN, 0, MEMFD_MIN]);
        let spilled = files.write(&object, ROOM).unwrap();
        let read = spilled.read(&Arena::new()).unwrap();
        assert_eq!((read.to_payload(), read.nbytes()), (object.to_payload(), 77));
        assert!(read.is_on_disk() && !object.is_on_disk());
        assert_eq!((read.shared_bytes(), read.heap_bytes()), (0, 7));
        let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&dir.path().join("storage")), mode(&spilled.path)), (0o700, 0o600));
        assert_eq!(std::fs::metadata(&spilled.path).unwrap().len(), spilled.len);
        // where another process maps it is where it lies
        let segment = read.frames()[3].segment().unwrap();
        let contents = std::fs::read(&spilled.path).unwrap();
        assert_eq!(contents[segment.offset() as usize..][..4], [4; 4]);
        assert_eq!(segment.offset() % ALIGNMENT as u64, 0);
    }

    #[test]
    fn small_objects_come_back_to_memory() {
        let (_dir, files) = files(None);
        for sizes in [&[][..], &[0], &[1, 2, 3], &[10; 3000], &[SHARED_FRAME_MIN, 7]] {
            let object = object(sizes);
            let read = files.write(&object, ROOM).unwrap().read(&Arena::new()).unwrap();
            assert_eq!(read.to_payload(), object.to_payload());
            assert!(!read.is_on_disk());
        }
    }

    #[test]
    fn compressed_frames_come_back_to_memory() {
        let (_dir, files) = files(Some(Arc::new(Halves)));
        let object = object(&[2 * SHARED_FRAME_MIN, 3, 2]);
        let spilled = files.write(&object, ROOM).unwrap();
        assert!(spilled.len < (3 * SHARED_FRAME_MIN / 2) as u64);
        let read = spilled.read(&Arena::new()).unwrap();
        assert_eq!(read.to_payload(), object.to_payload());
        assert!(!read.is_on_disk());
        assert_eq!(read.shared_bytes(), 2 * SHARED_FRAME_MIN as u64);
    }

    #[test]
    fn nothing_is_left_of_what_finds_no_room() {
        for codec in [None, Some(Arc::new(Halves) as Arc<dyn Codec>)] {
            let (dir, files) = files(codec);
            let object = object(&[1000, 2000]);
            let len = files.write(&object, ROOM).unwrap().len;
            assert!(matches!(files.write(&object, len - 1), Err(Error::NoRoom)));
            let left = files.write(&object, len).unwrap();
            remove(files.garbage.take());
            let names = std::fs::read_dir(dir.path().join("storage")).unwrap();
            let names: Vec<_> = names.map(|entry| entry.unwrap().path()).collect();
            assert_eq!(names, std::slice::from_ref(&left.path));
        }
    }

    #[test]
    fn a_folder_that_refuses_files_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        let files = Files::new(dir.path().join("file/storage"), None, Arc::default());
        assert!(matches!(files.write(&object(&[10]), ROOM), Err(Error::Write { .. })));
    }

    #[test]
    fn files_that_changed_are_found_out() {
        for sizes in [&[10, 20][..], &[MEMFD_MIN, 9]] {
            let (_dir, files) = files(None);
            let damage = |how: &dyn Fn(&std::path::Path)| {
                let spilled = files.write(&object(sizes), ROOM).unwrap();
                how(&spilled.path);
                spilled.read(&Arena::new()).unwrap_err()
            };
            assert!(matches!(damage(&|path| std::fs::remove_file(path).unwrap()), Error::Read { .. }));
            let cut = damage(&|path| File::options().write(true).open(path).unwrap().set_len(9).unwrap());
            assert!(matches!(cut, Error::Damaged { .. }));
            let overwritten = damage(&|path| {
                let mut contents = std::fs::read(path).unwrap();
                *contents.last_mut().unwrap() ^= 1;
                std::fs::write(path, contents).unwrap();
            });
            assert!(matches!(overwritten, Error::Damaged { .. }));
        }
    }
}
