//! Whatever a peer sends, there is an answer or a typed error, and no more memory than the limits give.

use bytes::{BufMut, Bytes, BytesMut};
use iqoqo_dask_worker::proto::{Stimulus, Value};
use iqoqo_dask_worker::wire::frame::{Deframer, Step};
use iqoqo_dask_worker::wire::handshake::Info;
use iqoqo_dask_worker::wire::{
    Compression, Error, Limits, compress, decode_message, encode_message, msgpack,
};
use proptest::prelude::*;

use crate::python::value;
use crate::{captured, deframe, enframe};

/// Room for the captures, not for what damaged ones ask for.
fn tight() -> Limits {
    Limits { message_bytes: 1 << 20, frames: 1000, depth: 250, values: 200_000, decompressed_bytes: 1 << 20 }
}

/// All the way that bytes of a peer go.
fn read(stream: &[u8]) -> Result<(), Error> {
    for frames in deframe(stream, 1 << 16, &tight())? {
        let value = decode_message(frames, &tight())?;
        let again = encode_message(&value, Compression::None)?;
        assert_eq!(format!("{:?}", decode_message(again, &tight())?), format!("{value:?}"));
        let _ = Info::from_value(&value);
        let messages = if let Value::List(messages) = value { messages } else { vec![value] };
        for message in messages {
            let _ = Stimulus::parse(message);
        }
    }
    Ok(())
}

/// A stream of one message with these numbers in front.
fn head(first: u64, numbers: &[u64]) -> Bytes {
    let mut out = BytesMut::new();
    out.put_u64_le(first);
    numbers.iter().for_each(|n| out.put_u64_le(*n));
    out.freeze()
}

fn main_frame(bytes: &[u8]) -> Result<Value, Error> {
    decode_message(vec![Bytes::copy_from_slice(bytes)], &Limits::default())
}

fn with_header(header: &Value, rest: &[&[u8]], limits: &Limits) -> Result<Value, Error> {
    let mut encoded = BytesMut::new();
    msgpack::encode(header, &mut encoded).unwrap();
    let mut frames = vec![Bytes::from_static(b"\x81\xae__Serialized__\x01"), encoded.freeze()];
    frames.extend(rest.iter().map(|f| Bytes::copy_from_slice(f)));
    decode_message(frames, limits)
}

#[test]
fn lengths_are_refused_before_they_are_believed() {
    let limits = Limits { message_bytes: 1000, frames: 10, ..Limits::default() };
    let refused = |bytes: Bytes| {
        let mut input = &bytes[..];
        Deframer::new(limits.clone()).advance(&mut input).unwrap_err()
    };
    assert!(matches!(
        refused(head(1001, &[1])),
        Error::TooLong { what: "message", bytes: 1001, limit: 1000 }
    ));
    assert!(matches!(refused(head(u64::MAX, &[u64::MAX])), Error::TooLong { .. }));
    assert!(matches!(refused(head(100, &[11])), Error::TooMany { what: "frames", count: 11, limit: 10 }));
    assert!(matches!(refused(head(8, &[0])), Error::NoFrames));
    assert!(matches!(refused(head(8, &[1])), Error::Split { bytes: 8 }));
    assert!(matches!(refused(head(16, &[1, 1001])), Error::TooLong { bytes: 1017, .. }));
    assert!(matches!(refused(head(24, &[2, u64::MAX, u64::MAX])), Error::TooLong { .. }));
    assert!(matches!(refused(head(17, &[1, 5])), Error::Split { bytes: 17 }));
    // an HTTP client that found the port
    assert!(matches!(refused(Bytes::from_static(b"GET / HTTP/1.1\r\nHost: x")), Error::TooLong { .. }));
}

#[test]
fn large_frames_are_left_to_the_caller() {
    let big = Bytes::from(vec![1; 100_000]);
    let frames = [Bytes::from_static(b"\xc0"), big.clone(), Bytes::new(), Bytes::from(vec![2; 30_000])];
    let stream = enframe(&frames);
    let mut deframer = Deframer::new(Limits::default());
    assert!(matches!(deframer.supply(big.clone()), Err(Error::Split { .. })), "nobody asked");
    let mut input = &stream[..];
    assert_eq!(deframer.advance(&mut input).unwrap(), Step::Large { len: 100_000 });
    assert_eq!(deframer.advance(&mut input).unwrap(), Step::Large { len: 100_000 });
    assert!(matches!(deframer.supply(big.slice(1..)), Err(Error::Split { bytes: 99_999 })));
    input = &input[100_000..];
    deframer.supply(big.clone()).unwrap();
    assert!(!deframer.is_idle());
    let Step::Message(got) = deframer.advance(&mut input).unwrap() else { panic!() };
    assert_eq!(got, frames);
    assert_eq!(got[1].as_ptr(), big.as_ptr());
    assert!(deframer.is_idle() && input.is_empty());
}

#[test]
fn malformed_values_are_named_with_their_place() {
    let error = |bytes: &[u8]| main_frame(bytes).unwrap_err();
    assert!(matches!(decode_message(Vec::new(), &Limits::default()), Err(Error::NoFrames)));
    assert!(matches!(error(b""), Error::Truncated { what: "value", offset: 0 }));
    assert!(matches!(error(b"\x92\x01"), Error::Truncated { what: "list", offset: 1 }));
    assert!(matches!(error(b"\x92\x01\xcd\x01"), Error::Truncated { what: "number", .. }));
    assert!(matches!(error(b"\xdd\xff\xff\xff\xff\x01"), Error::Truncated { what: "list", offset: 5 }));
    assert!(matches!(error(b"\xdf\xff\xff\xff\xff\x01"), Error::Truncated { what: "map", offset: 5 }));
    assert!(matches!(error(b"\xdb\xff\xff\xff\xffab"), Error::Truncated { what: "text", offset: 5 }));
    assert!(matches!(error(b"\xc6\xff\xff\xff\xffab"), Error::Truncated { what: "bytes", offset: 5 }));
    assert!(matches!(error(b"\x91\xa2a\xff"), Error::Utf8 { offset: 2 }));
    assert!(matches!(error(b"\x91\xc1"), Error::Marker { marker: 0xc1, offset: 1 }));
    assert!(matches!(error(b"\xd4\x01\x02"), Error::Marker { marker: 0xd4, offset: 0 }));
    assert!(matches!(error(b"\xc0\xc0\xc0"), Error::Trailing { offset: 1, bytes: 2 }));
    let deep = [vec![0x91; 512], vec![0xc0]].concat();
    assert!(main_frame(&deep).is_ok());
    let deeper = [vec![0x91; 513], vec![0xc0]].concat();
    assert!(matches!(error(&deeper), Error::TooDeep { limit: 512, .. }));
    let few = Limits { values: 10, ..Limits::default() };
    let eleven = Bytes::from([vec![0x9b], vec![0xc0; 11]].concat());
    assert!(matches!(msgpack::decode(&eleven, &few), Err(Error::TooMany { count: 11, limit: 10, .. })));
    // nested, so that no single list is over the limit
    let nested = Bytes::from(b"\x92\x94\xc0\xc0\xc0\xc0\x95\xc0\xc0\xc0\xc0\xc0".to_vec());
    assert!(matches!(msgpack::decode(&nested, &few), Err(Error::TooMany { count: 5, .. })));
}

#[test]
fn values_follow_each_other_in_one_buffer() {
    let bytes = Bytes::from_static(b"\x01\x92\xa1a\xc4\x01b\xc0");
    let mut at = 0;
    let limits = Limits::default();
    assert_eq!(msgpack::decode_at(&bytes, &mut at, &limits).unwrap(), Value::from(1));
    let pair = msgpack::decode_at(&bytes, &mut at, &limits).unwrap();
    assert_eq!((pair, at), (Value::List(vec!["a".into(), Value::Bytes("b".into())]), 7));
    assert_eq!(msgpack::decode_at(&bytes, &mut at, &limits).unwrap(), Value::Nil);
    assert!(matches!(
        msgpack::decode_at(&bytes, &mut at, &limits),
        Err(Error::Truncated { what: "value", offset: 8 })
    ));
    let mut beyond = 100;
    assert!(msgpack::decode_at(&bytes, &mut beyond, &limits).is_err());
}

#[test]
fn what_msgpack_cannot_hold_is_refused() {
    let mut out = BytesMut::new();
    for value in [1i128 << 64, i128::from(i64::MIN) - 1] {
        assert!(matches!(msgpack::encode(&Value::from(value), &mut out), Err(Error::Integer { .. })));
    }
    let payload = iqoqo_dask_worker::wire::payload::bytes_object(Bytes::new());
    assert!(matches!(msgpack::encode(&payload.into(), &mut out), Err(Error::Payload)));
    let deep = (0..600).fold(Value::Nil, |v, _| Value::List(vec![v]));
    assert!(matches!(msgpack::encode(&deep, &mut out), Err(Error::TooDeep { .. })));
    assert!(out.is_empty(), "a refused value leaves nothing behind");
}

#[test]
fn markers_that_point_nowhere_are_refused() {
    let marker = |bytes: &[u8], frames: usize| {
        let header = Bytes::from_static(b"\x81\xaenum-sub-frames\x00");
        let frames = std::iter::repeat_n(header, frames);
        decode_message(
            std::iter::once(Bytes::copy_from_slice(bytes)).chain(frames).collect(),
            &Limits::default(),
        )
    };
    let at = |n: u8| [b"\x81\xae__Serialized__".as_slice(), &[n]].concat();
    assert!(marker(&at(1), 1).is_ok());
    assert!(matches!(marker(&at(2), 1), Err(Error::FrameIndex { index: 2, frames: 2 })));
    let huge = b"\x81\xab__Pickled__\xcf\xff\xff\xff\xff\xff\xff\xff\xff";
    assert!(matches!(marker(huge, 1), Err(Error::FrameIndex { .. })));
    let twice = [b"\x92".as_slice(), &at(1), &at(1)].concat();
    assert!(matches!(marker(&twice, 1), Err(Error::FrameReused { index: 1 })));
    // sets of what is no list, and enum members, stay as they are
    for plain in [b"\x82\xa7__Set__\xc3\xa7as-list\xa1x".as_slice(), b"\x81\xa8__Enum__\xc3"] {
        let value = main_frame(plain).unwrap();
        assert_eq!(encode_message(&value, Compression::None).unwrap(), [plain]);
    }
    // not markers to Dask either
    for plain in [at(0), at(0xff), b"\x81\xae__Serialized__\xc0".to_vec()] {
        assert!(matches!(marker(&plain, 1), Ok(Value::Map(_))));
    }
}

#[test]
fn malformed_payload_headers_are_refused() {
    let limits = Limits::default();
    let count = |n: Value| Value::map([("num-sub-frames", n)]);
    let compressed = |list: Value| Value::map([("compression", list), ("num-sub-frames", 1.into())]);
    assert!(with_header(&count(2.into()), &[b"a", b"b"], &limits).is_ok());
    assert!(matches!(
        with_header(&count(2.into()), &[b"a"], &limits),
        Err(Error::FrameIndex { index: 3, frames: 3 })
    ));
    for n in [Value::from(-1), Value::Nil, "1".into()] {
        let error = with_header(&count(n), &[b"a"], &limits).unwrap_err();
        assert!(matches!(error, Error::Header { field: "num-sub-frames" }));
    }
    assert!(matches!(with_header(&count(u64::MAX.into()), &[b"a"], &limits), Err(Error::FrameIndex { .. })));
    assert!(matches!(with_header(&Value::map([]), &[], &limits), Err(Error::Header { .. })));
    assert!(matches!(with_header(&Value::Nil, &[], &limits), Err(Error::Header { field: "type" })));
    let short = Value::List(vec!["lz4".into(), Value::Nil]);
    assert!(matches!(
        with_header(&compressed(short), &[b"a"], &limits),
        Err(Error::Header { field: "compression" })
    ));
    for list in [Value::from(1), Value::List(vec![Value::from(1)])] {
        assert!(matches!(with_header(&compressed(list), &[b"a"], &limits), Err(Error::Header { .. })));
    }
    let unknown = Value::List(vec!["blosc".into()]);
    assert!(
        matches!(with_header(&compressed(unknown), &[b"a"], &limits), Err(Error::UnknownCompression { name }) if name == "blosc")
    );
    let lz4 = || compressed(Value::List(vec!["lz4".into()]));
    assert!(matches!(with_header(&lz4(), &[b"\x05\0\0\0bad"], &limits), Err(Error::Decompress { .. })));
}

#[test]
fn decompression_stops_at_the_limit() {
    let zeros = vec![0; 300_000];
    for compression in [Compression::Lz4, Compression::Zstd, Compression::Snappy, Compression::Zlib] {
        let frame = compress::maybe_compress(&zeros, compression).unwrap();
        assert!(frame.len() < 20_000);
        assert_eq!(compress::decompress(&frame, compression, 300_000).unwrap(), zeros);
        let error = compress::decompress(&frame, compression, 299_999).unwrap_err();
        assert!(matches!(error, Error::TooLong { limit: 299_999, .. }), "{compression}: {error}");
        for cut in [0, 1, 5, frame.len() - 1] {
            let error = compress::decompress(&frame.slice(..cut), compression, 300_000);
            assert!(error.is_err(), "{compression} cut to {cut}");
        }
    }
    // frames that claim gigabytes and hold nothing
    let four_gigabytes = Bytes::from_static(b"\xff\xff\xff\xff\x00");
    let limit = Limits::default().decompressed_bytes;
    assert!(compress::decompress(&four_gigabytes, Compression::Lz4, limit).is_err());
    assert!(
        compress::decompress(&Bytes::from_static(b"\xff\xff\xff\xff\x0f\0"), Compression::Snappy, limit)
            .is_err()
    );
    // one budget for all frames of a message
    let frame = compress::maybe_compress(&zeros, Compression::Lz4).unwrap();
    let header = Value::map([
        ("compression", Value::List(vec!["lz4".into(), "lz4".into()])),
        ("num-sub-frames", 2.into()),
    ]);
    let limits = |decompressed_bytes| Limits { decompressed_bytes, ..Limits::default() };
    assert!(with_header(&header, &[&frame, &frame], &limits(600_000)).is_ok());
    let error = with_header(&header, &[&frame, &frame], &limits(599_999)).unwrap_err();
    assert!(matches!(error, Error::TooLong { bytes: 300_000, limit: 299_999, .. }));
}

#[test]
fn only_what_shrinks_is_compressed() {
    let mut noise = vec![0; 100_000];
    fastrand::Rng::with_seed(1).fill(&mut noise);
    for compression in [Compression::Lz4, Compression::Zstd, Compression::Snappy, Compression::Zlib] {
        assert!(compress::maybe_compress(&noise, compression).is_none());
        assert!(compress::maybe_compress(&[0; 9_999], compression).is_none());
        assert!(compress::maybe_compress(&[0; 10_000], compression).is_some());
    }
    assert!(compress::maybe_compress(&[0; 100_000], Compression::None).is_none());
}

#[test]
fn a_capture_cut_anywhere_is_an_error_or_unfinished() {
    for (name, stream) in captured().into_iter().filter(|(_, s)| s.len() < 4000) {
        for cut in 0..stream.len() {
            assert_eq!(deframe(&stream[..cut], 1 << 16, &tight()).unwrap().len(), 0, "{name} cut to {cut}");
        }
        let frames = deframe(&stream, 1 << 16, &tight()).unwrap().remove(0);
        for cut in 0..frames[0].len() {
            let mut frames = frames.clone();
            frames[0].truncate(cut);
            assert!(decode_message(frames, &tight()).is_err(), "{name}: frame 0 cut to {cut}");
        }
    }
}

#[test]
fn captures_with_any_byte_changed_do_no_harm() {
    for (name, stream) in captured().into_iter().filter(|(_, s)| s.len() < 1500) {
        for at in 0..stream.len() {
            for flip in [0x01, 0x80, 0xff] {
                let mut stream = stream.clone();
                stream[at] ^= flip;
                let _ = read(&stream);
            }
        }
        read(&stream).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn values_survive(value in value()) {
        let frames = encode_message(&value, Compression::None).unwrap();
        prop_assert_eq!(decode_message(frames, &Limits::default()).unwrap(), value);
    }

    #[test]
    fn messages_survive_damage(
        pick in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let all = captured();
        let mut stream = pick.get(&all).1.clone();
        for (at, byte) in changes {
            let at = at.index(stream.len());
            stream[at] = byte;
        }
        let _ = read(&stream);
        stream.truncate(cut.index(stream.len()));
        let _ = read(&stream);
    }

    #[test]
    fn noise_is_no_message(noise in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = read(&noise);
        let noise = Bytes::from(noise);
        let _ = msgpack::decode(&noise, &tight());
        let _ = decode_message(vec![noise.clone(), noise.clone()], &tight());
        for compression in [Compression::Lz4, Compression::Zstd, Compression::Snappy, Compression::Zlib] {
            let _ = compress::decompress(&noise, compression, 1 << 20);
        }
    }

    #[test]
    fn frames_survive_a_stream(lengths in prop::collection::vec(prop_oneof![0..10usize, 2000..6000usize, 60_000..70_000usize], 1..8), piece in 1..5000usize) {
        let frames: Vec<Bytes> = lengths.iter().enumerate().map(|(i, n)| vec![i as u8; *n].into()).collect();
        let stream = [enframe(&frames), enframe(&frames)].concat();
        prop_assert_eq!(deframe(&stream, piece, &Limits::default()).unwrap(), [frames.clone(), frames]);
    }
}
