//! A message that decodes, payloads and compressed frames included, encodes to one that decodes to the same.
#![no_main]

use iqoqo_dask_worker::proto::Value;
use iqoqo_dask_worker::wire::{Compression, decode_message, encode_message, payload};
use iqoqo_dask_worker_fuzz::{deframe, limits, seed};
use libfuzzer_sys::fuzz_target;

fuzz_target!(
    init: seed("codec", |stream| if stream.len() < 8000 { vec![stream.to_vec()] } else { Vec::new() }),
    |data: &[u8]| {
        for frames in deframe(data, data.len()).0 {
            let Ok(value) = decode_message(frames, &limits()) else { continue };
            headers(&value);
            for compression in [Compression::None, Compression::Lz4] {
                let frames = encode_message(&value, compression).expect("what was decoded fits");
                let again = decode_message(frames, &limits()).expect("what was encoded is well formed");
                // as text: a NaN is not equal to itself
                assert_eq!(format!("{:?}", bare(again)), format!("{:?}", bare(value.clone())));
            }
        }
    }
);

/// Headers may gain a list of compressions on the way; what they say is compared through the frames.
fn bare(value: Value) -> Value {
    match value {
        Value::List(items) => Value::List(items.into_iter().map(bare).collect()),
        Value::Map(items) => Value::Map(items.into_iter().map(|(k, v)| (bare(k), bare(v))).collect()),
        Value::Set(items) => Value::Set(items.into_iter().map(bare).collect()),
        Value::Payload(mut payload) => {
            payload.header.clear();
            Value::Payload(payload)
        }
        other => other,
    }
}

fn headers(value: &Value) {
    match value {
        Value::List(items) | Value::Set(items) => items.iter().for_each(headers),
        Value::Map(items) => items.iter().for_each(|(_, v)| headers(v)),
        Value::Payload(p) => drop(payload::type_name(&p.header)),
        _ => {}
    }
}
