//! Spooled events in the hands of groups, in virtual time: the lane's machine
//! with a broker and a disk that are a few lists.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    groups::{Groups, Tag},
    machine::{Action, Intake, Local, Machine, Now, Settings},
    tests::settings,
};
use crate::{
    broker::{Confirmation, Fate, OrderKey, Outcome, Submission, Verdict},
    error::{Error, ErrorCode},
    hub::{
        spool::{Budget, ENTRY_OVERHEAD, Entry, Seq, Spool, Status},
        state::LaneState,
    },
    message::{
        Message, MessageId, Timestamp,
        wire::{Failure, Marks},
    },
};

struct Lane {
    machine: Machine<u64>,
    now: Instant,
    wall: i64,
    open_wanted: bool,
    to_load: Vec<Seq>,
    disk: BTreeMap<Seq, Entry>,
    written: Vec<Submission>,
    /// What the broker has, in order.
    stored: Vec<Submission>,
    /// Copies that the dead letters were asked for.
    copies: Vec<(Tag, String, Failure)>,
    spooled: BTreeSet<u64>,
}

fn events() -> Settings {
    Settings {
        local: Local::Groups,
        ..settings(&Arc::new(Budget::new(100_000, usize::MAX / 2)), false)
    }
}

fn name(group: &str) -> Arc<str> {
    Arc::from(group)
}

fn failure(details: &str) -> Failure {
    Failure::now("handler_error", details, "t", None)
}

fn retry(delay: Duration) -> Verdict {
    Verdict::Retry {
        delay,
        failure: failure("boom"),
    }
}

impl Lane {
    fn new() -> Self {
        Self {
            machine: Machine::new(events()),
            now: Instant::now(),
            wall: 1_000_000,
            open_wanted: false,
            to_load: Vec::new(),
            disk: BTreeMap::new(),
            written: Vec::new(),
            stored: Vec::new(),
            copies: Vec::new(),
            spooled: BTreeSet::new(),
        }
    }

    /// A lane that spooled these keys, one event each, while its broker was away.
    fn away_with(keys: &[u64]) -> Self {
        let mut lane = Self::new();
        lane.machine.broker_away(lane.now());
        for key in keys {
            lane.publish(*key);
        }
        lane
    }

    fn now(&self) -> Now {
        Now {
            at: self.now,
            wall: Timestamp::from_millis(self.wall),
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.wall += i64::try_from(time.as_millis()).unwrap();
        self.machine.tick(self.now());
        self.act();
    }

    /// Events are named after their place: e1 is the first.
    fn publish(&mut self, key: u64) {
        self.publish_marked(key, Marks::default());
    }

    fn publish_marked(&mut self, key: u64, marks: Marks) {
        let n = self.machine.next_seq() + self.machine.waiting() as u64;
        let mut message = Message::new("t", "x");
        message.id = MessageId::new(format!("e{n}")).unwrap();
        let intake = Intake {
            message: Arc::new(message),
            order: OrderKey::Publisher(key),
            confirm: true,
            deadline: self.now + Duration::from_secs(3_600),
            marks,
            waiter: n,
        };
        self.machine.publish(self.now(), [intake]);
        self.act();
    }

    fn act(&mut self) {
        for action in self.machine.take_actions() {
            match action {
                Action::Write(batch) => self.written.extend(batch),
                Action::Open => self.open_wanted = true,
                Action::Store { seq, entry, waiter } => {
                    self.disk.insert(seq, entry);
                    self.spooled.insert(waiter);
                }
                Action::Rewrite(seq) => {
                    let entry = self.machine.spool().get(seq).unwrap().clone();
                    self.disk.insert(seq, entry);
                }
                Action::Remove(seq) => drop(self.disk.remove(&seq).unwrap()),
                Action::Load(seqs) => self.to_load = seqs,
                Action::CopyToDead {
                    tag,
                    message,
                    failure,
                    ..
                } => self.copies.push((tag, message.id.to_string(), failure)),
                Action::DeadLetter { seq, .. } => drop(self.disk.remove(&seq)),
                Action::Answer(_, outcome) => {
                    assert!(
                        matches!(outcome, Ok(Outcome::Delivered { .. })),
                        "{outcome:?}"
                    );
                }
                Action::EndGeneration => self.written.clear(),
                Action::Changed { .. } => {}
            }
        }
    }

    fn back(&mut self) {
        self.machine.broker_back(self.now());
        self.act();
        self.open_wanted = false;
        self.machine.opened(self.now());
        self.act();
    }

    fn confirm_all(&mut self) {
        while !self.written.is_empty() {
            for submission in std::mem::take(&mut self.written) {
                let token = submission.token;
                self.stored.push(submission);
                let fate = Fate::Confirmed(None);
                self.machine
                    .confirmed(self.now(), [Confirmation { token, fate }]);
            }
            self.act();
        }
    }

    /// The connection dies; the broker has the first `stored` of what was written.
    fn crash(&mut self, stored: usize) {
        for (n, submission) in std::mem::take(&mut self.written).into_iter().enumerate() {
            let token = submission.token;
            if n < stored {
                self.stored.push(submission);
            }
            let fate = Fate::Unknown(Error::unknown(ErrorCode::ConnectionClosed, "lost"));
            self.machine
                .confirmed(self.now(), [Confirmation { token, fate }]);
            self.act();
        }
        self.machine.ended(self.now(), "crash");
        self.machine.broker_away(self.now());
        self.act();
    }

    fn load(&mut self) {
        let seqs = std::mem::take(&mut self.to_load);
        if !seqs.is_empty() {
            let entries = seqs.iter().map(|s| (*s, self.disk[s].clone())).collect();
            self.machine.loaded(self.now(), entries);
            self.act();
        }
    }

    fn take(&mut self, group: &str, max: usize) -> Vec<(Tag, Entry)> {
        let taken = self.machine.take_for(self.now(), &name(group), max);
        self.act();
        taken
    }

    fn settle(&mut self, tag: Tag, verdict: Verdict) {
        assert!(self.machine.settle(self.now(), tag, verdict));
        self.act();
    }

    /// A group takes what it may, acks all of it, and so on until it gets none.
    fn handle_all(&mut self, group: &str) -> Vec<String> {
        let mut handled = Vec::new();
        loop {
            let taken = self.take(group, 100);
            if taken.is_empty() && self.to_load.is_empty() {
                return handled;
            }
            for (tag, entry) in taken {
                handled.push(entry.message.id.to_string());
                self.settle(tag, Verdict::Ack);
            }
            self.load();
        }
    }

    /// What the broker has, each with the groups that handled it.
    fn stored(&self) -> Vec<String> {
        let named = |s: &Submission| format!("{} {}", s.message.id, s.marks.settled.join(","));
        let stored = self.stored.iter().map(named);
        stored.map(|s| s.trim_end().to_owned()).collect()
    }
}

fn ids(taken: &[(Tag, Entry)]) -> Vec<&str> {
    taken.iter().map(|(_, e)| e.message.id.as_str()).collect()
}

#[test]
fn each_group_gets_each_event_once_and_the_drain_says_who_handled_it() {
    let mut lane = Lane::away_with(&[0, 1, 0]);
    assert_eq!(lane.handle_all("a"), ["e1", "e2", "e3"]);
    assert_eq!(lane.handle_all("a"), [] as [&str; 0]);
    assert_eq!(lane.disk[&3].marks.settled, ["a"], "the mark is kept");
    let taken = lane.take("b", 1);
    assert_eq!(ids(&taken), ["e1"]);
    lane.settle(taken[0].0, Verdict::Ack);
    assert_eq!(lane.machine.spool().len(), 3, "everybody else needs them");
    lane.publish(2);
    lane.back();
    lane.confirm_all();
    assert_eq!(lane.stored(), ["e1 a,b", "e2 a", "e3 a", "e4"]);
    assert_eq!(lane.machine.state(), LaneState::Primary);
    assert!(lane.disk.is_empty());
}

#[test]
fn members_of_a_group_share_and_of_a_key_one_event_is_out() {
    let mut lane = Lane::away_with(&[0, 0, 1, 1, 2]);
    let first = lane.take("a", 2);
    let second = lane.take("a", 2);
    assert_eq!((ids(&first), ids(&second)), (vec!["e1", "e3"], vec!["e5"]));
    assert!(lane.take("a", 2).is_empty());
    assert_eq!(ids(&lane.take("b", 9)), ["e1", "e3", "e5"]);
    lane.settle(first[1].0, Verdict::Ack);
    assert_eq!(
        ids(&lane.take("a", 2)),
        ["e4"],
        "one key does not stop another"
    );
    // Given back, it comes again, before what is behind it.
    lane.settle(first[0].0, Verdict::Requeue);
    let again = lane.take("a", 2);
    assert_eq!(ids(&again), ["e1"]);
    assert!(again[0].1.message.redelivered);
    assert!(!lane.machine.settle(lane.now(), first[0].0, Verdict::Ack));
}

#[test]
fn what_a_group_has_in_hand_is_neither_drained_nor_overtaken() {
    let mut lane = Lane::away_with(&[0, 0, 1, 1]);
    let held = lane.take("a", 1);
    lane.back();
    assert!(
        lane.take("a", 9).is_empty(),
        "a lane that drains hands out nothing"
    );
    lane.publish(0);
    lane.publish(2);
    lane.confirm_all();
    assert_eq!(lane.stored(), ["e3", "e4", "e6"], "other keys do not wait");
    assert_eq!(lane.machine.state(), LaneState::Draining);
    assert!(
        lane.spooled.contains(&5),
        "a publish of that key goes behind"
    );
    lane.settle(held[0].0, Verdict::Ack);
    lane.confirm_all();
    assert_eq!(lane.stored()[3..], ["e1 a", "e2", "e5"]);
    assert_eq!(lane.machine.state(), LaneState::Primary);
}

#[test]
fn what_a_group_gives_back_while_it_drains_is_drained_unmarked() {
    let mut lane = Lane::away_with(&[0, 0]);
    let held = lane.take("a", 1);
    lane.back();
    lane.confirm_all();
    assert!(lane.stored.is_empty());
    lane.settle(held[0].0, Verdict::Requeue);
    lane.confirm_all();
    assert_eq!(lane.stored(), ["e1", "e2"]);
}

#[test]
fn publishers_do_not_wait_for_a_drain_that_waits_for_a_group() {
    let mut lane = Lane::away_with(&[0]);
    let held = lane.take("a", 1);
    lane.back();
    for _ in 0..6_000 {
        lane.publish(0);
    }
    assert_eq!(lane.machine.waiting(), 0);
    lane.settle(held[0].0, Verdict::Ack);
    lane.confirm_all();
    assert_eq!(lane.stored.len(), 6_001);
}

#[test]
fn what_is_in_doubt_is_not_handed_out_and_holds_its_key() {
    let mut lane = Lane::new();
    lane.back();
    lane.publish(0);
    lane.pass(Duration::from_secs(2));
    assert_eq!(lane.machine.state(), LaneState::Suspect);
    lane.publish(0);
    lane.publish(1);
    assert_eq!(ids(&lane.take("a", 9)), ["e3"]);
    lane.crash(1);
    let taken = lane.take("a", 9);
    assert_eq!(ids(&taken), ["e1"]);
    assert!(taken[0].1.marks.possible_duplicate);
}

#[test]
fn what_an_event_is_marked_with_goes_along_to_its_letter() {
    let mut lane = Lane::new();
    lane.machine.broker_away(lane.now());
    let marks = Marks {
        reprocess: 2,
        ..Marks::default()
    };
    lane.publish_marked(0, marks);
    let taken = lane.take("a", 1);
    let verdict = Verdict::DeadLetter {
        failure: failure("bang"),
    };
    assert!(lane.machine.settle(lane.now(), taken[0].0, verdict));
    // Else the next copy would have the number of one that was handled.
    let copied = |a: &Action<u64>| match a {
        Action::CopyToDead { marks, .. } => Some(marks.reprocess),
        _ => None,
    };
    let actions = lane.machine.take_actions();
    assert_eq!(actions.iter().filter_map(copied).collect::<Vec<_>>(), [2]);
}

#[test]
fn a_failed_event_rests_in_its_key_and_at_last_a_copy_goes_to_the_dead_letters() {
    let mut lane = Lane::away_with(&[0, 0, 1]);
    let first = lane.take("a", 1);
    let delay = Duration::from_secs(1);
    lane.settle(first[0].0, retry(delay));
    assert_eq!(ids(&lane.take("a", 9)), ["e3"], "only its key waits");
    assert_eq!(ids(&lane.take("b", 1)), ["e1"], "another group does not");
    let due = lane.machine.next_deadline(lane.now()).unwrap();
    assert!(due <= lane.now + delay);
    lane.pass(delay);
    let again = lane.take("a", 9);
    assert_eq!(ids(&again), ["e1"]);
    assert_eq!(again[0].1.message.retry_count, 1);
    assert_eq!(again[0].1.message.error.as_deref(), Some("boom"));
    lane.settle(
        again[0].0,
        Verdict::DeadLetter {
            failure: failure("bang"),
        },
    );
    let (tag, id, why) = lane.copies.pop().unwrap();
    assert_eq!((tag, id.as_str()), (again[0].0, "e1"));
    assert_eq!(why.details, "in group a: bang");
    assert!(lane.take("a", 9).is_empty(), "it waits for the copy");
    assert!(
        lane.disk[&1].marks.settled.is_empty(),
        "no mark without a copy"
    );
    lane.settle(tag, Verdict::Ack);
    assert_eq!(lane.disk[&1].marks.settled, ["a"]);
    assert_eq!(ids(&lane.take("a", 9)), ["e2"]);
    let spool = lane.machine.spool();
    let kept = spool.get(1).unwrap();
    assert_eq!(kept.message.retry_count, 0, "others begin anew");
    assert_eq!(spool.status(1), Some(Status::Leased), "b still has it");
}

#[test]
fn the_next_process_hands_out_only_what_a_group_has_not_settled() {
    let mut lane = Lane::away_with(&[0, 1, 2, 3, 4, 5, 6, 7]);
    for (tag, _) in lane.take("a", 5) {
        lane.settle(tag, Verdict::Ack);
    }
    let mut next = Lane::new();
    let mut left = Spool::new();
    for (seq, entry) in &lane.disk {
        left.restore(*seq, &entry.order, entry.message.size());
    }
    next.disk = lane.disk;
    next.machine.restore(left);
    next.machine.broker_away(next.now());
    next.act();
    assert_eq!(next.handle_all("a"), ["e6", "e7", "e8"]);
    assert_eq!(next.handle_all("b").len(), 8);
    next.back();
    for _ in 0..8 {
        next.load();
        next.confirm_all();
    }
    assert_eq!(next.stored.len(), 8);
    let all = |s: &Submission| s.marks.settled == ["a", "b"] && s.marks.possible_duplicate;
    assert!(next.stored.iter().all(all), "{:?}", next.stored());
}

#[test]
fn an_expired_event_goes_to_the_dead_letters_and_frees_its_key() {
    let mut lane = Lane::away_with(&[]);
    let mut message = Message::new("t", "x").with_id(MessageId::new("old").unwrap());
    message.expiration = Some(Timestamp::from_millis(lane.wall + 10));
    let intake = Intake {
        message: Arc::new(message),
        order: OrderKey::Publisher(0),
        confirm: true,
        deadline: lane.now + Duration::from_secs(60),
        marks: Marks::default(),
        waiter: 1,
    };
    lane.machine.publish(lane.now(), [intake]);
    lane.act();
    lane.publish(0);
    lane.pass(Duration::from_secs(1));
    assert!(lane.take("a", 9).is_empty());
    assert_eq!(ids(&lane.take("a", 9)), ["e2"]);
    assert!(!lane.disk.contains_key(&1));
}

#[test]
fn events_are_handed_out_during_an_outage_only() {
    let mut lane = Lane::away_with(&[0, 1]);
    lane.machine.pause_drain(lane.now());
    lane.back();
    assert_eq!(lane.machine.state(), LaneState::Draining);
    assert!(lane.take("a", 9).is_empty());
    lane.crash(0);
    assert_eq!(ids(&lane.take("a", 9)), ["e1", "e2"]);
}

#[test]
fn a_group_that_nobody_reads_for_is_forgotten_and_begins_anew() {
    let mut lane = Lane::away_with(&[0]);
    let taken = lane.take("a", 1);
    let verdict = retry(Duration::from_secs(60));
    // Not while it has something in hand.
    lane.machine.keep_groups(|_| false);
    lane.settle(taken[0].0, verdict);
    lane.machine.keep_groups(|group| group == "a");
    assert!(lane.take("a", 1).is_empty(), "it rests");
    lane.machine.keep_groups(|group| group == "b");
    let again = lane.take("a", 1);
    assert_eq!(
        (ids(&again), again[0].1.message.retry_count),
        (vec!["e1"], 0)
    );
}

#[test]
fn what_was_in_the_air_and_is_spooled_late_is_handed_out_before_what_came_after_it() {
    let mut lane = Lane::new();
    lane.back();
    lane.publish(0);
    lane.machine.force_degraded(lane.now());
    lane.publish(1);
    assert_eq!(lane.handle_all("a"), ["e2"]);
    assert!(lane.take("a", 9).is_empty());
    // The first one gets its copy now, behind what the group has handled.
    lane.pass(Duration::from_secs(2));
    lane.crash(0);
    assert_eq!(ids(&lane.take("a", 9)), ["e1"]);
}

#[test]
fn what_rests_when_a_drain_begins_rests_no_longer_in_the_next_outage() {
    let mut lane = Lane::away_with(&[0]);
    let taken = lane.take("a", 1);
    let verdict = retry(Duration::from_secs(3_600));
    lane.settle(taken[0].0, verdict);
    assert!(lane.take("a", 1).is_empty(), "it rests");
    lane.back();
    lane.crash(0);
    let again = lane.take("a", 1);
    assert_eq!(ids(&again), ["e1"]);
    assert_eq!(again[0].1.message.retry_count, 1);
}

/// Entries of a key each in a spool.
fn spool_of(seqs: std::ops::RangeInclusive<Seq>) -> Spool {
    let mut spool = Spool::new();
    for seq in seqs {
        let message = Message::new("t", "x");
        let entry = Entry {
            size: message.size() + ENTRY_OVERHEAD,
            message: Arc::new(message),
            order: OrderKey::Publisher(seq),
            marks: Marks::default(),
            confirm: true,
            since: Timestamp::from_millis(0),
            due: None,
        };
        spool.insert(seq, entry, Status::Ready);
    }
    spool
}

#[test]
fn what_stands_behind_something_that_is_only_on_the_disk_waits_for_it() {
    let (mut groups, group) = (Groups::default(), name("a"));
    let mut spool = spool_of(1..=4);
    let now = Timestamp::from_millis(0);
    let mut choose = |spool: &Spool, max| {
        let chosen = groups.choose(&group, now, spool, max);
        (chosen.events, chosen.reached_tail)
    };
    assert_eq!(choose(&spool, 9), (vec![1, 2, 3, 4], false), "all is here");
    assert!(spool.page_out(2));
    assert_eq!(choose(&spool, 9), (vec![1], true));
    // Nothing is read from the disk for somebody who has no room.
    assert_eq!(choose(&spool, 1), (vec![1], false));
}

#[test]
fn of_what_left_the_spool_or_was_settled_nothing_is_remembered() {
    let (mut groups, group) = (Groups::default(), name("a"));
    let due = Timestamp::from_millis(7);
    for seq in [1, 2] {
        groups.gave_back(&group, seq, Some((failure("boom"), due)));
        assert_eq!(groups.tried(&group, seq).map(|t| t.failed), Some(1));
    }
    assert_eq!(groups.next_due(), Some(due));
    groups.left(1);
    assert!(groups.tried(&group, 1).is_none());
    groups.take(&group, 2, 0);
    groups.settled(&group, 2);
    assert!(groups.tried(&group, 2).is_none());
    assert_eq!(groups.next_due(), None);
}

/// One run of random publishes, outages, hand-outs and verdicts.
fn run(seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut lane = Lane::new();
    lane.back();
    let mut up = true;
    let mut out: Vec<(Tag, &str, String, OrderKey)> = Vec::new();
    let mut handled: HashMap<(&str, String), u32> = HashMap::new();
    let mut doubtful: BTreeSet<String> = BTreeSet::new();
    for _ in 0..400 {
        match rng.u32(..100) {
            0..30 => lane.publish(rng.u64(..4)),
            30..45 => {
                let group = if rng.bool() { "a" } else { "b" };
                let max = rng.usize(1..4);
                for (tag, entry) in lane.take(group, max) {
                    let id = entry.message.id.to_string();
                    assert!(
                        !out.iter()
                            .any(|(_, g, _, k)| *g == group && *k == entry.order),
                        "two of a key are out in {group}"
                    );
                    assert!(
                        !handled.contains_key(&(group, id.clone())),
                        "{id} came again"
                    );
                    out.push((tag, group, id, entry.order));
                }
            }
            45..70 if !out.is_empty() => {
                let (tag, group, id, _) = out.swap_remove(rng.usize(..out.len()));
                match rng.u32(..6) {
                    0 => lane.settle(tag, Verdict::Requeue),
                    1 => lane.settle(tag, retry(Duration::from_millis(rng.u64(1..500)))),
                    _ => {
                        lane.settle(tag, Verdict::Ack);
                        handled.insert((group, id), 1);
                    }
                }
            }
            70..80 if up => lane.confirm_all(),
            80..90 => lane.pass(Duration::from_millis(rng.u64(1..300))),
            90..95 if up => {
                let n = rng.usize(..=lane.written.len());
                doubtful.extend(lane.written[..n].iter().map(|s| s.message.id.to_string()));
                lane.crash(n);
                up = false;
            }
            95.. if !up => {
                lane.back();
                up = true;
            }
            _ => {}
        }
        for submission in &lane.written {
            let id = submission.message.id.as_str();
            assert!(
                !out.iter().any(|(_, _, o, _)| o == id),
                "{id} was drained from a group's hands"
            );
        }
    }
    for (tag, group, id, _) in out {
        lane.settle(tag, Verdict::Ack);
        handled.insert((group, id), 1);
    }
    for _ in 0..100 {
        if lane.machine.is_quiet() && lane.machine.spool().is_empty() {
            break;
        }
        if !up || lane.open_wanted {
            lane.back();
            up = true;
        }
        lane.confirm_all();
        lane.pass(Duration::from_millis(200));
    }
    assert!(lane.machine.spool().is_empty(), "left in the spool");
    assert!(lane.disk.is_empty(), "left on the disk");

    // Each event is at the broker; again only if a connection died with it.
    let mut last: BTreeMap<String, &Submission> = BTreeMap::new();
    for submission in &lane.stored {
        let id = submission.message.id.to_string();
        let again = last.insert(id.clone(), submission).is_some();
        assert!(!again || doubtful.contains(&id), "{id} is there twice");
    }
    let count = usize::try_from(lane.machine.next_seq() - 1).unwrap();
    assert_eq!(last.len(), count, "lost");
    // The last copy says who handled it, and nobody else.
    for (id, submission) in &last {
        for group in ["a", "b"] {
            let marked = submission.marks.settled.iter().any(|g| g == group);
            let did = handled.contains_key(&(group, id.clone()));
            assert_eq!(marked, did, "{id} in {group}");
        }
    }
    // First copies of a key stand in publish order.
    let mut newest: HashMap<&OrderKey, Seq> = HashMap::new();
    let mut seen = BTreeSet::new();
    for submission in &lane.stored {
        if seen.insert(submission.token) {
            let before = newest.insert(&submission.order, submission.token);
            assert!(before.is_none_or(|b| b < submission.token), "out of order");
        }
    }
}

#[test]
fn groups_and_the_drain_share_a_spool_without_loss_repeats_or_disorder() {
    for seed in 0..2_000 {
        if let Err(panic) = std::panic::catch_unwind(|| run(seed)) {
            eprintln!("seed {seed} failed");
            std::panic::resume_unwind(panic);
        }
    }
}
