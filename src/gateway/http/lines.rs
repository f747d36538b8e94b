//! Cuts a body that arrives in pieces into lines. No I/O.

use bytes::{Bytes, BytesMut};

/// Takes pieces, gives lines; holds at most one unfinished line.
#[derive(Debug)]
pub(crate) struct Lines {
    rest: BytesMut,
    /// Where the search for the next line feed goes on.
    searched: usize,
    max: usize,
    /// The line that is being read is over the limit: its bytes are dropped
    /// until it ends.
    skipping: bool,
}

/// What was cut off.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Line {
    /// A line without its line feed (and carriage return).
    Whole(Bytes),
    /// A line over the limit; its bytes are gone.
    TooLong,
}

impl Lines {
    /// Lines of at most `max` bytes.
    pub(crate) fn new(max: usize) -> Self {
        Self {
            rest: BytesMut::new(),
            searched: 0,
            max,
            skipping: false,
        }
    }

    /// Adds a piece.
    pub(crate) fn push(&mut self, piece: &[u8]) {
        self.rest.extend_from_slice(piece);
    }

    /// The next complete line, if there is one.
    pub(crate) fn next_line(&mut self) -> Option<Line> {
        let fresh = self.rest.get(self.searched..).unwrap_or_default();
        match fresh.iter().position(|b| *b == b'\n') {
            Some(at) => {
                let line = self.rest.split_to(self.searched + at + 1);
                self.searched = 0;
                let body = line.len() - 1;
                Some(self.finish(line.freeze().slice(..body)))
            }
            None => {
                self.searched = self.rest.len();
                if self.rest.len() > self.max + 1 {
                    // One more for a carriage return. The bytes are dropped now,
                    // the line is answered when it ends.
                    self.skipping = true;
                    self.rest.clear();
                    self.searched = 0;
                }
                None
            }
        }
    }

    /// The last line, when the body ended without a line feed.
    pub(crate) fn last(&mut self) -> Option<Line> {
        if self.rest.is_empty() && !self.skipping {
            return None;
        }
        let line = self.rest.split().freeze();
        self.searched = 0;
        Some(self.finish(line))
    }

    fn finish(&mut self, line: Bytes) -> Line {
        let end = line.len() - usize::from(line.ends_with(b"\r"));
        if std::mem::take(&mut self.skipping) || end > self.max {
            Line::TooLong
        } else {
            Line::Whole(line.slice(..end))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(pieces: &[&[u8]], max: usize) -> Vec<Line> {
        let mut lines = Lines::new(max);
        let mut out = Vec::new();
        for piece in pieces {
            lines.push(piece);
            out.extend(std::iter::from_fn(|| lines.next_line()));
        }
        out.extend(lines.last());
        out
    }

    fn whole(text: &str) -> Line {
        Line::Whole(Bytes::copy_from_slice(text.as_bytes()))
    }

    #[test]
    fn lines_come_whole_however_they_were_cut() {
        let expected = vec![whole("ab"), whole(""), whole("c"), whole("d")];
        for size in 1..9 {
            let pieces: Vec<&[u8]> = b"ab\r\n\nc\r\nd".chunks(size).collect();
            assert_eq!(cut(&pieces, 10), expected, "pieces of {size}");
        }
    }

    #[test]
    fn a_line_over_the_limit_costs_only_itself_and_no_memory() {
        assert_eq!(
            cut(&[b"12345\n", b"123456\n1"], 5),
            vec![whole("12345"), Line::TooLong, whole("1")]
        );
        let mut lines = Lines::new(5);
        for _ in 0..1000 {
            lines.push(b"xxxxxxxxxx");
            assert_eq!(lines.next_line(), None);
            assert!(lines.rest.len() <= 10);
        }
        lines.push(b"\nok\n");
        assert_eq!(lines.next_line(), Some(Line::TooLong));
        assert_eq!(lines.next_line(), Some(whole("ok")));
        assert_eq!(lines.last(), None);
    }
}
