//! Bytes that are a header, a frame or an operation, and bytes that are none.

use crate::journal::format::{
    FRAME_HEADER, FrameHeader, FrameWriter, Head, MAX_FRAME, MOVED_HEADER, Op, OpHead, PUT_HEADER,
    SEGMENT_HEADER, SegmentHeader, VERSION, body_checksum, operations,
};

fn header() -> SegmentHeader {
    SegmentHeader {
        seq: 0x0102_0304_0506_0708,
        first_id: 0x1112_1314_1516_1718,
    }
}

#[test]
fn a_segments_header_stands_as_documented_and_is_read() {
    let bytes = header().encode();
    assert_eq!(&bytes[..8], b"MSGHUBJL");
    assert_eq!(bytes[8..12], VERSION.to_le_bytes());
    assert_eq!(bytes[12..20], header().seq.to_le_bytes());
    assert_eq!(bytes[20..28], header().first_id.to_le_bytes());
    assert_eq!(bytes[28..], crc32fast::hash(&bytes[..28]).to_le_bytes());
    assert_eq!(SegmentHeader::decode(&bytes), Head::Valid(header()));
}

#[test]
fn a_segments_header_with_a_flipped_bit_is_none_or_of_another_version() {
    let good = header().encode();
    for bit in 0..SEGMENT_HEADER * 8 {
        let mut bytes = good;
        bytes[bit / 8] ^= 1 << (bit % 8);
        let version = u32::from_le_bytes(bytes[8..12].try_into().unwrap());
        let expected = match version {
            0 | VERSION => Head::Bad,
            other => Head::Unknown(other),
        };
        assert_eq!(SegmentHeader::decode(&bytes), expected, "bit {bit}");
    }
    for len in 0..SEGMENT_HEADER {
        assert_eq!(SegmentHeader::decode(&good[..len]), Head::Bad, "{len}");
    }
}

fn frame_header(len: u64, puts: u32, moves: u32, synced: u64) -> Vec<u8> {
    let mut bytes = u32::try_from(len).unwrap().to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(7_u64.to_le_bytes());
    bytes.extend(puts.to_le_bytes());
    bytes.extend(moves.to_le_bytes());
    bytes.extend(synced.to_le_bytes());
    bytes
}

#[test]
fn a_frames_header_is_one_only_where_it_is_plausible() {
    let is = |len, puts, moves, synced| {
        FrameHeader::decode(&frame_header(len, puts, moves, synced), 100).is_some()
    };
    let (put, moved) = (PUT_HEADER as u64, MOVED_HEADER as u64);
    assert!(is(1, 0, 0, 0) && !is(0, 0, 0, 0), "an empty frame");
    let most = MAX_FRAME - FRAME_HEADER as u64;
    assert!(is(most, 0, 0, 0) && !is(most + 1, 0, 0, 0), "its size");
    assert!(is(3 * put, 3, 0, 0) && !is(3 * put - 1, 3, 0, 0), "puts");
    assert!(is(3 * moved, 0, 3, 0) && !is(3 * moved - 1, 0, 3, 0));
    let both = 2 * put + 3 * moved;
    assert!(is(both, 2, 3, 0) && !is(both - 1, 2, 3, 0), "both");
    assert!(is(1, 0, 0, 100) && !is(1, 0, 0, 101), "from the future");
    let short = &frame_header(1, 0, 0, 0)[..FRAME_HEADER - 1];
    assert_eq!(FrameHeader::decode(short, 100), None);
}

/// A frame behind something else, as several are written at once.
fn frame() -> Vec<u8> {
    let mut out = vec![0xaa; 5];
    let mut writer = FrameWriter::new(&mut out, 7);
    writer.put(b"one");
    writer.remove(3);
    writer.moved(2, b"moved");
    writer.put(b"");
    writer.mark();
    writer.finish(9, 1_000, 640);
    assert_eq!(out[..5], [0xaa; 5]);
    out.split_off(5)
}

#[test]
fn what_is_written_to_a_frame_is_read_from_it() {
    let frame = frame();
    let header = FrameHeader::decode(&frame, 1_000).unwrap();
    assert_eq!(header.total(), frame.len() as u64);
    assert_eq!((header.first_id, header.synced), (7, 640));
    assert_eq!((header.puts, header.moves), (2, 1));
    let read: Vec<_> = operations(&header, &frame[FRAME_HEADER..]).collect();
    let put = |id, body| Some(Op::Put { id, body });
    let expected = [
        put(7, &b"one"[..]),
        Some(Op::Remove { id: 3 }),
        Some(Op::Moved {
            id: 2,
            body: b"moved",
        }),
        put(8, b""),
        Some(Op::Mark),
    ];
    assert_eq!(read, expected);
}

#[test]
fn a_frame_fits_its_checksum_at_its_own_place_only() {
    let frame = frame();
    let header = FrameHeader::decode(&frame, 1_000).unwrap();
    assert!(header.verify(&frame, 9, 1_000));
    assert!(!header.verify(&frame, 8, 1_000));
    assert!(!header.verify(&frame, 9, 1_001));
    for bit in 0..frame.len() * 8 {
        let mut bytes = frame.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        // The checksum is not in itself: the header that was read has another.
        let crc = u32::from_le_bytes(bytes[4..8].try_into().unwrap());
        let header = FrameHeader { crc, ..header };
        assert!(!header.verify(&bytes, 9, 1_000), "bit {bit}");
    }
}

#[test]
fn an_operation_that_is_cut_or_unknown_ends_what_is_read() {
    let frame = frame();
    let header = FrameHeader::decode(&frame, 1_000).unwrap();
    let ops = &frame[FRAME_HEADER..];
    let whole = operations(&header, ops).count();
    for len in 1..ops.len() {
        let read: Vec<_> = operations(&header, &ops[..len]).collect();
        assert!(read.len() <= whole);
        let (last, before) = read.split_last().unwrap();
        assert!(before.iter().all(Option::is_some), "{len}");
        // A cut between two operations cannot be seen; the header's length says.
        let bytes: usize = read.iter().flatten().map(bytes_of).sum();
        assert_eq!(last.is_some(), bytes == len, "{len}");
    }
    assert_eq!(OpHead::decode(&[9; 40], 1), None);
    assert_eq!(OpHead::decode(&[], 1), None);
}

fn bytes_of(op: &Op<'_>) -> usize {
    match op {
        Op::Put { body, .. } => PUT_HEADER + body.len(),
        Op::Moved { body, .. } => MOVED_HEADER + body.len(),
        Op::Remove { .. } => 9,
        Op::Mark => 1,
    }
}

#[test]
fn a_body_is_checked_with_its_number() {
    let frame = frame();
    let head = OpHead::decode(&frame[FRAME_HEADER..], 7).unwrap();
    let crc = body_checksum(7, b"one");
    assert_eq!(head, OpHead::Put { id: 7, len: 3, crc });
    assert_eq!((head.len(), head.body_len()), (PUT_HEADER, 3));
    assert_ne!(crc, body_checksum(8, b"one"));
    assert_ne!(crc, body_checksum(7, b"two"));
}
