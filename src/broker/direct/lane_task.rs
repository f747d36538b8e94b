//! The task that owns a lane: takes chunks in, writes batches within the
//! window, passes confirmations to the callers.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use futures_util::future::OptionFuture;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::call::Job;
use crate::{
    broker::{Confirmation, Fate, Lane, Submission},
    error::{Error, ErrorCode},
    message::wire::Marks,
    metrics::MetricsRecorder,
};

pub(super) struct LaneTask {
    lane: Lane,
    intake: mpsc::Receiver<Vec<Job>>,
    window: usize,
    retire: CancellationToken,
    kill: CancellationToken,
    recorder: Arc<MetricsRecorder>,
    /// Taken in, not written; with when each was taken in.
    waiting: VecDeque<(Instant, Job)>,
    /// Written, not answered, by token.
    in_flight: HashMap<u64, Job>,
    next_token: u64,
    /// The intake was asked to close.
    retiring: bool,
    /// The intake may still give something.
    taking_in: bool,
    /// The lane takes submissions.
    writable: bool,
}

/// Why a lane's task ends.
enum End {
    /// Everything was answered and nobody wants it any more.
    Done,
    /// The adapter has ended the generation.
    Generation,
    /// The publisher is closed and the lane did not answer in time.
    Killed,
}

impl LaneTask {
    pub(super) fn new(
        lane: Lane,
        intake: mpsc::Receiver<Vec<Job>>,
        window: usize,
        retire: CancellationToken,
        kill: CancellationToken,
        recorder: Arc<MetricsRecorder>,
    ) -> Self {
        Self {
            lane,
            intake,
            window: window.max(1),
            retire,
            kill,
            recorder,
            waiting: VecDeque::new(),
            in_flight: HashMap::new(),
            next_token: 0,
            retiring: false,
            taking_in: true,
            writable: true,
        }
    }

    pub(super) async fn run(mut self) {
        let end = self.work().await;
        let (code, why) = match end {
            End::Done => return,
            End::Generation => (
                ErrorCode::ConnectionClosed,
                "the connection ended before the broker answered",
            ),
            End::Killed => (
                ErrorCode::OperationCanceled,
                "the broker was closed before it answered",
            ),
        };
        // The adapter answers for everything when it ends a generation; these
        // are left when it could not, or when we end it.
        for (_, job) in self.in_flight.drain() {
            job.resolve(Fate::Unknown(Error::unknown(code, why)));
        }
        let unsent = |job: Job| {
            if job.claim() {
                job.resolve(Fate::Unsent(Error::new(
                    code,
                    format!("{why}; the message was not written"),
                )));
            }
        };
        self.intake.close();
        self.waiting.drain(..).for_each(|(_, job)| unsent(job));
        while let Some(chunk) = self.intake.recv().await {
            chunk.into_iter().for_each(unsent);
        }
    }

    async fn work(&mut self) -> End {
        let mut used = Instant::now();
        loop {
            let drained = self.waiting.is_empty() && self.in_flight.is_empty();
            if drained && !self.taking_in {
                return End::Done;
            }
            let write_at = self.write_at();
            let due = write_at.is_some_and(|at| at <= Instant::now());
            let linger: OptionFuture<_> = write_at.filter(|_| !due).map(sleep_until).into();
            let room = self.taking_in && self.waiting.len() < self.window;
            tokio::select! {
                biased;
                () = self.kill.cancelled() => return End::Killed,
                () = self.retire.cancelled(), if !self.retiring => self.begin_retiring(),
                answer = self.lane.confirmations.recv() => match answer {
                    Some(answer) => {
                        used = Instant::now();
                        self.resolve(answer);
                    }
                    None => return End::Generation,
                },
                // Intake before writing, so that a batch is as full as can be.
                chunk = self.intake.recv(), if room => match chunk {
                    Some(chunk) => {
                        used = Instant::now();
                        self.waiting.extend(chunk.into_iter().map(|job| (used, job)));
                    }
                    None => self.taking_in = false,
                },
                room = has_room(&self.lane.submissions), if due => {
                    if room {
                        self.write();
                    } else {
                        // The generation has ended; the adapter still answers
                        // for what it took up, and then closes the
                        // confirmations.
                        self.writable = false;
                    }
                }
                Some(()) = linger => {}
                () = sleep_until(used + IDLE), if drained && !self.retiring => {
                    self.begin_retiring();
                }
            }
        }
    }

    /// Takes nothing more in. What was sent to the intake before is still
    /// written, and only then does the next lane of the same key open.
    fn begin_retiring(&mut self) {
        self.retiring = true;
        self.intake.close();
    }

    /// When the next batch should be written: at once when it is full, when
    /// nothing is in flight, or when nothing can join it; else after its linger.
    fn write_at(&self) -> Option<Instant> {
        let (since, job) = self.waiting.front()?;
        if !self.writable || self.in_flight.len() >= self.window {
            return None;
        }
        let at_once = self.in_flight.is_empty()
            || self.waiting.len() >= job.call.batch_size
            || !self.taking_in;
        Some(if at_once {
            *since
        } else {
            *since + job.call.linger
        })
    }

    /// Writes the next batch, as far as the window has room. Messages whose
    /// callers have given up are left out.
    fn write(&mut self) {
        let size = self
            .waiting
            .front()
            .map_or(0, |(_, job)| job.call.batch_size);
        let size = size.min(self.window - self.in_flight.len());
        let mut batch = Vec::with_capacity(size.min(self.waiting.len()));
        while batch.len() < size
            && let Some((_, job)) = self.waiting.pop_front()
        {
            if !job.claim() {
                continue;
            }
            let token = self.next_token;
            self.next_token += 1;
            batch.push(Submission {
                token,
                message: job.message.clone(),
                order: job.order.clone(),
                marks: Marks::default(),
                confirm: job.call.confirm,
            });
            self.in_flight.insert(token, job);
        }
        if batch.is_empty() {
            return;
        }
        self.recorder.batches_published.inc();
        if let Err(refused) = self.lane.submissions.try_send(batch) {
            // The adapter went away since there was room.
            self.writable = false;
            for submission in refused.into_inner() {
                let gone = "the connection ended before the message was written";
                let fate = Fate::Unsent(Error::new(ErrorCode::ConnectionClosed, gone));
                self.resolve(Confirmation {
                    token: submission.token,
                    fate,
                });
            }
        }
    }

    fn resolve(&mut self, Confirmation { token, fate }: Confirmation) {
        let Some(job) = self.in_flight.remove(&token) else {
            tracing::error!(
                token,
                "the broker answered for a message that it was not given"
            );
            return;
        };
        if matches!(fate, Fate::Confirmed(_)) && job.call.confirm {
            self.recorder.publish_confirmations.inc();
        }
        job.resolve(fate);
    }
}

/// Waits until the lane can take a batch; false when it never will. There is
/// one submitter, so the room is still there when the batch is sent.
async fn has_room(submissions: &mpsc::Sender<Vec<Submission>>) -> bool {
    submissions.reserve().await.is_ok()
}

/// How long a lane may be unused before it is closed.
pub(super) const IDLE: Duration = Duration::from_secs(60);
