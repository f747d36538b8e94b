//! Of the intake window: what a client that repeats may rely on.

use proptest::prelude::*;

use super::*;

type Window = IntakeWindow<u32, u32>;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_millis(1_700_000_000_000 + seconds * 1000)
}

fn topic() -> Topic {
    Topic::new("tasks.test").unwrap()
}

fn id(text: &str) -> MessageId {
    MessageId::new(text).unwrap()
}

fn offer(w: &mut Window, seconds: i64, text: &str) -> Intake<u32> {
    w.offer(at(seconds), &topic(), &id(text), Origin::Caller)
}

fn fresh(intake: Intake<u32>) -> Ticket {
    match intake {
        Intake::Fresh(ticket) => ticket,
        other => panic!("not fresh: {other:?}"),
    }
}

fn join(w: &mut Window, text: &str, joiner: u32) -> Result<(), Refused<u32>> {
    match offer(w, 0, text) {
        Intake::InFlight(joining) => w.join(&joining, joiner),
        other => panic!("not in flight: {other:?}"),
    }
}

#[test]
fn a_repeat_gets_the_first_outcome() {
    let mut w = Window::default();
    let ticket = fresh(offer(&mut w, 0, "a"));
    assert!(w.finish(at(0), ticket, Some(7)).is_empty());
    assert_eq!(offer(&mut w, 1, "a"), Intake::Done(7));
    assert_eq!(w.counts().repeats, 1);
}

#[test]
fn the_same_id_in_another_topic_is_another_message() {
    let mut w = Window::default();
    let ticket = fresh(offer(&mut w, 0, "a"));
    w.finish(at(0), ticket, Some(7));
    let other = Topic::new("tasks.other").unwrap();
    let intake = w.offer(at(0), &other, &id("a"), Origin::Caller);
    assert!(matches!(intake, Intake::Fresh(_)));
}

#[test]
fn a_repeat_joins_the_publish_in_flight() {
    let mut w = Window::default();
    let ticket = fresh(offer(&mut w, 0, "a"));
    join(&mut w, "a", 1).unwrap();
    join(&mut w, "a", 2).unwrap();
    assert_eq!(w.finish(at(0), ticket, Some(7)), [1, 2]);
    assert_eq!(w.counts().repeats, 2);
}

#[test]
fn an_outcome_that_is_forgotten_is_accepted_anew_and_for_as_long() {
    let mut w = Window::new(10, Duration::from_secs(60));
    for text in ["a", "b"] {
        let ticket = fresh(offer(&mut w, 0, text));
        w.finish(at(0), ticket, Some(7));
    }
    w.forget(&topic(), &id("a"));
    assert_eq!(offer(&mut w, 30, "b"), Intake::Done(7));
    let ticket = fresh(offer(&mut w, 30, "a"));
    // What is in flight has no outcome to forget.
    w.forget(&topic(), &id("a"));
    assert!(matches!(offer(&mut w, 30, "a"), Intake::InFlight(_)));
    w.finish(at(30), ticket, Some(8));
    // Nor does the age of the first outcome end the second one.
    assert_eq!(offer(&mut w, 89, "a"), Intake::Done(8));
    assert!(matches!(offer(&mut w, 89, "b"), Intake::Fresh(_)));
}

#[test]
fn an_error_is_told_to_those_who_joined_and_leaves_the_window() {
    let mut w = Window::default();
    let ticket = fresh(offer(&mut w, 0, "a"));
    join(&mut w, "a", 1).unwrap();
    assert_eq!(w.finish(at(0), ticket, None), [1]);
    assert_eq!(w.len(), 0);
    assert!(matches!(offer(&mut w, 0, "a"), Intake::Fresh(_)));
}

#[test]
fn hub_retries_and_ids_that_the_hub_made_pass_by() {
    let mut w = Window::default();
    let ticket = fresh(offer(&mut w, 0, "a"));
    w.finish(at(0), ticket, Some(7));
    let again = w.offer(at(0), &topic(), &id("a"), Origin::Hub);
    assert_eq!(again, Intake::Bypass);
    let made = w.offer(at(0), &topic(), &MessageId::generate(), Origin::Caller);
    assert_eq!(made, Intake::Bypass);
    assert_eq!(w.len(), 1);
}

#[test]
fn an_outcome_is_forgotten_with_age_and_a_publish_in_flight_is_not() {
    let mut w = Window::new(10, Duration::from_secs(60));
    let done = fresh(offer(&mut w, 0, "done"));
    let flying = fresh(offer(&mut w, 0, "flying"));
    w.finish(at(0), done, Some(7));
    assert_eq!(offer(&mut w, 59, "done"), Intake::Done(7));
    assert!(matches!(offer(&mut w, 60, "done"), Intake::Fresh(_)));
    assert!(matches!(offer(&mut w, 1000, "flying"), Intake::InFlight(_)));
    w.finish(at(1000), flying, Some(8));
    assert_eq!(offer(&mut w, 1059, "flying"), Intake::Done(8));
    assert_eq!(w.counts().forgotten_early, 0);
}

#[test]
fn a_window_that_is_too_short_says_so() {
    let mut w = Window::new(3, Duration::from_secs(60));
    for n in 0..5 {
        let ticket = fresh(offer(&mut w, 0, &n.to_string()));
        w.finish(at(0), ticket, Some(n));
    }
    assert_eq!((w.len(), w.counts().forgotten_early), (3, 2));
}

#[test]
fn no_more_than_a_bound_wait_for_one_publish() {
    let mut w = Window::default();
    let ticket = fresh(offer(&mut w, 0, "a"));
    for n in 0..MAX_JOINED {
        join(&mut w, "a", n as u32).unwrap();
    }
    assert_eq!(join(&mut w, "a", 9), Err(Refused::TooMany(9)));
    assert_eq!(w.finish(at(0), ticket, Some(7)).len(), MAX_JOINED);
}

proptest! {
    /// Whatever happens, one id is in flight at most once, a repeat within the
    /// window never publishes, and everybody who joined is answered.
    #[test]
    fn an_id_is_accepted_once_and_everybody_is_answered(
        steps in prop::collection::vec((0..3_u8, 0..4_u8, 0..50_i64), 0..200),
    ) {
        let mut w = Window::new(1000, Duration::from_secs(100));
        let mut now = 0;
        let mut flying: Vec<(u8, Ticket, u32)> = Vec::new();
        let mut done = [None; 3];
        for (which, action, wait) in steps {
            let name = which.to_string();
            let position = flying.iter().position(|(id, ..)| *id == which);
            match (action, position) {
                (0 | 1, _) => match offer(&mut w, now, &name) {
                    Intake::Fresh(ticket) => {
                        prop_assert!(position.is_none());
                        prop_assert!(done[usize::from(which)].is_none_or(|t| now - t >= 100));
                        flying.push((which, ticket, 0));
                    }
                    Intake::InFlight(joining) => {
                        let flight = &mut flying[position.unwrap()];
                        w.join(&joining, flight.2).unwrap();
                        flight.2 += 1;
                    }
                    Intake::Done(outcome) => prop_assert_eq!(outcome, u32::from(which)),
                    Intake::Bypass => prop_assert!(false, "not bypassed"),
                },
                (action, Some(position)) => {
                    let (_, ticket, joined) = flying.remove(position);
                    let good = action == 2;
                    let outcome = good.then_some(u32::from(which));
                    let told = w.finish(at(now), ticket, outcome);
                    prop_assert_eq!(told, (0..joined).collect::<Vec<_>>());
                    if good {
                        done[usize::from(which)] = Some(now);
                    }
                }
                (_, None) => now += wait,
            }
        }
    }
}
