//! Real RabbitMQ and Kafka nodes for tests, private or shared.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::OnceCell;

use super::launcher::{Node, NodeInfo, Unavailable};
use super::proxy::TcpProxy;

/// Which RabbitMQ: the oldest series that is supported, or the current one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RabbitVersion {
    V3_10,
    V4,
}

impl RabbitVersion {
    pub const ALL: [Self; 2] = [Self::V3_10, Self::V4];

    fn kind(self) -> &'static str {
        match self {
            Self::V3_10 => "rabbitmq-3.10",
            Self::V4 => "rabbitmq-4",
        }
    }
}

/// Listeners beside the plain one.
#[derive(Debug, Clone, Copy, Default)]
pub struct NodeOptions {
    pub tls: bool,
    /// Kafka only: RabbitMQ always authenticates.
    pub sasl: bool,
}

impl NodeOptions {
    pub const fn tls() -> Self {
        Self {
            tls: true,
            sasl: false,
        }
    }

    pub const fn secure() -> Self {
        Self {
            tls: true,
            sasl: true,
        }
    }

    fn words(self) -> Vec<&'static str> {
        let mut words = Vec::new();
        if self.tls {
            words.push("--tls");
        }
        if self.sasl {
            words.push("--sasl");
        }
        words
    }
}

/// What every node can do, whichever broker it is.
macro_rules! node_controls {
    ($broker:ty) => {
        impl $broker {
            pub fn info(&self) -> &NodeInfo {
                self.node.info()
            }

            pub fn port(&self) -> u16 {
                self.info().port
            }

            /// The server's own pid, for whoever must send a signal at once.
            pub fn pid(&self) -> u32 {
                self.info().pid
            }

            pub fn version(&self) -> &str {
                &self.info().version
            }

            /// A file of the test authority: `ca.pem`, `client.pem`, `client.key`, ...
            pub fn tls_file(&self, name: &str) -> PathBuf {
                self.info().dir.join("tls").join(name)
            }

            /// SIGKILL; returns when the process is gone.
            pub async fn kill(&self) {
                self.node.command("kill", &[]).await;
            }

            /// Ends it in good order.
            pub async fn stop(&self) {
                self.node.command("stop", &[]).await;
            }

            /// SIGSTOP: connections stay open, nothing answers.
            pub async fn pause(&self) {
                self.node.command("pause", &[]).await;
            }

            /// SIGCONT.
            pub async fn resume(&self) {
                self.node.command("resume", &[]).await;
            }

            /// Starts it again on the same ports and data; stops it first if it runs.
            pub async fn restart(&mut self) {
                self.node.restart().await;
            }

            /// Returns once the server answers its own protocol.
            pub async fn wait_ready(&self) {
                self.node.command("wait", &[]).await;
            }

            /// `running`, `paused` or `stopped`.
            pub async fn state(&self) -> String {
                let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/brokers");
                let output = tokio::process::Command::new(script)
                    .arg("status")
                    .arg(&self.info().dir)
                    .output()
                    .await
                    .expect("scripts/brokers runs");
                String::from_utf8_lossy(&output.stdout).trim().to_owned()
            }

            /// rabbitmqctl, or a Kafka tool class, with its arguments.
            pub async fn ctl(&self, arguments: &[&str]) -> String {
                self.node.command("ctl", arguments).await
            }
        }
    };
}

/// A RabbitMQ node.
#[derive(Debug)]
pub struct Rabbit {
    node: Node,
}

node_controls!(Rabbit);

impl Rabbit {
    pub async fn start(version: RabbitVersion) -> Result<Self, Unavailable> {
        Self::start_with(version, NodeOptions::default()).await
    }

    pub async fn start_with(
        version: RabbitVersion,
        options: NodeOptions,
    ) -> Result<Self, Unavailable> {
        let node = Node::start(version.kind(), &options.words()).await?;
        Ok(Self { node })
    }

    /// `amqp://guest:guest@127.0.0.1:PORT/%2f`
    pub fn url(&self) -> &str {
        &self.info().url
    }

    /// The same through something that listens on another port, a proxy.
    pub fn url_via(&self, port: u16) -> String {
        format!("amqp://guest:guest@127.0.0.1:{port}/%2f")
    }

    /// As user helixagent, the seeds' default.
    pub fn url_as_helixagent(&self) -> String {
        format!(
            "amqp://helixagent:helixagent123@127.0.0.1:{}/%2f",
            self.port()
        )
    }

    pub fn tls_url(&self) -> &str {
        self.info().tls_url.as_deref().expect("started with TLS")
    }

    /// `http://127.0.0.1:PORT` of the management API (guest, guest).
    pub fn management_url(&self) -> &str {
        self.info()
            .management_url
            .as_deref()
            .expect("RabbitMQ has one")
    }
}

/// A Kafka node.
#[derive(Debug)]
pub struct Kafka {
    node: Node,
}

node_controls!(Kafka);

impl Kafka {
    pub async fn start() -> Result<Self, Unavailable> {
        Self::start_with(NodeOptions::default()).await
    }

    pub async fn start_with(options: NodeOptions) -> Result<Self, Unavailable> {
        let node = Node::start(KAFKA, &options.words()).await?;
        Ok(Self { node })
    }

    /// A node whose clients all stay behind the proxy: the broker advertises
    /// the proxy's address to whoever comes through it. Connect to
    /// `proxy.address()`, not to `bootstrap()`.
    pub async fn start_behind(proxy: &TcpProxy) -> Result<Self, Unavailable> {
        let port = proxy.port().to_string();
        let node = Node::start(KAFKA, &["--via", &port]).await?;
        let inner = node.info().proxied_port.expect("started with --via");
        proxy.set_target(([127, 0, 0, 1], inner).into());
        Ok(Self { node })
    }

    /// `127.0.0.1:PORT`. A client goes on from here to the address that the
    /// broker advertises, so a proxy before this port sees the first
    /// connection only (see `start_behind`).
    pub fn bootstrap(&self) -> &str {
        &self.info().url
    }

    pub fn bootstrap_tls(&self) -> &str {
        self.info().tls_url.as_deref().expect("started with TLS")
    }

    /// SASL without TLS: PLAIN, SCRAM-SHA-256 or -512, helixagent/helixagent123.
    pub fn bootstrap_sasl(&self) -> String {
        format!(
            "127.0.0.1:{}",
            self.info().sasl_port.expect("started with SASL")
        )
    }

    pub fn bootstrap_sasl_tls(&self) -> String {
        format!(
            "localhost:{}",
            self.info()
                .sasl_tls_port
                .expect("started with TLS and SASL")
        )
    }
}

/// A schema registry with the Confluent-compatible API, in memory.
#[derive(Debug)]
pub struct Registry {
    node: Node,
}

impl Registry {
    pub async fn start() -> Result<Self, Unavailable> {
        let node = Node::start("registry-3", &[]).await?;
        Ok(Self { node })
    }

    pub fn port(&self) -> u16 {
        self.node.info().port
    }

    /// Where the API is, as reached through a port.
    pub fn url_via(&self, port: u16) -> String {
        let own = format!(":{}/", self.port());
        self.node.info().url.replace(&own, &format!(":{port}/"))
    }
}

/// The RabbitMQ that all tests of this process share: the node in
/// RABBITMQ_3_10_DIR or RABBITMQ_4_DIR, else one started for this process.
/// Tests that use it stop nothing, and name what they declare with `unique`.
pub async fn shared_rabbit(version: RabbitVersion) -> Result<Arc<Rabbit>, Unavailable> {
    static V3_10: OnceCell<Arc<Rabbit>> = OnceCell::const_new();
    static V4: OnceCell<Arc<Rabbit>> = OnceCell::const_new();
    let (cell, variable) = match version {
        RabbitVersion::V3_10 => (&V3_10, "RABBITMQ_3_10_DIR"),
        RabbitVersion::V4 => (&V4, "RABBITMQ_4_DIR"),
    };
    cell.get_or_try_init(|| async {
        let node = Node::start_shared(version.kind(), variable).await?;
        Ok(Arc::new(Rabbit { node }))
    })
    .await
    .cloned()
}

/// The Kafka that all tests of this process share (KAFKA_4_DIR).
pub async fn shared_kafka() -> Result<Arc<Kafka>, Unavailable> {
    static NODE: OnceCell<Arc<Kafka>> = OnceCell::const_new();
    NODE.get_or_try_init(|| async {
        let node = Node::start_shared(KAFKA, "KAFKA_4_DIR").await?;
        Ok(Arc::new(Kafka { node }))
    })
    .await
    .cloned()
}

const KAFKA: &str = "kafka-4";
