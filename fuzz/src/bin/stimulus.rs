//! A message of the scheduler's stream is understood or refused by name; keys in it behave as keys do.
#![no_main]

use std::hash::{BuildHasher, RandomState};

use bytes::{Bytes, BytesMut};
use iqoqo_dask_worker::proto::{Stimulus, Value};
use iqoqo_dask_worker::wire::{decode_message, msgpack};
use iqoqo_dask_worker_fuzz::{deframe, limits, seed};
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: seed("stimulus", seeds), |data: &[u8]| {
    let Ok(value) = msgpack::decode(&Bytes::copy_from_slice(data), &limits()) else { return };
    if let Some(key) = value.field("key").and_then(Value::to_key) {
        let back = Value::from(&key).to_key().expect("a key is a key");
        assert!(back == key && back.cmp(&key).is_eq());
        let hasher = RandomState::new();
        assert_eq!(hasher.hash_one(&back), hasher.hash_one(&key));
        let _ = (key.to_string(), format!("{key:?}"), key.prefix());
    }
    match Stimulus::parse(value) {
        Ok(stimulus) => drop(format!("{stimulus:?}")),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});

/// Each message of a batch apart, without its payloads.
fn seeds(stream: &[u8]) -> Vec<Vec<u8>> {
    let messages = deframe(stream, stream.len()).0.into_iter();
    let batches = messages.filter_map(|frames| decode_message(frames, &limits()).ok());
    let each =
        batches.filter_map(|batch| if let Value::List(list) = batch { Some(list) } else { None }).flatten();
    each.take(3)
        .filter_map(|mut message| {
            message.take_field("run_spec");
            let mut out = BytesMut::new();
            msgpack::encode(&message, &mut out).ok().map(|()| out.to_vec())
        })
        .collect()
}
