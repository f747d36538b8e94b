//! How long to wait before the next attempt: doubling, jittered, for ever.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

/// Pauses that double from a first to a longest one: it only says how long.
#[derive(Debug)]
pub(super) struct Backoff {
    builder: ExponentialBuilder,
    steps: ExponentialBackoff,
    longest: Duration,
}

impl Backoff {
    /// Pauses from `first` to `longest`.
    pub(super) fn new(first: Duration, longest: Duration) -> Self {
        let first = first.max(Duration::from_millis(1));
        let longest = longest.max(first);
        // Jitter adds up to a whole step, so each step is half of what is meant:
        // the pause lies between half and the whole of it, and many clients of
        // one broker do not come back at the same instant.
        let builder = ExponentialBuilder::new()
            .with_min_delay(first / 2)
            .with_max_delay(longest / 2)
            .with_factor(2.0)
            .with_jitter()
            .without_max_times();
        Self {
            builder,
            steps: builder.build(),
            longest,
        }
    }

    /// Begins again with the first pause.
    pub(super) fn reset(&mut self) {
        self.steps = self.builder.build();
    }

    /// The next pause.
    pub(super) fn pause(&mut self) -> Duration {
        self.steps.next().unwrap_or(self.longest)
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
