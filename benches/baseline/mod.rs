//! What the hub is measured against: the clients, files, channels and servers
//! that it stands on, used as well as they can be, without the hub.
//!
//! They are compiled into the command `bench` (`src/cli/bench`) and live beside
//! the benchmarks, because nothing of the hub's own is in them but the wire
//! mapping: both sides send the same bytes.

#[cfg(feature = "rabbitmq")]
pub(crate) mod amqp;
pub(crate) mod channel;
#[cfg(feature = "journal")]
pub(crate) mod file;
pub(crate) mod http;
#[cfg(feature = "kafka")]
pub(crate) mod kafka;

/// Deletes queues, each at its address; what could not be, and why.
#[cfg(feature = "rabbitmq")]
pub(crate) async fn remove_queues(queues: Vec<(String, String)>) -> Vec<String> {
    let mut left = Vec::new();
    for (url, queue) in queues {
        let deleted = async { amqp::Amqp::connect(&url).await?.delete(&queue).await }.await;
        if let Err(e) = deleted {
            left.push(format!("queue {queue}: {}", e.message));
        }
    }
    left
}

/// Nothing: without the client there are none.
#[cfg(not(feature = "rabbitmq"))]
pub(crate) async fn remove_queues(_: Vec<(String, String)>) -> Vec<String> {
    Vec::new()
}

/// Deletes topics and groups, each at its addresses; what could not be, and why.
#[cfg(feature = "kafka")]
pub(crate) async fn remove_topics(
    topics: Vec<(String, String)>,
    groups: Vec<(String, String)>,
) -> Vec<String> {
    let mut left = Vec::new();
    for (brokers, topic) in topics {
        if let Err(e) = kafka::delete_topic(&brokers, &topic).await {
            left.push(format!("topic {topic}: {}", e.message));
        }
    }
    for (brokers, group) in groups {
        // One whose members were cut off lives on until its session ends, and
        // then expires by itself: it holds positions of a topic that is gone.
        let _ = kafka::delete_group(&brokers, &group).await;
    }
    left
}

/// Nothing: without the client there are none.
#[cfg(not(feature = "kafka"))]
pub(crate) async fn remove_topics(
    _: Vec<(String, String)>,
    _: Vec<(String, String)>,
) -> Vec<String> {
    Vec::new()
}
