//! How many of the messages that were handed out ended among the dead letters
//! lately, and whether that is more than operators want to sleep through.
//!
//! The meter is pure; a task of the hub feeds it.

use std::{
    collections::VecDeque,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::{Inner, MessagingHub, lock};

/// What is looked back on.
const WINDOW: Duration = Duration::from_secs(600);

/// From one look to the next.
const LOOK: Duration = Duration::from_secs(5);

/// The share of dead letters, and whether it is too large.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct DeadLetterRate {
    /// Dead letters of the last ten minutes for each message handed out in them,
    /// 0 to 1.
    pub rate: f64,
    /// Dead letters of the last ten minutes.
    pub letters: u64,
    /// The level of `hub.dead_letter_alarm` is passed.
    pub alarm: bool,
}

/// Counts seen at successive looks.
#[derive(Debug, Default)]
pub(super) struct DeadRate {
    /// When, handed out so far, dead letters so far.
    looks: VecDeque<(Instant, u64, u64)>,
    last: DeadLetterRate,
}

impl DeadRate {
    /// Takes the counts so far. Says whether the alarm began or ended.
    pub(super) fn look(&mut self, now: Instant, handed: u64, dead: u64, level: f64) -> bool {
        // The last look outside the window stays: the window begins with it.
        while let [_, (second, ..), ..] = self.looks.make_contiguous()
            && now.duration_since(*second) >= WINDOW
        {
            self.looks.pop_front();
        }
        let (_, handed_then, dead_then) = self.looks.front().copied().unwrap_or((now, 0, 0));
        self.looks.push_back((now, handed, dead));
        let letters = dead.saturating_sub(dead_then);
        // What died without being handed out (it expired) counts as one of those.
        let all = handed.saturating_sub(handed_then).max(letters);
        #[allow(clippy::cast_precision_loss, reason = "a share")]
        let rate = if all == 0 {
            0.0
        } else {
            letters as f64 / all as f64
        };
        let alarm = level > 0.0 && letters > 0 && rate >= level;
        let changed = alarm != self.last.alarm;
        self.last = DeadLetterRate {
            rate,
            letters,
            alarm,
        };
        changed
    }
}

impl MessagingHub {
    /// The share of messages that ended among the dead letters lately, as of the last
    /// look: who asks does not look, or whoever asks often would fill the window.
    #[must_use]
    pub fn dead_letter_rate(&self) -> DeadLetterRate {
        lock(&self.0.dead_rate).last
    }

    fn look_at_dead_letters(&self) {
        let recorder = &self.0.recorder;
        let handed = recorder.messages_consumed.get();
        let dead = recorder.messages_dead_lettered.get();
        let level = self.0.config.dead_letter_alarm.0;
        let mut meter = lock(&self.0.dead_rate);
        let changed = meter.look(Instant::now(), handed, dead, level);
        let last = meter.last;
        drop(meter);
        if changed && last.alarm {
            tracing::warn!(
                letters = last.letters,
                rate = last.rate,
                level,
                "too many messages end among the dead letters; `messaging-hub dlq list` shows them"
            );
        } else if changed {
            tracing::info!(
                rate = last.rate,
                "messages no longer end among the dead letters too often"
            );
        }
    }

    /// Starts to look at intervals, once.
    pub(super) fn watch_dead_letters(&self) {
        if lock(&self.0.dead_rate).looks.is_empty() {
            self.look_at_dead_letters();
            let hub = Arc::downgrade(&self.0);
            self.0.tasks.spawn(watch(hub, self.0.closing.clone()));
        }
    }
}

async fn watch(hub: Weak<Inner>, closing: CancellationToken) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = closing.cancelled() => return,
        }
        let Some(hub) = hub.upgrade() else { return };
        MessagingHub(hub).look_at_dead_letters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_is_that_of_the_last_ten_minutes_and_the_alarm_ends() {
        let start = Instant::now();
        let at = |s: u64| start + Duration::from_secs(s);
        let mut meter = DeadRate::default();
        assert!(!meter.look(at(0), 0, 0, 0.001));
        assert!(!meter.look(at(10), 10_000, 9, 0.001));
        assert!((meter.last.rate - 0.0009).abs() < 1e-9);
        assert!(meter.look(at(20), 20_000, 21, 0.001), "it begins");
        assert!(meter.last.alarm);
        assert!(!meter.look(at(30), 20_000, 21, 0.001));
        // Ten minutes on, only what came since counts.
        assert!(meter.look(at(640), 30_000, 21, 0.001), "it ends");
        assert_eq!((meter.last.letters, meter.last.alarm), (0, false));
    }

    #[test]
    fn what_was_never_handed_out_counts_and_level_0_is_off() {
        let now = Instant::now();
        let mut meter = DeadRate::default();
        meter.look(now, 0, 0, 0.0);
        assert!(!meter.look(now, 0, 5, 0.0));
        assert!((meter.last.rate - 1.0).abs() < 1e-9);
        assert!(meter.look(now, 0, 5, 0.5));
    }

    #[test]
    fn many_looks_take_little_room() {
        let start = Instant::now();
        let mut meter = DeadRate::default();
        for n in 0..10_000 {
            meter.look(start + LOOK * n, u64::from(n), 0, 0.001);
        }
        assert!(meter.looks.len() <= 122, "{}", meter.looks.len());
    }
}
