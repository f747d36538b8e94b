//! Who holds which delivery, and until when. No clock and no I/O: time comes
//! in, what is due comes out.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use tokio::time::Instant;

/// The leases of one process, by token.
#[derive(Debug)]
pub(super) struct LeaseTable<T> {
    leases: HashMap<String, Lease<T>>,
    by_expiry: BTreeSet<(Instant, String)>,
    /// Room promised to requests that wait for deliveries.
    reserved: usize,
    capacity: usize,
}

#[derive(Debug)]
struct Lease<T> {
    item: T,
    expires: Instant,
}

impl<T> LeaseTable<T> {
    /// A table for `capacity` leases.
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            leases: HashMap::new(),
            by_expiry: BTreeSet::new(),
            reserved: 0,
            capacity,
        }
    }

    /// Keeps room for up to `wanted` leases and says for how many.
    pub(super) fn reserve(&mut self, wanted: usize) -> usize {
        let free = self
            .capacity
            .saturating_sub(self.leases.len() + self.reserved);
        let got = wanted.min(free);
        self.reserved += got;
        got
    }

    /// Gives kept room back.
    pub(super) fn release(&mut self, room: usize) {
        self.reserved = self.reserved.saturating_sub(room);
    }

    /// Leases an item; its room was reserved before.
    pub(super) fn grant(&mut self, now: Instant, token: String, item: T, lease: Duration) {
        let expires = now + lease;
        self.by_expiry.insert((expires, token.clone()));
        self.leases.insert(token, Lease { item, expires });
    }

    /// Ends a lease by its holder; `None` when there is none, or no more.
    pub(super) fn take(&mut self, now: Instant, token: &str) -> Option<T> {
        // An expired one stays for `expire`, which gives it back.
        if self.leases.get(token)?.expires <= now {
            return None;
        }
        self.remove(token)
    }

    /// Moves a lease's end to `lease` from now; false when there is none.
    pub(super) fn extend(&mut self, now: Instant, token: &str, lease: Duration) -> bool {
        let Some(held) = self.leases.get_mut(token) else {
            return false;
        };
        if held.expires <= now {
            return false;
        }
        self.by_expiry.remove(&(held.expires, token.to_owned()));
        held.expires = now + lease;
        self.by_expiry.insert((held.expires, token.to_owned()));
        true
    }

    /// Takes out what has expired.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<T> {
        let mut out = Vec::new();
        while let Some((at, token)) = self.by_expiry.first().cloned() {
            if at > now {
                break;
            }
            out.extend(self.remove(&token));
        }
        out
    }

    /// Takes everything out.
    pub(super) fn clear(&mut self) -> Vec<T> {
        self.by_expiry.clear();
        self.leases.drain().map(|(_, lease)| lease.item).collect()
    }

    /// When the next one expires.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.by_expiry.first().map(|(at, _)| *at)
    }

    /// Leases outstanding.
    pub(super) fn len(&self) -> usize {
        self.leases.len()
    }

    fn remove(&mut self, token: &str) -> Option<T> {
        let lease = self.leases.remove(token)?;
        self.by_expiry.remove(&(lease.expires, token.to_owned()));
        Some(lease.item)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn table() -> (LeaseTable<u32>, Instant) {
        let now = Instant::now();
        let mut table = LeaseTable::new(3);
        assert_eq!(table.reserve(2), 2);
        table.grant(now, "a".into(), 1, S);
        table.grant(now, "b".into(), 2, 2 * S);
        table.release(2);
        (table, now)
    }

    #[test]
    fn a_lease_is_taken_once() {
        let (mut table, now) = table();
        assert_eq!(table.take(now, "a"), Some(1));
        assert_eq!(table.take(now, "a"), None);
        assert_eq!(table.take(now, "x"), None);
        assert_eq!(table.next_expiry(), Some(now + 2 * S));
        assert_eq!(table.len(), 1);
    }

    #[test]
    fn an_expired_lease_belongs_to_nobody_and_is_given_back_once() {
        let (mut table, now) = table();
        assert_eq!(table.next_expiry(), Some(now + S));
        let later = now + S;
        assert_eq!(table.take(later, "a"), None);
        assert!(!table.extend(later, "a", S));
        assert_eq!(table.expire(later), vec![1]);
        assert!(table.expire(later).is_empty());
        assert_eq!(table.take(later, "b"), Some(2));
    }

    #[test]
    fn an_extended_lease_lives_longer() {
        let (mut table, now) = table();
        assert!(table.extend(now, "a", 5 * S));
        assert_eq!(table.expire(now + 2 * S), vec![2]);
        assert_eq!(table.take(now + 4 * S, "a"), Some(1));
    }

    #[test]
    fn room_is_bounded_and_counts_what_is_promised() {
        let (mut table, now) = table();
        assert_eq!(table.reserve(5), 1);
        assert_eq!(table.reserve(1), 0);
        table.release(1);
        assert_eq!(table.take(now, "a"), Some(1));
        assert_eq!(table.reserve(5), 2);
    }

    #[test]
    fn everything_comes_out_at_the_end() {
        let (mut table, _) = table();
        let mut all = table.clear();
        all.sort_unstable();
        assert_eq!(all, vec![1, 2]);
        assert_eq!(table.next_expiry(), None);
    }
}
