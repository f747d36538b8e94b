//! How much a lane writes, keeps and lets wait, and for how long.

use super::*;
use crate::{
    error::Assume,
    hub::spool::{ENTRY_OVERHEAD, Spool},
};

/// A lane with these settings, open on a broker that answers nothing by itself.
fn opened(settings: Settings) -> Sim {
    let mut sim = with(settings);
    back(&mut sim);
    sim
}

/// Publishes these numbers, each with a key of its own.
fn publish_each(sim: &mut Sim, numbers: std::ops::Range<u64>) {
    for n in numbers {
        sim.publish_numbered(n, 1_000 + n);
    }
    sim.act();
}

fn size(n: u64) -> usize {
    let mut message = Message::new("t", "x");
    message.id = MessageId::new(format!("m{n}")).unwrap();
    message.size() + ENTRY_OVERHEAD
}

fn code(sim: &Sim, n: u64) -> ErrorCode {
    sim.answers[&n].as_ref().unwrap_err().code()
}

#[test]
fn a_drain_leaves_a_quarter_of_the_window_to_new_publishes() {
    let mut sim = away_with(20);
    back(&mut sim);
    assert_eq!(sim.broker.written.len(), WINDOW * 3 / 4);
    publish_each(&mut sim, 20..30);
    assert_eq!(sim.broker.written.len(), WINDOW);
    while !sim.broker.written.is_empty() {
        confirm_all(&mut sim);
    }
    assert_eq!(sim.machine.drained(), 20);
    assert_eq!(sim.machine.state(), LaneState::Primary);
}

#[test]
fn new_publishes_do_not_take_the_drains_share_of_the_window() {
    let mut sim = away_with(1);
    sim.machine.pause_drain(sim.now());
    back(&mut sim);
    publish_each(&mut sim, 1..10);
    assert_eq!(sim.broker.written.len(), WINDOW / 4);
}

#[test]
fn what_was_in_flight_before_a_drain_takes_its_place_in_the_window() {
    let mut sim = with(default_settings());
    back(&mut sim);
    publish_each(&mut sim, 0..10);
    sim.machine.force_degraded(sim.now());
    publish_each(&mut sim, 10..40);
    sim.machine.release_lane(sim.now());
    sim.act();
    assert_eq!(sim.machine.state(), LaneState::Draining);
    assert_eq!(sim.broker.written.len(), WINDOW);
    assert_eq!(sim.machine.spool().in_flight(), WINDOW - 10);
}

#[test]
fn a_window_of_one_is_never_two() {
    let mut sim = with(Settings {
        window: 1,
        ..default_settings()
    });
    spool_away(&mut sim, 2);
    back(&mut sim);
    publish_each(&mut sim, 2..4);
    assert_eq!(sim.broker.written.len(), 1);
}

#[test]
fn a_message_takes_its_size_and_its_overhead_until_it_is_answered() {
    let mut sim = opened(default_settings());
    publish_each(&mut sim, 0..1);
    assert_eq!(sim.budget.taken(), (1, size(0)));
    confirm_all(&mut sim);
    assert_eq!(sim.budget.taken(), (0, 0));
}

#[test]
fn without_a_spool_its_bound_holds_nobody_up() {
    let mut sim = opened(Settings {
        spool: false,
        ..settings(&Arc::new(Budget::new(0, 0)), false)
    });
    publish_each(&mut sim, 0..1);
    assert_eq!(sim.broker.written.len(), 1);
}

#[test]
fn a_full_spool_is_waited_for_as_long_as_is_set() {
    let mut sim = with(settings(&Arc::new(Budget::new(2, usize::MAX / 2)), false));
    sim.machine.broker_away(sim.now());
    publish_each(&mut sim, 0..3);
    sim.wait(Duration::from_millis(4_999));
    assert_eq!(sim.answers.len(), 2);
    let deadline = sim.machine.next_deadline(sim.now()).unwrap();
    assert_eq!(deadline - sim.now, Duration::from_millis(1));
    sim.wait(Duration::from_millis(1));
    assert_eq!(code(&sim, 2), ErrorCode::SpoolFull);
}

/// The tenth of the room that is kept aside for healthy brokers is room here.
#[test]
fn a_full_window_is_waited_for_until_the_deadline_and_is_not_called_a_full_spool() {
    let room = Arc::new(Budget::new(10, 10 * size(0)));
    let mut sim = opened(Settings {
        window: 9,
        // Confirms are not late here.
        hedge: (Duration::from_secs(100), Duration::from_secs(100)),
        ..settings(&room, false)
    });
    publish_each(&mut sim, 0..10);
    assert_eq!(sim.broker.written.len(), 9);
    // Nobody is to look at the room when the spool's time is over.
    let deadline = sim.machine.next_deadline(sim.now()).unwrap();
    assert_eq!(deadline - sim.now, Duration::from_secs(30));
    sim.wait(Duration::from_secs(29));
    assert!(sim.answers.is_empty());
    sim.wait(Duration::from_secs(1));
    assert_eq!(code(&sim, 9), ErrorCode::Timeout);
    assert_eq!(sim.answers.len(), 1);
}

#[test]
fn without_a_spool_a_confirm_that_does_not_come_is_an_unknown_outcome_at_the_deadline() {
    let mut sim = opened(Settings {
        spool: false,
        window: 1,
        ..default_settings()
    });
    publish_each(&mut sim, 0..1);
    let deadline = sim.machine.next_deadline(sim.now()).unwrap();
    assert_eq!(deadline - sim.now, Duration::from_secs(30));
    sim.wait(Duration::from_secs(30));
    assert_eq!(code(&sim, 0), ErrorCode::PublishTimeout);
    let assume = sim.answers[&0].as_ref().unwrap_err().assume();
    assert_eq!(assume, Assume::Unknown);
    // It keeps its place until the broker's word.
    publish_each(&mut sim, 1..2);
    assert_eq!(sim.broker.written.len(), 1);
    confirm_all(&mut sim);
    assert_eq!(sim.broker.written.len(), 1);
}

/// As many as intake may add to the spool when a drain begins.
const CREDIT: u64 = 5_000;

/// A lane that drains the first of some messages and has used up its credit.
fn without_credit(local: Local) -> Sim {
    let mut sim = with(Settings {
        local,
        ..default_settings()
    });
    spool_away(&mut sim, 20);
    back(&mut sim);
    for n in 20..20 + CREDIT {
        sim.publish_numbered(n, 0);
    }
    sim.act();
    assert_eq!(sim.answers.len() as u64, 20 + CREDIT);
    sim
}

#[test]
fn intake_of_a_key_that_drains_is_one_for_two_drained_after_the_first_thousands() {
    for local in [Local::Nobody, Local::Groups] {
        let mut sim = without_credit(local);
        let begin = 20 + CREDIT;
        for n in begin..begin + 10 {
            sim.publish_numbered(n, 0);
        }
        sim.act();
        assert_eq!(sim.machine.waiting(), 10);
        let first: Vec<u64> = sim.broker.written.drain(..8).map(|s| s.token).collect();
        let confirms = first.into_iter();
        let confirms = confirms.map(|token| answer(token, Fate::Confirmed(None)));
        sim.machine.confirmed(sim.now(), confirms);
        sim.act();
        assert_eq!((sim.machine.drained(), sim.machine.waiting()), (8, 6));
    }
}

#[test]
fn each_drain_begins_with_its_credit() {
    let mut sim = without_credit(Local::Nobody);
    sim.machine.ended(sim.now(), "crash");
    sim.act();
    back(&mut sim);
    sim.publish_numbered(20 + CREDIT, 0);
    sim.act();
    assert_eq!(sim.machine.waiting(), 0);
}

#[test]
fn what_is_on_the_disk_leaves_the_memory_beyond_the_head() {
    let mut sim = away_with(10);
    sim.sync(6);
    assert_eq!(
        (sim.machine.spool().head_len(), sim.machine.spool().len()),
        (4, 10)
    );
    // As many as the head has room for stay.
    sim.sync(4);
    assert_eq!(sim.machine.spool().head_len(), 4);
}

#[test]
fn events_for_groups_stay_in_memory() {
    let mut sim = with(Settings {
        local: Local::Groups,
        ..default_settings()
    });
    spool_away(&mut sim, 10);
    sim.sync(10);
    assert_eq!(sim.machine.spool().head_len(), 10);
}

/// With a head of 8: below four at hand, four are read.
#[test]
fn the_disk_is_read_when_less_than_half_of_the_head_is_at_hand() {
    let before = away_with(20);
    let mut left = Spool::new();
    for (seq, entry) in &before.disk {
        left.restore(*seq, &entry.order, entry.message.size());
    }
    let mut sim = with(Settings {
        head: 8,
        window: 4,
        ..default_settings()
    });
    sim.disk = before.disk;
    sim.machine.restore(left);
    assert_eq!((sim.machine.restored(), sim.machine.next_seq()), (20, 21));
    sim.machine.pause_drain(sim.now());
    back(&mut sim);
    assert_eq!(sim.to_load, Some(vec![1, 2, 3, 4]));
    sim.load(usize::MAX);
    sim.act();
    assert_eq!(sim.to_load, None, "four are enough");
    sim.machine.resume_drain(sim.now());
    sim.act();
    assert_eq!(sim.broker.written.len(), 3);
    assert_eq!(sim.to_load, Some(vec![5, 6, 7, 8]));
}

#[test]
fn what_cannot_be_read_is_given_up_with_its_place() {
    let mut sim = away_with(10);
    sim.sync(6);
    let first = sim.machine.spool().tail_first().unwrap();
    sim.machine.unreadable(first);
    sim.act();
    assert_eq!(sim.machine.spool().len(), 9);
    assert_eq!(sim.budget.taken().0, 9);
}
