//! A handshake that is understood is written as one that is understood alike.
#![no_main]

use bytes::Bytes;
use iqoqo_dask_worker::wire::handshake::Info;
use iqoqo_dask_worker::wire::{Compression, msgpack};
use iqoqo_dask_worker_fuzz::{frames, limits, seed};
use libfuzzer_sys::fuzz_target;

fuzz_target!(
    init: seed("handshake", |stream| frames(stream).iter().take(1).filter(|f| f.len() < 200).map(|f| f.to_vec()).collect()),
    |data: &[u8]| {
        let Ok(value) = msgpack::decode(&Bytes::copy_from_slice(data), &limits()) else { return };
        let Ok(info) = Info::from_value(&value) else { return };
        assert_eq!(Info::from_value(&info.to_value()).expect("our own is understood"), info);
        let ours = Info::new(Compression::Lz4, [3, 11, 0]);
        assert_eq!(ours.negotiate(&info), info.negotiate(&ours));
    }
);
