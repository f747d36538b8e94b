//! Which publishes of a channel are unanswered, and what may be answered when.
//! Pure: it is told what happened and says what to answer.
//!
//! lapin hands a returned (unroutable) message to whichever confirm completes
//! next, not to its own. The server returns messages in publish order and
//! before it confirms them, and lapin hands them on first in, first out; so
//! once every publish up to one has its confirm, every return of those
//! publishes has been seen. Answers therefore wait for the confirms before
//! them, and a return is matched by the id found inside it.

use std::collections::VecDeque;

use crate::{
    broker::{BrokerType, Confirmation, Fate},
    error::{Error, ErrorCode},
    message::MessageId,
};

/// The unanswered publishes of one channel, in publish order.
#[derive(Debug)]
pub(super) struct Ledger {
    /// The number of the first slot.
    base: u64,
    slots: VecDeque<Slot>,
    /// Whether returns are possible, so that answers wait.
    mandatory: bool,
    /// Whether this channel ever confirmed anything.
    confirmed: bool,
}

#[derive(Debug)]
struct Slot {
    token: u64,
    id: MessageId,
    bytes: usize,
    /// Its answer was given already.
    answered: bool,
    outcome: Option<Outcome>,
    returned: Option<String>,
}

/// What a publish came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The server acked.
    Acked,
    /// The server nacked: overload.
    Nacked,
    /// Never handed to the channel.
    Unwritten,
    /// Handed to the channel, which failed.
    Failed,
}

/// Why a channel ended.
#[derive(Clone, Debug)]
pub(super) enum End {
    /// The connection, or the lane, is gone.
    Gone(String),
    /// The server closed the channel over something that holds for every
    /// message on it (missing exchange, no permission).
    Address(Error),
    /// The server closed the channel over one message of this many bytes.
    TooLarge(usize, String),
}

impl Ledger {
    pub(super) fn new(mandatory: bool) -> Self {
        Self {
            base: 0,
            slots: VecDeque::new(),
            mandatory,
            confirmed: false,
        }
    }

    /// A publish is about to be written; gives its number.
    pub(super) fn open(&mut self, token: u64, id: MessageId, bytes: usize) -> u64 {
        let number = self.base + self.slots.len() as u64;
        self.slots.push_back(Slot {
            token,
            id,
            bytes,
            answered: false,
            outcome: None,
            returned: None,
        });
        number
    }

    /// Publishes without a confirm.
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// A publish that wants no confirm was written: answered at once.
    pub(super) fn written(&mut self, number: u64, out: &mut Vec<Confirmation>) {
        if let Some(slot) = self.slot(number)
            && !slot.answered
        {
            slot.answered = true;
            out.push(Confirmation {
                token: slot.token,
                fate: Fate::Confirmed(None),
            });
        }
    }

    /// The message with this id was returned. When an id is in flight twice the
    /// earlier one is meant: returns come in publish order.
    pub(super) fn returned(&mut self, id: &str, why: &str) -> bool {
        let found = self
            .slots
            .iter_mut()
            .find(|s| s.returned.is_none() && s.id.as_str() == id);
        match found {
            Some(slot) => {
                slot.returned = Some(why.to_owned());
                true
            }
            None => false,
        }
    }

    /// A publish came to an end; pushes what may be answered now.
    pub(super) fn settle(&mut self, number: u64, outcome: Outcome, out: &mut Vec<Confirmation>) {
        self.confirmed |= outcome == Outcome::Acked;
        let mandatory = self.mandatory;
        if let Some(slot) = self.slot(number) {
            slot.outcome = Some(outcome);
            if !mandatory {
                answer(slot, out);
            }
        }
        while let Some(first) = self.slots.front_mut() {
            if first.outcome.is_none() {
                break;
            }
            answer(first, out);
            self.slots.pop_front();
            self.base += 1;
        }
    }

    /// Notes an end that is answered only when all are known.
    pub(super) fn note(&mut self, number: u64, outcome: Outcome) {
        self.confirmed |= outcome == Outcome::Acked;
        if let Some(slot) = self.slot(number) {
            slot.outcome = Some(outcome);
        }
    }

    /// The channel is gone: everything is answered, in publish order.
    pub(super) fn end(mut self, end: &End) -> Vec<Confirmation> {
        let culprit = match end {
            End::TooLarge(bytes, _) => self.slots.iter().position(|s| {
                s.bytes == *bytes && !matches!(s.outcome, Some(Outcome::Acked | Outcome::Nacked))
            }),
            _ => None,
        };
        let confirmed = self.confirmed;
        let mut out = Vec::with_capacity(self.slots.len());
        for (i, mut slot) in std::mem::take(&mut self.slots).into_iter().enumerate() {
            match slot.outcome {
                Some(Outcome::Acked | Outcome::Nacked) => answer(&mut slot, &mut out),
                _ if slot.answered => {}
                ref outcome => {
                    let written = *outcome != Some(Outcome::Unwritten);
                    let fate =
                        last_fate(end, culprit.map(|c| i.cmp(&c)), written, confirmed, &slot);
                    out.push(Confirmation {
                        token: slot.token,
                        fate,
                    });
                }
            }
        }
        out
    }

    fn slot(&mut self, number: u64) -> Option<&mut Slot> {
        let at = usize::try_from(number.checked_sub(self.base)?).ok()?;
        self.slots.get_mut(at)
    }
}

fn last_fate(
    end: &End,
    culprit: Option<std::cmp::Ordering>,
    written: bool,
    confirmed: bool,
    slot: &Slot,
) -> Fate {
    use std::cmp::Ordering;
    let error = |code, why: &str| {
        Error::new(code, why.to_owned())
            .at(BrokerType::RabbitMq)
            .with_id(slot.id.as_str())
    };
    let unsent = |why: &str| {
        Fate::Unsent(error(
            ErrorCode::ConnectionClosed,
            &format!("not written: {why}"),
        ))
    };
    let unknown = |why: &str| {
        Fate::Unknown(
            Error::unknown(
                ErrorCode::PublishFailed,
                format!("written and not confirmed: {why}"),
            )
            .at(BrokerType::RabbitMq)
            .with_id(slot.id.as_str()),
        )
    };
    match (end, culprit) {
        // What holds for the address holds for every message of the lane. When
        // something was confirmed here before, the address was good until some
        // unknown message, so nobody can say for which it was not.
        (End::Address(why), _) if !confirmed => {
            Fate::Refused(why.clone().with_id(slot.id.as_str()))
        }
        (End::Address(why), _) if written => unknown(why.message()),
        (End::Address(why), _) => unsent(why.message()),
        (End::TooLarge(_, why), Some(Ordering::Equal)) => Fate::Refused(
            Error::rejected(ErrorCode::MessageTooLarge, why.clone())
                .at(BrokerType::RabbitMq)
                .with_id(slot.id.as_str()),
        ),
        // The server reads nothing more from a channel that it closes.
        (End::TooLarge(_, why), Some(Ordering::Greater)) => unsent(why),
        (End::TooLarge(_, why) | End::Gone(why), _) if written => unknown(why),
        (End::TooLarge(_, why) | End::Gone(why), _) => unsent(why),
    }
}

fn answer(slot: &mut Slot, out: &mut Vec<Confirmation>) {
    if slot.answered {
        return;
    }
    let error = |code, why: String| {
        Error::new(code, why)
            .at(BrokerType::RabbitMq)
            .with_id(slot.id.as_str())
    };
    let fate = match (&slot.outcome, &slot.returned) {
        (_, Some(why)) => Fate::Refused(
            Error::rejected(
                ErrorCode::PublishRejected,
                format!("no queue takes it: {why}; declare the queue, or bind one"),
            )
            .at(BrokerType::RabbitMq)
            .with_id(slot.id.as_str()),
        ),
        (Some(Outcome::Acked), None) => Fate::Confirmed(None),
        (Some(Outcome::Nacked), None) => Fate::Overloaded(error(
            ErrorCode::PublishFailed,
            "the queue took no more (nack)".to_owned(),
        )),
        (Some(Outcome::Unwritten), None) => Fate::Unsent(error(
            ErrorCode::ConnectionClosed,
            "not written: the channel is closed".to_owned(),
        )),
        (Some(Outcome::Failed) | None, None) => Fate::Unknown(
            error(
                ErrorCode::PublishFailed,
                "written and not confirmed: the channel failed".to_owned(),
            )
            .assuming(crate::error::Assume::Unknown),
        ),
    };
    slot.answered = true;
    out.push(Confirmation {
        token: slot.token,
        fate,
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(n: u64, mandatory: bool) -> Ledger {
        let mut ledger = Ledger::new(mandatory);
        for token in 0..n {
            let id = MessageId::new(format!("id-{token}")).unwrap();
            assert_eq!(ledger.open(token, id, 10 + token as usize), token);
        }
        ledger
    }

    fn fates(out: &[Confirmation]) -> Vec<(u64, &'static str)> {
        out.iter()
            .map(|c| {
                let fate = match c.fate {
                    Fate::Confirmed(_) => "confirmed",
                    Fate::Refused(_) => "refused",
                    Fate::Overloaded(_) => "overloaded",
                    Fate::Unknown(_) => "unknown",
                    Fate::Unsent(_) => "unsent",
                };
                (c.token, fate)
            })
            .collect()
    }

    #[test]
    fn a_return_that_comes_with_anothers_confirm_refuses_its_own_message() {
        let mut ledger = filled(3, true);
        let mut out = Vec::new();
        // The confirms of 1 and 2 are seen before that of 0, and the one of 2
        // brings the return of 0's neighbour.
        ledger.settle(2, Outcome::Acked, &mut out);
        assert!(ledger.returned("id-1", "NO_ROUTE"));
        ledger.settle(1, Outcome::Acked, &mut out);
        assert!(out.is_empty());
        ledger.settle(0, Outcome::Acked, &mut out);
        assert_eq!(
            fates(&out),
            [(0, "confirmed"), (1, "refused"), (2, "confirmed")]
        );
        assert_eq!(ledger.len(), 0);
    }

    #[test]
    fn an_id_in_flight_twice_is_refused_once_for_each_return() {
        let mut ledger = Ledger::new(true);
        let id = MessageId::new("same").unwrap();
        ledger.open(0, id.clone(), 0);
        ledger.open(1, id, 0);
        assert!(ledger.returned("same", "NO_ROUTE"));
        let mut out = Vec::new();
        ledger.settle(0, Outcome::Acked, &mut out);
        ledger.settle(1, Outcome::Acked, &mut out);
        assert_eq!(fates(&out), [(0, "refused"), (1, "confirmed")]);
    }

    #[test]
    fn without_mandatory_nothing_waits_for_its_neighbours() {
        let mut ledger = filled(3, false);
        let mut out = Vec::new();
        ledger.settle(2, Outcome::Nacked, &mut out);
        ledger.settle(1, Outcome::Acked, &mut out);
        assert_eq!(fates(&out), [(2, "overloaded"), (1, "confirmed")]);
        assert_eq!(ledger.len(), 3);
        ledger.settle(0, Outcome::Acked, &mut out);
        assert_eq!((out.len(), ledger.len()), (3, 0));
    }

    #[test]
    fn what_wants_no_confirm_is_answered_once() {
        let mut ledger = filled(2, true);
        let mut out = Vec::new();
        ledger.written(1, &mut out);
        ledger.settle(1, Outcome::Acked, &mut out);
        ledger.settle(0, Outcome::Acked, &mut out);
        assert_eq!(fates(&out), [(1, "confirmed"), (0, "confirmed")]);
    }

    #[test]
    fn at_the_end_all_are_answered_in_order() {
        let mut ledger = filled(4, true);
        ledger.note(1, Outcome::Acked);
        ledger.note(3, Outcome::Unwritten);
        let out = ledger.end(&End::Gone("reset".into()));
        assert_eq!(
            fates(&out),
            [
                (0, "unknown"),
                (1, "confirmed"),
                (2, "unknown"),
                (3, "unsent")
            ]
        );
    }

    #[test]
    fn a_message_that_is_too_large_takes_the_blame_alone() {
        let ledger = filled(4, true);
        let out = ledger.end(&End::TooLarge(12, "too large".into()));
        assert_eq!(
            fates(&out),
            [
                (0, "unknown"),
                (1, "unknown"),
                (2, "refused"),
                (3, "unsent")
            ]
        );
    }

    #[test]
    fn a_bad_address_refuses_all_unless_something_was_confirmed_before() {
        let bad = || End::Address(Error::new(ErrorCode::ExchangeNotFound, "no exchange"));
        let out = filled(2, true).end(&bad());
        assert_eq!(fates(&out), [(0, "refused"), (1, "refused")]);
        let mut ledger = filled(2, true);
        ledger.settle(0, Outcome::Acked, &mut Vec::new());
        assert_eq!(fates(&ledger.end(&bad())), [(1, "unknown")]);
    }
}
