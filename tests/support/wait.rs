//! Waiting for a condition with a deadline. Tests never sleep for a fixed
//! time and hope.

use std::future::Future;
use std::time::Duration;

use tokio::time::Instant;

/// Asks again and again until the answer is yes; panics with `what` when it is
/// still no after `limit`.
pub async fn until<F, Fut>(limit: Duration, what: &str, mut condition: F)
where
    F: FnMut() -> Fut,
    Fut: Future<Output = bool>,
{
    value(limit, what, || {
        let answer = condition();
        async move { answer.await.then_some(()) }
    })
    .await;
}

/// As [`until`], for a value that appears: the first `Some` is returned.
pub async fn value<T, F, Fut>(limit: Duration, what: &str, mut probe: F) -> T
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Option<T>>,
{
    let deadline = Instant::now() + limit;
    let mut pause = FIRST_PAUSE;
    loop {
        match tokio::time::timeout_at(deadline, probe()).await {
            Ok(Some(value)) => return value,
            Ok(None) if Instant::now() < deadline => {}
            Ok(None) | Err(_) => panic!("not within {limit:?}: {what}"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// The future's result, or a panic that says what did not happen in time.
pub async fn within<T>(limit: Duration, what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(limit, future).await {
        Ok(value) => value,
        Err(_) => panic!("not within {limit:?}: {what}"),
    }
}

const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);
