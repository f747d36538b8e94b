//! Numbers out of repeated runs: medians, ranges, and how sure a ratio is. Pure;
//! it measures nothing and draws no random numbers, so that the same runs
//! always say the same.

/// A middle value with the extremes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

/// How one row's rate stands to another's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Ratio {
    /// The median of the one over the median of the other.
    pub(super) value: f64,
    /// Where the true ratio lies with [`Ratio::confidence`]; none for one pair.
    pub(super) interval: Option<(f64, f64)>,
    /// The probability of that, 0 to 1.
    pub(super) confidence: f64,
}

impl Ratio {
    /// Whether the runs leave it open which of the two is faster.
    pub(super) fn shows_no_difference(&self) -> bool {
        self.interval
            .is_some_and(|(low, high)| low <= 1.0 && high >= 1.0)
    }

    /// Whether it is that of a row to itself.
    pub(super) fn is_of_itself(&self) -> bool {
        self.interval == Some((1.0, 1.0))
    }
}

/// Median, smallest and largest; zeros of nothing.
pub(super) fn spread(values: &[f64]) -> Spread {
    let sorted = sorted(values);
    Spread {
        median: median(&sorted),
        min: sorted.first().copied().unwrap_or_default(),
        max: sorted.last().copied().unwrap_or_default(),
    }
}

/// The ratio of `top` to `bottom`, whose runs belong together pair by pair: what
/// else the machine did in a pair fell on both.
///
/// The interval is that of the median of the pairs' ratios by order statistics:
/// it assumes nothing about how the ratios are distributed. Of few pairs it is
/// their whole range, and the confidence says how little that is.
pub(super) fn ratio(top: &[f64], bottom: &[f64]) -> Option<Ratio> {
    let pairs: Vec<f64> = top
        .iter()
        .zip(bottom)
        .filter(|(_, b)| **b > 0.0)
        .map(|(t, b)| t / b)
        .collect();
    let below = spread(bottom).median;
    if pairs.is_empty() || below <= 0.0 {
        return None;
    }
    let value = spread(top).median / below;
    let sorted = sorted(&pairs);
    let (rank, confidence) = rank(sorted.len());
    let interval = (sorted.len() > 1).then(|| {
        let low = sorted.get(rank).copied().unwrap_or(value);
        let high = sorted
            .get(sorted.len() - 1 - rank)
            .copied()
            .unwrap_or(value);
        // The ratio of the medians and the median of the ratios may part by a
        // little; what is reported lies in its own interval.
        (low.min(value), high.max(value))
    });
    Some(Ratio {
        value,
        interval,
        confidence: if interval.is_some() { confidence } else { 0.0 },
    })
}

/// How many values may be left out at each end so that the rest holds the median
/// with [`WANTED`], and with which probability it does.
fn rank(count: usize) -> (usize, f64) {
    let mut best = (0, covered(count, 0));
    for rank in 1..count / 2 {
        let covered = covered(count, rank);
        if covered < WANTED {
            break;
        }
        best = (rank, covered);
    }
    best
}

/// The probability that the median lies between the values of these ranks from
/// below and from above: 1 - 2 P(Binomial(count, 1/2) <= rank).
#[allow(
    clippy::cast_precision_loss,
    reason = "counts of runs are far below 2^52"
)]
fn covered(count: usize, rank: usize) -> f64 {
    let mut term = 0.5_f64.powi(i32::try_from(count).unwrap_or(i32::MAX));
    let mut tail = term;
    for k in 1..=rank {
        term *= (count - k + 1) as f64 / k as f64;
        tail += term;
    }
    (1.0 - 2.0 * tail).max(0.0)
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    let at = |n: usize| sorted.get(n).copied().unwrap_or_default();
    if sorted.len() % 2 == 1 {
        at(middle)
    } else if sorted.is_empty() {
        0.0
    } else {
        f64::midpoint(at(middle - 1), at(middle))
    }
}

/// The confidence that is aimed at; six pairs reach it.
const WANTED: f64 = 0.95;

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-9
    }

    #[test]
    fn a_median_is_the_middle_or_between_the_two_middle_ones() {
        let odd = spread(&[3.0, 1.0, 2.0]);
        assert_eq!((odd.median, odd.min, odd.max), (2.0, 1.0, 3.0));
        assert!(near(spread(&[4.0, 1.0, 2.0, 3.0]).median, 2.5));
        assert!(near(spread(&[]).median, 0.0));
    }

    #[test]
    fn the_interval_of_few_pairs_is_their_range_and_says_how_sure_it_is() {
        for (count, sure) in [(2, 0.5), (3, 0.75), (5, 0.9375), (6, 0.96875)] {
            let (rank, confidence) = rank(count);
            assert_eq!(rank, 0, "{count}");
            assert!(near(confidence, sure), "{count}: {confidence}");
        }
    }

    #[test]
    fn many_pairs_leave_the_extremes_out_and_stay_above_the_confidence() {
        // The ranks of the tables of the sign test at 95 %.
        for (count, expected) in [(8, 0), (9, 1), (12, 2), (15, 3), (20, 5)] {
            let (rank, confidence) = rank(count);
            assert_eq!(rank, expected, "{count}");
            assert!(confidence >= 0.95, "{count}: {confidence}");
        }
    }

    #[test]
    fn a_ratio_is_of_medians_and_lies_in_its_interval() {
        let hub = [90.0, 110.0, 100.0, 95.0, 105.0, 100.0];
        let raw = [100.0; 6];
        let ratio = ratio(&hub, &raw).unwrap();
        assert!(near(ratio.value, 1.0));
        assert_eq!(ratio.interval, Some((0.9, 1.1)));
        assert!(ratio.shows_no_difference());
    }

    #[test]
    fn a_difference_is_shown_when_every_pair_shows_it() {
        let ratio = ratio(&[80.0, 81.0, 82.0], &[100.0, 100.0, 100.0]).unwrap();
        assert!(!ratio.shows_no_difference());
        assert!(near(ratio.confidence, 0.75));
    }

    #[test]
    fn one_pair_has_no_interval_and_nothing_has_no_ratio() {
        let one = ratio(&[50.0], &[100.0]).unwrap();
        assert_eq!(one.interval, None);
        assert!(!one.shows_no_difference());
        assert!(ratio(&[], &[]).is_none());
        assert!(ratio(&[1.0], &[0.0]).is_none());
    }
}
