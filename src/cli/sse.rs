//! Reads Server-Sent Events from a body. No I/O.

use crate::gateway::http::lines::{Line, Lines};

/// One event.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Event {
    pub(super) id: String,
    pub(super) name: String,
    pub(super) data: String,
}

/// Takes pieces, gives events.
#[derive(Debug)]
pub(super) struct Events {
    lines: Lines,
    current: Event,
}

impl Events {
    pub(super) fn new() -> Self {
        Self {
            lines: Lines::new(MAX_LINE),
            current: Event::default(),
        }
    }

    pub(super) fn push(&mut self, piece: &[u8]) {
        self.lines.push(piece);
    }

    /// The next whole event; comments and events without data are passed over.
    pub(super) fn next_event(&mut self) -> Option<Event> {
        loop {
            let Line::Whole(line) = self.lines.next_line()? else {
                continue;
            };
            let line = String::from_utf8_lossy(&line);
            if line.is_empty() {
                let event = std::mem::take(&mut self.current);
                if event.data.is_empty() {
                    continue;
                }
                return Some(event);
            }
            let (field, value) = line.split_once(':').unwrap_or((&line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "id" => value.clone_into(&mut self.current.id),
                "event" => value.clone_into(&mut self.current.name),
                "data" => {
                    if !self.current.data.is_empty() {
                        self.current.data.push('\n');
                    }
                    self.current.data.push_str(value);
                }
                _ => {}
            }
        }
    }
}

/// Bytes of one line: the largest message that a hub may be set to, in base64.
const MAX_LINE: usize = 256 * 1024 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_told_apart_and_comments_passed_over() {
        let mut events = Events::new();
        events.push(b"retry: 5\n: live\n\nid: 1\ndata: {\"a\"");
        assert_eq!(events.next_event(), None);
        events.push(b":1}\n\nevent: change\ndata: x\ndata: y\n\n");
        let first = events.next_event().unwrap();
        assert_eq!((first.id.as_str(), first.data.as_str()), ("1", "{\"a\":1}"));
        let second = events.next_event().unwrap();
        assert_eq!(
            (second.name.as_str(), second.data.as_str()),
            ("change", "x\ny")
        );
        assert_eq!(events.next_event(), None);
    }
}
