//! The lease table with its clock: tokens are made here, and what expires is
//! given back by a task of its own.

use std::{
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

use super::{App, lease_table::LeaseTable, limits, problem::Problem};
use crate::{
    broker::{Delivery, Verdict},
    error::{Error, ErrorCode},
};

/// Every lease of this process.
#[derive(Clone)]
pub(super) struct Leases(Arc<Inner>);

struct Inner {
    /// Part of every token, so that a token says whose it is.
    hub: String,
    table: Mutex<LeaseTable<Delivery>>,
    /// The earliest expiry may have changed.
    changed: Notify,
}

/// Room for leases that are still to come; given back when dropped.
pub(super) struct Room {
    leases: Leases,
    pub(super) size: usize,
}

impl Leases {
    pub(super) fn new() -> Self {
        let mut name = [0; 6];
        // Only a name: a hub that cannot have a random one is still itself.
        let _ = getrandom::fill(&mut name);
        Self(Arc::new(Inner {
            hub: BASE64_URL_SAFE_NO_PAD.encode(name),
            table: Mutex::new(LeaseTable::new(limits::MAX_LEASES)),
            changed: Notify::new(),
        }))
    }

    /// Keeps room for at most `wanted` leases.
    pub(super) fn reserve(&self, wanted: usize) -> Result<Room, Problem> {
        let size = self.table().reserve(wanted);
        if size == 0 {
            return Err(Problem::http(
                axum::http::StatusCode::SERVICE_UNAVAILABLE,
                "LEASES_FULL",
                format!(
                    "{} leases are outstanding, which is the limit; ack some, or let them expire",
                    limits::MAX_LEASES
                ),
            )
            .retry_after(Duration::from_secs(1)));
        }
        Ok(Room {
            leases: self.clone(),
            size,
        })
    }

    /// Leases a delivery and returns its token.
    pub(super) fn grant(
        &self,
        room: &mut Room,
        delivery: Delivery,
        lease: Duration,
    ) -> Result<String, Error> {
        let mut secret = [0; 18];
        getrandom::fill(&mut secret).map_err(|e| {
            // The delivery is dropped and thereby given back.
            Error::new(
                ErrorCode::UnknownError,
                format!("the system has no random numbers for a token: {e}"),
            )
        })?;
        let token = format!("{}.{}", self.0.hub, BASE64_URL_SAFE_NO_PAD.encode(secret));
        let mut table = self.table();
        table.grant(Instant::now(), token.clone(), delivery, lease);
        if room.size > 0 {
            room.size -= 1;
            table.release(1);
        }
        drop(table);
        self.0.changed.notify_one();
        Ok(token)
    }

    /// Ends a lease by its holder.
    pub(super) fn take(&self, token: &str) -> Result<Delivery, Problem> {
        self.table()
            .take(Instant::now(), token)
            .ok_or_else(|| self.gone(token))
    }

    /// Prolongs a lease.
    pub(super) fn extend(&self, token: &str, lease: Duration) -> Result<(), Problem> {
        let extended = self.table().extend(Instant::now(), token, lease);
        if extended {
            self.0.changed.notify_one();
            Ok(())
        } else {
            Err(self.gone(token))
        }
    }

    /// Gives everything back to its queue.
    pub(super) fn give_back_all(&self) {
        let all = self.table().clear();
        give_back(all);
    }

    /// Leases outstanding.
    pub(super) fn len(&self) -> usize {
        self.table().len()
    }

    /// Starts the task that gives back what expires; it ends with the server.
    pub(super) fn spawn_expiry(&self, app: &App) {
        let leases = self.clone();
        let closing = app.closing().clone();
        app.spawn(async move {
            loop {
                let next = leases.table().next_expiry();
                tokio::select! {
                    () = async {
                        match next {
                            Some(at) => sleep_until(at).await,
                            None => std::future::pending().await,
                        }
                    } => {}
                    () = leases.0.changed.notified() => continue,
                    () = closing.cancelled() => return,
                }
                let expired = leases.table().expire(Instant::now());
                if !expired.is_empty() {
                    tracing::info!(
                        count = expired.len(),
                        "leases expired; their messages go back"
                    );
                }
                give_back(expired);
            }
        });
    }

    fn gone(&self, token: &str) -> Problem {
        match token.split_once('.') {
            Some((hub, _)) if hub != self.0.hub => Problem::gone(format!(
                "the token was given out by hub {hub:?}, this is hub {:?}; leases live and die with the process that gave them",
                self.0.hub
            )),
            _ => Problem::gone(
                "no lease has this token: it expired, was settled before, or was never given out; the message, unless settled, is handed out again",
            ),
        }
    }

    fn table(&self) -> MutexGuard<'_, LeaseTable<Delivery>> {
        // Nothing under this lock can panic half-way, so a poisoned one is whole.
        self.0.table.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.leases.table().release(self.size);
    }
}

fn give_back(deliveries: Vec<Delivery>) {
    for delivery in deliveries {
        // A source that is gone gives it back by itself.
        delivery.settle_now(Verdict::Requeue);
    }
}
