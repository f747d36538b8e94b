//! When a lane changes its state, and when it does not.

use super::*;

fn changes(sim: &mut Sim) -> Vec<(LaneState, LaneState)> {
    std::mem::take(&mut sim.changes)
}

fn opened() -> Sim {
    let mut sim = with(default_settings());
    back(&mut sim);
    sim
}

/// Answers the first that was written, and was not stored.
fn turn_away(sim: &mut Sim, fate: impl FnOnce(Error) -> Fate) {
    let token = sim.broker.written.pop_front().unwrap().token;
    let fate = fate(Error::new(ErrorCode::PublishFailed, "no"));
    sim.machine.confirmed(sim.now(), [answer(token, fate)]);
    sim.act();
}

fn until_deadline(sim: &Sim) -> Duration {
    sim.machine.next_deadline(sim.now()).unwrap() - sim.now
}

#[test]
fn a_rumour_that_the_broker_is_away_does_not_close_an_open_lane() {
    let mut sim = opened();
    sim.machine.broker_away(sim.now());
    sim.publish();
    sim.act();
    assert_eq!(sim.machine.state(), LaneState::Primary);
    assert_eq!(sim.broker.written.len(), 1);
}

#[test]
fn a_lane_that_opens_with_nothing_spooled_is_primary_at_once() {
    let mut sim = with(default_settings());
    sim.machine.broker_away(sim.now());
    back(&mut sim);
    assert_eq!(
        changes(&mut sim),
        [
            (LaneState::Primary, LaneState::Degraded),
            (LaneState::Degraded, LaneState::Primary)
        ]
    );
}

#[test]
fn a_lane_that_does_not_open_is_degraded_and_publishes_do_not_ask_again() {
    let mut sim = with(default_settings());
    sim.publish();
    sim.act();
    assert!(std::mem::take(&mut sim.open_wanted));
    let error = Error::new(ErrorCode::ConnectionFailed, "no");
    sim.machine.open_failed(sim.now(), &error);
    sim.act();
    assert_eq!(sim.machine.state(), LaneState::Degraded);
    assert!(sim.answers[&0].is_ok());
    sim.publish();
    sim.act();
    assert!(!sim.open_wanted, "the shell tries again by itself");
}

#[test]
fn without_a_spool_each_publish_asks_for_a_lane_and_hears_that_there_is_none() {
    let mut sim = with(Settings {
        spool: false,
        ..default_settings()
    });
    let error = Error::new(ErrorCode::ConnectionFailed, "no");
    for n in 0..2 {
        sim.publish();
        sim.act();
        assert!(std::mem::take(&mut sim.open_wanted), "publish {n}");
        sim.machine.open_failed(sim.now(), &error);
        sim.act();
        assert!(sim.answers[&n].is_err());
    }
}

#[test]
fn a_lane_that_takes_longer_to_open_than_the_hedge_is_degraded() {
    let mut sim = with(default_settings());
    sim.publish();
    sim.act();
    assert_eq!(until_deadline(&sim), Duration::from_secs(1));
    sim.wait(Duration::from_millis(999));
    assert_eq!(sim.machine.state(), LaneState::Primary);
    sim.wait(Duration::from_millis(1));
    assert_eq!(sim.machine.state(), LaneState::Degraded);
    assert!(sim.answers[&0].is_ok());
}

#[test]
fn a_confirm_is_not_late_before_the_hedge() {
    let mut sim = opened();
    sim.publish();
    sim.act();
    sim.wait(Duration::from_millis(999));
    assert_eq!(sim.machine.state(), LaneState::Primary);
}

#[test]
fn the_hedge_follows_the_confirms_but_for_those_of_a_stall() {
    let mut sim = opened();
    let publish_and_confirm = |sim: &mut Sim, after: u64| {
        sim.publish();
        sim.act();
        sim.wait(Duration::from_millis(after));
        confirm_all(sim);
    };
    for _ in 0..128 {
        publish_and_confirm(&mut sim, 50);
    }
    sim.publish();
    sim.act();
    assert_eq!(until_deadline(&sim), Duration::from_millis(200));
    confirm_all(&mut sim);
    for _ in 0..128 {
        publish_and_confirm(&mut sim, 900);
        assert_eq!(sim.machine.state(), LaneState::Primary);
    }
    sim.publish();
    sim.act();
    assert_eq!(until_deadline(&sim), Duration::from_millis(200));
}

#[test]
fn what_is_spooled_in_doubt_is_kept_as_a_possible_duplicate_and_nothing_else_is() {
    let mut sim = opened();
    sim.publish();
    sim.act();
    sim.wait(Duration::from_secs(1));
    sim.publish();
    sim.act();
    let marked: Vec<bool> = sim
        .disk
        .values()
        .map(|e| e.marks.possible_duplicate)
        .collect();
    assert_eq!(marked, [true, false]);
}

#[test]
fn what_has_an_unknown_outcome_is_kept_with_its_mark() {
    let mut sim = opened();
    sim.publish();
    sim.act();
    turn_away(&mut sim, Fate::Unknown);
    assert!(sim.disk.values().all(|e| e.marks.possible_duplicate));
    assert_eq!(sim.disk.len(), 1);
}

#[test]
fn a_suspicion_begins_once_and_ends_with_its_time_out() {
    let mut sim = opened();
    for _ in 0..2 {
        sim.publish();
    }
    sim.act();
    turn_away(&mut sim, Fate::Unknown);
    sim.wait(Duration::from_secs(9));
    turn_away(&mut sim, Fate::Unknown);
    let suspected = (LaneState::Primary, LaneState::Suspect);
    assert_eq!(changes(&mut sim), [suspected]);
    assert_eq!(until_deadline(&sim), Duration::from_secs(1));
    sim.wait(Duration::from_secs(1));
    assert_eq!(sim.machine.state(), LaneState::Degraded);
    assert!(!sim.lane_open);
}

#[test]
fn an_overloaded_broker_is_left_alone_longer_each_time_until_it_confirms() {
    let mut sim = opened();
    sim.publish();
    sim.act();
    for pause in [50, 100, 200, 400, 800, 1_600, 2_000, 2_000] {
        turn_away(&mut sim, Fate::Overloaded);
        assert_eq!(sim.machine.state(), LaneState::Suspect);
        assert!(sim.broker.written.is_empty());
        assert_eq!(until_deadline(&sim), Duration::from_millis(pause));
        sim.wait(Duration::from_millis(pause - 1));
        assert!(sim.broker.written.is_empty());
        sim.wait(Duration::from_millis(1));
        assert_eq!(sim.broker.written.len(), 1);
    }
    confirm_all(&mut sim);
    sim.publish();
    sim.act();
    turn_away(&mut sim, Fate::Overloaded);
    assert_eq!(until_deadline(&sim), Duration::from_millis(50));
}

#[test]
fn an_overloaded_broker_is_not_given_up_with_nothing_in_doubt() {
    let mut sim = with(Settings {
        overload_pause: Duration::from_secs(60),
        ..default_settings()
    });
    back(&mut sim);
    sim.publish();
    sim.act();
    turn_away(&mut sim, Fate::Overloaded);
    assert_eq!(until_deadline(&sim), Duration::from_secs(60));
    sim.wait(Duration::from_secs(59));
    assert_eq!(sim.machine.state(), LaneState::Suspect);
    assert!(sim.lane_open);
    sim.wait(Duration::from_secs(1));
    confirm_all(&mut sim);
    assert_eq!(sim.machine.state(), LaneState::Primary);
}

#[test]
fn a_suspect_lane_that_an_operator_releases_still_waits_for_its_confirms() {
    let mut sim = opened();
    sim.publish();
    sim.act();
    sim.machine.force_degraded(sim.now());
    sim.act();
    sim.wait(Duration::from_secs(1));
    assert_eq!(sim.machine.state(), LaneState::Suspect);
    sim.machine.release_lane(sim.now());
    sim.act();
    assert_eq!(sim.machine.state(), LaneState::Suspect);
    confirm_all(&mut sim);
    assert_eq!(sim.machine.state(), LaneState::Primary);
}

#[test]
fn a_close_waits_also_for_what_a_broken_disk_does_not_keep() {
    let mut sim = away_with(3);
    sim.machine.close(sim.now());
    assert!(!sim.machine.awaits_broker(), "the next process has them");
    sim.machine.note_unkept(1);
    assert!(sim.machine.awaits_broker());
    sim.machine.note_unkept(0);
    assert!(!sim.machine.awaits_broker());
}

/// While it is refused nobody asks by themselves, but for whoever has work.
#[test]
fn a_refused_topic_is_asked_for_again_by_a_publish_and_by_what_comes_back() {
    let mut sim = with(settings(
        &Arc::new(Budget::new(100_000, usize::MAX / 2)),
        true,
    ));
    spool_away(&mut sim, 2);
    let (seq, _) = sim.machine.lease(sim.now()).unwrap();
    sim.machine.broker_back(sim.now());
    sim.act();
    let refusal = Error::rejected(ErrorCode::PublishRejected, "no such exchange");
    assert!(std::mem::take(&mut sim.open_wanted));
    sim.machine.open_failed(sim.now(), &refusal);
    sim.act();
    assert_eq!(sim.machine.state(), LaneState::Primary);
    assert_eq!(sim.dead.len(), 1);
    sim.machine.tick(sim.now());
    sim.act();
    assert!(!sim.open_wanted);
    assert!(sim.machine.settle(sim.now(), seq, Verdict::Requeue));
    sim.act();
    assert!(std::mem::take(&mut sim.open_wanted), "what came back");
    sim.machine.open_failed(sim.now(), &refusal);
    sim.act();
    assert_eq!(sim.dead.len(), 2);
    assert!(!sim.open_wanted);
    sim.publish_numbered(2, 0);
    sim.act();
    assert!(sim.open_wanted, "a publish");
}
