//! Routing: which broker a topic belongs to. Pure; resolved once per topic.

use crate::{
    broker::{BrokerType, Compression, Delays},
    topic::Pattern,
};

pub use crate::config::{DuringOutage, RetryBy, RouteKind, RouteSettings};

/// One route: topics that are treated alike.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    /// Which topics.
    pub pattern: Pattern,
    /// Tasks or events.
    pub kind: RouteKind,
    /// Where they live.
    pub primary: BrokerType,
    /// Whether the spool takes what the primary cannot.
    pub spool: bool,
    /// Who gets spooled messages during an outage.
    pub during_outage: DuringOutage,
    /// Delays of a failed message; none: the kind's.
    pub retry_delay: Option<Delays>,
    /// Where a group's failed event rests.
    pub retry_by: RetryBy,
    /// Its tasks may take longer than RabbitMQ waits for an ack.
    pub long_running: bool,
    /// Compression of payloads; none: the hub's, or the broker's.
    pub compression: Option<Compression>,
}

/// All routes; the first that matches holds.
#[derive(Clone, Debug, Default)]
pub struct RouteTable {
    routes: Vec<Route>,
}

impl RouteTable {
    /// A table; the last route should match everything.
    #[must_use]
    pub fn new(routes: Vec<Route>) -> Self {
        Self { routes }
    }

    /// The route of a topic and its place in the table.
    #[must_use]
    pub fn find(&self, topic: &str) -> Option<(usize, &Route)> {
        self.routes
            .iter()
            .enumerate()
            .find(|(_, r)| r.pattern.matches(topic))
    }

    /// All routes, in order.
    #[must_use]
    pub fn all(&self) -> &[Route] {
        &self.routes
    }

    /// The route that a subscription to `pattern` means: the first whose topics
    /// include every topic that begins as the pattern does.
    #[must_use]
    pub fn of_pattern(&self, pattern: &Pattern) -> Option<(usize, &Route)> {
        let start: Vec<&str> = pattern
            .as_str()
            .split('.')
            .take_while(|w| *w != "*" && *w != "#")
            .collect();
        // A word that no user names stands for "anything from here on".
        let probe = if pattern.literal().is_some() {
            pattern.as_str().to_owned()
        } else if start.is_empty() {
            "--any--".to_owned()
        } else {
            format!("{}.--any--", start.join("."))
        };
        self.find(&probe)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> RouteTable {
        RouteTable::new(
            RouteSettings::defaults()
                .into_iter()
                .map(|r| Route {
                    pattern: r.pattern,
                    kind: r.kind,
                    primary: BrokerType::InMemory,
                    spool: false,
                    during_outage: DuringOutage::Hold,
                    retry_delay: None,
                    retry_by: RetryBy::Lane,
                    long_running: false,
                    compression: None,
                })
                .collect(),
        )
    }

    #[test]
    fn the_default_prefixes_decide_and_everything_else_is_an_event() {
        let table = table();
        for (topic, kind) in [
            ("helixagent.tasks.llm", RouteKind::Task),
            ("tasks", RouteKind::Task),
            ("task.process", RouteKind::Task),
            ("tasks.x.y", RouteKind::Task),
            ("event.completed", RouteKind::Event),
            ("user.created", RouteKind::Event),
            ("helixagent.events.audit", RouteKind::Event),
            ("tasksx", RouteKind::Event),
        ] {
            assert_eq!(table.find(topic).unwrap().1.kind, kind, "{topic}");
        }
    }

    #[test]
    fn the_first_route_that_matches_holds_and_all_are_shown_in_order() {
        let table = table();
        let all = table.all();
        assert_eq!(all.len(), RouteSettings::defaults().len());
        for (place, route) in all.iter().enumerate() {
            let topic = route.pattern.as_str().replace(['*', '#'], "x");
            let (found, _) = table.find(&topic).unwrap();
            assert!(found <= place, "{topic}");
        }
        assert_eq!(table.find("anything").map(|(n, _)| n), Some(all.len() - 1));
    }

    #[test]
    fn a_pattern_belongs_to_the_route_of_what_it_begins_with() {
        let table = table();
        for (pattern, kind) in [
            ("helixagent.tasks.#", RouteKind::Task),
            ("helixagent.tasks.*", RouteKind::Task),
            ("helixagent.events.#", RouteKind::Event),
            ("#", RouteKind::Event),
            ("task.process", RouteKind::Task),
        ] {
            let pattern = Pattern::new(pattern).unwrap();
            assert_eq!(
                table.of_pattern(&pattern).unwrap().1.kind,
                kind,
                "{pattern}"
            );
        }
    }

    #[test]
    fn a_pattern_is_found_by_the_words_before_its_first_wildcard() {
        let mut table = table();
        let one_word = Route {
            pattern: Pattern::new("jobs.*").unwrap(),
            kind: RouteKind::Task,
            ..table.all()[0].clone()
        };
        table.routes.insert(0, one_word);
        for pattern in ["jobs.*", "jobs.#"] {
            let found = table.of_pattern(&Pattern::new(pattern).unwrap());
            assert_eq!(found.unwrap().0, 0, "{pattern}");
        }
        let found = table.of_pattern(&Pattern::new("jobs.a.*").unwrap());
        assert_ne!(found.unwrap().0, 0);
    }
}
