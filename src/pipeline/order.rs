//! The order of layers, and why each stands where it does. Pure. The table in
//! [`super::Pipeline`] says the same.

use std::{cmp::Ordering, time::Duration};

use super::{CircuitBreaker, Retry, Validate};
use crate::error::{Error, ErrorCode, Result};

/// A layer with its settings.
#[derive(Clone, Debug)]
pub(super) enum Layer {
    Logging,
    Validate(Validate),
    Breaker(CircuitBreaker),
    Rate { messages: u64, per: Duration },
    Concurrency(usize),
    Timeout(Duration),
    Retry(Retry),
}

impl Layer {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Logging => "logging",
            Self::Validate(_) => "validate",
            Self::Breaker(_) => "circuit_breaker",
            Self::Rate { .. } => "rate_limit",
            Self::Concurrency(_) => "concurrency",
            Self::Timeout(_) => "timeout",
            Self::Retry(_) => "retry",
        }
    }

    /// Lower stands outside of higher; the same may stand either way.
    fn rank(&self) -> u8 {
        match self {
            Self::Logging => 0,
            Self::Validate(_) => 1,
            Self::Breaker(_) => 2,
            Self::Rate { .. } => 3,
            Self::Concurrency(_) => 4,
            Self::Timeout(_) | Self::Retry(_) => 5,
        }
    }

    /// What goes wrong when `outer` stands outside of this layer, which belongs
    /// outside of it.
    fn harm(&self, outer: &Self) -> &'static str {
        match (self, outer) {
            (Self::Logging, _) => "what the outer layer refuses would not be logged",
            (Self::Validate(_), Self::Retry(_)) => {
                "a message that is wrong stays wrong however often it is tried"
            }
            (Self::Validate(_), _) => {
                "a message that is wrong would count against what the outer layer guards or limits"
            }
            (Self::Breaker(_), Self::Retry(_)) => {
                "a retry outside of the breaker would go on hammering what the breaker guards"
            }
            (Self::Breaker(_), Self::Timeout(_)) => {
                "the time that the breaker is open would be part of the time-out, and time-outs would not be failures to it"
            }
            (Self::Breaker(_), _) => {
                "a message that waits for the breaker would use up the outer limit"
            }
            (Self::Rate { .. }, Self::Retry(_)) => {
                "a retry outside of the rate would wait for it with the message in hand"
            }
            (Self::Rate { .. }, Self::Timeout(_)) => {
                "the wait for the rate would be part of the time-out"
            }
            (Self::Rate { .. }, _) => {
                "a message that waits for the rate would hold a place among the running"
            }
            (_, Self::Retry(_)) => {
                "each attempt would queue for a place again, with the message in hand"
            }
            (_, _) => "the wait for a place would be part of the time-out",
        }
    }
}

/// Whether these layers, outermost first, stand in order.
///
/// # Errors
/// `INVALID_CONFIG` with the first pair that does not.
pub(super) fn check(layers: &[Layer]) -> Result<()> {
    for (at, inner) in layers.iter().enumerate() {
        let before = layers.get(..at).unwrap_or_default();
        for outer in before {
            match outer.rank().cmp(&inner.rank()) {
                Ordering::Greater => return Err(misplaced(outer, inner)),
                Ordering::Equal if outer.name() == inner.name() => {
                    twice(before, inner)?;
                }
                Ordering::Equal | Ordering::Less => {}
            }
        }
    }
    Ok(())
}

fn misplaced(outer: &Layer, inner: &Layer) -> Error {
    let (outer, inner, harm) = (outer.name(), inner.name(), inner.harm(outer));
    invalid(format!(
        "{inner} must stand outside of {outer}: {harm}; call .{inner}(..) before .{outer}(..)"
    ))
}

/// A second time-out has a meaning only on the other side of a retry.
fn twice(before: &[Layer], inner: &Layer) -> Result<()> {
    let name = inner.name();
    let times = before.iter().filter(|l| l.name() == name).count();
    let across = matches!(before.last(), Some(Layer::Retry(_)));
    match inner {
        Layer::Timeout(_) if times == 1 && across => Ok(()),
        Layer::Timeout(_) => Err(invalid(
            "timeout stands twice on one side; with a retry between them the outer bounds all attempts together and the inner each, otherwise keep the shorter"
                .to_owned(),
        )),
        _ => Err(invalid(format!(
            "{name} stands twice; keep one, with the settings that you mean"
        ))),
    }
}

pub(super) fn invalid(text: String) -> Error {
    Error::rejected(ErrorCode::InvalidConfig, format!("pipeline: {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(name: &str) -> Layer {
        let second = Duration::from_secs(1);
        match name {
            "logging" => Layer::Logging,
            "validate" => Layer::Validate(Validate::new().max_payload_bytes(1)),
            "circuit_breaker" => Layer::Breaker(CircuitBreaker::new(1, second)),
            "rate_limit" => Layer::Rate {
                messages: 1,
                per: second,
            },
            "concurrency" => Layer::Concurrency(1),
            "timeout" => Layer::Timeout(second),
            _ => Layer::Retry(Retry::new(1, second)),
        }
    }

    fn verdict(names: &[&str]) -> Result<()> {
        check(&names.iter().map(|n| layer(n)).collect::<Vec<_>>())
    }

    const ORDER: [&str; 7] = [
        "logging",
        "validate",
        "circuit_breaker",
        "rate_limit",
        "concurrency",
        "timeout",
        "retry",
    ];

    #[test]
    fn a_time_out_may_stand_on_either_side_of_a_retry_and_on_both() {
        for names in [
            &["timeout", "retry"][..],
            &["retry", "timeout"],
            &["timeout", "retry", "timeout"],
            &ORDER,
            &[],
        ] {
            verdict(names).unwrap();
        }
        let error = verdict(&["timeout", "timeout"]).unwrap_err();
        assert!(error.message().contains("twice on one side"), "{error}");
        for name in ORDER {
            assert!(verdict(&[name, name]).is_err(), "{name} twice");
        }
        assert!(verdict(&["timeout", "retry", "timeout", "timeout"]).is_err());
        assert!(verdict(&["retry", "timeout", "retry"]).is_err());
    }

    #[test]
    fn every_pair_in_the_wrong_order_is_refused_and_says_which_goes_where() {
        for (at, inner) in ORDER.iter().enumerate() {
            for outer in &ORDER[at + 1..] {
                verdict(&[inner, outer]).unwrap();
                if (*inner, *outer) == ("timeout", "retry") {
                    continue;
                }
                let error = verdict(&[outer, inner]).unwrap_err();
                assert_eq!(error.code(), ErrorCode::InvalidConfig);
                let wanted = format!("{inner} must stand outside of {outer}: ");
                assert!(error.message().contains(&wanted), "{error}");
            }
        }
        let hammer = verdict(&["retry", "circuit_breaker"]).unwrap_err();
        assert!(hammer.message().contains("hammering"), "{hammer}");
    }
}
