//! A publishing lane: one task that owns one channel. Nobody else writes on
//! the channel, because lapin takes a publish's number and queues its frames
//! under two locks, and two writers would get each other's confirms.

use std::{sync::Arc, time::Duration};

use futures_util::{FutureExt, StreamExt, stream::FuturesUnordered};
use lapin::{
    BasicProperties, Channel, PublisherConfirm, message::BasicReturnMessage,
    options::BasicPublishOptions, types::ShortString,
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};
use tracing::warn;

use super::{
    error::{self, Refusal, refusal},
    ledger::{End, Ledger, Outcome},
    link::Link,
    shared::Shared,
    wire,
};
use crate::{
    broker::{BrokerType, Confirmation, Fate, Submission},
    error::{Error, ErrorCode},
    message::Message,
};

/// Where and how a lane publishes.
#[derive(Clone)]
pub(super) struct Target {
    /// Goes into the header that names the topic.
    pub(super) topic: Arc<str>,
    pub(super) exchange: ShortString,
    pub(super) key: ShortString,
    pub(super) mandatory: bool,
    /// Whether answers wait for confirms at all.
    pub(super) confirm: bool,
    /// Whether the message's expiration holds on the way.
    pub(super) expires: bool,
    /// Messages in flight at most, those included whose answer was not awaited.
    pub(super) window: usize,
}

/// The task's side: where work comes from and answers go.
pub(super) struct Port {
    pub(super) submissions: mpsc::Receiver<Vec<Submission>>,
    pub(super) confirmations: mpsc::Sender<Confirmation>,
}

/// What a publish came to, as the channel's futures report it.
enum Step {
    /// Handed to the channel and written.
    Written(PublisherConfirm),
    /// The server's answer, and a message that came back with it.
    Answer {
        acked: bool,
        returned: Option<Box<BasicReturnMessage>>,
    },
    /// The channel was closed before it was handed over.
    Unwritten,
    /// The channel failed afterwards.
    Failed(lapin::Error),
}

/// Runs until the submitter lets go, the channel or the connection ends, or the
/// broker is closed. Answers everything that it was given.
pub(super) async fn run(
    shared: Arc<Shared>,
    link: Arc<Link>,
    channel: Channel,
    target: Target,
    port: Port,
) {
    let mut lane = Lane {
        ledger: Ledger::new(target.mandatory),
        out: Vec::new(),
        shared,
        target,
    };
    let Port {
        mut submissions,
        confirmations,
    } = port;
    let mut blocked = link.blocked.clone();
    let mut writes = FuturesUnordered::new();
    let mut unawaited = FuturesUnordered::new();
    // While closing, what was taken is finished and nothing new is taken.
    let mut taking = true;
    let mut deadline: Option<Instant> = None;

    let failure = loop {
        if !taking && writes.is_empty() && unawaited.is_empty() {
            break None;
        }
        let may_write = taking
            && lane.ledger.len() < lane.target.window
            && blocked.borrow_and_update().is_none();
        let mut batch = None;
        tokio::select! {
            biased;
            Some((number, step)) = writes.next() => {
                let mut next = Some((number, step));
                // Confirms come in bursts: take all that are there.
                while let Some((number, step)) = next.take() {
                    match lane.step(number, step) {
                        Ok(None) => {}
                        Ok(Some(confirm)) => unawaited.push(answer_of(number, confirm)),
                        Err(e) => {
                            lane.deliver(&confirmations).await;
                            return lane.end(&link, channel, writes, unawaited, submissions, confirmations, e).await;
                        }
                    }
                    next = writes.next().now_or_never().flatten();
                }
            }
            Some((number, step)) = unawaited.next() => {
                if let Err(e) = lane.step(number, step) {
                    return lane.end(&link, channel, writes, unawaited, submissions, confirmations, e).await;
                }
            }
            () = link.lost.cancelled() => break Some("the connection was lost".to_owned()),
            () = lane.shared.closing.cancelled(), if taking => {
                // What was accepted is finished, if the server answers soon.
                taking = false;
                deadline = Some(Instant::now() + FLUSH);
            }
            () = sleep_until(deadline) => break Some("the broker was closed before the confirm came".to_owned()),
            () = confirmations.closed() => {
                // Nobody hears the answers any more: the generation is over.
                break Some("the lane was dropped".to_owned());
            }
            changed = blocked.changed() => {
                if changed.is_err() {
                    break Some("the connection was lost".to_owned());
                }
            }
            received = submissions.recv(), if may_write => match received {
                Some(submissions) => batch = Some(submissions),
                None => taking = false,
            },
        }
        if let Some(batch) = batch {
            lane.shared.recorder.batches_published.inc();
            lane.shared.recorder.touch_publish();
            for submission in batch {
                let early = !(submission.confirm && lane.target.confirm);
                if let Some((number, properties)) = lane.prepare(&submission, link.frame_max) {
                    let target = &lane.target;
                    writes.push(write(
                        channel.clone(),
                        target.exchange.clone(),
                        target.key.clone(),
                        // An answer that was given cannot be taken back.
                        target.mandatory && !early,
                        submission.message,
                        properties,
                        number,
                        early,
                    ));
                }
            }
        }
        lane.deliver(&confirmations).await;
    };
    match failure {
        None => {
            // Everything is answered; the server may still refuse to say good-bye.
            submissions.close();
            lane.refuse_rest(&mut submissions, "the broker is closed", &confirmations)
                .await;
            let _ = timeout(FAREWELL, channel.close(200, "OK".into())).await;
        }
        Some(why) => {
            let end = LaneEnd::Why(why);
            lane.end(
                &link,
                channel,
                writes,
                unawaited,
                submissions,
                confirmations,
                end,
            )
            .await;
        }
    }
}

/// What ended a lane.
enum LaneEnd {
    Why(String),
    Channel(lapin::Error),
    /// The channel was closed; the error that says why comes with a confirm.
    Closed,
}

struct Lane {
    ledger: Ledger,
    out: Vec<Confirmation>,
    shared: Arc<Shared>,
    target: Target,
}

impl Lane {
    /// Checks a submission and opens its slot; answers it when it is refused.
    fn prepare(
        &mut self,
        submission: &Submission,
        frame_max: usize,
    ) -> Option<(u64, BasicProperties)> {
        let message = &submission.message;
        let recorder = &self.shared.recorder;
        match wire::properties(
            message,
            &self.target.topic,
            &submission.marks,
            self.target.expires,
            frame_max,
        ) {
            Ok(properties) => {
                recorder.messages_published.inc();
                recorder.bytes_published.add(message.payload.len() as u64);
                let number =
                    self.ledger
                        .open(submission.token, message.id.clone(), message.payload.len());
                Some((number, properties))
            }
            Err(e) => {
                self.out.push(Confirmation {
                    token: submission.token,
                    fate: Fate::Refused(e),
                });
                None
            }
        }
    }

    /// Takes in what became of a publish. `Ok(Some)` is a confirm that nobody
    /// waits for and that must be awaited all the same, or lapin keeps it.
    fn step(&mut self, number: u64, step: Step) -> Result<Option<PublisherConfirm>, LaneEnd> {
        match step {
            Step::Written(confirm) => {
                self.ledger.written(number, &mut self.out);
                return Ok(Some(confirm));
            }
            Step::Answer { acked, returned } => {
                let outcome = if acked {
                    Outcome::Acked
                } else {
                    Outcome::Nacked
                };
                self.shared.recorder.publish_confirmations.inc();
                self.note_return(returned);
                self.ledger.settle(number, outcome, &mut self.out);
            }
            Step::Unwritten => {
                self.ledger.note(number, Outcome::Unwritten);
                return Err(LaneEnd::Closed);
            }
            Step::Failed(e) => {
                self.ledger.note(number, Outcome::Failed);
                return Err(LaneEnd::Channel(e));
            }
        }
        Ok(None)
    }

    fn note_return(&mut self, returned: Option<Box<BasicReturnMessage>>) {
        let Some(returned) = returned else {
            return;
        };
        let why = format!(
            "{} (exchange {:?}, key {:?})",
            returned.reply_text,
            returned.exchange.as_str(),
            returned.routing_key.as_str()
        );
        let id = returned
            .properties
            .message_id()
            .as_ref()
            .map(|id| id.as_str());
        if !id.is_some_and(|id| self.ledger.returned(id, &why)) {
            warn!(topic = %self.target.topic, %why, "a message came back that is not in flight");
        }
    }

    /// Sends what is answered. The channel has room for a window, and only a
    /// submitter that breaks its promise makes this wait.
    async fn deliver(&mut self, confirmations: &mpsc::Sender<Confirmation>) {
        let recorder = &self.shared.recorder;
        for confirmation in self.out.drain(..) {
            match confirmation.fate {
                Fate::Confirmed(_) => recorder.publish_successes.inc(),
                _ => {
                    recorder.publish_failures.inc();
                    recorder.publish_errors.inc();
                    recorder.total_errors.inc();
                }
            }
            // Nobody there to hear it is not our concern.
            let _ = confirmations.send(confirmation).await;
        }
    }

    async fn refuse_rest(
        &mut self,
        submissions: &mut mpsc::Receiver<Vec<Submission>>,
        why: &str,
        confirmations: &mpsc::Sender<Confirmation>,
    ) {
        submissions.close();
        while let Some(batch) = submissions.recv().await {
            for submission in batch {
                self.out.push(Confirmation {
                    token: submission.token,
                    fate: Fate::Unsent(
                        Error::new(ErrorCode::ConnectionClosed, format!("not written: {why}"))
                            .at(BrokerType::RabbitMq)
                            .on(self.target.topic.as_ref())
                            .with_id(submission.message.id.as_str()),
                    ),
                });
            }
            self.deliver(confirmations).await;
        }
    }

    /// The channel is over. Waits for what lapin still has to say about the
    /// publishes in flight (at once, when the connection is gone), then answers
    /// all, in order: first what was written, then what was not.
    #[allow(clippy::too_many_arguments)]
    async fn end<W, U>(
        mut self,
        link: &Link,
        channel: Channel,
        mut writes: FuturesUnordered<W>,
        mut unawaited: FuturesUnordered<U>,
        mut submissions: mpsc::Receiver<Vec<Submission>>,
        confirmations: mpsc::Sender<Confirmation>,
        cause: LaneEnd,
    ) where
        W: Future<Output = (u64, Step)>,
        U: Future<Output = (u64, Step)>,
    {
        submissions.close();
        let mut why = match &cause {
            LaneEnd::Why(why) => Some(why.clone()),
            LaneEnd::Channel(_) | LaneEnd::Closed => None,
        };
        let mut refused = match cause {
            LaneEnd::Channel(e) => Some(e),
            _ => None,
        };
        let patience = Instant::now() + LAST_WORDS;
        while !confirmations.is_closed() {
            let (number, step) = tokio::select! {
                Some(step) = writes.next() => step,
                Some(step) = unawaited.next() => step,
                // A server that is alive may owe us confirms for ever.
                () = tokio::time::sleep_until(patience) => break,
                else => break,
            };
            let failed = self.last_step(number, step);
            if refused.as_ref().and_then(refusal).is_none() {
                refused = failed.or(refused);
            }
        }
        let said = refused.as_ref().map(error::text);
        let end = match (refused.as_ref().and_then(refusal), said) {
            (Some(Refusal::NotFound), Some(said)) => {
                End::Address(self.address_error(ErrorCode::ExchangeNotFound, &said))
            }
            (Some(Refusal::Access), Some(said)) => {
                End::Address(self.address_error(ErrorCode::AuthenticationFailed, &said))
            }
            (Some(_), Some(said)) => match too_large(&said) {
                Some(bytes) => End::TooLarge(bytes, said),
                None => End::Gone(said),
            },
            (None, Some(said)) => End::Gone(why.take().unwrap_or(said)),
            (_, None) => End::Gone(
                why.take()
                    .unwrap_or_else(|| "the channel was closed".to_owned()),
            ),
        };
        let ledger = std::mem::replace(&mut self.ledger, Ledger::new(false));
        self.out.extend(ledger.end(&end));
        self.deliver(&confirmations).await;
        self.refuse_rest(&mut submissions, "the lane has ended", &confirmations)
            .await;
        drop(confirmations);
        // Confirms that are still owed go with the channel.
        drop((writes, unawaited));
        if channel.status().connected() && !link.lost.is_cancelled() {
            let _ = timeout(FAREWELL, channel.close(200, "OK".into())).await;
        }
    }

    fn last_step(&mut self, number: u64, step: Step) -> Option<lapin::Error> {
        match step {
            Step::Written(_) => self.ledger.written(number, &mut self.out),
            Step::Answer { acked, returned } => {
                let outcome = if acked {
                    Outcome::Acked
                } else {
                    Outcome::Nacked
                };
                self.note_return(returned);
                self.ledger.note(number, outcome);
            }
            Step::Unwritten => self.ledger.note(number, Outcome::Unwritten),
            Step::Failed(e) => {
                self.ledger.note(number, Outcome::Failed);
                return Some(e);
            }
        }
        None
    }

    fn address_error(&self, code: ErrorCode, said: &str) -> Error {
        Error::rejected(
            code,
            format!(
                "RabbitMQ refuses publishes to exchange {:?} with key {:?}: {said}",
                self.target.exchange.as_str(),
                self.target.key.as_str()
            ),
        )
        .at(BrokerType::RabbitMq)
        .on(self.target.topic.as_ref())
    }
}

/// Writes one message and, unless nobody waits for it, awaits its confirm.
/// First polled in the order of publishing, which is when lapin numbers it.
#[allow(clippy::too_many_arguments)]
async fn write(
    channel: Channel,
    exchange: ShortString,
    key: ShortString,
    mandatory: bool,
    message: Arc<Message>,
    properties: BasicProperties,
    number: u64,
    early: bool,
) -> (u64, Step) {
    if !channel.status().connected() {
        return (number, Step::Unwritten);
    }
    let options = BasicPublishOptions {
        mandatory,
        immediate: false,
    };
    let written = channel
        .basic_publish(exchange, key, options, &message.payload, properties)
        .await;
    match written {
        // From here on bytes may have left, whatever the error says.
        Err(e) => (number, Step::Failed(e)),
        Ok(confirm) if early => (number, Step::Written(confirm)),
        Ok(confirm) => answer_of(number, confirm).await,
    }
}

async fn answer_of(number: u64, confirm: PublisherConfirm) -> (u64, Step) {
    match confirm.await {
        Ok(answer) => {
            let step = Step::Answer {
                acked: !answer.is_nack(),
                returned: answer.take_message().map(Box::new),
            };
            (number, step)
        }
        Err(e) => (number, Step::Failed(e)),
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// The size in `message size 200 is larger than configured max size 100`.
fn too_large(said: &str) -> Option<usize> {
    let rest = said.split_once("message size ")?.1;
    rest.split_once(' ')?.0.parse().ok()
}

/// How long a lane waits for the confirms of what it wrote, on close.
const FLUSH: Duration = Duration::from_secs(5);
/// How long lapin may take to fail the publishes of a dead channel.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How long the server may take to close a channel.
const FAREWELL: Duration = Duration::from_secs(2);
