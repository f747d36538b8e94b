//! How long to wait before the next attempt: doubling, jittered, for ever.

use std::time::Duration;

/// Pauses that double from a first to a longest one. Pure: it only says how
/// long.
#[derive(Clone, Debug)]
pub(super) struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Backoff {
    /// Pauses from `first` to `longest`.
    pub(super) fn new(first: Duration, longest: Duration) -> Self {
        let first = first.max(Duration::from_millis(1));
        Self {
            first,
            longest: longest.max(first),
            next: first,
        }
    }

    /// Begins again with the first pause.
    pub(super) fn reset(&mut self) {
        self.next = self.first;
    }

    /// The next pause: between half and the whole of its step, so that many
    /// clients of one broker do not come back at the same instant.
    pub(super) fn pause(&mut self) -> Duration {
        let step = self.next;
        self.next = (step * 2).min(self.longest);
        step.mul_f64(0.5 + fastrand::f64() / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_are_jittered() {
        let ms = Duration::from_millis;
        let mut backoff = Backoff::new(ms(50), ms(250));
        for step in [50, 100, 200, 250, 250, 250] {
            let pause = backoff.pause();
            assert!(
                pause >= ms(step) / 2 && pause <= ms(step),
                "{pause:?} of {step}"
            );
        }
        backoff.reset();
        assert!(backoff.pause() <= ms(50));
    }
}
