//! The layers, without a broker and in virtual time.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    time::Duration,
};

use futures_util::{FutureExt, future::pending};
use tokio::time::{Instant, timeout};

use super::*;
use crate::{
    ErrorCode,
    breaker::BreakerState,
    broker::{Blame, BrokerType, HandlerError, Turn, dispatch::by_turn},
    message::{Message, wire::Marks},
    topic::Topic,
};

const SECOND: Duration = Duration::from_secs(1);
const LONG: Duration = Duration::from_secs(3600);

fn received(message: Message) -> Received {
    Received {
        topic: Topic::new("tasks.test").unwrap(),
        message: Arc::new(message),
        marks: Arc::new(Marks::default()),
        via: BrokerType::InMemory,
    }
}

fn plain() -> Received {
    received(Message::new("t", "x"))
}

/// A handler that answers what its script says, then well; it counts its calls.
#[derive(Clone, Default)]
struct Scripted {
    script: Arc<Mutex<Vec<HandlerError>>>,
    calls: Arc<AtomicU32>,
}

impl Scripted {
    fn failing(times: usize, error: &HandlerError) -> Self {
        let scripted = Self::default();
        scripted.fails(times, error);
        scripted
    }

    fn fails(&self, times: usize, error: &HandlerError) {
        *self.script.lock().unwrap() = vec![error.clone(); times];
    }

    fn calls(&self) -> u32 {
        self.calls.load(SeqCst)
    }

    fn handler(&self) -> impl Handler + use<> {
        let scripted = self.clone();
        move |_: Received| {
            scripted.calls.fetch_add(1, SeqCst);
            let answer = scripted.script.lock().unwrap().pop();
            async move { answer.map_or(Ok(()), Err) }
        }
    }
}

async fn turn(piped: &Piped<Received>) -> Turn {
    timeout(LONG, piped.ready().unwrap()).await.expect("a turn")
}

async fn call(piped: &Piped<Received>) -> (Result<(), HandlerError>, Blame) {
    by_turn(turn(piped).await, plain(), None).await
}

fn no_turn(piped: &Piped<Received>) -> bool {
    piped.ready().unwrap().now_or_never().is_none()
}

#[tokio::test(start_paused = true)]
async fn a_retry_calls_again_within_its_bound_and_only_for_what_may_be_mended() {
    let piped = |s: &Scripted| {
        let retry = Retry::new(2, SECOND);
        Pipeline::new().retry(retry).build(s.handler()).unwrap()
    };
    let mended = Scripted::failing(2, &HandlerError::retry("not yet"));
    let since = Instant::now();
    assert_eq!(call(&piped(&mended)).await, (Ok(()), Blame::Message));
    assert_eq!(mended.calls(), 3);
    assert!(since.elapsed() >= SECOND * 3 && since.elapsed() < SECOND * 5);

    let broken = Scripted::failing(9, &HandlerError::retry("never"));
    let (result, _) = call(&piped(&broken)).await;
    assert_eq!(result, Err(HandlerError::retry("never")));
    assert_eq!(broken.calls(), 3);

    let bad = Scripted::failing(9, &HandlerError::reject("bad"));
    let (result, _) = call(&piped(&bad)).await;
    assert_eq!(result, Err(HandlerError::reject("bad")));
    assert_eq!(bad.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_time_out_inside_a_retry_bounds_each_attempt_and_outside_all_of_them() {
    let calls = Arc::new(AtomicU32::new(0));
    let hanging = || {
        let calls = calls.clone();
        move |_: Received| {
            calls.fetch_add(1, SeqCst);
            pending::<Result<(), HandlerError>>()
        }
    };
    let each = Pipeline::new()
        .retry(Retry::new(2, SECOND))
        .timeout(SECOND)
        .build(hanging())
        .unwrap();
    let error = call(&each).await.0.unwrap_err();
    assert_eq!(error.reason, HandlerError::TIMEOUT);
    assert_eq!(calls.swap(0, SeqCst), 3);

    let all = Pipeline::new()
        .timeout(SECOND)
        .retry(Retry::new(2, SECOND))
        .build(hanging())
        .unwrap();
    let since = Instant::now();
    let error = call(&all).await.0.unwrap_err();
    assert_eq!(error.reason, HandlerError::TIMEOUT);
    assert!(error.retryable);
    assert_eq!(since.elapsed().as_secs(), 1);
    assert_eq!(calls.load(SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn the_rate_is_waited_for_before_a_message_is_started_also_by_many() {
    let piped = Pipeline::new()
        .rate_limit(2, SECOND)
        .build(Scripted::default().handler())
        .unwrap();
    let since = Instant::now();
    // Side by side: a waiter that is not woken would show here.
    let turns = (0..7).map(|_| {
        let piped = piped.clone();
        async move {
            call(&piped).await.0.unwrap();
            since.elapsed().as_secs()
        }
    });
    let mut at = futures_util::future::join_all(turns).await;
    at.sort_unstable();
    assert_eq!(at, [0, 0, 1, 1, 2, 2, 3]);
}

#[tokio::test(start_paused = true)]
async fn no_more_run_at_once_than_allowed_and_a_dropped_turn_frees_its_place() {
    let piped = Pipeline::new()
        .concurrency(1)
        .build(|_: Received| tokio::time::sleep(SECOND).map(Ok::<(), HandlerError>))
        .unwrap();
    let first = turn(&piped).await;
    assert!(no_turn(&piped));
    drop(first);
    let running = tokio::spawn(by_turn(turn(&piped).await, plain(), None));
    let since = Instant::now();
    drop(turn(&piped).await);
    assert_eq!(since.elapsed().as_secs(), 1);
    running.await.unwrap().0.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_message_that_breaks_a_rule_never_reaches_the_handler_and_opens_nothing() {
    let rules = Validate::new()
        .require(Field::Key)
        .require(Field::Header("tenant".to_owned()))
        .require(Field::Json("/user/id".to_owned()))
        .max_payload_bytes(40);
    let scripted = Scripted::default();
    let piped = Pipeline::new()
        .logging()
        .validate(rules.clone())
        .circuit_breaker(CircuitBreaker::new(1, SECOND))
        .retry(Retry::new(3, SECOND))
        .build(scripted.handler())
        .unwrap();
    let good = Message::new("t", r#"{"user":{"id":7}}"#)
        .with_key("k")
        .with_header("tenant", "a");
    let with = |payload: &'static str| {
        let mut message = good.clone();
        message.payload = payload.into();
        message
    };
    let mut keyless = good.clone();
    keyless.key = None;
    let mut tenantless = good.clone();
    tenantless.headers.clear();
    for (message, why) in [
        (keyless, "key is missing"),
        (tenantless, "the header tenant is missing"),
        (with(r#"{"user":{"id":null}}"#), "/user/id is missing"),
        (with("{"), "not JSON"),
        (
            with("0123456789012345678901234567890123456789!"),
            "41 bytes",
        ),
    ] {
        let error = by_turn(turn(&piped).await, received(message), None)
            .await
            .0
            .unwrap_err();
        assert_eq!(error.reason, "invalid_message");
        assert!(error.details.contains(why), "{why}: {error}");
        assert!(!error.retryable);
    }
    assert_eq!(scripted.calls(), 0);
    assert_eq!(piped.circuit(), Some(BreakerState::Closed));
    piped.handle(received(good)).await.unwrap();

    let batch = Pipeline::new()
        .validate(rules)
        .build_batch(|_: Vec<Received>| async { Ok::<(), HandlerError>(()) })
        .unwrap();
    assert!(batch.admit(&plain()).is_err(), "before it joins a batch");
}

#[tokio::test(start_paused = true)]
async fn an_open_circuit_gives_no_turn_and_one_probe_decides() {
    let scripted = Scripted::failing(3, &HandlerError::retry("away"));
    let piped = Pipeline::new()
        .circuit_breaker(CircuitBreaker::new(2, SECOND))
        .build(scripted.handler())
        .unwrap();
    assert_eq!(call(&piped).await.1, Blame::Message);
    assert_eq!(call(&piped).await.1, Blame::Handler, "it opens it");
    assert_eq!(piped.circuit(), Some(BreakerState::Open));
    assert!(no_turn(&piped));

    let since = Instant::now();
    let probe = turn(&piped).await;
    assert_eq!(since.elapsed().as_secs(), 1);
    assert!(no_turn(&piped), "one probe at a time");
    // A probe that is given up frees its place for one that waits already.
    let waits = tokio::spawn({
        let piped = piped.clone();
        async move { call(&piped).await }
    });
    tokio::task::yield_now().await;
    drop(probe);
    let (result, blame) = timeout(SECOND / 2, waits).await.unwrap().unwrap();
    assert_eq!((result.is_err(), blame), (true, Blame::Handler));
    assert_eq!(piped.circuit(), Some(BreakerState::Open));

    let since = Instant::now();
    assert_eq!(call(&piped).await, (Ok(()), Blame::Message));
    assert_eq!(since.elapsed().as_secs(), 1);
    assert_eq!(piped.circuit(), Some(BreakerState::Closed));
    assert_eq!(scripted.calls(), 4);
}

#[tokio::test(start_paused = true)]
async fn time_outs_of_the_subscription_count_and_panics_do_not() {
    let piped = |breaks: fn() -> bool| {
        Pipeline::new()
            .circuit_breaker(CircuitBreaker::new(1, SECOND))
            .build(move |_: Received| async move {
                assert!(!breaks(), "a bug");
                pending::<Result<(), HandlerError>>().await
            })
            .unwrap()
    };
    let hangs = piped(|| false);
    let limit = Some(SECOND);
    let (_, blame) = by_turn(turn(&hangs).await, plain(), limit).await;
    assert_eq!(blame, Blame::Handler);
    let panics = piped(|| true);
    let (result, blame) = by_turn(turn(&panics).await, plain(), limit).await;
    assert_eq!(result.unwrap_err().reason, HandlerError::PANIC);
    assert_eq!(blame, Blame::Message);
    assert_eq!(panics.circuit(), Some(BreakerState::Closed));
}

#[tokio::test(start_paused = true)]
async fn called_without_a_turn_it_waits_with_the_message_in_hand() {
    let scripted = Scripted::failing(3, &HandlerError::retry("away"));
    let piped = Pipeline::new()
        .circuit_breaker(CircuitBreaker::new(1, SECOND))
        .build(scripted.handler())
        .unwrap();
    let since = Instant::now();
    piped.handle(plain()).await.unwrap();
    assert_eq!((scripted.calls(), since.elapsed().as_secs()), (4, 3));
}

#[tokio::test]
async fn settings_out_of_range_and_orders_that_do_not_work_are_refused() {
    let zero = Duration::ZERO;
    let new = Pipeline::new;
    for (pipeline, about) in [
        (new().rate_limit(0, SECOND), "rate_limit"),
        (new().rate_limit(1, zero), "rate_limit"),
        (new().concurrency(0), "concurrency"),
        (new().concurrency(usize::MAX), "concurrency"),
        (new().timeout(zero), "timeout"),
        (new().retry(Retry::new(0, SECOND)), "retry"),
        (new().retry(Retry::new(11, SECOND)), "retry"),
        (new().retry(Retry::new(1, SECOND).up_to(LONG)), "retry"),
        (new().retry(Retry::new(1, zero)), "retry"),
        (
            new().circuit_breaker(CircuitBreaker::new(0, SECOND)),
            "circuit_breaker",
        ),
        (
            new().circuit_breaker(CircuitBreaker::new(1, zero)),
            "circuit_breaker",
        ),
        (new().validate(Validate::new()), "validate"),
        (
            new().validate(Validate::new().require(Field::Json("id".to_owned()))),
            "validate",
        ),
        (
            new()
                .retry(Retry::new(1, SECOND))
                .circuit_breaker(CircuitBreaker::new(1, SECOND)),
            "circuit_breaker must stand outside of retry",
        ),
    ] {
        let error = pipeline.build(Scripted::default().handler()).unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidConfig, "{error}");
        assert!(error.message().contains(about), "{error}");
    }
}
