//! The thread of a transactor: it takes batches and writes each as one. It keeps
//! nothing between two batches but its producer.

use std::time::Instant;

use tokio::{runtime::Handle, sync::mpsc};
use tokio_util::sync::CancellationToken;

use super::session::{Session, Work};
use crate::{adapter::kafka::error::closed, broker::transaction::Batch};

/// The thread's own.
pub(super) struct Writer {
    pub(super) session: Session,
    pub(super) batches: mpsc::Receiver<Batch>,
    pub(super) runtime: Handle,
    /// Nothing more is begun.
    pub(super) stopping: CancellationToken,
}

impl Writer {
    /// Runs until the last transactor is dropped, or the broker closes.
    pub(super) fn run(mut self) {
        while let Some(batch) = self.next() {
            if batch.begin() {
                self.write(batch);
            }
        }
        self.batches.close();
        while let Ok(batch) = self.batches.try_recv() {
            if batch.begin() {
                batch.into_parts().1.give(Err(closed()));
            }
        }
    }

    fn next(&mut self) -> Option<Batch> {
        self.runtime.block_on(async {
            tokio::select! {
                biased;
                () = self.stopping.cancelled() => None,
                batch = self.batches.recv() => batch,
            }
        })
    }

    fn write(&mut self, batch: Batch) {
        let (compression, deadline) = (batch.compression, batch.deadline);
        let (messages, mut answer) = batch.into_parts();
        if messages.is_empty() {
            let session = &mut self.session;
            let ready = session.reachable().and_then(|()| session.prepare(deadline));
            return answer.give(ready.map(|()| Vec::new()));
        }
        let work = Work {
            batch: &messages,
            compression,
            offsets: None,
            deadline,
        };
        let began = Instant::now();
        let outcome = self
            .session
            .write(&work, &mut |unknown| answer.give(Err(unknown)));
        tracing::debug!(target: "messaging_hub::kafka", messages = messages.len(),
            took = ?began.elapsed(), ok = outcome.is_ok(), "a transaction ended");
        // After an answer that came too early this one is for the log only.
        answer.give(outcome);
    }
}

/// What a transactor's thread is called.
pub(super) const NAME: &str = "kafka-transactor";
