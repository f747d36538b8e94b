//! Spooled tasks in the hands of local handlers.

use super::*;
use crate::message::wire::Failure;

fn away_with_local(n: usize) -> Sim {
    let mut sim = with(settings(
        &Arc::new(Budget::new(100_000, usize::MAX / 2)),
        true,
    ));
    spool_away(&mut sim, n);
    sim
}

fn retry(delay: Duration) -> Verdict {
    let failure = Failure::now("handler_error", "no luck", "t", None);
    Verdict::Retry { delay, failure }
}

#[test]
fn handlers_get_spooled_tasks_in_order_during_an_outage_only() {
    let mut sim = away_with_local(3);
    for n in 0..2 {
        let (seq, entry) = sim.machine.lease(sim.now()).unwrap();
        assert_eq!(entry.message.id.as_str(), format!("m{n}"));
        assert!(sim.machine.settle(sim.now(), seq, Verdict::Ack));
        assert!(!sim.machine.settle(sim.now(), seq, Verdict::Ack));
    }
    sim.act();
    back(&mut sim);
    assert!(sim.machine.lease(sim.now()).is_none());
    confirm_all(&mut sim);
    assert_eq!(stored(&sim), ["m2"]);
}

#[test]
fn where_handlers_are_not_served_an_outage_changes_nothing() {
    let mut sim = away_with(1);
    assert!(sim.machine.lease(sim.now()).is_none());
}

#[test]
fn tasks_are_not_handed_to_groups() {
    let mut sim = away_with_local(1);
    let taken = sim.machine.take_for(sim.now(), &"a".into(), 1);
    assert!(taken.is_empty());
}

#[test]
fn a_retry_counts_and_rests_and_then_comes_again() {
    let mut sim = away_with_local(1);
    for attempt in 0..3 {
        let (seq, entry) = sim.machine.lease(sim.now()).unwrap();
        assert_eq!(entry.message.retry_count, attempt);
        let error = (attempt > 0).then_some("no luck");
        assert_eq!(entry.message.error.as_deref(), error);
        let verdict = retry(Duration::from_secs(2));
        assert!(sim.machine.settle(sim.now(), seq, verdict));
        sim.act();
        assert_eq!(sim.disk[&seq].message.retry_count, attempt + 1);
        assert!(sim.machine.lease(sim.now()).is_none());
        sim.wait(Duration::from_millis(1_999));
        assert!(sim.machine.lease(sim.now()).is_none());
        sim.wait(Duration::from_millis(1));
    }
}

#[test]
fn what_handlers_hold_does_not_keep_a_lane_draining() {
    let mut sim = away_with_local(3);
    let taken: Vec<u64> = (0..3)
        .map(|_| sim.machine.lease(sim.now()).unwrap().0)
        .collect();
    let hour = retry(Duration::from_secs(3_600));
    assert!(sim.machine.settle(sim.now(), taken[0], hour));
    back(&mut sim);
    assert_eq!(sim.machine.state(), LaneState::Primary);
    assert_eq!(sim.machine.spool().len(), 3);
    // One that is given back is drained.
    assert!(sim.machine.settle(sim.now(), taken[1], Verdict::Requeue));
    sim.act();
    assert_eq!(sim.machine.state(), LaneState::Draining);
    confirm_all(&mut sim);
    assert_eq!(stored(&sim), ["m1"]);
    assert_eq!(sim.machine.state(), LaneState::Primary);
}
