//! What operators want of lanes, by pattern. Pure. It holds for lanes that do
//! not exist yet, too: the last word whose pattern covers a topic counts.

use crate::{
    error::{Error, ErrorCode, Result},
    topic::Pattern,
};

/// What holds for one lane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Controls {
    pub(crate) hold: Hold,
    /// Messages drained a second at most; 0: no limit.
    pub(crate) rate: u32,
}

/// What a lane is kept from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Hold {
    #[default]
    Nothing,
    /// From draining.
    Drain,
    /// From writing to the primary at all.
    Everything,
}

/// Everything that was said and still counts.
#[derive(Clone, Debug)]
pub(crate) struct Rules {
    /// The configured rate, for topics about which nothing was said.
    rate: u32,
    rules: Vec<Rule>,
}

#[derive(Clone, Debug)]
struct Rule {
    pattern: Pattern,
    said: Said,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    Hold(Hold),
    Rate(u32),
}

/// Words remembered at most. More patterns than this are a sign that one that
/// covers them is wanted.
pub(crate) const MAX_RULES: usize = 1_000;

impl Rules {
    pub(crate) fn new(rate: u32) -> Self {
        Self {
            rate,
            rules: Vec::new(),
        }
    }

    /// What holds for a topic.
    pub(crate) fn of(&self, topic: &str) -> Controls {
        self.fold(|pattern| pattern.matches(topic))
    }

    /// What holds for every topic of a pattern, as far as it was said of just
    /// this pattern, or of all topics.
    pub(crate) fn of_pattern(&self, pattern: &Pattern) -> Controls {
        self.fold(|p| p == pattern || p.as_str() == ALL)
    }

    fn fold(&self, covers: impl Fn(&Pattern) -> bool) -> Controls {
        let mut controls = Controls {
            hold: Hold::Nothing,
            rate: self.rate,
        };
        for rule in self.rules.iter().filter(|r| covers(&r.pattern)) {
            match rule.said {
                Said::Hold(hold) => controls.hold = hold,
                Said::Rate(rate) => controls.rate = rate,
            }
        }
        controls
    }

    /// Holds, or lets go, what a pattern covers.
    pub(crate) fn hold(&mut self, pattern: &Pattern, hold: Hold) -> Result<()> {
        self.say(pattern, Said::Hold(hold))
    }

    /// Limits the drain of what a pattern covers.
    pub(crate) fn limit(&mut self, pattern: &Pattern, rate: u32) -> Result<()> {
        self.say(pattern, Said::Rate(rate))
    }

    fn say(&mut self, pattern: &Pattern, said: Said) -> Result<()> {
        let same_kind =
            |other: Said| matches!(other, Said::Hold(_)) == matches!(said, Said::Hold(_));
        let all = pattern.as_str() == ALL;
        // What the new word covers wholly has nothing to say any more.
        self.rules
            .retain(|r| !(same_kind(r.said) && (all || r.pattern == *pattern)));
        // Back to what holds without any word needs no word, unless it takes
        // another one back for a part.
        let usual = match said {
            Said::Hold(hold) => hold == Hold::Nothing,
            Said::Rate(rate) => rate == self.rate,
        };
        if usual && !self.rules.iter().any(|r| same_kind(r.said)) {
            return Ok(());
        }
        if self.rules.len() >= MAX_RULES {
            return Err(Error::new(
                ErrorCode::InvalidConfig,
                format!(
                    "{MAX_RULES} patterns are paused, resumed or limited already; say it of a wider pattern, such as #"
                ),
            ));
        }
        self.rules.push(Rule {
            pattern: pattern.clone(),
            said,
        });
        Ok(())
    }
}

const ALL: &str = "#";

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(text: &str) -> Pattern {
        Pattern::new(text).unwrap()
    }

    #[test]
    fn the_last_word_that_covers_a_topic_counts() {
        let mut rules = Rules::new(0);
        rules.hold(&pattern("tasks.#"), Hold::Drain).unwrap();
        assert_eq!(rules.of("tasks.a").hold, Hold::Drain);
        assert_eq!(rules.of("events.a").hold, Hold::Nothing);
        rules.hold(&pattern("tasks.a"), Hold::Nothing).unwrap();
        assert_eq!(rules.of("tasks.a").hold, Hold::Nothing);
        assert_eq!(rules.of("tasks.b").hold, Hold::Drain);
        rules.limit(&pattern("tasks.*"), 7).unwrap();
        assert_eq!(
            rules.of("tasks.b"),
            Controls {
                hold: Hold::Drain,
                rate: 7
            }
        );
        rules.hold(&pattern("#"), Hold::Everything).unwrap();
        assert_eq!(rules.of("tasks.a").hold, Hold::Everything);
        assert_eq!(rules.of("tasks.a").rate, 7);
        assert_eq!(rules.of_pattern(&pattern("x.#")).hold, Hold::Everything);
        rules.hold(&pattern("#"), Hold::Nothing).unwrap();
        rules.limit(&pattern("#"), 0).unwrap();
        assert!(rules.rules.is_empty(), "{rules:?}");
    }

    #[test]
    fn what_is_shown_of_a_pattern_is_what_was_said_of_it_or_of_all() {
        let mut rules = Rules::new(0);
        rules.hold(&pattern("tasks.#"), Hold::Drain).unwrap();
        assert_eq!(rules.of_pattern(&pattern("tasks.#")).hold, Hold::Drain);
        // It may cover the topics of another pattern, and says nothing of that one.
        assert_eq!(rules.of_pattern(&pattern("tasks.a")).hold, Hold::Nothing);
        rules.hold(&pattern(ALL), Hold::Everything).unwrap();
        assert_eq!(rules.of_pattern(&pattern("tasks.a")).hold, Hold::Everything);
    }

    #[test]
    fn a_configured_rate_holds_until_another_is_said() {
        let mut rules = Rules::new(50);
        assert_eq!(rules.of("t").rate, 50);
        rules.limit(&pattern("t"), 0).unwrap();
        assert_eq!(rules.of("t").rate, 0);
        assert_eq!(rules.of("u").rate, 50);
        rules.limit(&pattern("t"), 50).unwrap();
        assert!(rules.rules.is_empty());
    }

    #[test]
    fn repeating_oneself_needs_no_room_and_too_many_patterns_are_refused() {
        let mut rules = Rules::new(0);
        for _ in 0..MAX_RULES * 2 {
            rules.hold(&pattern("t"), Hold::Drain).unwrap();
        }
        for n in 1..MAX_RULES {
            rules.hold(&pattern(&format!("t{n}")), Hold::Drain).unwrap();
        }
        let error = rules.hold(&pattern("one.more"), Hold::Drain).unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidConfig);
        rules.hold(&pattern("#"), Hold::Drain).unwrap();
        assert_eq!(rules.rules.len(), 1);
    }
}
