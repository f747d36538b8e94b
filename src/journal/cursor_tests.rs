//! How often, and how much at once, a cursor reads.

use std::sync::Mutex;

use super::*;

/// A file of so many bytes, each told by its place, that remembers what was asked.
struct Watched {
    len: u64,
    byte: Box<dyn Fn(u64) -> u8 + Send + Sync>,
    reads: Mutex<Vec<(u64, usize)>>,
    lens: Mutex<usize>,
}

fn at(offset: u64) -> u8 {
    u8::try_from(offset % 251).unwrap()
}

impl SegmentFile for Watched {
    fn len(&self) -> io::Result<u64> {
        *self.lens.lock().unwrap() += 1;
        Ok(self.len)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.reads.lock().unwrap().push((offset, buffer.len()));
        let rest = usize::try_from(self.len.saturating_sub(offset)).unwrap();
        let read = buffer.len().min(rest);
        for (byte, place) in buffer[..read].iter_mut().zip(offset..) {
            *byte = (self.byte)(place);
        }
        Ok(read)
    }

    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
        unreachable!("a cursor reads")
    }

    fn sync(&self) -> io::Result<()> {
        unreachable!("a cursor reads")
    }

    fn truncate(&self, _: u64) -> io::Result<()> {
        unreachable!("a cursor reads")
    }
}

fn cursor(len: u64) -> (Cursor, Arc<Watched>) {
    cursor_of(len, at)
}

fn cursor_of(len: u64, byte: impl Fn(u64) -> u8 + Send + Sync + 'static) -> (Cursor, Arc<Watched>) {
    let file = Arc::new(Watched {
        len,
        byte: Box::new(byte),
        reads: Mutex::default(),
        lens: Mutex::default(),
    });
    (Cursor::new(file.clone()), file)
}

impl Watched {
    /// What was read since the last time.
    fn reads(&self) -> Vec<(u64, usize)> {
        std::mem::take(&mut self.reads.lock().unwrap())
    }

    fn lens(&self) -> usize {
        std::mem::take(&mut self.lens.lock().unwrap())
    }
}

fn check(cursor: &mut Cursor, offset: u64, len: usize) {
    let expected: Vec<u8> = (offset..offset + len as u64).map(at).collect();
    assert!(cursor.peek(offset, len).unwrap() == expected, "at {offset}");
}

#[test]
fn who_reads_on_reads_more_at_once_and_who_jumps_little() {
    let (mut cursor, file) = cursor(8 << 20);
    // From byte to byte: each read is twice the one before, up to the largest.
    let (mut offset, mut length) = (0, 2 * SMALL);
    for _ in 0..8 {
        check(&mut cursor, offset, 1);
        assert_eq!(file.reads(), [(offset, length)]);
        // To its last byte it is here, and its first one still.
        check(&mut cursor, offset + length as u64 - 10, 10);
        check(&mut cursor, offset, 1);
        assert!(file.reads().is_empty());
        offset += length as u64;
        length = (2 * length).min(LARGE);
    }
    assert_eq!(length, LARGE);
    // Over its end: from there on, at a large one's length.
    check(&mut cursor, offset - 1, 2);
    assert_eq!(file.reads(), [(offset - 1, LARGE)]);
    for elsewhere in [4 << 20, 1 << 20] {
        check(&mut cursor, elsewhere, 100);
        assert_eq!(file.reads(), [(elsewhere, SMALL)]);
    }
    // More than a window is asked for: that much.
    check(&mut cursor, 6 << 20, SMALL + 1);
    assert_eq!(file.reads(), [(6 << 20, SMALL + 1)]);
    assert_eq!(file.lens(), 0, "nothing needed the file's length");
}

#[test]
fn a_huge_frame_is_read_past_the_buffer_and_no_more_than_the_file_has() {
    let (mut cursor, file) = cursor(3 << 20);
    let huge = cursor.read(100, LARGE + 1).unwrap();
    assert_eq!((huge.len(), cursor.buffer.capacity()), (LARGE + 1, 0));
    assert_eq!(file.reads(), [(100, LARGE + 1)]);
    let large = cursor.read(100, LARGE).unwrap();
    assert!(large.iter().copied().eq((100..).map(at).take(LARGE)));
    assert_eq!(cursor.buffer.len(), LARGE);
    assert_eq!(file.lens(), 0);
    // A length that cannot be true takes no memory.
    assert_eq!(cursor.peek(1 << 20, 1 << 40).unwrap().len(), 2 << 20);
    assert_eq!(file.lens(), 1);
    assert_eq!(cursor.read(3 << 20, LARGE + 1).unwrap(), [0; 0]);
}

#[test]
fn a_buffer_that_one_huge_frame_made_does_not_stay() {
    let (mut cursor, _) = cursor(8 << 20);
    check(&mut cursor, 0, 2 * LARGE);
    let twice = cursor.buffer.capacity();
    assert!(twice >= 2 * LARGE);
    // That much is what a growing buffer may well have: it stays.
    check(&mut cursor, 4 << 20, 1);
    assert_eq!(cursor.buffer.capacity(), twice);
    check(&mut cursor, 0, 2 * LARGE + 1);
    check(&mut cursor, 2 << 20, LARGE + 1);
    assert!(
        cursor.buffer.capacity() > 2 * LARGE,
        "for the next huge one"
    );
    check(&mut cursor, 4 << 20, 1);
    assert!(cursor.buffer.capacity() <= LARGE);
}

#[test]
fn the_first_byte_that_is_not_zero_is_found_where_it_is() {
    let first = |place, from| {
        let (mut cursor, _) = cursor_of(1 << 20, move |at| u8::from(at == place));
        cursor.first_nonzero(from).unwrap()
    };
    for place in [32, 33, LARGE as u64 + 32, LARGE as u64 + 31, (1 << 20) - 1] {
        assert_eq!(first(place, 32), Some(place));
    }
    assert_eq!(first(31, 32), None);
    assert_eq!(first(1 << 20, 32), None);
}
