//! A circuit around what a handler needs: the shared breaker, with one probe at a
//! time, and with calls told apart by the period in which they began. Pure: time
//! goes in, and nothing waits here.
//!
//! ```text
//!            failures in a row            open_for is over
//!   closed ---------------------> open ---------------------> half open
//!      ^                            ^        the probe failed    |  one call
//!      |                            '----------------------------|
//!      '--------------- the probe worked ------------------------'
//! ```

use std::time::{Duration, Instant};

use crate::{
    breaker::{Breaker, BreakerState},
    broker::Blame,
};

/// The circuit.
#[derive(Debug)]
pub(super) struct Circuit {
    breaker: Breaker,
    /// Counts the times that it opened or closed. What a call of an earlier
    /// period came to says nothing about now.
    period: u64,
    probing: bool,
}

/// A call's leave to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pass {
    period: u64,
    probe: bool,
}

/// Whether a call may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admission {
    Go(Pass),
    /// Not before this time.
    At(Instant),
    /// Not before the probe has ended.
    AfterProbe,
}

/// What a call says about what is guarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sign {
    Works,
    Broken,
    /// Nothing: the call was not made, or the message was at fault.
    None,
}

impl Circuit {
    pub(super) fn new(failures: u32, open_for: Duration) -> Self {
        Self {
            breaker: Breaker::new(failures, open_for),
            period: 0,
            probing: false,
        }
    }

    pub(super) fn state(&self, now: Instant) -> BreakerState {
        self.breaker.state(now)
    }

    pub(super) fn admit(&mut self, now: Instant) -> Admission {
        let probe = match (self.breaker.state(now), self.breaker.half_opens_at()) {
            (BreakerState::Open, Some(at)) => return Admission::At(at),
            (BreakerState::HalfOpen, _) if self.probing => return Admission::AfterProbe,
            (state, _) => state == BreakerState::HalfOpen,
        };
        self.probing = probe;
        Admission::Go(Pass {
            period: self.period,
            probe,
        })
    }

    /// Whether a pass that was not used yet still holds.
    pub(super) fn holds(&self, pass: Pass) -> bool {
        pass.period == self.period
    }

    /// A call ended, or was not made after all. Says whose a failure was.
    pub(super) fn end(&mut self, now: Instant, pass: Pass, sign: Sign) -> Blame {
        let broken = sign == Sign::Broken;
        if pass.period != self.period {
            // It began before the circuit opened. A failure is the outage's; the
            // message has not had its try yet.
            return if broken {
                Blame::Handler
            } else {
                Blame::Message
            };
        }
        if pass.probe {
            self.probing = false;
        }
        match sign {
            Sign::Works => {
                self.breaker.succeeded();
                self.period += u64::from(pass.probe);
            }
            Sign::Broken => self.breaker.failed(now),
            Sign::None => {}
        }
        if broken && self.breaker.state(now) == BreakerState::Open {
            // The failure that opens it is the outage's too.
            self.period += 1;
            return Blame::Handler;
        }
        Blame::Message
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: Duration = Duration::from_secs(10);

    fn go(circuit: &mut Circuit, now: Instant) -> Pass {
        match circuit.admit(now) {
            Admission::Go(pass) => pass,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_failure_that_opens_it_and_those_of_calls_under_way_are_nobodys() {
        let now = Instant::now();
        let mut circuit = Circuit::new(3, OPEN);
        let passes: Vec<Pass> = (0..6).map(|_| go(&mut circuit, now)).collect();
        let blames: Vec<Blame> = passes[..5]
            .iter()
            .map(|p| circuit.end(now, *p, Sign::Broken))
            .collect();
        let (message, handler) = (Blame::Message, Blame::Handler);
        assert_eq!(blames, [message, message, handler, handler, handler]);
        assert_eq!(circuit.admit(now), Admission::At(now + OPEN));
        // One that began before and works does not close it.
        assert_eq!(circuit.end(now, passes[5], Sign::Works), Blame::Message);
        assert_eq!(circuit.state(now), BreakerState::Open);
    }

    #[test]
    fn one_probe_goes_at_a_time_and_decides() {
        let mut now = Instant::now();
        let mut circuit = Circuit::new(1, OPEN);
        let first = go(&mut circuit, now);
        let slow = go(&mut circuit, now);
        assert_eq!(circuit.end(now, first, Sign::Broken), Blame::Handler);
        assert!(!circuit.holds(slow), "a pass ends with its period");
        now += OPEN;
        let probe = go(&mut circuit, now);
        assert_eq!(circuit.admit(now), Admission::AfterProbe);
        // Not made after all: the next may probe.
        circuit.end(now, probe, Sign::None);
        let probe = go(&mut circuit, now);
        assert_eq!(circuit.end(now, probe, Sign::Broken), Blame::Handler);
        assert_eq!(circuit.admit(now), Admission::At(now + OPEN));
        now += OPEN;
        let probe = go(&mut circuit, now);
        assert!(circuit.holds(probe));
        assert_eq!(circuit.end(now, probe, Sign::Works), Blame::Message);
        assert_eq!(circuit.state(now), BreakerState::Closed);
        // A failure from before the outage is still the outage's.
        assert_eq!(circuit.end(now, slow, Sign::Broken), Blame::Handler);
        assert_eq!(circuit.state(now), BreakerState::Closed);
    }

    #[test]
    fn it_takes_failures_in_a_row_and_a_bad_message_is_none() {
        let now = Instant::now();
        let mut circuit = Circuit::new(2, OPEN);
        for sign in [Sign::Broken, Sign::Works, Sign::Broken, Sign::None] {
            let pass = go(&mut circuit, now);
            assert_eq!(circuit.end(now, pass, sign), Blame::Message);
            assert_eq!(circuit.state(now), BreakerState::Closed);
        }
        let pass = go(&mut circuit, now);
        assert_eq!(circuit.end(now, pass, Sign::Broken), Blame::Handler);
    }
}
