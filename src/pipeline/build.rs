//! Puts layers together, and is the handler that comes of it.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::future::BoxFuture;
use tower::{
    BoxError, Layer as _, Service, ServiceExt, limit::ConcurrencyLimitLayer, retry::RetryLayer,
    timeout::TimeoutLayer, util::BoxCloneSyncService,
};

use super::{
    breaker::Gate,
    fault::{boxed, unboxed},
    logging::Logged,
    order::{self, Layer, invalid},
    rate::Pace,
    validate::{Validate, Validated},
};
use crate::{
    breaker::BreakerState,
    broker::{
        BatchHandler, Blame, Handler, HandlerError, Received, Turn,
        dispatch::by_turn,
        handler::{HandlerFuture, ReadyFuture},
    },
    error::Result,
};

/// A handler in its layers. Clones share them: one breaker, one rate, one bound.
///
/// Given to a subscription, waiting is backpressure. Called by another handler,
/// a [`TypeRouter`](crate::broker::dispatch::TypeRouter) for one, it waits inside
/// the call instead, with the message in hand.
pub struct Piped<R>(Arc<Inner<R>>);

struct Inner<R> {
    stack: Stack<R>,
    pace: Option<Pace>,
    gate: Option<Gate>,
    /// Batches: looked at before they are gathered.
    rules: Option<Arc<Validate>>,
}

type Stack<R> = BoxCloneSyncService<R, (), BoxError>;

/// What handlers are called with.
pub(super) trait Input: Clone + Send + 'static {
    fn first(&self) -> Option<&Received>;
    fn len(&self) -> usize;
}

impl Input for Received {
    fn first(&self) -> Option<&Received> {
        Some(self)
    }

    fn len(&self) -> usize {
        1
    }
}

impl Input for Vec<Received> {
    fn first(&self) -> Option<&Received> {
        <[Received]>::first(self)
    }

    fn len(&self) -> usize {
        self.len()
    }
}

impl Piped<Received> {
    pub(super) fn single(layers: Vec<Layer>, handler: impl Handler) -> Result<Self> {
        let leaf = Leaf(Arc::new(move |received| handler.handle(received)));
        build(layers, leaf, |rules, inner| {
            Stack::new(Validated { rules, inner })
        })
    }
}

impl Piped<Vec<Received>> {
    pub(super) fn batch(layers: Vec<Layer>, handler: impl BatchHandler) -> Result<Self> {
        let leaf = Leaf(Arc::new(move |batch| handler.handle(batch)));
        // A batch is settled as one: a bad message must not get into it.
        build(layers, leaf, |_, inner| inner)
    }
}

fn build<R: Input>(
    layers: Vec<Layer>,
    leaf: Leaf<R>,
    validate: impl Fn(Arc<Validate>, Stack<R>) -> Stack<R>,
) -> Result<Piped<R>> {
    order::check(&layers)?;
    let mut stack = Stack::new(leaf);
    let (mut pace, mut gate, mut rules) = (None, None, None);
    for layer in layers.into_iter().rev() {
        stack = match layer {
            Layer::Logging => Stack::new(Logged(stack)),
            Layer::Validate(wanted) => {
                wanted.check_settings()?;
                let wanted = rules.insert(Arc::new(wanted));
                validate(wanted.clone(), stack)
            }
            Layer::Breaker(breaker) => {
                gate = Some(breaker.gate()?);
                stack
            }
            Layer::Rate { messages, per } => {
                if messages == 0 || per.is_zero() {
                    return Err(invalid(
                        "rate_limit: the messages and the time must be above zero".to_owned(),
                    ));
                }
                pace = Some(Pace::new(messages, per));
                stack
            }
            Layer::Concurrency(most) => {
                if !(1..=tokio::sync::Semaphore::MAX_PERMITS).contains(&most) {
                    return Err(invalid(format!(
                        "concurrency: {most} at once asked for; at least 1 must be allowed"
                    )));
                }
                Stack::new(ConcurrencyLimitLayer::new(most).layer(stack))
            }
            Layer::Timeout(limit) => {
                if limit.is_zero() {
                    return Err(invalid("timeout: it must be above zero".to_owned()));
                }
                Stack::new(TimeoutLayer::new(limit).layer(stack))
            }
            Layer::Retry(retry) => Stack::new(RetryLayer::new(retry.policy()?).layer(stack)),
        };
    }
    Ok(Piped(Arc::new(Inner {
        stack,
        pace,
        gate,
        rules,
    })))
}

impl<R: Clone + Send + 'static> Piped<R> {
    fn turn(&self) -> ReadyFuture<R> {
        let inner = self.0.clone();
        Box::pin(async move {
            loop {
                let permit = match &inner.gate {
                    Some(gate) => Some(gate.admit().await),
                    None => None,
                };
                if let Some(pace) = &inner.pace {
                    pace.wait().await;
                }
                let mut service = inner.stack.clone();
                if let Err(error) = service.ready().await {
                    return Turn::failed(unboxed(error));
                }
                if permit.as_ref().is_some_and(|p| !p.holds()) {
                    // The circuit opened while it waited for the other two.
                    continue;
                }
                let turn = Turn::new(move |input| -> HandlerFuture {
                    let answer = service.call(input);
                    Box::pin(async move { answer.await.map_err(unboxed) })
                });
                return match permit {
                    Some(permit) => turn.judged_by(move |result| permit.judge(result)),
                    None => turn,
                };
            }
        })
    }

    /// Called without a turn: waits with the message in hand, and stays with it
    /// until its outcome is its own.
    fn at_once(&self, input: R) -> HandlerFuture {
        let piped = Self(self.0.clone());
        Box::pin(async move {
            loop {
                let turn = piped.turn().await;
                let (result, blame) = by_turn(turn, input.clone(), None).await;
                if result.is_ok() || blame == Blame::Message {
                    return result;
                }
            }
        })
    }
}

impl<R> Piped<R> {
    /// Where its circuit breaker stands, if it has one.
    #[must_use]
    pub fn circuit(&self) -> Option<BreakerState> {
        self.0.gate.as_ref().map(Gate::state)
    }
}

impl Handler for Piped<Received> {
    fn handle(&self, received: Received) -> HandlerFuture {
        self.at_once(received)
    }

    fn ready(&self) -> Option<ReadyFuture> {
        Some(self.turn())
    }
}

impl BatchHandler for Piped<Vec<Received>> {
    fn handle(&self, batch: Vec<Received>) -> HandlerFuture {
        self.at_once(batch)
    }

    fn ready(&self) -> Option<ReadyFuture<Vec<Received>>> {
        Some(self.turn())
    }

    fn admit(&self, received: &Received) -> Result<(), HandlerError> {
        match &self.0.rules {
            Some(rules) => rules.check(received),
            None => Ok(()),
        }
    }
}

impl<R> Clone for Piped<R> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<R> fmt::Debug for Piped<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Piped")
            .field("circuit", &self.circuit())
            .finish_non_exhaustive()
    }
}

/// The handler, at the bottom of the stack.
struct Leaf<R>(Arc<dyn Fn(R) -> HandlerFuture + Send + Sync>);

impl<R> Clone for Leaf<R> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<R> Service<R> for Leaf<R> {
    type Response = ();
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<(), BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, input: R) -> Self::Future {
        let handled: Pin<Box<dyn Future<Output = _> + Send>> = (self.0)(input);
        Box::pin(async move { handled.await.map_err(boxed) })
    }
}
