//! How long a failed message rests before each of its retries. Data only; who
//! holds it meanwhile is the broker's or the reader's business.

use std::{fmt, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _, ser::SerializeSeq};

use crate::duration;

/// Delays of retries: the first holds before the first retry, the next before the
/// second, and the last before all that are left. In a configuration one duration
/// (`5s`) or a list (`[5s, 1m, 10m]`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delays {
    first: Duration,
    then: Vec<Duration>,
}

impl Delays {
    /// The same delay before every retry.
    #[must_use]
    pub const fn every(delay: Duration) -> Self {
        Self {
            first: delay,
            then: Vec::new(),
        }
    }

    /// One delay for each retry; `None` for an empty list.
    #[must_use]
    pub fn list(delays: &[Duration]) -> Option<Self> {
        let (first, then) = delays.split_first()?;
        Some(Self {
            first: *first,
            then: then.to_vec(),
        })
    }

    /// How long a message rests that was retried `retries` times before.
    #[must_use]
    pub fn after(&self, retries: u32) -> Duration {
        let n = usize::try_from(retries).unwrap_or(usize::MAX);
        let last = self.then.last().copied().unwrap_or(self.first);
        match n.checked_sub(1) {
            None => self.first,
            Some(n) => self.then.get(n).copied().unwrap_or(last),
        }
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = Duration> + '_ {
        std::iter::once(self.first).chain(self.then.iter().copied())
    }
}

impl fmt::Display for Delays {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<String> = self.iter().map(duration::format).collect();
        f.write_str(&all.join(", "))
    }
}

impl Serialize for Delays {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        if self.then.is_empty() {
            return duration::serialize(&self.first, s);
        }
        let mut list = s.serialize_seq(Some(1 + self.then.len()))?;
        for delay in self.iter() {
            list.serialize_element(&duration::format(delay))?;
        }
        list.end()
    }
}

impl<'de> Deserialize<'de> for Delays {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct One(#[serde(with = "duration")] Duration);
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            One(One),
            List(Vec<One>),
        }
        match Form::deserialize(d).map_err(|_| {
            D::Error::custom("expected a duration such as 5s, or a list of them: [5s, 1m]")
        })? {
            Form::One(one) => Ok(Self::every(one.0)),
            Form::List(list) => {
                let all: Vec<Duration> = list.into_iter().map(|one| one.0).collect();
                Self::list(&all).ok_or_else(|| {
                    D::Error::custom(
                        "a list of delays needs one at least; leave it out for the default",
                    )
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_delay_holds_for_all_further_retries() {
        let seconds = |n| Duration::from_secs(n);
        let delays = Delays::list(&[seconds(1), seconds(5), seconds(60)]).unwrap();
        let rests: Vec<u64> = (0..5).map(|n| delays.after(n).as_secs()).collect();
        assert_eq!(rests, [1, 5, 60, 60, 60]);
        assert_eq!(Delays::every(seconds(2)).after(7), seconds(2));
        assert_eq!(Delays::list(&[]), None);
    }

    #[test]
    fn one_and_several_are_read_and_written_as_people_write_them() {
        for (text, back) in [
            (r#""5s""#, r#""5s""#),
            ("250", r#""250ms""#),
            (r#"["5s","1m"]"#, r#"["5s","60s"]"#),
        ] {
            let delays: Delays = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_string(&delays).unwrap(), back, "{text}");
        }
        for wrong in [r#""soon""#, "[]", "true"] {
            assert!(serde_json::from_str::<Delays>(wrong).is_err(), "{wrong}");
        }
    }
}
