//! Dead letters in a log, read without a group, so that nobody's position moves.
//! A decision is a record behind its letter, in the letter's partition: it lives
//! at least as long as the letter, and every hub that reads the log knows it.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::{DeadLetter, Decision, LetterStatus, MOST_BYTES, MOST_LETTERS};
use crate::{
    broker::{MessageBroker, PublishOptions, Received, StartFrom, SubscribeOptions},
    error::{Error, ErrorCode, Result},
    message::{Message, Timestamp},
    topic::{Pattern, Topic},
};

/// Where a letter stands in its log.
pub(super) type Position = (i32, i64);

/// Which letters of a log are wanted.
pub(super) struct Wanted<'a> {
    pub(super) open: bool,
    pub(super) decided: bool,
    /// Whatever else is asked of them; it does not look at the status.
    pub(super) keep: &'a (dyn Fn(&DeadLetter) -> bool + Send + Sync),
}

/// What was read.
pub(super) struct Read {
    pub(super) letters: Vec<(DeadLetter, Position)>,
    pub(super) complete: bool,
}

/// A decision as it is written.
#[derive(Serialize, Deserialize)]
struct Record {
    /// Of the letter, in this partition.
    offset: i64,
    /// None: purged, which hides the letter for good.
    status: Option<LetterStatus>,
    at: Timestamp,
    note: String,
}

/// Reads a log to its end. A topic that does not exist is empty.
///
/// # Errors
/// Why it could not be read, or not to its end: then what was decided is not
/// known either.
pub(super) async fn read(
    broker: &dyn MessageBroker,
    topic: &Topic,
    wanted: &Wanted<'_>,
    is_queue: &(dyn Fn(&str) -> bool + Send + Sync),
) -> Result<Read> {
    let nothing = || Read {
        letters: Vec::new(),
        complete: true,
    };
    let Some(streams) = broker.event_stream() else {
        return Ok(nothing());
    };
    let metadata = match streams.topic_metadata(topic).await {
        Ok(metadata) => metadata,
        Err(e) if e.code() == ErrorCode::TopicNotFound => return Ok(nothing()),
        Err(e) => return Err(e),
    };
    let ends: BTreeMap<i32, i64> = metadata
        .partitions
        .iter()
        .filter(|p| p.high_watermark > p.low_watermark)
        .map(|p| (p.id, p.high_watermark))
        .collect();
    if ends.is_empty() {
        return Ok(nothing());
    }
    let fold = Fold::new(ends.clone(), wanted.open, wanted.decided);
    let fold = read_through(broker, topic, fold, wanted, is_queue).await?;
    if fold.complete {
        return Ok(fold.finish());
    }
    // A decision stands behind its letter: letters that are decided took the place of
    // others. With all decisions known from the beginning they do not.
    let again = fold.again(ends);
    let fold = read_through(broker, topic, again, wanted, is_queue).await?;
    Ok(fold.finish())
}

/// Reads a log to the ends that the fold has.
async fn read_through(
    broker: &dyn MessageBroker,
    topic: &Topic,
    mut fold: Fold,
    wanted: &Wanted<'_>,
    is_queue: &(dyn Fn(&str) -> bool + Send + Sync),
) -> Result<Fold> {
    let Some(streams) = broker.event_stream() else {
        return Ok(fold);
    };
    let mut options = SubscribeOptions::default().starting(StartFrom::Earliest);
    options.stream.until = Some(fold.ends.clone());
    let pattern = Pattern::from(topic);
    let mut consumer = streams.stream_messages(&pattern, &options).await?;
    while !fold.is_done() {
        let unread = || {
            Error::new(
                ErrorCode::ConsumeFailed,
                "the dead letters could not be read to their end, so what was decided about them is not known; try again",
            )
            .at(broker.broker_type())
            .on(topic.as_str())
        };
        match timeout(STANDSTILL, consumer.deliveries.recv()).await {
            Ok(Some(batch)) => {
                for delivery in batch {
                    fold.feed(delivery.received(), wanted.keep, is_queue);
                }
            }
            // The last offset may be a transaction's marker, which nobody is given:
            // the reader knows when it is at its end.
            Ok(None) => {
                consumer.control.stop().await;
                match consumer.control.failure() {
                    None => break,
                    Some(why) => {
                        return Err(unread()
                            .caused_by(Error::new(ErrorCode::ConsumeFailed, why.to_string())));
                    }
                }
            }
            Err(_) => return Err(unread()),
        }
    }
    consumer.control.begin_stop();
    Ok(fold)
}

/// Writes a decision about a letter; without a status it is purged.
///
/// # Errors
/// Why it could not be written.
pub(super) async fn decide(
    broker: &dyn MessageBroker,
    topic: &Topic,
    position: Position,
    decision: Option<&Decision>,
) -> Result<()> {
    let record = Record {
        offset: position.1,
        status: decision.map(|d| d.status),
        at: decision.map_or_else(Timestamp::now, |d| d.at),
        note: decision.map_or_else(String::new, |d| d.note.clone()),
    };
    let options = PublishOptions {
        partition: Some(position.0),
        timeout: DECIDING,
        ..PublishOptions::default()
    };
    let message = Message::json(RECORD, &record)?;
    broker.publish(topic, message, &options).await.map(drop)
}

/// Letters and decisions as they come, one partition's in order. Pure.
struct Fold {
    /// Up to where each partition is read.
    ends: BTreeMap<i32, i64>,
    letters: BTreeMap<Position, DeadLetter>,
    bytes: usize,
    complete: bool,
    open: bool,
    decided: bool,
    /// What was decided about which letter; none: purged.
    decisions: HashMap<Position, Option<Decision>>,
    /// All decisions were read before.
    knows: bool,
}

impl Fold {
    fn new(ends: BTreeMap<i32, i64>, open: bool, decided: bool) -> Self {
        Self {
            ends,
            letters: BTreeMap::new(),
            bytes: 0,
            complete: true,
            open,
            decided,
            decisions: HashMap::new(),
            knows: false,
        }
    }

    /// To read the same once more, knowing what was decided.
    fn again(self, ends: BTreeMap<i32, i64>) -> Self {
        Self {
            decisions: self.decisions,
            knows: true,
            ..Self::new(ends, self.open, self.decided)
        }
    }

    fn is_done(&self) -> bool {
        self.ends.is_empty()
    }

    fn feed(
        &mut self,
        received: &Received,
        keep: &(dyn Fn(&DeadLetter) -> bool + Send + Sync),
        is_queue: &(dyn Fn(&str) -> bool + Send + Sync),
    ) {
        let message = &received.message;
        let (Some(partition), Some(offset)) = (message.partition, message.offset) else {
            return;
        };
        if message.kind == RECORD {
            // What cannot be read decides nothing.
            if let Ok(record) = serde_json::from_slice(&message.payload) {
                self.apply(partition, record);
            }
        } else {
            let position = (partition, offset);
            let decision = self.decisions.get(&position).filter(|_| self.knows);
            let decision = decision.cloned();
            let letter = DeadLetter::of(received, Some(position), is_queue);
            let letter = match decision {
                None if self.knows && !self.open => None,
                None => Some(letter),
                Some(Some(decision)) if self.decided => Some(letter.decided(decision)),
                Some(_) => None,
            };
            if let Some(letter) = letter.filter(keep) {
                self.add(position, letter);
            }
        }
        if self
            .ends
            .get(&partition)
            .is_some_and(|end| offset + 1 >= *end)
        {
            self.ends.remove(&partition);
        }
    }

    fn add(&mut self, position: Position, letter: DeadLetter) {
        let size = letter.size();
        if self.letters.len() >= MOST_LETTERS || self.bytes + size > MOST_BYTES {
            self.complete = false;
            return;
        }
        self.bytes += size;
        self.letters.insert(position, letter);
    }

    fn apply(&mut self, partition: i32, record: Record) {
        let position = (partition, record.offset);
        let decision = record.status.map(|status| Decision {
            status,
            at: record.at,
            note: record.note,
        });
        let letter = self.letters.remove(&position);
        if let Some(letter) = &letter {
            self.bytes -= letter.size();
        }
        if let (Some(letter), Some(decision), true) = (letter, &decision, self.decided) {
            self.add(position, letter.decided(decision.clone()));
        }
        // The last one holds; a letter that was purged does not come back. What is
        // beyond the bound is applied in the second reading too.
        if !self.knows && self.decisions.len() < MOST_DECISIONS {
            let decision = decision.filter(|_| self.decided);
            self.decisions
                .entry(position)
                .and_modify(|known| {
                    if known.is_some() {
                        known.clone_from(&decision);
                    }
                })
                .or_insert(decision);
        }
    }

    fn finish(self) -> Read {
        let open = self.open;
        let letters = self.letters.into_iter();
        Read {
            letters: letters
                .filter(|(_, l)| open || l.status.is_decided())
                .map(|(position, letter)| (letter, position))
                .collect(),
            complete: self.complete,
        }
    }
}

/// Decisions that are remembered while a log is read that has more letters than are
/// read at once.
const MOST_DECISIONS: usize = 1_000_000;

/// How long nothing may come before the end is reached.
const STANDSTILL: Duration = Duration::from_secs(10);

/// How long writing a decision may take.
const DECIDING: Duration = Duration::from_secs(10);

/// The type of a record that decides.
const RECORD: &str = "hub.dead-letter.decision";

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{super::letter::tests::received, *};

    fn letter(partition: i32, offset: i64) -> Received {
        let mut received = received(&format!("m{partition}-{offset}"), "handler_error", 1);
        let message = Arc::make_mut(&mut received.message);
        message.partition = Some(partition);
        message.offset = Some(offset);
        received
    }

    fn decision(partition: i32, at: i64, of: i64, status: Option<LetterStatus>) -> Received {
        let mut received = letter(partition, at);
        let record = Record {
            offset: of,
            status,
            at: Timestamp::from_millis(5),
            note: "n".to_owned(),
        };
        let message = Arc::make_mut(&mut received.message);
        message.kind = RECORD.to_owned();
        message.payload = serde_json::to_vec(&record).unwrap().into();
        received
    }

    fn read(open: bool, decided: bool) -> Vec<(String, LetterStatus)> {
        let mut fold = Fold::new([(0, 4), (1, 3)].into(), open, decided);
        let records = [
            letter(0, 0),
            letter(0, 1),
            decision(0, 2, 0, Some(LetterStatus::Discarded)),
            decision(0, 3, 0, Some(LetterStatus::Processed)),
            letter(1, 0),
            letter(1, 1),
            decision(1, 2, 1, None),
        ];
        for record in &records {
            assert!(!fold.is_done());
            fold.feed(record, &|_| true, &|_| false);
        }
        assert!(fold.is_done());
        let read = fold.finish();
        assert!(read.complete);
        read.letters
            .into_iter()
            .map(|(l, _)| (l.original_message.id.to_string(), l.status))
            .collect()
    }

    #[test]
    fn the_last_decision_holds_and_what_is_purged_is_gone() {
        use LetterStatus::{Pending, Processed};
        let named = |list: &[(&str, LetterStatus)]| {
            list.iter()
                .map(|(id, s)| ((*id).to_owned(), *s))
                .collect::<Vec<_>>()
        };
        let open = [("m0-1", Pending), ("m1-0", Pending)];
        let decided = [("m0-0", Processed)];
        assert_eq!(read(true, false), named(&open));
        assert_eq!(read(false, true), named(&decided));
        assert_eq!(read(true, true).len(), 3);
    }

    #[test]
    fn letters_that_are_decided_take_no_place_of_others() {
        let decided = MOST_LETTERS as i64 + 3;
        let letters = 2 * MOST_LETTERS as i64;
        let status = |n: i64| (n % 3 > 0).then_some(LetterStatus::Processed);
        let mut records: Vec<Received> = (0..letters).map(|n| letter(0, n)).collect();
        records.extend((0..decided).map(|n| decision(0, letters + n, n, status(n))));
        let all = |mut fold: Fold| {
            for record in &records {
                fold.feed(record, &|_| true, &|_| false);
            }
            assert!(fold.is_done());
            fold
        };
        let ends = BTreeMap::from([(0, letters + decided)]);
        let open = all(Fold::new(ends.clone(), true, false));
        assert!(!open.complete);
        let open = all(open.again(ends.clone())).finish();
        let rest: Vec<i64> = open.letters.iter().map(|(_, (_, at))| *at).collect();
        assert_eq!(rest, (decided..letters).collect::<Vec<_>>());
        assert!(open.complete);
        // Those that are decided, and were not purged.
        let done = all(all(Fold::new(ends.clone(), false, true)).again(ends)).finish();
        let wanted = (0..decided).filter(|n| status(*n).is_some()).count();
        assert_eq!(done.letters.len(), wanted);
        assert!(done.complete && done.letters.iter().all(|(l, _)| l.status.is_decided()));
    }

    #[test]
    fn letters_beyond_the_bound_are_left_where_they_are_and_that_is_said() {
        let count = MOST_LETTERS as i64 + 3;
        let mut fold = Fold::new([(0, count)].into(), true, false);
        for offset in 0..count {
            fold.feed(&letter(0, offset), &|_| true, &|_| false);
        }
        let read = fold.finish();
        assert_eq!(read.letters.len(), MOST_LETTERS);
        assert!(!read.complete);
    }
}
