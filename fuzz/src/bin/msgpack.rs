//! A value that decodes encodes to what decodes to the same value.
#![no_main]

use bytes::{Bytes, BytesMut};
use iqoqo_dask_worker::wire::msgpack::{decode, encode};
use iqoqo_dask_worker_fuzz::{frames, limits, seed};
use libfuzzer_sys::fuzz_target;

fuzz_target!(
    init: seed("msgpack", seeds),
    |data: &[u8]| {
        let Ok(value) = decode(&Bytes::copy_from_slice(data), &limits()) else { return };
        let mut encoded = BytesMut::new();
        encode(&value, &mut encoded).expect("what was decoded fits");
        let again = decode(&encoded.freeze(), &limits()).expect("what was encoded is well formed");
        // as text: a NaN is not equal to itself
        assert_eq!(format!("{again:?}"), format!("{value:?}"));
    }
);

/// Main frames and payload headers.
fn seeds(stream: &[u8]) -> Vec<Vec<u8>> {
    frames(stream).iter().take(2).filter(|frame| frame.len() < 2_000).map(|frame| frame.to_vec()).collect()
}
