//! Transactions: batches that are visible as one, and streams that are read,
//! transformed and written on in one. Each transactional id has one thread, because
//! the client library's calls block; the thread owns the id's producer, and the
//! consumer of a transform.
//!
//! ```text
//!   Transactor --Batch--> writer ----.
//!                                     >-- session --(machine)--> producer --> Kafka
//!   consumer --> held --> transform -'
//! ```
//!
//! Nothing here is spooled: while Kafka is away a batch is an error.

mod handle;
mod held;
mod machine;
mod member;
mod producer;
mod session;
mod transform;
mod writer;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use self::{session::Session, transform::Transform, writer::Writer};
use super::{broker::Backend, error::invalid};
use crate::{
    broker::{ConsumerControl, Source, SubscribeOptions, Transactor, Transformer},
    error::Result,
};

/// The threads of a broker's transactions.
pub(super) struct Transactions {
    runtime: Handle,
    /// Ids that are made up for this process.
    made_up: String,
    running: Mutex<Vec<JoinHandle<()>>>,
    /// Nothing more is begun.
    stopping: CancellationToken,
    /// What is open is left to the brokers.
    abandoned: CancellationToken,
}

impl Transactions {
    pub(super) fn new(runtime: Handle) -> Self {
        Self {
            runtime,
            made_up: uuid::Uuid::now_v7().to_string(),
            running: Mutex::default(),
            stopping: CancellationToken::new(),
            abandoned: CancellationToken::new(),
        }
    }

    /// Starts the thread of an id.
    ///
    /// # Errors
    /// `INVALID_CONFIG` for a bad id, or when the system gives no thread.
    pub(super) fn transactor(
        &self,
        backend: &Arc<Backend>,
        id: Option<&str>,
    ) -> Result<Transactor> {
        let id = match id {
            Some(id) => checked(id)?.to_owned(),
            None => self.own_id(backend),
        };
        let (transactor, batches) = Transactor::pair();
        let writer = Writer {
            session: self.session(backend, id),
            batches,
            runtime: self.runtime.clone(),
            stopping: self.stopping.clone(),
        };
        self.spawn(writer::NAME, move || writer.run())?;
        Ok(transactor)
    }

    /// Starts a transform.
    ///
    /// # Errors
    /// `INVALID_CONFIG` for what cannot be honoured.
    pub(super) fn transform(
        &self,
        backend: &Arc<Backend>,
        source: &Source,
        options: &SubscribeOptions,
        id: &str,
        transformer: Arc<dyn Transformer>,
    ) -> Result<ConsumerControl> {
        let session = self.session(backend, checked(id)?.to_owned());
        let (control, stopping, report) = ConsumerControl::new();
        let transform = Transform::new(
            backend,
            (source, options, id),
            session,
            transformer,
            self.runtime.clone(),
            (stopping, report),
        )?;
        // The broker's close stops it too.
        let all = self.stopping.clone();
        self.spawn(transform::NAME, move || transform.run(&all))?;
        Ok(control)
    }

    fn session(&self, backend: &Arc<Backend>, id: String) -> Session {
        let (runtime, abandoned) = (self.runtime.clone(), self.abandoned.clone());
        Session::new(Arc::clone(backend), runtime, id, abandoned)
    }

    fn own_id(&self, backend: &Backend) -> String {
        let config = &backend.config;
        config.transactional_id.clone().unwrap_or_else(|| {
            // Another one for each process, so that none fences another.
            format!("{}-{}", config.client_id, self.made_up)
        })
    }

    fn spawn(&self, name: &str, run: impl FnOnce() + Send + 'static) -> Result<()> {
        let mut running = self.running();
        // Under the lock: a close that looked just before would not join it.
        if self.stopping.is_cancelled() {
            return Err(super::error::closed());
        }
        running.retain(|thread| !thread.is_finished());
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(run)
            .map_err(|e| invalid("the system gives no thread for transactions").caused_by(e))?;
        running.push(thread);
        Ok(())
    }

    /// Stops all; what is open gets `grace` to be committed or aborted.
    pub(super) async fn close(&self, grace: Duration) {
        let running = {
            let mut running = self.running();
            self.stopping.cancel();
            std::mem::take(&mut *running)
        };
        let joined = tokio::task::spawn_blocking(move || {
            for thread in running {
                // A thread that panicked has ended too.
                let _ = thread.join();
            }
        });
        tokio::pin!(joined);
        if tokio::time::timeout(grace, &mut joined).await.is_err() {
            self.abandoned.cancel();
            let _ = joined.await;
        }
    }

    /// Not closed, just forgotten: the threads end unobserved.
    pub(super) fn abandon(&self) {
        self.stopping.cancel();
        self.abandoned.cancel();
    }

    fn running(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        // Nothing under this lock can stop half-way.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn checked(id: &str) -> Result<&str> {
    if id.is_empty() || id.len() > MAX_ID || !id.chars().all(|c| c.is_ascii_graphic()) {
        return Err(invalid(format!(
            "a transactional id has 1 to {MAX_ID} printable characters without spaces"
        )));
    }
    Ok(id)
}

/// Characters of a transactional id.
const MAX_ID: usize = 249;
