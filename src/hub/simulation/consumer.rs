//! Who reads: a foreign consumer and the hubs' groups at the queue, the hubs'
//! group at the stream, and the hubs' local handlers at their spools. Handlers
//! ack, give back, retry, give up, and die.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use super::{
    broker::SETTLED,
    oracle::Attempt,
    process::{GROUP, attempt_of},
    world::{Ev, World},
};
use crate::{
    broker::{BrokerType, Delivery, Received, Verdict},
    hub::group::{Lease, Taken},
    message::{
        Message, MessageId, Timestamp,
        wire::{Failure, Marks},
    },
};

/// The queue-like broker's queue.
#[derive(Default)]
pub(super) struct Queue {
    pub(super) ready: VecDeque<Arc<Message>>,
    /// The foreign consumer, and one for each process.
    pub(super) consumers: [Reader; 3],
    next: u64,
}

/// One consumer at the queue.
#[derive(Default)]
pub(super) struct Reader {
    epoch: u32,
    pub(super) unacked: BTreeMap<u64, Arc<Message>>,
    scheduled: bool,
}

/// One partition's group.
#[derive(Default)]
pub(super) struct Partition {
    owner: Option<usize>,
    epoch: u32,
    position: usize,
    pub(super) committed: usize,
    acked: BTreeSet<usize>,
    again: VecDeque<usize>,
    out: usize,
    scheduled: bool,
}

/// Where a delivery came from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Source {
    Queue {
        epoch: u32,
        tag: u64,
    },
    Stream {
        partition: usize,
        epoch: u32,
        offset: usize,
    },
    Spool {
        lane: usize,
        seq: u64,
    },
    /// A spooled event, in a group's hands.
    Event {
        lane: usize,
        tag: u64,
        attempt: Attempt,
    },
}

/// A delivery in a handler's hands.
pub(super) struct Held {
    source: Source,
    lease: Option<Lease>,
    group: usize,
    id: String,
    retry: u32,
}

const PREFETCH: usize = 8;

impl Partition {
    fn commit(&mut self) {
        while self.acked.remove(&self.committed) {
            self.committed += 1;
        }
    }
}

impl Queue {
    pub(super) fn arrives(&mut self, _attempt: Attempt, message: Arc<Message>) {
        self.ready.push_back(message);
    }

    fn lose(&mut self, reader: usize) {
        let reader = &mut self.consumers[reader];
        reader.epoch += 1;
        for (_, message) in std::mem::take(&mut reader.unacked).into_iter().rev() {
            self.ready.push_front(message);
        }
    }
}

impl World {
    // ----- the brokers' side -----

    /// Whoever has room for more is served soon.
    pub(super) fn kick_consumers(&mut self) {
        for r in 0..3 {
            let linked = r == 0 || self.processes[r - 1].connected[0];
            let reader = &mut self.queue.consumers[r];
            if linked
                && !reader.scheduled
                && reader.unacked.len() < PREFETCH
                && !self.queue.ready.is_empty()
            {
                reader.scheduled = true;
                let after = self.rng.u64(50..2_000);
                self.post(after, Ev::Deliver(r));
            }
        }
        for j in 0..2 {
            let part = &mut self.partitions[j];
            let more = part.position < self.logs[1 + j].messages.len() || !part.again.is_empty();
            if more && !part.scheduled && part.out < PREFETCH {
                part.scheduled = true;
                let after = self.rng.u64(50..2_000);
                self.post(after, Ev::Deliver(3 + j));
            }
        }
    }

    pub(super) fn deliver(&mut self, r: usize) {
        if r >= 3 {
            self.deliver_stream(r - 3);
            return;
        }
        self.queue.consumers[r].scheduled = false;
        if !self.brokers[0].answers() || r > 0 && !self.processes[r - 1].connected[0] {
            return;
        }
        let n = self.rng.usize(1..=4);
        for _ in 0..n {
            let queue = &mut self.queue;
            if queue.consumers[r].unacked.len() >= PREFETCH {
                break;
            }
            let Some(message) = queue.ready.pop_front() else {
                break;
            };
            queue.next += 1;
            let tag = queue.next;
            let epoch = queue.consumers[r].epoch;
            queue.consumers[r].unacked.insert(tag, message.clone());
            if r == 0 {
                let after = self.rng.u64(1_000..400_000);
                self.post(after, Ev::ForeignAck(epoch, tag));
            } else {
                self.take_in(r - 1, 0, Source::Queue { epoch, tag }, &message);
            }
        }
        self.kick_consumers();
    }

    fn deliver_stream(&mut self, j: usize) {
        self.partitions[j].scheduled = false;
        if !self.brokers[1].answers() {
            return;
        }
        let member = |p: &usize| self.processes[*p].connected[1];
        let members: Vec<usize> = (0..self.processes.len()).filter(member).collect();
        if self.partitions[j]
            .owner
            .is_none_or(|p| !members.contains(&p))
        {
            self.revoke(j);
            if members.is_empty() {
                // The next one that connects is looked for then.
                return;
            }
            self.partitions[j].owner = Some(members[self.rng.usize(..members.len())]);
        }
        let Some(p) = self.partitions[j].owner else {
            return;
        };
        let n = self.rng.usize(1..=4);
        for _ in 0..n {
            let part = &mut self.partitions[j];
            if part.out >= PREFETCH {
                break;
            }
            let offset = match part.again.pop_front() {
                Some(offset) => offset,
                None if part.position < self.logs[1 + j].messages.len() => {
                    part.position += 1;
                    part.position - 1
                }
                None => break,
            };
            part.out += 1;
            let epoch = part.epoch;
            let message = self.logs[1 + j].messages[offset].clone();
            self.take_in(
                p,
                1,
                Source::Stream {
                    partition: j,
                    epoch,
                    offset,
                },
                &message,
            );
        }
        self.kick_consumers();
    }

    /// A partition loses its reader: the next one goes on from what is committed.
    fn revoke(&mut self, j: usize) {
        let part = &mut self.partitions[j];
        part.owner = None;
        part.epoch += 1;
        part.position = part.committed;
        part.acked.clear();
        part.again.clear();
        part.out = 0;
    }

    pub(super) fn foreign_ack(&mut self, epoch: u32, tag: u64) {
        if self.queue.consumers[0].epoch == epoch {
            self.queue.consumers[0].unacked.remove(&tag);
        }
        self.kick_consumers();
    }

    pub(super) fn consumers_lose_link(&mut self, p: usize, b: usize) {
        if b == 0 {
            self.queue.lose(1 + p);
        } else {
            for j in 0..2 {
                if self.partitions[j].owner == Some(p) {
                    self.revoke(j);
                }
            }
        }
        self.kick_consumers();
    }

    pub(super) fn consumers_lose_broker(&mut self, b: usize) {
        if b == 0 {
            self.queue.lose(0);
        }
        for p in 0..self.processes.len() {
            self.consumers_lose_link(p, b);
        }
    }

    pub(super) fn consumers_lose_process(&mut self, p: usize) {
        self.processes[p].connected = [false; 2];
        self.consumers_lose_link(p, 0);
        self.consumers_lose_link(p, 1);
    }

    pub(super) fn kill_consumer(&mut self, p: usize, b: usize) {
        if b == 0 && self.rng.bool() {
            self.queue.lose(0);
            self.kick_consumers();
        } else {
            self.consumers_lose_link(p, b);
        }
    }

    // ----- the hubs' side -----

    /// A hub's subscription gets a delivery: its group says whether a handler
    /// may have it.
    fn take_in(&mut self, p: usize, g: usize, source: Source, message: &Message) {
        self.next_tag += 1;
        let tag = self.next_tag;
        let mut shown = message.clone();
        let settled = shown.headers.remove(SETTLED).unwrap_or_default();
        let settled: Vec<String> = settled.split(',').map(str::to_owned).collect();
        shown.id = MessageId::new(shown.id.as_str()).unwrap();
        let received = Received {
            topic: self.topics[g].clone(),
            message: Arc::new(shown),
            marks: Arc::new(Marks {
                settled: settled.clone(),
                ..Marks::default()
            }),
            via: BrokerType::InMemory,
        };
        let incarnation = self.processes[p].incarnation;
        let skips = settled.iter().any(|g| g == GROUP);
        let process = &mut self.processes[p];
        process.sources.insert(tag, source);
        let delivery = Delivery::new(received, process.settlements.clone(), tag);
        match process.groups[g].take_in(delivery) {
            Taken::New(delivery, lease) => {
                let (received, _) = delivery.into_parts();
                process.sources.remove(&tag);
                let id = received.message.id.to_string();
                let retry = received.message.retry_count;
                self.trace(|| {
                    format!(
                        "process {p} group {g}: handles {} from {source:?}",
                        attempt_of(&received.message)
                    )
                });
                if skips {
                    self.oracle
                        .fail("C6", || format!("{id} says that its group has settled it"));
                }
                self.oracle.handler_begins(p, g, &id, retry);
                let held = Held {
                    source,
                    lease,
                    group: g,
                    id,
                    retry,
                };
                self.processes[p].held.insert(tag, held);
                let slow = self.rng.u32(..20) == 0;
                let after = self.rng.u64(500..if slow { 3_000_000 } else { 60_000 });
                self.post(after, Ev::Handled(p, incarnation, tag));
            }
            Taken::Kept => self.settle_duplicates(p),
        }
    }

    /// A handler decided.
    pub(super) fn handled(&mut self, p: usize, tag: u64) {
        let incarnation = self.processes[p].incarnation;
        let Some(held) = self.processes[p].held.remove(&tag) else {
            return;
        };
        let Held {
            source,
            lease,
            group,
            id,
            retry,
        } = held;
        let stream = matches!(source, Source::Stream { .. });
        // Tried again where it is: another copy of it is as good.
        let in_place = matches!(source, Source::Event { .. });
        let verdict = match self.rng.u32(..100) {
            _ if self.healed => Verdict::Ack,
            0..=79 => Verdict::Ack,
            80..=87 => Verdict::Requeue,
            88..=95 if !stream => Verdict::Retry {
                delay: Duration::from_millis(self.rng.u64(10..3_000)),
                failure: failure(),
            },
            96..=97 => Verdict::DeadLetter { failure: failure() },
            _ => Verdict::Ack,
        };
        self.trace(|| {
            format!(
                "process {p} group {group}: {id} ends with {}",
                verdict_name(&verdict)
            )
        });
        // As the span does it: an ack holds whether or not the source hears of
        // it; a copy counts only once the source says that it is safe.
        let ack = matches!(verdict, Verdict::Ack);
        let requeue = matches!(verdict, Verdict::Requeue);
        let retried = matches!(verdict, Verdict::Retry { .. });
        if ack || requeue {
            self.oracle.handler_ends(p, group, &id, retry, ack);
            if let Some(lease) = lease {
                let group = &self.processes[p].groups[group];
                if ack {
                    group.commit(lease)
                } else {
                    group.release(lease)
                }
            }
            let _ = self.settle(p, source, verdict);
        } else {
            let done = self.settle(p, source, verdict);
            if self.processes[p].incarnation != incarnation {
                return;
            }
            let over = done && !(retried && in_place);
            self.oracle.handler_ends(p, group, &id, retry, over);
            if let Some(lease) = lease {
                let group = &self.processes[p].groups[group];
                match (over, retried) {
                    (true, true) => group.retried(lease),
                    (true, false) => group.commit(lease),
                    (false, _) => group.release(lease),
                }
            }
        }
        if self.processes[p].incarnation == incarnation {
            self.settle_duplicates(p);
        }
        self.kick_consumers();
    }

    /// What the groups settle by themselves: duplicates, and parked copies.
    fn settle_duplicates(&mut self, p: usize) {
        let incarnation = self.processes[p].incarnation;
        while self.processes[p].incarnation == incarnation {
            let Ok(settlement) = self.processes[p].verdicts.try_recv() else {
                return;
            };
            if let Some(source) = self.processes[p].sources.remove(&settlement.tag) {
                self.settle(p, source, settlement.verdict);
            }
        }
    }

    /// A source carries a verdict out. False when it could not.
    fn settle(&mut self, p: usize, source: Source, verdict: Verdict) -> bool {
        match source {
            Source::Queue { epoch, tag } => self.settle_queue(p, epoch, tag, &verdict),
            Source::Stream {
                partition,
                epoch,
                offset,
            } => self.settle_stream(partition, epoch, offset, &verdict),
            Source::Event { .. } => self.settle_event(p, source, verdict),
            Source::Spool { lane, seq } => {
                let incarnation = self.processes[p].incarnation;
                let Some(sim) = self.processes[p].lanes.get_mut(lane) else {
                    return false;
                };
                sim.leases = sim.leases.saturating_sub(1);
                if matches!(verdict, Verdict::Ack)
                    && let Some(attempt) = sim.attempts.get(&seq).copied()
                {
                    self.oracle.life(attempt).handled = Some(incarnation);
                }
                self.with_machine(p, lane, |machine, now| machine.settle(now, seq, verdict))
                    .unwrap_or(false)
            }
        }
    }

    fn settle_event(&mut self, p: usize, source: Source, verdict: Verdict) -> bool {
        let Source::Event { lane, tag, attempt } = source else {
            return false;
        };
        let incarnation = self.processes[p].incarnation;
        let Some(sim) = self.processes[p].lanes.get_mut(lane) else {
            return false;
        };
        sim.leases = sim.leases.saturating_sub(1);
        if matches!(verdict, Verdict::Ack | Verdict::DeadLetter { .. }) {
            self.oracle.settles(attempt, incarnation);
        }
        self.with_machine(p, lane, |machine, now| machine.settle(now, tag, verdict))
            .unwrap_or(false)
    }

    fn settle_queue(&mut self, p: usize, epoch: u32, tag: u64, verdict: &Verdict) -> bool {
        let fails = matches!(verdict, Verdict::Retry { .. } | Verdict::DeadLetter { .. })
            && self.rng.u32(..5) == 0;
        let reader = &mut self.queue.consumers[1 + p];
        if reader.epoch != epoch {
            return false;
        }
        let Some(message) = reader.unacked.remove(&tag) else {
            return false;
        };
        match verdict {
            _ if fails => self.queue.ready.push_front(message),
            Verdict::Requeue => self.queue.ready.push_front(message),
            Verdict::Retry { .. } => {
                let mut next = (*message).clone();
                next.retry_count += 1;
                self.queue.ready.push_back(Arc::new(next));
            }
            Verdict::Ack | Verdict::DeadLetter { .. } => {}
        }
        !fails
    }

    fn settle_stream(&mut self, j: usize, epoch: u32, offset: usize, verdict: &Verdict) -> bool {
        let commits = self.healed || self.rng.u32(..3) == 0;
        let part = &mut self.partitions[j];
        if part.epoch != epoch {
            return false;
        }
        part.out -= 1;
        if matches!(verdict, Verdict::Requeue) {
            part.again.push_back(offset);
            return true;
        }
        part.acked.insert(offset);
        if commits {
            part.commit();
        }
        true
    }

    /// Whoever commits at an interval has by now.
    pub(super) fn commit_all(&mut self) {
        for part in &mut self.partitions {
            part.commit();
        }
    }

    /// Hands spooled messages to local handlers that have room.
    pub(super) fn feed_local(&mut self, p: usize, l: usize) {
        if self.plan.groups && l > 0 {
            self.feed_group(p, l);
            return;
        }
        if !self.plan.local || l != 0 {
            return;
        }
        let now = self.at();
        let incarnation = self.processes[p].incarnation;
        while let Some(lane) = self.processes[p].lanes.get_mut(l) {
            if lane.leases >= 4 {
                break;
            }
            let Some((seq, entry)) = lane.machine.lease(now) else {
                break;
            };
            lane.leases += 1;
            let attempt = attempt_of(&entry.message);
            self.trace(|| format!("process {p} lane {l}: leases {attempt}"));
            self.oracle.leases(attempt, incarnation);
            self.take_in(p, 0, Source::Spool { lane: l, seq }, &entry.message);
            if self.processes[p].incarnation != incarnation {
                return;
            }
        }
    }
}

impl World {
    /// Hands spooled events to the group, which has a member in each process.
    fn feed_group(&mut self, p: usize, l: usize) {
        let now = self.at();
        let incarnation = self.processes[p].incarnation;
        let Some(lane) = self.processes[p].lanes.get_mut(l) else {
            return;
        };
        let room = 4_usize.saturating_sub(lane.leases);
        let taken = lane.machine.take_for(now, &Arc::from(GROUP), room);
        lane.leases += taken.len();
        for (tag, entry) in taken {
            let attempt = attempt_of(&entry.message);
            self.trace(|| format!("process {p} lane {l}: hands out {attempt}"));
            self.oracle.gives(attempt, incarnation);
            let source = Source::Event {
                lane: l,
                tag,
                attempt,
            };
            self.take_in(p, 1, source, &entry.message);
            if self.processes[p].incarnation != incarnation {
                return;
            }
        }
    }
}

fn failure() -> Failure {
    Failure {
        reason: "handler".to_owned(),
        details: String::new(),
        first: Timestamp::from_millis(0),
        last: Timestamp::from_millis(0),
        original_topic: String::new(),
        retries: 0,
    }
}

fn verdict_name(verdict: &Verdict) -> &'static str {
    match verdict {
        Verdict::Ack => "an ack",
        Verdict::Requeue => "a requeue",
        Verdict::Retry { .. } => "a retry",
        Verdict::DeadLetter { .. } => "a dead letter",
    }
}
