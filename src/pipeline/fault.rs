//! A handler's error on its way through tower, whose layers have errors of their
//! own.

use std::fmt;

use tower::{BoxError, timeout::error::Elapsed};

use crate::broker::HandlerError;

/// A handler's error as an `Error`, which [`HandlerError`] itself is not.
#[derive(Debug)]
pub(super) struct Fault(HandlerError);

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Fault {}

/// Into tower.
pub(super) fn boxed(error: HandlerError) -> BoxError {
    Box::new(Fault(error))
}

/// Out of it.
pub(super) fn unboxed(error: BoxError) -> HandlerError {
    match error.downcast::<Fault>() {
        Ok(fault) => fault.0,
        Err(error) if error.is::<Elapsed>() => HandlerError {
            reason: HandlerError::TIMEOUT.to_owned(),
            details: "the handler took longer than its pipeline's timeout".to_owned(),
            retryable: true,
        },
        Err(error) => HandlerError::retry(error.to_string()),
    }
}

/// Whether another attempt may mend it.
pub(super) fn may_mend(error: &BoxError) -> bool {
    error.downcast_ref::<Fault>().is_none_or(|f| f.0.retryable)
}
