//! Dispatching, with a source that is played step by step.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio::{
    sync::{Semaphore, mpsc, watch},
    task::JoinHandle,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::{
    broker::{
        Blame, BrokerType, Consumer, ConsumerControl, Delivery, Handler, HandlerError, Received,
        RetryMode, Settlement, Source, SubscribeOptions, Turn, Verdict,
        consumer::ConsumerState,
        handler::{HandlerFuture, ReadyFuture},
        options::Filter,
    },
    message::{Message, Timestamp, wire::Marks},
    metrics::MetricsRecorder,
    topic::{Pattern, Topic},
};

/// The adapter's side of a consumer, in the test's hands.
struct Script {
    batches: mpsc::Sender<Vec<Delivery>>,
    settling: mpsc::UnboundedSender<Settlement>,
    settlements: mpsc::UnboundedReceiver<Settlement>,
    control: ConsumerControl,
    stopping: CancellationToken,
    _state: watch::Sender<ConsumerState>,
    recorder: Arc<MetricsRecorder>,
    give_up: CancellationToken,
    task: JoinHandle<()>,
    tags: u64,
}

fn queue() -> Source {
    Source::Queue(Pattern::new("tasks.test").unwrap())
}

fn stream() -> Source {
    Source::Stream(Pattern::new("events.test").unwrap())
}

impl Script {
    fn start(
        source: &Source,
        retry: RetryMode,
        options: &SubscribeOptions,
        handler: impl Handler,
    ) -> Self {
        let (batches, deliveries) = mpsc::channel(4);
        let (settling, settlements) = mpsc::unbounded_channel();
        let (control, stopping, state) = ConsumerControl::new();
        state.send_replace(ConsumerState::Active);
        let recorder = Arc::<MetricsRecorder>::default();
        let settings = DispatchSettings::new(source, options, &recorder);
        let give_up = settings.give_up.clone();
        let consumer = Consumer {
            deliveries,
            control: control.clone(),
            retry,
        };
        Self {
            batches,
            settling,
            settlements,
            control,
            stopping,
            _state: state,
            recorder,
            give_up,
            task: dispatch(consumer, Arc::new(handler), settings),
            tags: 0,
        }
    }

    /// Delivers messages, tagged 1, 2, ... in the order of delivery.
    async fn deliver(&mut self, messages: Vec<Message>) {
        let batch = messages
            .into_iter()
            .map(|message| {
                self.tags += 1;
                let received = Received {
                    topic: Topic::new("events.test").unwrap(),
                    message: Arc::new(message),
                    marks: Arc::new(Marks::default()),
                    via: BrokerType::InMemory,
                };
                Delivery::new(received, self.settling.clone(), self.tags)
            })
            .collect();
        self.batches.send(batch).await.unwrap();
    }

    /// The next settlement, carried out.
    async fn settled(&mut self) -> (u64, Verdict) {
        let settlement = timeout(LONG, self.settlements.recv())
            .await
            .expect("a settlement")
            .unwrap();
        if let Some(done) = settlement.done {
            let _ = done.send(Ok(()));
        }
        (settlement.tag, settlement.verdict)
    }

    async fn stopped(self) -> HashMap<u64, &'static str> {
        self.control.begin_stop();
        self.task.await.unwrap();
        let mut settlements = self.settlements;
        let mut verdicts = HashMap::new();
        drop((self.settling, self.batches));
        while let Some(s) = settlements.recv().await {
            verdicts.insert(s.tag, name(&s.verdict));
        }
        verdicts
    }
}

const LONG: Duration = Duration::from_secs(3600);

fn name(verdict: &Verdict) -> &'static str {
    match verdict {
        Verdict::Ack => "ack",
        Verdict::Requeue => "requeue",
        Verdict::Retry { .. } => "retry",
        Verdict::DeadLetter { .. } => "dead letter",
    }
}

fn plain() -> Message {
    Message::new("t", "x")
}

fn keyed(key: &str, payload: &str) -> Message {
    Message::new("t", payload.to_owned()).with_key(key)
}

/// A handler that fails in the given way.
fn failing(error: HandlerError) -> impl Handler {
    move |_: Received| {
        let error = error.clone();
        async move { Err::<(), HandlerError>(error) }
    }
}

async fn good(_: Received) -> Result<(), HandlerError> {
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn a_handled_message_is_acked_and_counted() {
    let mut script = Script::start(
        &queue(),
        RetryMode::Broker,
        &SubscribeOptions::default(),
        good,
    );
    script.deliver(vec![plain(), plain()]).await;
    for _ in 0..2 {
        assert_eq!(name(&script.settled().await.1), "ack");
    }
    let m = script.recorder.snapshot();
    assert_eq!((m.messages_received, m.messages_processed), (2, 2));
    assert_eq!(m.active_subscriptions, 1);
    let recorder = script.recorder.clone();
    script.stopped().await;
    assert_eq!(recorder.snapshot().active_subscriptions, 0);
    assert_eq!(recorder.snapshot().subscribe_latency_count, 1);
}

#[tokio::test(start_paused = true)]
async fn a_queue_runs_as_many_handlers_as_the_prefetch_and_no_more() {
    let (running, peak) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let handler = {
        let (running, peak) = (running.clone(), peak.clone());
        move |_: Received| {
            let (running, peak) = (running.clone(), peak.clone());
            async move {
                let now = running.fetch_add(1, SeqCst) + 1;
                peak.fetch_max(now, SeqCst);
                tokio::time::sleep(Duration::from_secs(1)).await;
                running.fetch_sub(1, SeqCst);
                Ok::<(), HandlerError>(())
            }
        }
    };
    let options = SubscribeOptions::default().with_prefetch(3);
    let mut script = Script::start(&queue(), RetryMode::Broker, &options, handler);
    script.deliver((0..9).map(|_| plain()).collect()).await;
    for _ in 0..9 {
        script.settled().await;
    }
    assert_eq!(peak.load(SeqCst), 3);
}

#[tokio::test(start_paused = true)]
async fn a_stream_keeps_the_order_of_each_key_and_runs_keys_side_by_side() {
    let log = Arc::new(Mutex::new(Vec::new()));
    let handler = {
        let log = log.clone();
        move |r: Received| {
            let log = log.clone();
            async move {
                let payload = String::from_utf8_lossy(&r.message.payload).into_owned();
                // The earlier a message of its key, the longer it takes.
                let n: u64 = payload[1..].parse().unwrap();
                tokio::time::sleep(Duration::from_millis(100 - n)).await;
                log.lock().unwrap().push(payload);
                Ok::<(), HandlerError>(())
            }
        }
    };
    let mut script = Script::start(
        &stream(),
        RetryMode::InLane,
        &SubscribeOptions::default(),
        handler,
    );
    let began = Instant::now();
    let mut batch = Vec::new();
    for n in 0..20 {
        for key in ["a", "b", "c"] {
            batch.push(keyed(key, &format!("{key}{n}")));
        }
        // Without a key: by partition.
        batch.push(Message::new("t", format!("p{n}")).with_partition(0));
        batch.push(Message::new("t", format!("q{n}")).with_partition(1));
    }
    script.deliver(batch).await;
    for _ in 0..100 {
        script.settled().await;
    }
    let log = log.lock().unwrap();
    for lane in ["a", "b", "c", "p", "q"] {
        let of_lane: Vec<_> = log.iter().filter(|p| p.starts_with(lane)).collect();
        let expected: Vec<_> = (0..20).map(|n| format!("{lane}{n}")).collect();
        assert!(of_lane.into_iter().eq(expected.iter()), "lane {lane}");
    }
    assert!(
        began.elapsed() < Duration::from_secs(3),
        "keys ran side by side"
    );
}

#[tokio::test(start_paused = true)]
async fn a_failed_task_goes_to_the_broker_to_rest_for_the_tier_of_tasks() {
    let mut script = Script::start(
        &queue(),
        RetryMode::Broker,
        &SubscribeOptions::default(),
        failing(HandlerError::retry("no luck")),
    );
    script.deliver(vec![plain()]).await;
    let (_, Verdict::Retry { delay, failure }) = script.settled().await else {
        panic!("no retry")
    };
    assert_eq!(delay, TASK_RETRY_DELAY);
    assert_eq!(failure.reason, "handler_error");
    assert_eq!(failure.details, "no luck");
    assert_eq!(failure.original_topic, "events.test");
    tokio::task::yield_now().await;
    assert_eq!(script.recorder.snapshot().messages_failed, 1);
}

#[tokio::test(start_paused = true)]
async fn attempts_are_one_more_than_the_retries_and_then_it_is_dead() {
    for (carried, option, verdict) in [
        (2, None, "retry"),
        (3, None, "dead letter"),
        (3, Some(4), "retry"),
        (0, Some(0), "dead letter"),
    ] {
        let options = SubscribeOptions {
            max_retries: option,
            ..SubscribeOptions::default()
        };
        let handler = failing(HandlerError::retry("no luck"));
        let mut script = Script::start(&queue(), RetryMode::Broker, &options, handler);
        let mut message = plain();
        message.retry_count = carried;
        script.deliver(vec![message]).await;
        assert_eq!(
            name(&script.settled().await.1),
            verdict,
            "{carried} {option:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_mended_and_what_must_not_be_retried_is_dead_at_once() {
    let never = SubscribeOptions {
        retry_on_error: false,
        ..SubscribeOptions::default()
    };
    for (error, options, reason) in [
        (
            HandlerError::reject("bad"),
            SubscribeOptions::default(),
            "rejected",
        ),
        (HandlerError::retry("bad"), never, "handler_error"),
    ] {
        let mut script = Script::start(&queue(), RetryMode::Broker, &options, failing(error));
        script.deliver(vec![plain()]).await;
        let (_, Verdict::DeadLetter { failure }) = script.settled().await else {
            panic!("not dead")
        };
        assert_eq!(failure.reason, reason);
    }
}

#[tokio::test(start_paused = true)]
async fn a_retry_in_the_lane_stops_its_key_only_and_counts_up() {
    let log = Arc::new(Mutex::new(Vec::new()));
    let handler = {
        let log = log.clone();
        move |r: Received| {
            let payload = String::from_utf8_lossy(&r.message.payload).into_owned();
            log.lock()
                .unwrap()
                .push(format!("{payload}/{}", r.message.retry_count));
            let fails = payload == "a0" && r.message.retry_count < 2;
            async move {
                if fails {
                    return Err(HandlerError::retry("not yet"));
                }
                Ok(())
            }
        }
    };
    let mut script = Script::start(
        &stream(),
        RetryMode::InLane,
        &SubscribeOptions::default(),
        handler,
    );
    let began = Instant::now();
    script
        .deliver(vec![keyed("a", "a0"), keyed("a", "a1"), keyed("b", "b0")])
        .await;
    assert_eq!(script.settled().await.0, 3, "the other key goes at once");
    assert_eq!(began.elapsed(), Duration::ZERO);
    assert_eq!(script.settled().await.0, 1);
    assert!(began.elapsed() >= EVENT_RETRY_DELAY * 2);
    assert_eq!(script.settled().await.0, 2);
    assert_eq!(
        *log.lock().unwrap(),
        ["a0/0", "b0/0", "a0/1", "a0/2", "a1/0"]
    );
    assert_eq!(script.recorder.snapshot().messages_retried, 2);
}

#[tokio::test(start_paused = true)]
async fn a_lane_goes_on_after_its_last_attempt_failed() {
    let handler = |r: Received| async move {
        if r.message.payload == "bad" {
            return Err(HandlerError::retry("never"));
        }
        Ok(())
    };
    let mut script = Script::start(
        &stream(),
        RetryMode::InLane,
        &SubscribeOptions::default(),
        handler,
    );
    script
        .deliver(vec![keyed("a", "bad"), keyed("a", "fine")])
        .await;
    let (1, Verdict::DeadLetter { failure }) = script.settled().await else {
        panic!("not dead")
    };
    assert!(failure.first <= failure.last);
    assert_eq!(script.recorder.snapshot().messages_failed, 4);
    let (tag, verdict) = script.settled().await;
    assert_eq!((tag, name(&verdict)), (2, "ack"));
}

#[tokio::test(start_paused = true)]
async fn a_panic_and_a_time_out_are_failed_deliveries_and_nothing_more() {
    let handler = |r: Received| {
        // Before the first await, too.
        assert!(r.message.payload != "early", "early panic");
        async move {
            match &r.message.payload[..] {
                b"late" => panic!("late panic"),
                b"slow" => std::future::pending().await,
                _ => Ok::<(), HandlerError>(()),
            }
        }
    };
    let options = SubscribeOptions {
        handler_timeout: Some(Duration::from_secs(5)),
        max_retries: Some(0),
        ..SubscribeOptions::default()
    };
    let mut script = Script::start(&queue(), RetryMode::Broker, &options, handler);
    for (payload, reason, details) in [
        ("early", "handler_panic", "early panic"),
        ("late", "handler_panic", "late panic"),
        ("slow", "handler_timeout", "5s"),
    ] {
        script.deliver(vec![Message::new("t", payload)]).await;
        let (_, Verdict::DeadLetter { failure }) = script.settled().await else {
            panic!("not dead")
        };
        assert_eq!(failure.reason, reason);
        assert!(failure.details.contains(details), "{}", failure.details);
    }
    script.deliver(vec![plain()]).await;
    assert_eq!(name(&script.settled().await.1), "ack");
}

#[tokio::test(start_paused = true)]
async fn what_does_not_pass_the_filter_is_acked_unseen() {
    let options = SubscribeOptions {
        filter: Some(Filter::new(|r| r.message.kind == "wanted")),
        max_retries: Some(0),
        ..SubscribeOptions::default()
    };
    let handler = failing(HandlerError::retry("seen"));
    let mut script = Script::start(&queue(), RetryMode::Broker, &options, handler);
    script
        .deliver(vec![Message::new("other", ""), Message::new("wanted", "")])
        .await;
    let mut verdicts = HashMap::new();
    for _ in 0..2 {
        let (tag, verdict) = script.settled().await;
        verdicts.insert(tag, name(&verdict));
    }
    assert_eq!(verdicts, HashMap::from([(1, "ack"), (2, "dead letter")]));
}

#[tokio::test(start_paused = true)]
async fn an_expired_message_is_dead_without_being_handled() {
    let mut script = Script::start(
        &queue(),
        RetryMode::Broker,
        &SubscribeOptions::default(),
        failing(HandlerError::retry("handled")),
    );
    let past = Timestamp::from_millis(1);
    script.deliver(vec![plain().with_expiration(past)]).await;
    let (_, Verdict::DeadLetter { failure }) = script.settled().await else {
        panic!("not dead")
    };
    assert_eq!(failure.reason, "expired");
    assert_eq!(script.recorder.snapshot().messages_consumed, 0);
}

#[tokio::test(start_paused = true)]
async fn auto_ack_acks_before_the_handler_and_does_not_retry() {
    let gate = Arc::new(Semaphore::new(0));
    let handler = {
        let gate = gate.clone();
        move |_: Received| {
            let gate = gate.clone();
            async move {
                gate.acquire().await.unwrap().forget();
                Err::<(), _>(HandlerError::retry("failed after the ack"))
            }
        }
    };
    let options = SubscribeOptions {
        auto_ack: true,
        ..SubscribeOptions::default()
    };
    let mut script = Script::start(&queue(), RetryMode::Broker, &options, handler);
    script.deliver(vec![plain()]).await;
    assert_eq!(name(&script.settled().await.1), "ack");
    gate.add_permits(1);
    let recorder = script.recorder.clone();
    assert!(script.stopped().await.is_empty());
    assert_eq!(recorder.snapshot().messages_failed, 1);
}

#[tokio::test(start_paused = true)]
async fn a_stop_lets_running_handlers_finish_and_gives_back_the_rest() {
    let (gate, started) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
    let handler = {
        let (gate, started) = (gate.clone(), started.clone());
        move |_: Received| {
            let (gate, started) = (gate.clone(), started.clone());
            async move {
                started.add_permits(1);
                gate.acquire().await.unwrap().forget();
                Ok::<(), HandlerError>(())
            }
        }
    };
    let options = SubscribeOptions::default().with_prefetch(2);
    let mut script = Script::start(&queue(), RetryMode::Broker, &options, handler);
    script.deliver((0..3).map(|_| plain()).collect()).await;
    script.deliver(vec![plain()]).await;
    started.acquire_many(2).await.unwrap().forget();
    script.control.begin_stop();
    script.stopping.cancelled().await;
    let first = script.settlements.recv().await.unwrap();
    let second = script.settlements.recv().await.unwrap();
    assert_eq!(
        (first.tag, second.tag),
        (3, 4),
        "given back before the handlers end"
    );
    assert!(!script.task.is_finished());
    gate.add_permits(2);
    let rest = script.stopped().await;
    assert_eq!(rest, HashMap::from([(1, "ack"), (2, "ack")]));
}

#[tokio::test(start_paused = true)]
async fn a_resting_retry_and_a_handler_beyond_the_grace_are_given_back() {
    let handler = |r: Received| async move {
        if r.message.payload == "hangs" {
            std::future::pending::<()>().await;
        }
        Err::<(), _>(HandlerError::retry("rests"))
    };
    let mut script = Script::start(
        &stream(),
        RetryMode::InLane,
        &SubscribeOptions::default(),
        handler,
    );
    script
        .deliver(vec![keyed("a", "rests"), keyed("b", "hangs")])
        .await;
    while script.recorder.messages_retried.get() == 0 {
        tokio::task::yield_now().await;
    }
    script.give_up.cancel();
    let verdicts = script.stopped().await;
    assert_eq!(verdicts, HashMap::from([(1, "requeue"), (2, "requeue")]));
}

#[tokio::test(start_paused = true)]
async fn no_more_is_taken_in_than_may_be_held() {
    let options = SubscribeOptions {
        max_poll_records: 2,
        concurrency: Some(1),
        ..SubscribeOptions::default()
    };
    let handler = |_: Received| std::future::pending::<Result<(), HandlerError>>();
    let mut script = Script::start(&stream(), RetryMode::InLane, &options, handler);
    // Two are held and four batches wait in the channel; a seventh finds no room.
    for _ in 0..6 {
        script.deliver(vec![plain()]).await;
    }
    let more = timeout(Duration::from_secs(60), script.deliver(vec![plain()])).await;
    assert!(more.is_err());
    assert_eq!(script.recorder.messages_received.get(), 2);
    script.give_up.cancel();
    script.stopped().await;
}

#[tokio::test(start_paused = true)]
async fn a_source_that_fails_for_good_ends_the_dispatcher_after_its_handlers() {
    let mut script = Script::start(
        &queue(),
        RetryMode::Broker,
        &SubscribeOptions::default(),
        good,
    );
    script.deliver(vec![plain()]).await;
    drop(script.batches);
    script.task.await.unwrap();
    assert_eq!(
        name(&script.settlements.recv().await.unwrap().verdict),
        "ack"
    );
}

#[tokio::test(start_paused = true)]
async fn messages_are_routed_by_type_and_an_unknown_type_is_rejected() {
    let router = || TypeRouter::new().on("good", good);
    let strict = router();
    let lenient = router().otherwise(good);
    for (router, verdict) in [(strict, "dead letter"), (lenient, "ack")] {
        let mut script = Script::start(
            &queue(),
            RetryMode::Broker,
            &SubscribeOptions::default(),
            router,
        );
        script.deliver(vec![Message::new("good", "")]).await;
        assert_eq!(name(&script.settled().await.1), "ack");
        script.deliver(vec![Message::new("unknown", "")]).await;
        assert_eq!(name(&script.settled().await.1), verdict);
    }
}

/// A handler that takes a message for each permit, and is to blame for failures
/// while it is broken.
#[derive(Clone)]
struct Gated {
    gate: Arc<Semaphore>,
    broken: Arc<AtomicUsize>,
    log: Arc<Mutex<Vec<String>>>,
}

impl Gated {
    fn new(broken: usize) -> Self {
        Self {
            gate: Arc::new(Semaphore::new(0)),
            broken: Arc::new(AtomicUsize::new(broken)),
            log: Arc::default(),
        }
    }
}

impl Handler for Gated {
    fn handle(&self, received: Received) -> HandlerFuture {
        let payload = String::from_utf8_lossy(&received.message.payload).into_owned();
        let text = format!("{payload}/{}", received.message.retry_count);
        self.log.lock().unwrap().push(text);
        let broken = self.broken.load(SeqCst) > 0;
        if broken {
            self.broken.fetch_sub(1, SeqCst);
        }
        Box::pin(async move {
            if broken {
                return Err(HandlerError::retry("away"));
            }
            Ok(())
        })
    }

    fn ready(&self) -> Option<ReadyFuture> {
        let gated = self.clone();
        Some(Box::pin(async move {
            gated.gate.acquire().await.unwrap().forget();
            Turn::new(move |received| gated.handle(received)).judged_by(|_| Blame::Handler)
        }))
    }
}

#[tokio::test(start_paused = true)]
async fn while_a_handler_takes_nothing_no_more_is_taken_in_and_nothing_is_settled() {
    let gated = Gated::new(0);
    let mut script = Script::start(
        &queue(),
        RetryMode::Broker,
        &SubscribeOptions::default(),
        gated.clone(),
    );
    // One is held and four batches wait in the channel; a sixth finds no room,
    // though ten may be held.
    for _ in 0..5 {
        script.deliver(vec![plain()]).await;
    }
    let more = timeout(Duration::from_secs(60), script.deliver(vec![plain()])).await;
    assert!(more.is_err());
    assert_eq!(name(&script.settled().await.1), "requeue", "the sixth");
    assert_eq!(script.recorder.messages_received.get(), 1);
    assert!(gated.log.lock().unwrap().is_empty());
    gated.gate.add_permits(2);
    for _ in 0..2 {
        assert_eq!(name(&script.settled().await.1), "ack");
    }
    let verdicts = script.stopped().await;
    assert!(verdicts.values().all(|v| *v == "requeue"), "{verdicts:?}");
}

#[tokio::test(start_paused = true)]
async fn a_failure_that_is_the_handlers_leaves_the_message_in_its_place_uncounted() {
    for (source, mode, expected) in [
        // The lane keeps its order, and the other lane goes first next time.
        (
            stream(),
            RetryMode::InLane,
            ["a0/0", "b0/0", "a0/0", "a1/0"],
        ),
        (queue(), RetryMode::Broker, ["a0/0", "a1/0", "b0/0", "a0/0"]),
    ] {
        let gated = Gated::new(1);
        let options = SubscribeOptions {
            concurrency: Some(1),
            max_retries: Some(0),
            ..SubscribeOptions::default()
        };
        let mut script = Script::start(&source, mode, &options, gated.clone());
        script
            .deliver(vec![keyed("a", "a0"), keyed("a", "a1"), keyed("b", "b0")])
            .await;
        gated.gate.add_permits(4);
        let mut acked = Vec::new();
        for _ in 0..3 {
            let (tag, verdict) = script.settled().await;
            assert_eq!(name(&verdict), "ack");
            acked.push(tag);
        }
        acked.sort_unstable();
        assert_eq!(acked, [1, 2, 3]);
        assert_eq!(*gated.log.lock().unwrap(), expected);
        let counted = script.recorder.snapshot();
        assert_eq!((counted.messages_failed, counted.messages_retried), (0, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_panics_when_asked_fails_a_message_and_nothing_more() {
    struct Panics;
    impl Handler for Panics {
        fn handle(&self, _: Received) -> HandlerFuture {
            Box::pin(async { Ok(()) })
        }
        fn ready(&self) -> Option<ReadyFuture> {
            panic!("asked")
        }
    }
    let mut script = Script::start(
        &queue(),
        RetryMode::Broker,
        &SubscribeOptions {
            max_retries: Some(0),
            ..SubscribeOptions::default()
        },
        Panics,
    );
    for _ in 0..2 {
        script.deliver(vec![plain()]).await;
        let (_, Verdict::DeadLetter { failure }) = script.settled().await else {
            panic!("not dead")
        };
        assert_eq!(
            (&*failure.reason, &*failure.details),
            ("handler_panic", "asked")
        );
    }
}
