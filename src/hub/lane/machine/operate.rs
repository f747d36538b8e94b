//! What operators may do with a lane: pause its drain, limit it, and keep the
//! lane from writing at all.
//!
//! A paused lane is a draining one that does not drain: messages whose keys the
//! spool holds go behind it, others go to the primary. A lane that is degraded
//! by force writes nothing; what is in flight ends as its confirms come, or
//! through suspicion and its time-out as everywhere. Neither slows publishers
//! for the sake of a drain that an operator has slowed: the spool's own bound
//! holds them.

use super::{Limit, Machine, Now, Seq};
use crate::hub::{
    controls::{Controls, Hold},
    lane::machine::Action,
    state::LaneState,
};

/// Why a lane stays degraded though its broker may be there.
pub(super) const HELD: &str = "an operator degraded the lane";

impl<W> Machine<W> {
    /// Does what operators want of this lane; what holds already changes
    /// nothing.
    pub(crate) fn control(&mut self, now: Now, wanted: Controls) {
        // In the order in which least is written that should not be.
        match wanted.hold {
            Hold::Nothing => {
                self.limit_drain(now, wanted.rate);
                self.resume_drain(now);
                self.release_lane(now);
            }
            Hold::Drain => {
                self.pause_drain(now);
                self.release_lane(now);
                self.limit_drain(now, wanted.rate);
            }
            Hold::Everything => {
                self.force_degraded(now);
                self.pause_drain(now);
                self.limit_drain(now, wanted.rate);
            }
        }
    }

    /// Drains no more until resumed. What was drained already ends as its
    /// confirms come.
    pub(crate) fn pause_drain(&mut self, now: Now) {
        if !self.paused {
            self.paused = true;
            self.tell("an operator paused the drain");
            self.pump(now);
        }
    }

    /// Drains again.
    pub(crate) fn resume_drain(&mut self, now: Now) {
        if self.paused {
            self.paused = false;
            // As at the beginning of any drain: what came meanwhile is not the
            // publishers' fault.
            self.credit = super::FIRST_CREDIT;
            self.tell("an operator resumed the drain");
            self.pump(now);
        }
    }

    /// Drains at most so many messages a second; 0 lifts the limit.
    pub(crate) fn limit_drain(&mut self, now: Now, per_second: u32) {
        if self.limit() == per_second {
            return;
        }
        self.limit = Limit::new(per_second, now.at);
        if self.limit.is_none() {
            self.credit = super::FIRST_CREDIT;
        }
        self.pump(now);
    }

    /// Writes nothing to the primary until released. Without a spool it cannot
    /// be done, and is not.
    pub(crate) fn force_degraded(&mut self, now: Now) {
        if self.forced || !self.settings.spool {
            return;
        }
        self.forced = true;
        // A suspect lane waits for its confirms first, and degrades then.
        if self.state != LaneState::Suspect {
            self.go(LaneState::Degraded, HELD);
        }
        self.pump(now);
    }

    /// Lets it write again.
    pub(crate) fn release_lane(&mut self, now: Now) {
        if !self.forced {
            return;
        }
        self.forced = false;
        self.refused = false;
        if self.state == LaneState::Degraded && self.open {
            // What is still in flight was written before anything in the spool,
            // or is filed before it should it come back.
            if self.spool.is_empty() {
                self.go(LaneState::Primary, "an operator released the lane");
            } else {
                self.begin_drain("an operator released the lane");
            }
        }
        self.want_open(now);
        self.pump(now);
    }

    /// Whether an operator paused the drain.
    pub(crate) fn is_paused(&self) -> bool {
        self.paused
    }

    /// Whether an operator lets nothing be written.
    pub(crate) fn is_forced(&self) -> bool {
        self.forced
    }

    /// Messages drained a second at most; 0: no limit.
    pub(crate) fn limit(&self) -> u32 {
        self.limit.as_ref().map_or(0, Limit::per_second)
    }

    /// The number that the next message gets.
    pub(crate) fn next_seq(&self) -> Seq {
        self.next_seq
    }

    /// Everything up to this was left by an earlier process.
    pub(crate) fn restored(&self) -> Seq {
        self.restored
    }

    /// An operator slows the drain: publishers do not wait for it.
    pub(super) fn is_slowed(&self) -> bool {
        self.paused || self.limit.is_some()
    }

    /// Announces what changed for a lane that is draining, and stays so.
    fn tell(&mut self, why: &'static str) {
        if self.state == LaneState::Draining {
            self.actions.push(Action::Changed {
                from: self.state,
                to: self.state,
                why,
            });
        }
    }
}
