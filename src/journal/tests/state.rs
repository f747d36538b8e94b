//! What is counted behind the lock, to the byte: the room that is taken, what
//! waits for the writer, the removes to come, and when a segment is worth moving.

use super::{
    super::{
        format::{FRAME_HEADER, MAX_FRAME, PUT_HEADER, REMOVE_LEN},
        index::Index,
        state::{Contents, State, Written},
    },
    *,
};

/// What is kept aside for the removal of one entry.
const REMOVAL: u64 = (FRAME_HEADER + REMOVE_LEN) as u64;

fn state(options: &JournalOptions) -> State {
    State::new(Index::default(), 1, options)
}

/// Bytes of a batch with one put of so many.
fn encoded(len: u64) -> u64 {
    (FRAME_HEADER + PUT_HEADER) as u64 + len
}

fn of(len: u64) -> Batch {
    put(body(1, len as usize))
}

/// Everything that is queued is in a file.
fn write(state: &mut State, seq: u64) {
    let queue = state.take_queue();
    state.index.begin_segment(seq, queue[0].first_id, 0);
    for queued in queue {
        let left = state.queued_bytes - queued.batch.encoded_len();
        let (frame, what) = (state.index.bytes(), Contents::Batch(queued));
        state.index.grow(seq, frame + 1000);
        state.publish(Written { seq, frame, what });
        assert_eq!(state.queued_bytes, left);
    }
}

#[test]
fn what_is_written_waits_no_longer_and_what_lives_keeps_the_room_of_its_removal() {
    let mut state = state(&small());
    assert_eq!((state.used(), state.appended()), (0, 0));
    for len in [100, 200, 300] {
        state.append(of(len)).unwrap();
    }
    let queued = encoded(100) + encoded(200) + encoded(300);
    assert_eq!(state.queued_bytes, queued);
    assert_eq!((state.used(), state.appended()), (queued + 3 * REMOVAL, 3));
    write(&mut state, 1);
    assert_eq!((state.queued_bytes, state.live()), (0, 3));
    assert_eq!(state.used(), state.index.bytes() + 3 * REMOVAL);
    // The removal waits for the writer in its turn.
    state.append(remove([2])).unwrap();
    assert_eq!((state.queued_bytes, state.live()), (REMOVAL, 2));
    assert_eq!(state.used(), state.index.bytes() + REMOVAL + 2 * REMOVAL);
    assert_eq!(state.appended(), 4);
}

#[test]
fn the_last_byte_of_the_room_is_taken_and_not_one_more() {
    let options = small();
    let room = options.budget();
    let longest = room - REMOVAL - encoded(0);
    let alone = |len| state(&options).append(of(len));
    alone(longest).unwrap();
    match alone(longest + 1).unwrap_err() {
        JournalError::TooLarge { bytes, limit } => {
            assert_eq!((bytes, limit), (encoded(longest + 1), room));
        }
        other => panic!("{other}"),
    }
    // The same behind another.
    let beside = |len| {
        let mut state = state(&options);
        state.append(of(1000)).unwrap();
        state.append(of(len)).map(|_| state.used())
    };
    let rest = longest - encoded(1000) - REMOVAL;
    assert_eq!(beside(rest).unwrap(), room);
    assert!(matches!(beside(rest + 1), Err(JournalError::Full)));
}

#[test]
fn the_queue_takes_its_last_byte_and_always_one_batch() {
    let options = JournalOptions {
        max_queued_bytes: encoded(100) + encoded(200),
        ..small()
    };
    let mut state = state(&options);
    state.append(of(100)).unwrap();
    assert!(matches!(state.append(of(201)), Err(JournalError::Full)));
    state.append(of(200)).unwrap();
    assert!(matches!(state.append(of(0)), Err(JournalError::Full)));
    state.append(remove([1])).unwrap();
    write(&mut state, 1);
    state.append(of(10_000)).unwrap();
}

#[test]
fn a_frame_has_its_bound_however_much_room_there_is() {
    let options = JournalOptions {
        max_bytes: 8 * MAX_FRAME,
        max_queued_bytes: 8 * MAX_FRAME,
        ..small()
    };
    // One body many times: it takes its memory once.
    let piece = body(1, 1 << 20);
    let of = |bytes: u64| {
        let header = PUT_HEADER as u64;
        let whole = (bytes - FRAME_HEADER as u64) / (piece.len() as u64 + header) - 1;
        let last = bytes - FRAME_HEADER as u64 - whole * (piece.len() as u64 + header) - 2 * header;
        let mut batch = Batch::new();
        for _ in 0..whole {
            batch.put(piece.clone());
        }
        batch.put(piece.slice(..(last / 2) as usize));
        batch.put(piece.slice(..(last - last / 2) as usize));
        assert_eq!(batch.encoded_len(), bytes);
        batch
    };
    state(&options).append(of(MAX_FRAME)).unwrap();
    match state(&options).append(of(MAX_FRAME + 1)).unwrap_err() {
        JournalError::TooLarge { limit, .. } => assert_eq!(limit, MAX_FRAME),
        other => panic!("{other}"),
    }
}

/// A log of segments of which each has so many bytes, and 20 entries, of which so
/// many live.
fn log(options: &JournalOptions, segments: &[(u64, u64)]) -> State {
    let mut state = state(options);
    let mut id = 1;
    for (seq, &(bytes, live)) in (1..).zip(segments) {
        state.index.begin_segment(seq, id, bytes);
        for n in 0..20 {
            state.index.insert(id, seq, 0, bytes / 20);
            if n >= live {
                state.index.remove(id, 1);
            }
            id += 1;
        }
    }
    state
}

#[test]
fn a_segment_is_moved_when_little_of_it_or_less_than_half_of_the_log_lives() {
    let options = small();
    let oldest = |segments: &[(u64, u64)]| log(&options, segments).compactable();
    // A quarter is not little; less is.
    assert_eq!(
        oldest(&[(4000, 5), (4000, 20), (4000, 20), (4000, 20), (4000, 20)]),
        None
    );
    assert_eq!(
        oldest(&[(4000, 4), (4000, 20), (4000, 20), (4000, 20), (4000, 20)]),
        Some(1)
    );
    // Nothing has to be moved: the file can go.
    assert_eq!(
        oldest(&[(4000, 0), (4000, 20), (4000, 20), (4000, 20), (4000, 20)]),
        None
    );
    // Half of the log is not too little; less is.
    assert_eq!(oldest(&[(4000, 10); 5]), None);
    assert_eq!(oldest(&[(4000, 9); 5]), Some(1));
    // With few segments there is little to gain.
    assert_eq!(oldest(&[(4000, 9); 4]), None);
}

#[test]
fn with_three_quarters_of_the_room_taken_more_is_moved_for_less() {
    let options = small();
    let short = options.budget() / 4 * 3;
    // Three segments of which 14 in 20 live: only when room is short.
    let lives = 3 * 14;
    let log = |used: u64| {
        let bytes = used - lives * REMOVAL;
        let third = bytes / 60 * 20;
        let state = log(
            &options,
            &[(bytes - 2 * third, 14), (third, 14), (third, 14)],
        );
        assert_eq!(state.used(), used);
        state.compactable()
    };
    assert_eq!(log(short), None);
    assert_eq!(log(short + 1), Some(1));
    assert_eq!(log(short / 2), None);
}
