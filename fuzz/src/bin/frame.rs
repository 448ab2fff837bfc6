//! A stream of frames comes out the same however it is cut, and goes in again.
#![no_main]

use iqoqo_dask_worker::wire::frame::prelude;
use iqoqo_dask_worker_fuzz::{deframe, seed};
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: seed("frame", seeds), |data: &[u8]| {
    let (whole, error) = deframe(data, data.len());
    let (pieces, same_error) = deframe(data, 7);
    assert_eq!(whole, pieces);
    assert_eq!(error.map(|e| e.to_string()), same_error.map(|e| e.to_string()));
    for frames in whole {
        let mut stream = prelude(&frames).to_vec();
        frames.iter().for_each(|frame| stream.extend_from_slice(frame));
        let (again, error) = deframe(&stream, 1000);
        assert!(error.is_none() && again == [frames]);
    }
});

/// Small streams, which mutate fast, and those that have a large frame.
fn seeds(stream: &[u8]) -> Vec<Vec<u8>> {
    if (2_000..65_000).contains(&stream.len()) { Vec::new() } else { vec![stream.to_vec()] }
}
