//! Decompressing writes no more than it may, and gives back what was compressed. The first byte picks the compression.
#![no_main]

use bytes::Bytes;
use iqoqo_dask_worker::wire::Compression;
use iqoqo_dask_worker::wire::compress::{decompress, maybe_compress};
use iqoqo_dask_worker_fuzz::{frames, seed};
use libfuzzer_sys::fuzz_target;

const ALL: [Compression; 4] = [Compression::Lz4, Compression::Zstd, Compression::Snappy, Compression::Zlib];
const LIMIT: u64 = 1 << 20;

fuzz_target!(init: seed("decompress", seeds), |data: &[u8]| {
    let Some((&pick, frame)) = data.split_first() else { return };
    let compression = ALL[usize::from(pick) % ALL.len()];
    let frame = Bytes::copy_from_slice(frame);
    if let Ok(original) = decompress(&frame, compression, LIMIT) {
        assert!(original.len() as u64 <= LIMIT);
    }
    // long enough to be worth it, and repetitive
    let original = frame.repeat(20_000 / frame.len().max(1) + 1);
    if let Some(compressed) = maybe_compress(&original, compression) {
        assert_eq!(decompress(&compressed, compression, LIMIT).expect("our own decompresses"), original);
    }
});

fn seeds(stream: &[u8]) -> Vec<Vec<u8>> {
    let frames = frames(stream).into_iter().filter(|f| f.len() < 2000);
    let mut seeds = Vec::new();
    for frame in frames {
        for (pick, compression) in ALL.into_iter().enumerate() {
            let repeated = frame.repeat(10_000 / frame.len().max(1) + 1);
            let compressed = maybe_compress(&repeated, compression).unwrap_or_default();
            seeds.push([&[pick as u8], &compressed[..]].concat());
        }
    }
    seeds.truncate(8);
    seeds
}
