//! The shell around a [`Job`]: reads, publishes, waits, and decides nothing.

use std::{
    collections::{BTreeMap, VecDeque},
    future::Future,
    time::Duration,
};

use futures_util::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    copy::Copied,
    job::{Action, Job},
    plan::{self, Source, Stretch},
    progress::ReplayProgress,
};
use crate::{
    broker::{Consumer, Received, StartFrom, StreamOptions, SubscribeOptions},
    error::{Error, ErrorCode, Result},
};

/// What became of a message of a batch.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// It was published again. The id that it had at first.
    Published(String),
    /// It was not.
    Failed(Error),
    /// One before it failed, or the replay was cancelled.
    NotTried,
}

/// Where a replay publishes.
pub(crate) trait Sink: Send + 'static {
    /// Publishes messages in order, and says what became of each.
    fn publish(&self, batch: Vec<Copied>) -> BoxFuture<'static, Vec<Outcome>>;
}

/// A stretch that is being read.
struct Reading {
    consumer: Consumer,
    source: Source,
    waiting: VecDeque<Received>,
}

/// Carries a replay out, and reports. `planned` is called once it is known
/// whether it can be done.
pub(crate) async fn run(
    mut job: Job,
    sources: Vec<Source>,
    sink: impl Sink,
    cancel: CancellationToken,
    report: watch::Sender<ReplayProgress>,
    planned: impl FnOnce(Result<()>) + Send,
) {
    let clock = Instant::now();
    let stretches = tokio::select! {
        found = tokio::time::timeout(PLAN, plan::stretches(&job.wanted, &sources)) => {
            found.unwrap_or_else(|_| Err(Error::new(
                ErrorCode::Timeout,
                "the brokers did not say in time what there is to be replayed; see /v1/state for their connections",
            )))
        }
        () = cancel.cancelled() => {
            job.cancel();
            Ok(Vec::new())
        }
    };
    let result = stretches.map(|stretches| job.planned(stretches));
    if let Err(error) = &result {
        job.fail(error);
    }
    report.send_replace(job.progress(clock.elapsed()));
    planned(result);

    let mut reading: Option<Reading> = None;
    let mut under_way: FuturesUnordered<BoxFuture<'static, Vec<Outcome>>> = FuturesUnordered::new();
    loop {
        if cancel.is_cancelled() {
            job.cancel();
        }
        let action = job.next(clock.elapsed());
        // A read changes little, and there are many.
        if !matches!(action, Action::Read) {
            report.send_replace(job.progress(clock.elapsed()));
        }
        match action {
            Action::Open(n) => {
                let stretch = job.stretch(n);
                let source = stretch.and_then(|s| sources.iter().find(|f| f.topic == s.topic));
                let (Some(stretch), Some(source)) = (stretch, source) else {
                    job.ended();
                    continue;
                };
                match open(source, stretch).await {
                    Ok(opened) => reading = Some(opened),
                    Err(error) => job.fail(&error),
                }
            }
            Action::Read => {
                let Some(from) = &mut reading else {
                    job.ended();
                    continue;
                };
                if let Some(received) = from.waiting.pop_front() {
                    job.message(&received);
                    continue;
                }
                tokio::select! {
                    biased;
                    () = cancel.cancelled() => {}
                    Some(outcomes) = under_way.next() => job.settled(clock.elapsed(), outcomes),
                    batch = from.consumer.deliveries.recv() => match batch {
                        Some(batch) => {
                            from.waiting.extend(batch.iter().map(|d| d.received().clone()));
                            report.send_replace(job.progress(clock.elapsed()));
                        }
                        None => {
                            let whole = job.has_read_all();
                            match finish(reading.take(), whole).await {
                                Ok(()) => job.ended(),
                                Err(error) => job.fail(&error),
                            }
                        }
                    }
                }
            }
            Action::Publish(batch) => under_way.push(sink.publish(batch)),
            Action::Settle => match under_way.next().await {
                Some(outcomes) => job.settled(clock.elapsed(), outcomes),
                // Cannot be: what is under way is here.
                None => job.settled(clock.elapsed(), Vec::new()),
            },
            Action::Pause(until) => {
                tokio::select! {
                    () = tokio::time::sleep_until(clock + until) => {}
                    () = cancel.cancelled() => {}
                }
            }
            Action::End => break,
        }
    }
    if let Some(left) = reading {
        close(left.consumer).await;
    }
}

/// Starts to read a stretch, without a group: nobody's position moves.
async fn open(source: &Source, stretch: &Stretch) -> Result<Reading> {
    let (mut from, mut until) = (BTreeMap::new(), BTreeMap::new());
    for (partition, (first, end)) in &stretch.partitions {
        from.insert((stretch.topic.as_str().to_owned(), *partition), *first);
        until.insert(*partition, *end);
    }
    let options = SubscribeOptions {
        start: StartFrom::Offsets(from),
        stream: StreamOptions {
            until: Some(until),
            ..StreamOptions::default()
        },
        ..SubscribeOptions::default()
    };
    let pattern = (&source.topic).into();
    let consumer = plan::streams(source)?
        .stream_messages(&pattern, &options)
        .await?;
    Ok(Reading {
        consumer,
        source: source.clone(),
        waiting: VecDeque::new(),
    })
}

/// The source has closed: because all was read (`whole`: nothing can be missing),
/// or because it failed.
async fn finish(reading: Option<Reading>, whole: bool) -> Result<()> {
    let Some(reading) = reading else {
        return Ok(());
    };
    let control = reading.consumer.control.clone();
    close(reading.consumer).await;
    if let Some(why) = control.failure() {
        return Err(
            Error::new(ErrorCode::ConsumeFailed, why.as_ref()).on(reading.source.topic.as_str())
        );
    }
    if whole {
        return Ok(());
    }
    // A stream that was deleted meanwhile, or a broker that was closed, ends its
    // readers too; else what is missing does not exist.
    let asked = plan::streams(&reading.source)?;
    match asked
        .locate(&reading.source.topic, crate::broker::SeekTo::End)
        .await
    {
        Err(e)
            if matches!(
                e.code(),
                ErrorCode::TopicNotFound | ErrorCode::OperationCanceled
            ) =>
        {
            Err(e.on(reading.source.topic.as_str()))
        }
        _ => Ok(()),
    }
}

/// Lets go of a source; its own task, which its broker owns, goes on to the end.
fn close(consumer: Consumer) -> impl Future<Output = ()> {
    let control = consumer.control.clone();
    control.begin_stop();
    drop(consumer);
    async move {
        let _ = tokio::time::timeout(CLOSE, control.stop()).await;
    }
}

/// How long brokers may take to say what there is.
const PLAN: Duration = Duration::from_secs(30);

/// How long a source is waited for that is to end.
const CLOSE: Duration = Duration::from_secs(5);
