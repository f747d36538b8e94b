//! Handled ids of one group as they are kept: bytes in, bytes out. Pure; it
//! refuses what it cannot read instead of guessing.
//!
//! ```text
//! version (1 byte) | key (16) | first second (8) | length of the name (4) | name | ids
//! an id: hash (16) | seconds after the first (4) | attempt (4)
//! ```
//!
//! Numbers are little endian. Each entry says its group and its key, so that any
//! of them can go without the others.

use bytes::{BufMut, Bytes, BytesMut};

use super::super::dedup::{Attempt, Handled, IdHash, IdHasher};
use crate::error::{Error, ErrorCode, Result};

/// An entry that was read, without its ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) hasher: IdHasher,
    pub(super) group: String,
    pub(super) ids: usize,
    /// When the last of them was handled, in seconds since the epoch.
    pub(super) newest: u64,
}

/// The form that is written today.
const VERSION: u8 = 1;

/// Bytes before the group's name.
const PREFIX: usize = 29;

/// Bytes of an id.
const ID: usize = 24;

/// The bytes that stand for some ids of a group.
pub(super) fn encode<'a>(
    hasher: IdHasher,
    group: &str,
    ids: impl Iterator<Item = &'a Handled> + Clone,
) -> Bytes {
    let first = ids.clone().map(|h| h.at).min().unwrap_or(0);
    let mut out = BytesMut::with_capacity(PREFIX + group.len() + ids.clone().count() * ID);
    out.put_u8(VERSION);
    out.put_slice(&hasher.key());
    out.put_u64_le(first);
    // A name of 4 GiB does not fit a frame of the journal either.
    out.put_u32_le(u32::try_from(group.len()).unwrap_or(u32::MAX));
    out.put_slice(group.as_bytes());
    for handled in ids {
        out.put_slice(&handled.id.to_bytes());
        out.put_u32_le(u32::try_from(handled.at - first).unwrap_or(u32::MAX));
        out.put_u32_le(handled.attempt.0);
    }
    out.freeze()
}

/// What an entry is about.
///
/// # Errors
/// It is not an entry of this form.
pub(super) fn head(body: &[u8]) -> Result<Head> {
    let parts = split(body).ok_or_else(unreadable)?;
    let group = std::str::from_utf8(parts.name).map_err(|_| unreadable())?;
    Ok(Head {
        hasher: IdHasher::with_key(parts.key),
        group: group.to_owned(),
        ids: parts.ids.len() / ID,
        newest: parts.handled().map(|h| h.at).max().unwrap_or(0),
    })
}

/// The ids of an entry, in the order in which they were handled.
///
/// # Errors
/// It is not an entry of this form.
pub(super) fn ids(body: &[u8]) -> Result<impl Iterator<Item = Handled>> {
    split(body).map(|p| p.handled()).ok_or_else(unreadable)
}

struct Parts<'a> {
    key: [u8; 16],
    first: u64,
    name: &'a [u8],
    ids: &'a [u8],
}

impl<'a> Parts<'a> {
    fn handled(&self) -> impl Iterator<Item = Handled> + use<'a> {
        let first = self.first;
        let (ids, _) = self.ids.as_chunks::<ID>();
        ids.iter().filter_map(move |id| {
            let (hash, rest) = id.split_first_chunk()?;
            let (after, attempt) = rest.split_first_chunk()?;
            Some(Handled {
                at: first.saturating_add(u32::from_le_bytes(*after).into()),
                id: IdHash::from_bytes(*hash),
                attempt: Attempt(u32::from_le_bytes(attempt.try_into().ok()?)),
            })
        })
    }
}

fn split(body: &[u8]) -> Option<Parts<'_>> {
    let (version, rest) = body.split_first()?;
    let (key, rest) = rest.split_first_chunk()?;
    let (first, rest) = rest.split_first_chunk()?;
    let (len, rest) = rest.split_first_chunk()?;
    let len = usize::try_from(u32::from_le_bytes(*len)).ok()?;
    let (name, ids) = rest.split_at_checked(len)?;
    (*version == VERSION && ids.len() % ID == 0).then_some(Parts {
        key: *key,
        first: u64::from_le_bytes(*first),
        name,
        ids,
    })
}

pub(super) fn unreadable() -> Error {
    Error::new(
        ErrorCode::InvalidConfig,
        "the handled ids in the data folder have a form that this version does not read; use the version that wrote them, or move the folder away: what was handled and not settled may then be handed out again",
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn handled() -> impl Strategy<Value = Handled> {
        (any::<[u8; 16]>(), 0..u64::from(u32::MAX), any::<u32>()).prop_map(|(id, at, attempt)| {
            Handled {
                at,
                id: IdHash::from_bytes(id),
                attempt: Attempt(attempt),
            }
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            key: [u8; 16],
            name in ".{0,40}",
            all in prop::collection::vec(handled(), 1..40),
        ) {
            let hasher = IdHasher::with_key(key);
            let body = encode(hasher, &name, all.iter());
            let head = head(&body).unwrap();
            prop_assert_eq!(head.hasher.key(), key);
            prop_assert_eq!((head.group, head.ids), (name, all.len()));
            prop_assert_eq!(head.newest, all.iter().map(|h| h.at).max().unwrap());
            prop_assert_eq!(ids(&body).unwrap().collect::<Vec<_>>(), all);
        }

        #[test]
        fn anything_else_is_refused_or_read_and_never_a_panic(
            body in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let _ = (head(&body), ids(&body).map(Iterator::count));
        }
    }

    #[test]
    fn another_form_is_refused_with_what_to_do() {
        let mut body = encode(IdHasher::random(), "queue:", std::iter::empty()).to_vec();
        assert!(head(&body).is_ok());
        body[0] = 2;
        let said = head(&body).unwrap_err().to_string();
        assert!(said.contains("move the folder away"), "{said}");
    }
}
