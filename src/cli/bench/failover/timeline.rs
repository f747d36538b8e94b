//! A run over time: the phases of an outage, and what publishers were answered
//! in each. Pure; times count from the beginning of the run.

use std::time::Duration;

use super::super::{latency::Latencies, stats::Spread};

/// An answer: when its message was due, and how long it took.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    pub(super) due: Duration,
    pub(super) latency: Duration,
    pub(super) spooled: bool,
}

impl Sample {
    fn answered(&self) -> Duration {
        self.due + self.latency
    }
}

/// When what happened.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moments {
    /// The broker was taken away.
    pub(super) struck: Duration,
    /// It was given back, or its start began.
    pub(super) mended: Duration,
    /// A bare client was confirmed again.
    pub(super) probed: Duration,
    /// The hub began to drain.
    pub(super) draining: Duration,
    /// The first spooled message was confirmed.
    pub(super) drained_first: Duration,
    /// The spool was empty.
    pub(super) empty: Duration,
    /// The load ended.
    pub(super) end: Duration,
}

/// A stretch of the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Phase {
    pub(super) name: &'static str,
    pub(super) from: Duration,
    pub(super) to: Duration,
}

/// What publishers saw of a phase.
pub(super) struct Seen {
    /// Answers a second; the extremes are those of half a second.
    pub(super) rate: Spread,
    /// Of the messages that were due in it.
    pub(super) latencies: Latencies,
    pub(super) spooled: u64,
}

/// A tenth of a second.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bucket {
    pub(super) at: Duration,
    /// Answers a second.
    pub(super) rate: f64,
    /// Of the messages that were due in it, in microseconds.
    pub(super) p99_us: Option<f64>,
}

impl Moments {
    /// The four phases, in order.
    pub(super) fn phases(&self) -> [Phase; 4] {
        let phase = |name, from, to| Phase { name, from, to };
        [
            phase("before", Duration::ZERO, self.struck),
            phase("outage", self.struck, self.draining),
            phase("drain", self.draining, self.empty),
            phase("after", self.empty, self.end.max(self.empty)),
        ]
    }

    /// From the bare client's first confirm to the hub's; zero when the hub was
    /// first.
    pub(super) fn recovery(&self) -> Duration {
        self.drained_first.saturating_sub(self.probed)
    }
}

impl Phase {
    pub(super) fn length(&self) -> Duration {
        self.to.saturating_sub(self.from)
    }

    fn holds(&self, at: Duration) -> bool {
        self.from <= at && at < self.to
    }
}

/// What publishers saw of a phase.
pub(super) fn seen(samples: &[Sample], phase: Phase) -> Seen {
    let mut latencies = Latencies::new();
    let mut spooled = 0;
    for sample in samples.iter().filter(|s| phase.holds(s.due)) {
        latencies.record(sample.latency);
        spooled += u64::from(sample.spooled);
    }
    let pieces = (phase.length().as_nanos() / PIECE.as_nanos()).max(1);
    let pieces = u32::try_from(pieces).unwrap_or(u32::MAX);
    let mut counts = vec![0_u64; pieces as usize];
    let length = phase.length() / pieces;
    for sample in samples.iter().filter(|s| phase.holds(s.answered())) {
        let at = index(sample.answered().saturating_sub(phase.from), length);
        if let Some(count) = counts.get_mut(at.min(pieces as usize - 1)) {
            *count += 1;
        }
    }
    let rates = counts.iter().map(|count| per_second(*count, length));
    Seen {
        rate: Spread {
            median: per_second(counts.iter().sum(), phase.length()),
            min: rates.clone().fold(f64::INFINITY, f64::min),
            max: rates.fold(0.0, f64::max),
        },
        latencies,
        spooled,
    }
}

/// How many spooled messages left the spool, which held `before` when the phase
/// began and is empty at its end.
pub(super) fn drained(samples: &[Sample], phase: Phase, before: u64) -> u64 {
    let added = samples
        .iter()
        .filter(|s| s.spooled && phase.holds(s.answered()));
    before + added.count() as u64
}

/// The whole run, a tenth of a second at a time.
pub(super) fn buckets(samples: &[Sample], end: Duration) -> Vec<Bucket> {
    let count = index(end, BUCKET) + 1;
    let mut answers = vec![0_u64; count];
    let mut latencies: Vec<Vec<Duration>> = vec![Vec::new(); count];
    for sample in samples {
        if let Some(n) = answers.get_mut(index(sample.answered(), BUCKET)) {
            *n += 1;
        }
        if let Some(all) = latencies.get_mut(index(sample.due, BUCKET)) {
            all.push(sample.latency);
        }
    }
    let each = answers.into_iter().zip(latencies).zip(0_u32..);
    each.map(|((answers, mut latencies), n)| {
        latencies.sort_unstable();
        let rank = (latencies.len() * 99).div_ceil(100).saturating_sub(1);
        Bucket {
            at: BUCKET * n,
            rate: per_second(answers, BUCKET),
            p99_us: latencies.get(rank).map(|l| l.as_secs_f64() * 1e6),
        }
    })
    .collect()
}

fn index(at: Duration, length: Duration) -> usize {
    let n = at.as_nanos() / length.as_nanos().max(1);
    usize::try_from(n).unwrap_or(usize::MAX)
}

#[allow(clippy::cast_precision_loss, reason = "counts are below 2^52")]
fn per_second(count: u64, length: Duration) -> f64 {
    if length.is_zero() {
        return 0.0;
    }
    count as f64 / length.as_secs_f64()
}

/// What a point of the plot covers.
const BUCKET: Duration = Duration::from_millis(100);
/// What a phase's slowest and fastest stretch cover, about.
const PIECE: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    /// A message each 10 ms for 4 s; those due from 1 s to 2 s take 50 ms.
    fn samples() -> Vec<Sample> {
        (0..400)
            .map(|n| Sample {
                due: ms(n * 10),
                latency: if (100..200).contains(&n) {
                    ms(50)
                } else {
                    ms(1)
                },
                spooled: (100..250).contains(&n),
            })
            .collect()
    }

    fn moments() -> Moments {
        Moments {
            struck: ms(1000),
            mended: ms(1800),
            probed: ms(1900),
            draining: ms(2000),
            drained_first: ms(2050),
            empty: ms(2500),
            end: ms(4000),
        }
    }

    #[test]
    fn phases_follow_each_other_and_recovery_counts_from_the_probe() {
        let moments = moments();
        let phases = moments.phases();
        for pair in phases.windows(2) {
            assert_eq!(pair[0].to, pair[1].from);
        }
        assert_eq!(moments.recovery(), ms(150));
        let first = Moments {
            drained_first: ms(1850),
            ..moments
        };
        assert_eq!(first.recovery(), Duration::ZERO);
    }

    #[test]
    fn a_phase_has_the_latencies_of_what_was_due_in_it() {
        let phases = moments().phases();
        let outage = seen(&samples(), phases[1]);
        let p50 = outage.latencies.quantile_us(0.5).unwrap();
        assert!((49_000.0..51_000.0).contains(&p50), "{p50}");
        assert_eq!(outage.spooled, 100);
        // Answers of what was due before 1.95 s: five of them come later.
        assert!((94.0..=96.0).contains(&outage.rate.median));
        assert!(outage.rate.min <= outage.rate.median);
        let before = seen(&samples(), phases[0]);
        assert!((99.0..=101.0).contains(&before.rate.median));
        assert_eq!(before.spooled, 0);
    }

    #[test]
    fn what_was_drained_is_what_was_there_and_what_came() {
        // Due from 1.95 s on, answered from 2 s to 2.5 s.
        let drain = moments().phases()[2];
        assert_eq!(drained(&samples(), drain, 100), 100 + 5 + 50);
    }

    #[test]
    fn an_empty_phase_is_no_division_by_nothing() {
        let phase = Phase {
            name: "after",
            from: ms(5),
            to: ms(5),
        };
        let seen = seen(&samples(), phase);
        assert!(seen.latencies.is_empty());
        assert_eq!((seen.rate.median, seen.rate.max), (0.0, 0.0));
    }

    #[test]
    fn buckets_cover_the_run() {
        let buckets = buckets(&samples(), ms(3999));
        assert_eq!(buckets.len(), 40);
        assert!((buckets[5].rate - 100.0).abs() < 1e-9);
        assert!((buckets[15].p99_us.unwrap() - 50_000.0).abs() < 1.0);
    }
}
