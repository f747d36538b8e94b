//! Many publishers, short time-outs, and lanes that answer in any order or die:
//! whatever happens, "not sent" is never said of what is written, what is
//! delivered was written, and the order of each key holds.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{task::JoinSet, time::timeout};

use super::{
    scripted::{Opened, Peer},
    *,
};
use crate::{
    broker::{Confirmation, Fate, lane::LanePort},
    error::Assume,
};

/// What the far end has seen, in order: key and number.
type Written = Arc<Mutex<Vec<(String, u32)>>>;

async fn serve(mut opened: Opened, written: Written) {
    let mut lanes = JoinSet::new();
    while let Some((_, _, port)) = opened.recv().await {
        lanes.spawn(serve_lane(port, written.clone()));
    }
    while lanes.join_next().await.is_some() {}
}

async fn serve_lane(mut port: LanePort, written: Written) {
    let mut random = fastrand::Rng::new();
    let mut unanswered = Vec::new();
    loop {
        // What was left unanswered is answered when nothing more comes.
        let next = timeout(Duration::from_millis(20), port.submissions.recv()).await;
        let batch = match next {
            Ok(Some(batch)) => batch,
            Ok(None) => return,
            Err(_) => Vec::new(),
        };
        let quiet = batch.is_empty();
        for submission in batch {
            let key = String::from_utf8_lossy(submission.message.key.as_ref().unwrap().as_bytes())
                .into_owned();
            let number = submission.message.kind.parse().unwrap();
            written.lock().unwrap().push((key, number));
            unanswered.push(submission.token);
        }
        match random.u32(0..40) {
            0 => return,
            1..5 if !quiet => continue,
            5..8 => tokio::time::sleep(Duration::from_millis(random.u64(1..8))).await,
            _ => {}
        }
        random.shuffle(&mut unanswered);
        for token in unanswered.drain(..) {
            let fate = Fate::Confirmed(None);
            if port
                .confirmations
                .try_send(Confirmation { token, fate })
                .is_err()
            {
                return;
            }
        }
    }
}

async fn publisher(
    direct: Arc<DirectPublisher>,
    peer: Arc<Peer>,
    key: String,
) -> HashMap<(String, u32), Result<Receipt>> {
    let topic = Topic::new("tasks.test").unwrap();
    let mut random = fastrand::Rng::new();
    let mut outcomes = HashMap::new();
    let mut number = 0;
    for _ in 0..60 {
        let batch: Vec<u32> = (0..random.u32(1..30)).map(|n| number + n).collect();
        number += batch.len() as u32;
        let messages = batch
            .iter()
            .map(|n| Arc::new(Message::new(n.to_string(), "").with_key(key.as_str())))
            .collect();
        let options = PublishOptions {
            timeout: Duration::from_millis(random.u64(1..12)),
            batch_size: random.usize(1..12),
            linger: Duration::from_millis(random.u64(0..2)),
            ..PublishOptions::default()
        };
        let results = direct
            .publish_batch(peer.as_ref(), &topic, messages, &options)
            .await;
        assert_eq!(results.len(), batch.len());
        for (n, result) in batch.into_iter().zip(results) {
            outcomes.insert((key.clone(), n), result);
        }
    }
    outcomes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_happens_no_outcome_is_a_lie_and_keys_keep_their_order() {
    let (peer, opened) = Peer::new(1);
    let written = Written::default();
    let far_end = tokio::spawn(serve(opened, written.clone()));
    let direct = Arc::new(DirectPublisher::default());
    let mut publishers = JoinSet::new();
    for key in ["a", "b", "c", "d"] {
        publishers.spawn(publisher(direct.clone(), peer.clone(), key.to_owned()));
    }
    let mut outcomes = HashMap::new();
    while let Some(of_one) = publishers.join_next().await {
        outcomes.extend(of_one.unwrap());
    }
    direct.close().await;
    drop((direct, peer));
    far_end.await.unwrap();

    let written = written.lock().unwrap();
    let seen: HashSet<_> = written.iter().cloned().collect();
    assert_eq!(seen.len(), written.len(), "nothing is written twice");
    for (message, outcome) in &outcomes {
        match outcome {
            Ok(_) => assert!(seen.contains(message), "{message:?} was never written"),
            Err(e) if e.assume() == Assume::NotSent => {
                assert!(!seen.contains(message), "{message:?} was written: {e}");
            }
            Err(e) => assert_eq!(e.assume(), Assume::Unknown, "{e}"),
        }
    }
    for key in ["a", "b", "c", "d"] {
        let numbers: Vec<_> = written.iter().filter(|(k, _)| k == key).collect();
        assert!(numbers.is_sorted(), "order of key {key}");
    }
}
