//! Passing a batch on to whoever has room for it, as one branch of a select.

use tokio::sync::mpsc;

/// Passes `batch` on once the other end has room. False when that end is gone,
/// or there is none.
///
/// # Cancel safety
/// Nothing is lost when this is dropped half-way: the batch is emptied only with
/// the permit in hand.
pub(crate) async fn hand_over<T>(to: &Option<mpsc::Sender<Vec<T>>>, batch: &mut Vec<T>) -> bool {
    match to {
        Some(to) => match to.reserve().await {
            Ok(permit) => {
                permit.send(std::mem::take(batch));
                true
            }
            Err(_) => false,
        },
        None => false,
    }
}
