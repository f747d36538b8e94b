//! A broker whose lanes and consumers are played by a test, step by step.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use tokio::sync::{mpsc, watch};

use crate::{
    broker::{
        BrokerType, ConnectionState, Consumer, Handler, Lane, LaneOptions, MessageBroker, OrderKey,
        PublishOptions, Receipt, Source, SubscribeOptions, Subscription, lane::LanePort,
    },
    error::{Error, ErrorCode, Result},
    message::Message,
    metrics::MetricsRecorder,
    topic::{Pattern, Topic},
};

/// Hands the adapter's end of every lane that is opened to the test.
pub(in crate::broker) struct Peer {
    pub(in crate::broker) recorder: Arc<MetricsRecorder>,
    pub(in crate::broker) connection: watch::Sender<ConnectionState>,
    opened: mpsc::UnboundedSender<(u32, LaneOptions, LanePort)>,
    lanes: u32,
    pub(in crate::broker) refusal: Mutex<Option<Error>>,
    /// What the next `consume` gives, and what it was asked for.
    pub(in crate::broker) consumers: Mutex<Vec<Consumer>>,
    pub(in crate::broker) asked: Mutex<Vec<SubscribeOptions>>,
    pub(in crate::broker) kind: BrokerType,
}

pub(in crate::broker) type Opened = mpsc::UnboundedReceiver<(u32, LaneOptions, LanePort)>;

impl Peer {
    pub(in crate::broker) fn new(lanes: u32) -> (Arc<Self>, Opened) {
        let (opened, ports) = mpsc::unbounded_channel();
        let (connection, _) = watch::channel(ConnectionState {
            generation: 1,
            connected: true,
            ..ConnectionState::default()
        });
        let peer = Self {
            recorder: Arc::default(),
            connection,
            opened,
            lanes,
            refusal: Mutex::default(),
            consumers: Mutex::default(),
            asked: Mutex::default(),
            kind: BrokerType::InMemory,
        };
        (Arc::new(peer), ports)
    }
}

#[async_trait]
impl MessageBroker for Peer {
    fn broker_type(&self) -> BrokerType {
        self.kind
    }
    async fn connect(&self) -> Result<()> {
        Ok(())
    }
    async fn close(&self) -> Result<()> {
        Ok(())
    }
    async fn health_check(&self) -> Result<()> {
        Ok(())
    }
    fn connection(&self) -> watch::Receiver<ConnectionState> {
        self.connection.subscribe()
    }
    fn endpoints(&self) -> Vec<String> {
        Vec::new()
    }
    fn server_version(&self) -> Option<String> {
        None
    }
    fn recorder(&self) -> &Arc<MetricsRecorder> {
        &self.recorder
    }
    async fn lanes(&self, _: &Topic) -> u32 {
        self.lanes
    }
    fn lane_of(&self, _: &Topic, _: &OrderKey, partition: Option<i32>, lanes: u32) -> u32 {
        partition.map_or(0, |p| p.unsigned_abs() % lanes)
    }
    async fn open_lane(&self, _: &Topic, lane: u32, options: &LaneOptions) -> Result<Lane> {
        if let Some(refusal) = self.refusal.lock().unwrap().clone() {
            return Err(refusal);
        }
        let (ours, port) = Lane::pair(options);
        self.opened.send((lane, options.clone(), port)).unwrap();
        Ok(ours)
    }
    async fn consume(&self, _: &Source, options: &SubscribeOptions) -> Result<Consumer> {
        self.asked.lock().unwrap().push(options.clone());
        let consumer = self.consumers.lock().unwrap().pop();
        consumer.ok_or_else(|| Error::rejected(ErrorCode::QueueNotFound, "no such queue"))
    }
    async fn publish_batch(
        &self,
        _: &Topic,
        _: Vec<Arc<Message>>,
        _: &PublishOptions,
    ) -> Vec<Result<Receipt>> {
        unreachable!()
    }
    async fn subscribe(
        &self,
        _: &Source,
        _: SubscribeOptions,
        _: Arc<dyn Handler>,
    ) -> Result<Subscription> {
        unreachable!()
    }
    async fn unsubscribe(&self, _: &Pattern) -> Result<()> {
        unreachable!()
    }
    async fn ensure(&self, _: &Source) -> Result<()> {
        Ok(())
    }
}
