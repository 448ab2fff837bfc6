//! What the wire room costs: a batch of tasks in, an answer out. Times are for a whole message; the item rate is tasks.
#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use divan::counter::ItemsCount;
use divan::{Bencher, black_box};
use iqoqo_dask_worker::proto::{Stimulus, Value};
use iqoqo_dask_worker::wire::frame::{Deframer, Step, prelude};
use iqoqo_dask_worker::wire::{Compression, Limits, decode_message, encode_message};

fn main() {
    divan::main();
}

/// A captured batch of compute-task messages, as it lies on the stream.
const BATCH: &[u8] = include_bytes!("../tests/data/wire/stream-compute-task-long.bin");

fn deframe(mut stream: &[u8]) -> Vec<Bytes> {
    match Deframer::new(Limits::default()).advance(&mut stream).unwrap() {
        Step::Message(frames) => frames,
        other => panic!("{other:?}"),
    }
}

fn tasks() -> ItemsCount {
    let batch = decode_message(deframe(BATCH), &Limits::default()).unwrap();
    ItemsCount::new(batch.as_list().unwrap().len())
}

#[divan::bench]
fn deframe_batch(bencher: Bencher<'_, '_>) {
    bencher.counter(tasks()).bench(|| deframe(black_box(BATCH)));
}

#[divan::bench]
fn decode_batch(bencher: Bencher<'_, '_>) {
    let limits = Limits::default();
    let frames = deframe(BATCH);
    bencher
        .counter(tasks())
        .with_inputs(|| frames.clone())
        .bench_values(|frames| decode_message(frames, &limits).unwrap());
}

#[divan::bench]
fn parse_batch(bencher: Bencher<'_, '_>) {
    let batch = decode_message(deframe(BATCH), &Limits::default()).unwrap();
    bencher.counter(tasks()).with_inputs(|| batch.clone()).bench_values(|batch| match batch {
        Value::List(messages) => {
            messages.into_iter().map(|m| Stimulus::parse(m).unwrap()).collect::<Vec<_>>()
        }
        other => panic!("{other:?}"),
    });
}

#[divan::bench]
fn stream_to_stimuli(bencher: Bencher<'_, '_>) {
    let limits = Limits::default();
    bencher.counter(tasks()).bench(|| match decode_message(deframe(black_box(BATCH)), &limits).unwrap() {
        Value::List(messages) => {
            messages.into_iter().map(|m| Stimulus::parse(m).unwrap()).collect::<Vec<_>>()
        }
        other => panic!("{other:?}"),
    });
}

/// As `worker_state_machine.TaskFinishedMsg`.
fn finished(i: usize) -> Value {
    Value::map([
        ("op", "task-finished".into()),
        ("key", Value::List(vec!["add-0123456789abcdef".into(), i.into()])),
        ("run_id", i.into()),
        ("nbytes", 28.into()),
        ("type", Bytes::from_static(b"\x80\x04K\x01.").into()),
        ("typename", "int".into()),
        ("metadata", Value::Map(Vec::new())),
        ("thread", 140_000_000_000_000i64.into()),
        (
            "startstops",
            Value::List(vec![Value::map([
                ("action", "compute".into()),
                ("start", 1.75e9.into()),
                ("stop", (1.75e9 + 0.001).into()),
            ])]),
        ),
        ("status", "OK".into()),
        ("stimulus_id", "task-finished-1750000000.1234567".into()),
    ])
}

#[divan::bench(args = [1, 40])]
fn encode_finished(bencher: Bencher<'_, '_>, count: usize) {
    let batch = Value::List((0..count).map(finished).collect());
    bencher.counter(ItemsCount::new(count)).bench(|| {
        let frames = encode_message(black_box(&batch), Compression::None).unwrap();
        (prelude(&frames), frames)
    });
}
