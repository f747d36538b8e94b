//! When messages are due: at a rate, whether or not the producer is ready for
//! them, or at once. It sends nothing.
//!
//! ```text
//!   metronome (a thread) --due--> Turns --due--> producer --> hub | bare client
//! ```

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{latency::Tally, load::Load};
use crate::cli::Failure;

/// When the next message is due.
#[derive(Debug)]
pub(crate) struct Turns {
    paced: Option<mpsc::UnboundedReceiver<Instant>>,
    until: Instant,
    left: u64,
    backlog: Option<Backlog>,
    /// Turns since the backlog was looked at.
    looked: u32,
    stop: CancellationToken,
}

impl Turns {
    /// The turns of a load, from when it started on.
    pub(crate) fn of(load: &Load) -> Result<Self, Failure> {
        let until = load.started + load.time;
        let paced = match load.rate {
            Some(rate) => Some(metronome(load.started, until, rate)?),
            None => None,
        };
        Ok(Self {
            paced,
            until,
            left: load.most,
            backlog: load.backlog.clone(),
            looked: 0,
            stop: load.stop.clone(),
        })
    }

    /// Whether there is a time to wait for before a message is due.
    pub(crate) fn is_paced(&self) -> bool {
        self.paced.is_some()
    }

    /// Waits until a message is due; none when the run is over.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub(crate) async fn next(&mut self) -> Option<Instant> {
        if self.left == 0 {
            return None;
        }
        if let Some(backlog) = &self.backlog
            && self.looked == 0
        {
            backlog.room().await;
        }
        let due = match &mut self.paced {
            Some(due) => tokio::select! {
                biased;
                () = self.stop.cancelled() => return None,
                due = due.recv() => due?,
            },
            None => {
                let now = Instant::now();
                if now >= self.until {
                    return None;
                }
                now
            }
        };
        self.looked = (self.looked + 1) % LOOK_EVERY;
        self.left -= 1;
        Some(due)
    }

    /// As [`Turns::next`], on a thread that may block. It looks at no backlog.
    pub(crate) fn next_blocking(&mut self) -> Option<Instant> {
        if self.paced.is_none() {
            return self.ready();
        }
        if self.left == 0 {
            return None;
        }
        let due = self.paced.as_mut()?.blocking_recv()?;
        self.left -= 1;
        Some(due)
    }

    /// What is due by now, if anything is.
    pub(crate) fn ready(&mut self) -> Option<Instant> {
        if self.left == 0 {
            return None;
        }
        let due = match &mut self.paced {
            Some(due) => due.try_recv().ok()?,
            None => {
                let now = Instant::now();
                if now >= self.until {
                    return None;
                }
                now
            }
        };
        self.left -= 1;
        Some(due)
    }
}

/// Says when messages are due, on a thread of its own: a runtime's timers are a
/// millisecond coarse, which is more than many a latency.
///
/// The channel has no bound: it holds what a stalled producer owes, which is the
/// rate times the time of the run at most.
#[allow(
    clippy::disallowed_methods,
    reason = "a thread of its own that does nothing but wait for the time"
)]
fn metronome(
    started: Instant,
    until: Instant,
    rate: u64,
) -> Result<mpsc::UnboundedReceiver<Instant>, Failure> {
    let (tick, due) = mpsc::unbounded_channel();
    std::thread::Builder::new()
        .name("metronome".to_owned())
        .spawn(move || {
            for n in 0.. {
                let at = started + due_after(n, rate);
                if at >= until {
                    return;
                }
                let wait = at.saturating_duration_since(Instant::now());
                if !wait.is_zero() {
                    std::thread::sleep(wait);
                }
                if tick.send(at).is_err() {
                    return;
                }
            }
        })
        .map_err(|e| Failure::new(format!("no thread can be started for the pace: {e}")))?;
    Ok(due)
}

/// When the `n`th message of a rate is due. Not a sum of intervals, whose
/// rounding would add up.
fn due_after(n: u64, rate: u64) -> Duration {
    let rate = rate.max(1);
    let ns = u128::from(n % rate) * 1_000_000_000 / u128::from(rate);
    Duration::from_secs(n / rate) + Duration::from_nanos(u64::try_from(ns).unwrap_or(0))
}

/// Holds producers back while consumers are far behind: what is in memory only
/// has a bound, and running into it is not what is measured.
#[derive(Clone, Debug)]
pub(crate) struct Backlog {
    pub(crate) sent: Arc<AtomicU64>,
    pub(crate) arrived: Arc<Tally>,
    /// How often each message arrives.
    pub(crate) copies: u64,
}

impl Backlog {
    /// Counts what a producer sent.
    pub(crate) fn add(&self, count: u64) {
        self.sent.fetch_add(count, Relaxed);
    }

    async fn room(&self) {
        loop {
            let sent = self.sent.load(Relaxed) * self.copies;
            if sent.saturating_sub(self.arrived.count()) < MOST_BEHIND * self.copies {
                return;
            }
            // No signal: a handler that gave one for each message would be what
            // is measured.
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// Messages that producers may be ahead of consumers in memory.
const MOST_BEHIND: u64 = 100_000;
/// Turns between two looks at the backlog.
const LOOK_EVERY: u32 = 64;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::bench::{load::Shape, payload::Bodies};

    #[test]
    fn what_is_due_does_not_drift() {
        assert_eq!(due_after(0, 3), Duration::ZERO);
        assert_eq!(due_after(3, 3), Duration::from_secs(1));
        assert_eq!(due_after(3_000_001, 3).as_secs(), 1_000_000);
        assert_eq!(due_after(1, 5000), Duration::from_micros(200));
        assert_eq!(due_after(7, 0), Duration::from_secs(7));
    }

    #[tokio::test]
    async fn a_stalled_producer_owes_what_was_due_meanwhile() {
        let shape = Shape {
            producers: 1,
            consumers: 0,
            window: 1,
            prefetch: 1,
            ack_every: 1,
            size: 16,
            rate: Some(1000),
            time: Duration::from_millis(50),
            pairs: 1,
        };
        let bodies = Bodies::new(16, true).unwrap();
        let load = Load::split(&shape, shape.time, &bodies).remove(0);
        let mut turns = load.turns().unwrap();
        tokio::time::sleep(Duration::from_millis(60)).await;
        let mut due = Vec::new();
        while let Some(at) = turns.next().await {
            due.push(at.saturating_duration_since(load.started));
        }
        assert_eq!(due.len(), 50);
        assert_eq!(due[10], Duration::from_millis(10));
    }
}
