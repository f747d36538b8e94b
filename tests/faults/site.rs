//! What a cell runs on: a broker that all cells of its kind share, a link to it
//! that can be broken, and a folder with the hub's configuration.

use std::path::Path;
use std::process::Command;

use crate::cell::{Cell, Mode};
use crate::support::{
    DEAD_EVENTS, Kafka, NodeInfo, RETRY_EXCHANGE, RETRY_QUEUES, Rabbit, RabbitVersion, TcpProxy,
    Unavailable,
};

/// The route that all cells use.
pub const PATTERN: &str = "faults.#";

/// A broker behind a proxy of its own.
pub struct Site {
    pub node: Node,
    /// Between hub and broker.
    pub link: TcpProxy,
    /// Between the foreign reader and RabbitMQ. Kafka sends all clients of one
    /// listener to one address, so its foreign reader comes past all proxies.
    pub reader_link: Option<TcpProxy>,
}

pub enum Node {
    Rabbit(Rabbit),
    Kafka(Kafka),
}

impl Site {
    pub async fn rabbitmq() -> Result<Self, Unavailable> {
        let node = Rabbit::start(RabbitVersion::V4).await?;
        let link = TcpProxy::to_port(node.port()).await.unwrap();
        let reader_link = TcpProxy::to_port(node.port()).await.unwrap();
        Ok(Self {
            node: Node::Rabbit(node),
            link,
            reader_link: Some(reader_link),
        })
    }

    pub async fn kafka() -> Result<Self, Unavailable> {
        // The proxy's target is set once the node has its ports.
        let link = TcpProxy::to_port(1).await.unwrap();
        let node = Kafka::start_behind(&link).await?;
        Ok(Self {
            node: Node::Kafka(node),
            link,
            reader_link: None,
        })
    }

    /// As it was, whatever the last cell left.
    pub async fn mend(&mut self) {
        self.heal_links().await;
        self.node.mend().await;
    }

    pub async fn heal_links(&self) {
        for link in [Some(&self.link), self.reader_link.as_ref()]
            .into_iter()
            .flatten()
        {
            link.set_delay(std::time::Duration::ZERO);
            link.set_rate(None);
            link.heal().await;
        }
    }
}

impl Node {
    fn info(&self) -> &NodeInfo {
        match self {
            Self::Rabbit(node) => node.info(),
            Self::Kafka(node) => node.info(),
        }
    }

    pub fn pid(&self) -> u32 {
        self.info().pid
    }

    async fn state(&self) -> String {
        match self {
            Self::Rabbit(node) => node.state().await,
            Self::Kafka(node) => node.state().await,
        }
    }

    pub fn version(&self) -> String {
        match self {
            Self::Rabbit(node) => format!("RabbitMQ {}", node.version()),
            Self::Kafka(node) => format!("Kafka {}", node.version()),
        }
    }

    /// How it is, and the last that it said, for the report of a failure.
    pub async fn last_words(&self) -> String {
        let state = self.state().await;
        let log = crate::hub::tail(&self.info().dir.join("server.log"));
        format!("the server is {state}; its log ends with\n{log}")
    }

    /// Returns when the process is gone.
    pub async fn kill(&self) {
        // The signal at once; the launcher's command waits for the rest.
        crate::hub::signal(self.pid(), "KILL");
        match self {
            Self::Rabbit(node) => node.kill().await,
            Self::Kafka(node) => node.kill().await,
        }
    }

    pub async fn stop(&self) {
        match self {
            Self::Rabbit(node) => node.stop().await,
            Self::Kafka(node) => node.stop().await,
        }
    }

    pub async fn pause(&self) {
        match self {
            Self::Rabbit(node) => node.pause().await,
            Self::Kafka(node) => node.pause().await,
        }
    }

    pub async fn resume(&self) {
        match self {
            Self::Rabbit(node) => node.resume().await,
            Self::Kafka(node) => node.resume().await,
        }
    }

    pub async fn restart(&mut self) {
        match self {
            Self::Rabbit(node) => node.restart().await,
            Self::Kafka(node) => node.restart().await,
        }
    }

    async fn mend(&mut self) {
        match self.state().await.as_str() {
            "running" => {}
            "paused" => self.resume().await,
            _ => self.restart().await,
        }
        if let Self::Rabbit(node) = self {
            node.ctl(&["set_disk_free_limit", "50MB"]).await;
        }
    }

    /// The disk that it stores messages on counts as full.
    pub async fn fill_disk(&self) {
        match self {
            // The alarm that a full disk raises; publishers are blocked.
            Self::Rabbit(node) => {
                node.ctl(&["set_disk_free_limit", "1000000GB"]).await;
            }
            // No file may grow: the log's next write fails, and Kafka, which
            // has one folder, ends itself.
            Self::Kafka(node) => {
                let done = Command::new("prlimit")
                    .args(["--pid", &node.pid().to_string(), "--fsize=1:1"])
                    .status()
                    .expect("prlimit runs");
                assert!(done.success(), "prlimit on Kafka");
            }
        }
    }

    pub async fn free_disk(&mut self) {
        match self {
            Self::Rabbit(node) => {
                node.ctl(&["set_disk_free_limit", "50MB"]).await;
            }
            // A limit that was lowered stays lowered for that process.
            Self::Kafka(node) => {
                node.kill().await;
                node.restart().await;
            }
        }
    }
}

/// The queue that gets a copy of everything that reaches RabbitMQ.
pub fn audit(topic: &str) -> String {
    format!("{topic}.audit")
}

/// Writes the hub's configuration for a cell.
pub fn configure(folder: &Path, cell: &Cell, topic: &str, site: &Site) {
    let port = site.link.port();
    let during = match cell.mode {
        Mode::Local => "local",
        Mode::Hold | Mode::Events => "hold",
    };
    let broker = match &site.node {
        Node::Rabbit(_) => format!("rabbitmq:\n  url: amqp://guest:guest@127.0.0.1:{port}/%2f\n"),
        Node::Kafka(_) => format!("kafka:\n  brokers: [\"127.0.0.1:{port}\"]\n"),
    };
    let (kind, primary) = match cell.mode {
        Mode::Events => ("event", "kafka"),
        Mode::Hold | Mode::Local => ("task", "rabbitmq"),
    };
    let audit = audit(topic);
    let topology = match cell.mode {
        Mode::Events => topics(topic),
        Mode::Hold | Mode::Local => format!(
            "  exchanges:
    - {{name: faults, kind: direct}}
{RETRY_EXCHANGE}  queues:
    - {{name: {topic}, bindings: [{{exchange: faults, routing_key: {topic}}}]}}
    - {{name: {audit}, bindings: [{{exchange: faults, routing_key: {topic}}}]}}
{RETRY_QUEUES}"
        ),
    };
    write(folder, &broker, (kind, primary, during), &topology);
}

/// The hub beside a broker, without a proxy and without anything that a cell
/// needs for its readers.
pub fn configure_plain(folder: &Path, topic: &str, node: &Node) {
    match node {
        Node::Rabbit(node) => {
            let broker = format!("rabbitmq:\n  url: {}\n", node.url());
            let topology = format!(
                "  exchanges:
{RETRY_EXCHANGE}  queues:
    - {{name: {topic}, options: {{queue_type: quorum}}}}
{RETRY_QUEUES}"
            );
            write(folder, &broker, ("task", "rabbitmq", "hold"), &topology);
        }
        Node::Kafka(node) => {
            let broker = format!("kafka:\n  brokers: [\"{}\"]\n", node.bootstrap());
            write(folder, &broker, ("event", "kafka", "hold"), &topics(topic));
        }
    }
}

fn topics(topic: &str) -> String {
    format!(
        "  topics:
    - {{name: {topic}, options: {{partitions: {PARTITIONS}}}}}
{DEAD_EVENTS}"
    )
}

fn write(folder: &Path, broker: &str, (kind, primary, during): (&str, &str, &str), topology: &str) {
    let text = format!(
        "{broker}hub:
  routes:
    - {{pattern: \"{PATTERN}\", kind: {kind}, primary: {primary}, during_outage: {during}}}
log: {{level: \"info,messaging_hub=debug\"}}
topology:
  defaults: false
{topology}"
    );
    std::fs::write(folder.join("hub.yaml"), text).unwrap();
}

pub const PARTITIONS: u64 = 3;
