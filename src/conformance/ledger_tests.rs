use proptest::prelude::*;

use super::*;

const TOPIC: &str = "tasks.llm";

fn published(seq: u64, outcome: Outcome) -> Published {
    Published {
        publisher: format!("p{}", seq % 2),
        topic: TOPIC.into(),
        key: (!seq.is_multiple_of(3)).then(|| format!("k{}", seq % 3)),
        seq,
        id: format!("m{seq}"),
        payload_hash: seq * 31,
        outcome,
    }
}

fn delivered(group: &str, message: &Published, index: u64) -> Delivered {
    Delivered {
        group: group.into(),
        consumer: "one".into(),
        topic: message.topic.clone(),
        id: message.id.clone(),
        payload_hash: message.payload_hash,
        key: message.key.clone(),
        index,
        redelivered: false,
        settled: true,
    }
}

/// Everything accepted, everything delivered once and in order, to each group.
fn good(messages: u64, groups: &[&str]) -> History {
    let published: Vec<_> = (0..messages)
        .map(|n| {
            published(
                n,
                if n % 5 == 4 {
                    Outcome::Spooled
                } else {
                    Outcome::Delivered
                },
            )
        })
        .collect();
    let delivered = groups
        .iter()
        .flat_map(|group| {
            published
                .iter()
                .zip(0..)
                .map(move |(m, index)| delivered(group, m, index))
        })
        .collect();
    let expected = groups.iter().map(|group| (*group).to_owned()).collect();
    History {
        published,
        delivered,
        expected_groups: BTreeMap::from([(TOPIC.to_owned(), expected)]),
        ..History::default()
    }
}

#[test]
fn an_empty_history_is_sound() {
    assert!(check(&History::default()).is_exactly_once());
}

#[test]
fn a_message_that_one_of_two_groups_misses_is_lost_for_that_group() {
    let mut history = good(10, &["a", "b"]);
    history
        .delivered
        .retain(|d| !(d.group == "b" && d.id == "m4"));
    assert_eq!(check(&history).lost, [finding("b", TOPIC, "m4")]);
}

#[test]
fn a_topic_that_nobody_reads_is_lost() {
    let history = History {
        published: vec![published(0, Outcome::Spooled)],
        ..History::default()
    };
    assert_eq!(check(&history).lost, [finding("", TOPIC, "m0")]);
}

#[test]
fn a_group_that_was_expected_and_saw_nothing_lost_everything() {
    let mut history = good(3, &["a"]);
    history
        .expected_groups
        .entry(TOPIC.into())
        .or_default()
        .insert("silent".into());
    assert_eq!(check(&history).lost.len(), 3);
}

#[test]
fn an_unknown_outcome_may_arrive_or_not() {
    let mut history = good(4, &["a"]);
    history.published.push(published(4, Outcome::Unknown));
    history.published.push(published(5, Outcome::Unknown));
    let last = delivered("a", &history.published[5], 4);
    history.delivered.push(last);
    let verdict = check(&history);
    assert!(verdict.is_exactly_once());
    assert_eq!(verdict.unknown, 2);
    assert_eq!(verdict.recovered, [finding("a", TOPIC, "m5")]);
}

#[test]
fn a_refused_message_that_arrives_is_unexpected() {
    for outcome in [Outcome::NotSent, Outcome::Rejected] {
        let mut history = good(4, &["a"]);
        history.published[2].outcome = outcome;
        assert_eq!(check(&history).unexpected, [finding("a", TOPIC, "m2")]);
    }
}

#[test]
fn a_refused_publish_that_was_repeated_with_success_is_expected() {
    let mut history = good(4, &["a"]);
    let mut again = history.published[3].clone();
    history.published[3].outcome = Outcome::NotSent;
    again.seq = 9;
    history.published.push(again);
    let verdict = check(&history);
    assert!(verdict.is_exactly_once(), "{verdict:?}");
    assert_eq!(verdict.accepted, 4);
}

#[test]
fn a_repeat_takes_the_place_of_the_attempt_that_was_not_refused() {
    for (first, sound) in [
        (Outcome::NotSent, true),
        (Outcome::Unknown, true),
        (Outcome::Delivered, false),
    ] {
        let mut history = good(12, &["a"]);
        // m0 is published again after m6, its neighbour, and arrives last.
        let mut again = history.published[0].clone();
        history.published[0].outcome = first;
        again.seq = 20;
        history.published.push(again);
        history.delivered[0].index = 100;
        assert_eq!(check(&history).reordered.is_empty(), sound, "{first:?}");
    }
}

#[test]
fn a_delivery_before_it_was_settled_does_not_make_a_duplicate() {
    let mut history = good(3, &["a"]);
    let mut failed = delivered("a", &history.published[2], 2);
    failed.settled = false;
    history.delivered[2].index = 3;
    history.delivered.push(failed);
    assert!(check(&history).is_exactly_once());
}

#[test]
fn duplicates_are_counted_by_group_and_their_mark() {
    let mut history = good(3, &["a", "b"]);
    for (index, marked) in [(10, true), (11, false)] {
        let mut again = delivered("b", &history.published[0], index);
        again.redelivered = marked;
        history.delivered.push(again);
    }
    let verdict = check(&history);
    assert!(verdict.is_sound() && !verdict.is_exactly_once());
    assert_eq!(
        verdict.duplicated,
        [Duplicate {
            finding: finding("b", TOPIC, "m0"),
            extra: 2,
            marked: 1
        }]
    );
    assert_eq!(verdict.extra_deliveries(), 2);
}

#[test]
fn order_counts_within_publisher_and_key_only() {
    let mut history = good(12, &["a"]);
    // m0 and m6: publisher p0 without a key; m1 is another line.
    history.delivered[0].index = 100;
    history.delivered[1].index = 101;
    let verdict = check(&history);
    assert_eq!(verdict.reordered.len(), 2);
    assert_eq!(
        (verdict.reordered[0].seq, verdict.reordered[0].after),
        (0, 6)
    );
    assert_eq!(
        (verdict.reordered[1].seq, verdict.reordered[1].after),
        (1, 7)
    );
    let mut other_lines = good(3, &["a"]);
    other_lines.delivered[0].index = 50;
    assert!(check(&other_lines).is_exactly_once());
}

#[test]
fn what_is_left_over_is_reported_by_place() {
    let mut history = good(2, &["a"]);
    history.left_over = BTreeMap::from([("spool".to_owned(), 3), ("queue".to_owned(), 0)]);
    let verdict = check(&history);
    assert_eq!(verdict.left_over, BTreeMap::from([("spool".to_owned(), 3)]));
    assert!(!verdict.is_sound());
}

#[test]
fn one_id_with_two_payloads_is_ambiguous() {
    let mut history = good(2, &["a"]);
    let mut other = history.published[0].clone();
    other.payload_hash += 1;
    history.published.push(other);
    assert_eq!(check(&history).ambiguous, [finding("", TOPIC, "m0")]);
}

#[test]
fn the_table_line_has_a_column_for_each_head() {
    let line = check(&good(5, &["a"])).to_string();
    assert_eq!(line, "| 5 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 |");
    assert_eq!(
        line.matches('|').count(),
        Verdict::TABLE_HEAD.matches('|').count()
    );
}

proptest! {
    #[test]
    fn a_good_history_is_sound_in_any_order_of_its_lists(
        history in (1_u64..40).prop_map(|n| good(n, &["a", "b"])),
        shuffle in any::<u64>(),
    ) {
        let mut mixed = history.clone();
        let mix = |n: u64| n.wrapping_add(shuffle).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(31);
        mixed.published.sort_by_key(|p| mix(p.seq));
        mixed.delivered.sort_by_key(|d| mix(d.index));
        prop_assert!(check(&mixed).is_exactly_once());
        prop_assert_eq!(check(&mixed), check(&history));
    }

    #[test]
    fn each_kind_of_violation_is_found(messages in 8_u64..40, place in any::<prop::sample::Index>(), kind in 0..6) {
        let mut history = good(messages, &["a", "b"]);
        let at = place.index(history.delivered.len());
        let victim = history.delivered[at].clone();
        let found = finding(&victim.group, TOPIC, &victim.id);
        match kind {
            0 => {
                history.delivered.remove(at);
                prop_assert_eq!(check(&history).lost, vec![found]);
            }
            1 => {
                history.delivered[at].id = "nobody's".into();
                let verdict = check(&history);
                prop_assert_eq!(verdict.lost, vec![found]);
                prop_assert_eq!(verdict.unexpected, vec![finding(&victim.group, TOPIC, "nobody's")]);
            }
            2 => {
                history.delivered[at].payload_hash ^= 1;
                prop_assert_eq!(check(&history).corrupted, vec![found]);
            }
            3 => {
                history.delivered[at].key = Some("another".into());
                prop_assert_eq!(check(&history).corrupted, vec![found]);
            }
            4 => {
                history.delivered.push(Delivered { index: 1_000, ..victim });
                let verdict = check(&history);
                prop_assert_eq!(verdict.extra_deliveries(), 1);
                prop_assert!(verdict.reordered.is_empty(), "a repeat is not a first delivery");
            }
            _ => {
                // To the end: out of order when its line has a later message.
                history.delivered[at].index = 1_000;
                let own = history.published.iter().find(|p| p.id == victim.id).cloned();
                let later = history.published.iter().any(|p| own.as_ref().is_some_and(
                    |own| p.publisher == own.publisher && p.key == own.key && p.seq > own.seq));
                prop_assert_eq!(check(&history).reordered.len(), usize::from(later));
            }
        }
    }

    #[test]
    fn a_verdict_survives_serialization(messages in 0_u64..20) {
        let verdict = check(&good(messages, &["a"]));
        let text = serde_json::to_string(&verdict).unwrap_or_default();
        prop_assert_eq!(serde_json::from_str::<Verdict>(&text).ok(), Some(verdict));
    }
}
