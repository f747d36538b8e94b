//! A stream of envelopes: each line is published while the body still arrives,
//! and answered with one line, in order, while it is read.
//!
//! ```text
//!   body --lines--> reader --slots (bounded)--> answerer --chunks (bounded)--> response
//!                     `-- publisher.enqueue --> hub --outcome--^
//! ```
//!
//! A line that is no envelope costs only itself. Blank lines are skipped and
//! counted. What a broken-off body leaves behind of its last line is not
//! published. A client that writes without reading its answers is stopped, by
//! not being read, once [`ANSWER_CHUNKS`] chunks of answers wait for it.

use std::{future::Future, pin::Pin};

use axum::{
    body::Body,
    http::header,
    response::{IntoResponse, Response},
};
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::{StreamExt, future::ready};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::{
    App, Intake, envelope, limits,
    lines::{Line, Lines},
    problem::Problem,
    publish::{Answer, answer},
};
use crate::hub::Publisher;

/// One line's answer on its way.
struct Slot {
    line: u64,
    answer: Pin<Box<dyn Future<Output = Answer> + Send>>,
}

#[derive(Serialize)]
struct Answered<'a> {
    line: u64,
    #[serde(flatten)]
    answer: &'a Answer,
}

/// Answers at once and goes on reading.
pub(super) fn respond(
    app: App,
    topic: String,
    publisher: Publisher,
    body: Body,
    intake: Intake,
) -> Response {
    let (slots, waiting) = mpsc::channel(limits::NDJSON_WINDOW);
    let (chunks, answers) = mpsc::channel::<Bytes>(ANSWER_CHUNKS);
    let reader = Reader {
        topic,
        publisher,
        slots,
        line: 0,
        max: limits::envelope_bytes(app.max_message_bytes()),
    };
    let closing = app.clone();
    app.spawn(async move { reader.run(body, &closing).await });
    app.spawn(async move {
        answer_in_order(waiting, chunks).await;
        // The request counts as running until its last answer is on its way.
        drop(intake);
    });
    let stream = ReceiverStream::new(answers).map(Ok::<_, std::convert::Infallible>);
    (
        [(header::CONTENT_TYPE, "application/x-ndjson")],
        Body::from_stream(stream),
    )
        .into_response()
}

struct Reader {
    topic: String,
    publisher: Publisher,
    slots: mpsc::Sender<Slot>,
    line: u64,
    max: usize,
}

impl Reader {
    async fn run(mut self, body: Body, app: &App) {
        let mut body = body.into_data_stream();
        let mut lines = Lines::new(self.max);
        loop {
            while let Some(line) = lines.next_line() {
                if app.closing().is_cancelled() {
                    // Nothing new is taken; the client sees at which line.
                    self.line += 1;
                    self.refuse(Problem::shutting_down()).await;
                    return;
                }
                if !self.take(line).await {
                    return;
                }
            }
            let piece = tokio::select! {
                piece = body.next() => piece,
                // Without this an idle client would hold the shutdown up.
                () = app.closing().cancelled() => {
                    self.line += 1;
                    self.refuse(Problem::shutting_down()).await;
                    return;
                }
                // Nobody reads the answers any more.
                () = self.slots.closed() => return,
            };
            match piece {
                Some(Ok(piece)) => lines.push(&piece),
                Some(Err(_)) => return,
                None => break,
            }
        }
        if let Some(line) = lines.last() {
            self.take(line).await;
        }
    }

    /// Takes one line up; false when nobody reads the answers any more.
    async fn take(&mut self, line: Line) -> bool {
        self.line += 1;
        let json = match line {
            Line::Whole(json) if json.iter().all(u8::is_ascii_whitespace) => return true,
            Line::Whole(json) => json,
            Line::TooLong => {
                let problem =
                    Problem::too_large(format!("the line is over the limit of {} bytes", self.max));
                return self.refuse(problem).await;
            }
        };
        let message = match envelope::parse(&json, &self.topic) {
            Ok(message) => message,
            Err(problem) => return self.refuse(problem).await,
        };
        // Room for the answer first: whatever is published is answered for.
        let Ok(permit) = self.slots.clone().reserve_owned().await else {
            return false;
        };
        let id = message.id.clone();
        let topic = self.topic.clone();
        let answer: Pin<Box<dyn Future<Output = Answer> + Send>> =
            match self.publisher.enqueue(message).await {
                Ok(pending) => {
                    Box::pin(async move { answer(Some(pending.await), &topic, id.as_str()) })
                }
                Err(e) => Box::pin(ready(answer(Some(Err(e)), &topic, id.as_str()))),
            };
        permit.send(Slot {
            line: self.line,
            answer,
        });
        true
    }

    async fn refuse(&self, problem: Problem) -> bool {
        let slot = Slot {
            line: self.line,
            answer: Box::pin(ready(Answer::failed(problem, &self.topic))),
        };
        self.slots.send(slot).await.is_ok()
    }
}

/// Awaits the answers in order. Lines whose answers are there together leave
/// together; one that is there alone leaves at once.
async fn answer_in_order(mut slots: mpsc::Receiver<Slot>, chunks: mpsc::Sender<Bytes>) {
    let mut out = BytesMut::new();
    let mut current: Option<Slot> = None;
    let mut ended = false;
    while !(ended && current.is_none() && out.is_empty()) {
        let room = out.len() < CHUNK_BYTES;
        tokio::select! {
            // In this order everything that is ready is gathered first.
            biased;
            done = resolve(&mut current), if room && current.is_some() => {
                current = None;
                if let Some((line, answer)) = done {
                    put(&mut out, line, &answer);
                }
            }
            slot = slots.recv(), if room && current.is_none() && !ended => match slot {
                Some(slot) => current = Some(slot),
                None => ended = true,
            },
            permit = chunks.reserve(), if !out.is_empty() => match permit {
                Ok(permit) => permit.send(out.split().freeze()),
                // The client is gone; what was published stays published.
                Err(_) => return,
            },
            () = chunks.closed() => return,
        }
    }
}

async fn resolve(current: &mut Option<Slot>) -> Option<(u64, Answer)> {
    let slot = current.as_mut()?;
    let answer = slot.answer.as_mut().await;
    Some((slot.line, answer))
}

fn put(out: &mut BytesMut, line: u64, answer: &Answer) {
    let answered = Answered { line, answer };
    // Writing plain data into memory has nothing to fail on.
    let _ = serde_json::to_writer(out.writer(), &answered);
    out.put_u8(b'\n');
}

/// Answers that leave together at most.
const CHUNK_BYTES: usize = 64 * 1024;

/// Chunks of answers that wait for the socket at most: 8 MiB when full, some
/// sixty thousand answers, so that a client of modest size may write
/// everything before it reads.
const ANSWER_CHUNKS: usize = 128;
