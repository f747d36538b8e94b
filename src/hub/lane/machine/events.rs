//! Spooled events in the hands of this hub's groups, while the lane is suspect
//! or degraded (`during_outage: local`).
//!
//! An event stays in the spool: every group has to get it, and so have other
//! hubs. A group that handled it is noted in its marks, and the drain publishes
//! it with them. While any group has it in hand it is not drained, nor is what
//! stands behind it in its order key.

use std::sync::Arc;

use super::{Action, Entry, Machine, Now, Seq, Spool, Status, Verdict};
use crate::{hub::lane::groups::Tag, message::wire::Failure};

/// Who of this hub may take spooled messages during an outage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Local {
    /// Nobody: they wait for the primary.
    Nobody,
    /// One consumer each; what it handled is never drained.
    Consumers,
    /// Each group its own copy; all are drained, marked with who handled them.
    Groups,
}

impl Local {
    /// A spool that holds what groups must not overtake, where they may.
    pub(super) fn prepare(self, mut spool: Spool) -> Spool {
        if self == Self::Groups {
            spool.hold_keys();
        }
        spool
    }
}

impl<W> Machine<W> {
    /// Whether groups may get spooled events now.
    pub(crate) fn hands_out_events(&self) -> bool {
        self.settings.local == Local::Groups && self.is_out()
    }

    /// Hands up to `max` events to a group. Each is to be settled under its tag.
    pub(crate) fn take_for(&mut self, now: Now, group: &Arc<str>, max: usize) -> Vec<(Tag, Entry)> {
        if !self.hands_out_events() || max == 0 {
            return Vec::new();
        }
        let chosen = self.groups.choose(group, now.wall, &self.spool, max);
        for seq in chosen.expired {
            self.bury_if_expired(now, seq);
        }
        if chosen.reached_tail {
            self.load();
        }
        let mut taken = Vec::with_capacity(chosen.events.len());
        for seq in chosen.events {
            let Some(entry) = self.spool.get(seq).cloned() else {
                continue;
            };
            let slot = self.spool.slot(&entry.order);
            self.spool.set(seq, Status::Leased);
            let tag = self.groups.take(group, seq, slot);
            taken.push((tag, self.as_seen_by(group, seq, entry)));
        }
        taken
    }

    /// Lets go of what is remembered of groups that nobody reads for.
    pub(crate) fn keep_groups(&mut self, reads: impl Fn(&str) -> bool) {
        self.groups.keep(reads);
    }

    /// A group decided about an event. False when it has none under this tag.
    pub(super) fn settle_event(&mut self, now: Now, tag: Tag, verdict: Verdict) -> bool {
        if let Verdict::DeadLetter { failure } = verdict {
            return self.copy_to_dead(tag, failure);
        }
        let Some((group, seq)) = self.groups.end(tag) else {
            return false;
        };
        match verdict {
            Verdict::Retry { delay, failure } => {
                let due = now.wall + delay;
                self.groups.gave_back(&group, seq, Some((failure, due)));
            }
            Verdict::Requeue => self.groups.gave_back(&group, seq, None),
            Verdict::Ack | Verdict::DeadLetter { .. } => {
                self.groups.settled(&group, seq);
                self.spool.edit(seq, |e| {
                    if !e.marks.settled.iter().any(|g| **g == *group) {
                        e.marks.settled.push(group.to_string());
                    }
                });
                self.actions.push(Action::Rewrite(seq));
            }
        }
        if !self.groups.is_held(seq) {
            self.spool.set(seq, Status::Ready);
        }
        self.pump(now);
        true
    }

    /// The drain waits for groups: publishers must not wait for it as well.
    pub(super) fn waits_for_groups(&self) -> bool {
        self.settings.local == Local::Groups && self.spool.leased() > 0
    }

    /// The group keeps the event in hand until there is a copy: a mark without
    /// one would be a loss.
    fn copy_to_dead(&mut self, tag: Tag, mut failure: Failure) -> bool {
        let Some((group, seq)) = self.groups.taken(tag) else {
            return false;
        };
        let Some(entry) = self.spool.get(seq) else {
            return false;
        };
        failure.details = format!("in group {group}: {}", failure.details);
        self.actions.push(Action::CopyToDead {
            tag,
            message: entry.message.clone(),
            failure,
            marks: entry.marks.clone(),
        });
        true
    }

    /// An event with the attempts that this group made.
    fn as_seen_by(&self, group: &Arc<str>, seq: Seq, mut entry: Entry) -> Entry {
        if let Some(tried) = self.groups.tried(group, seq) {
            let message = Arc::make_mut(&mut entry.message);
            message.redelivered = true;
            message.retry_count += tried.failed;
            if let Some(failure) = &tried.failure {
                message.error = Some(failure.details.clone());
                entry.marks.failure = Some(failure.clone());
            }
        }
        entry
    }
}
