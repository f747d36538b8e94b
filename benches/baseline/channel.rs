//! A bare bounded channel of tokio's: what handing messages over in memory costs
//! without a broker. It acks, retries and keeps nothing.

use std::sync::Arc;

use tokio::{sync::mpsc, task::JoinSet};

use crate::cli::{
    Failure,
    bench::{latency::Tally, load::Load},
};

/// Sends what the loads say to one consumer, which a tokio channel has.
pub(crate) async fn run(loads: Vec<Load>, capacity: usize) -> Result<Arc<Tally>, Failure> {
    let tally = Arc::new(Tally::new());
    let (tx, mut rx) = mpsc::channel(capacity);
    let mut producers = JoinSet::new();
    for load in loads {
        let tx = tx.clone();
        producers.spawn(async move {
            let mut turns = load.turns()?;
            let mut n = 0;
            while let Some(due) = turns.next().await {
                if tx.send(load.body(n, due)).await.is_err() {
                    break;
                }
                n += 1;
            }
            Ok::<(), Failure>(())
        });
    }
    drop(tx);
    let arrived = tally.clone();
    let consumer = async move {
        let mut batch = Vec::with_capacity(BATCH);
        while rx.recv_many(&mut batch, BATCH).await > 0 {
            for payload in batch.drain(..) {
                arrived.take(&payload);
            }
        }
    };
    let mut consuming = JoinSet::new();
    consuming.spawn(consumer);
    while let Some(ended) = producers.join_next().await {
        ended.map_err(|e| Failure::new(format!("a producer ended early: {e}")))??;
    }
    while let Some(ended) = consuming.join_next().await {
        ended.map_err(|e| Failure::new(format!("the consumer ended early: {e}")))?;
    }
    Ok(tally)
}

/// Messages that are taken at once at most.
const BATCH: usize = 256;
