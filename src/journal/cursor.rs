//! Reads one segment's bytes through a buffer: large when read on and on, small
//! when jumped about in.

use std::{io, sync::Arc};

use super::storage::SegmentFile;

/// A window on a segment file.
pub(super) struct Cursor {
    file: Arc<dyn SegmentFile>,
    buffer: Vec<u8>,
    start: u64,
    window: usize,
}

impl Cursor {
    pub(super) fn new(file: Arc<dyn SegmentFile>) -> Self {
        Self {
            file,
            buffer: Vec::new(),
            start: 0,
            window: SMALL,
        }
    }

    /// The bytes at a place; fewer than asked for where the file ends.
    pub(super) fn peek(&mut self, offset: u64, len: usize) -> io::Result<&[u8]> {
        let held = self.start + self.buffer.len() as u64;
        if offset < self.start || offset + len as u64 > held {
            let reads_on = offset >= self.start && offset <= held;
            self.window = if reads_on {
                (self.window * 2).min(LARGE)
            } else {
                SMALL
            };
            self.fill(offset, len.max(self.window))?;
        }
        let from = usize::try_from(offset - self.start).unwrap_or(usize::MAX);
        let rest = self.buffer.get(from..).unwrap_or_default();
        Ok(rest.get(..len).unwrap_or(rest))
    }

    /// Bytes that are handed out for good; large ones do not pass the buffer.
    pub(super) fn read(&mut self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        if len <= LARGE {
            return Ok(self.peek(offset, len)?.to_vec());
        }
        let mut bytes = vec![0; len];
        let got = self.file.read_at(offset, &mut bytes)?;
        bytes.truncate(got);
        Ok(bytes)
    }

    /// Bytes from a place to the file's end.
    pub(super) fn remaining(&self, offset: u64) -> io::Result<u64> {
        Ok(self.file.len()?.saturating_sub(offset))
    }

    /// Where the bytes from `offset` on stop being zero; `None`: nowhere.
    pub(super) fn first_nonzero(&mut self, mut offset: u64) -> io::Result<Option<u64>> {
        loop {
            let bytes = self.peek(offset, LARGE)?;
            if bytes.is_empty() {
                return Ok(None);
            }
            if let Some(at) = bytes.iter().position(|&byte| byte != 0) {
                return Ok(Some(offset + at as u64));
            }
            offset += bytes.len() as u64;
        }
    }

    fn fill(&mut self, offset: u64, len: usize) -> io::Result<()> {
        self.buffer.clear();
        if len <= LARGE && self.buffer.capacity() > 2 * LARGE {
            // One huge frame does not keep its memory.
            self.buffer = Vec::new();
        }
        // How long the file is costs a call; worth it only before much is allocated.
        let rest = if len > LARGE {
            usize::try_from(self.remaining(offset)?).unwrap_or(usize::MAX)
        } else {
            len
        };
        self.buffer.resize(len.min(rest), 0);
        self.start = offset;
        let read = self.file.read_at(offset, &mut self.buffer);
        // After an error the buffer holds nothing that was read.
        self.buffer.truncate(*read.as_ref().unwrap_or(&0));
        read.map(|_| ())
    }
}

/// One entry of a usual size with its neighbours.
const SMALL: usize = 4 << 10;
/// From here on a read costs the disk, not the call.
const LARGE: usize = 256 << 10;

#[cfg(test)]
#[path = "cursor_tests.rs"]
mod tests;
