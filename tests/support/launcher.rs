//! Calls `scripts/brokers`, the launcher that the Makefile and the challenge
//! scripts use too. Knows nothing of RabbitMQ or Kafka but their names.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;
use tokio::sync::Semaphore;

/// Why there is no broker to test with.
#[derive(Debug)]
pub struct Unavailable(String);

impl Unavailable {
    /// Fails the test where brokers are required, else says what is skipped.
    pub fn skip_or_fail(&self) {
        let required = |name: &str| std::env::var(name).is_ok_and(|v| v == "true" || v == "1");
        if required("CI") || required("MESSAGING_REQUIRE_BROKERS") {
            panic!("a broker is required here: {}", self.0);
        }
        let test = std::thread::current().name().unwrap_or("test").to_owned();
        eprintln!("skipped {test}: {}", self.0);
    }
}

/// What the launcher says of a node; changes with each restart (the pid).
#[derive(Debug, Clone, serde::Deserialize)]
pub struct NodeInfo {
    pub kind: String,
    pub version: String,
    pub pid: u32,
    pub port: u16,
    pub url: String,
    pub management_port: Option<u16>,
    pub management_url: Option<String>,
    pub tls_port: Option<u16>,
    pub tls_url: Option<String>,
    pub sasl_port: Option<u16>,
    pub sasl_tls_port: Option<u16>,
    /// The listener whose clients are sent to a proxy (`Kafka::start_behind`).
    pub proxied_port: Option<u16>,
    /// The certificate authority, in PEM; its folder has `client.pem` and the rest.
    pub ca: Option<PathBuf>,
    pub dir: PathBuf,
}

/// One node. A private one ends, with its folder, when this is dropped, or at
/// the latest when the test process ends, however it ends.
#[derive(Debug)]
pub struct Node {
    info: NodeInfo,
    folder: Option<TempDir>,
}

impl Node {
    /// Starts a private node.
    pub async fn start(kind: &str, options: &[&str]) -> Result<Self, Unavailable> {
        installed(kind).await?;
        let folder = tempfile::Builder::new()
            .prefix("hub-node-")
            .tempdir()
            .expect("a temporary folder");
        let info = start_in(kind, folder.path(), options).await;
        Ok(Self {
            info,
            folder: Some(folder),
        })
    }

    /// A node that serves all tests of this process; nobody drops it.
    pub async fn start_shared(kind: &str, variable: &str) -> Result<Self, Unavailable> {
        if let Some(dir) = std::env::var_os(variable) {
            let file = Path::new(&dir).join("node.json");
            let text = std::fs::read(&file)
                .unwrap_or_else(|e| panic!("{variable}: {}: {e}", file.display()));
            let info = parse(&text);
            assert_eq!(info.kind, kind, "{variable} points at another kind of node");
            return Ok(Self { info, folder: None });
        }
        let mut node = Self::start(kind, &[]).await?;
        // Owned by a static, which is never dropped: the launcher's keeper
        // ends the node and deletes the folder when this process has ended.
        if let Some(folder) = node.folder.take() {
            let _kept = folder.keep();
        }
        Ok(node)
    }

    pub fn info(&self) -> &NodeInfo {
        &self.info
    }

    /// Gives one of the launcher's commands and returns what it printed.
    pub async fn command(&self, name: &str, arguments: &[&str]) -> String {
        let dir = self.info.dir.to_str().expect("a folder in UTF-8");
        let mut words = vec![name, dir];
        words.extend_from_slice(arguments);
        let output = launcher(&words).await;
        assert!(
            output.status.success(),
            "scripts/brokers {name}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Starts it again, on the same ports and data.
    pub async fn restart(&mut self) {
        let _starting = STARTING.acquire().await.expect("never closed");
        self.info = parse(self.command("restart", &[]).await.as_bytes());
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if self.folder.is_some() {
            // In Drop there is no await; killing takes a tenth of a second.
            let ended = Command::new(SCRIPT)
                .arg("remove")
                .arg(&self.info.dir)
                .stdin(Stdio::null())
                .output();
            if let Ok(output) = ended
                && !output.status.success()
            {
                eprintln!(
                    "scripts/brokers remove: {}",
                    String::from_utf8_lossy(&output.stderr)
                );
            }
        }
    }
}

async fn installed(kind: &str) -> Result<(), Unavailable> {
    let output = launcher(&["installed", kind]).await;
    if output.status.success() {
        Ok(())
    } else {
        Err(Unavailable(format!(
            "{kind} is not installed (scripts/brokers install {kind}, or make test)"
        )))
    }
}

async fn start_in(kind: &str, dir: &Path, options: &[&str]) -> NodeInfo {
    let _starting = STARTING.acquire().await.expect("never closed");
    let parent = std::process::id().to_string();
    let dir = dir.to_str().expect("a folder in UTF-8");
    let mut words = vec!["start", kind, dir, "--parent-pid", &parent, "--temporary"];
    words.extend_from_slice(options);
    let output = launcher(&words).await;
    // A server that is there and does not start is a failure, not a reason to skip.
    assert!(
        output.status.success(),
        "{kind} did not start: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    parse(&output.stdout)
}

async fn launcher(words: &[&str]) -> Output {
    tokio::process::Command::new(SCRIPT)
        .args(words)
        .stdin(Stdio::null())
        .output()
        .await
        .unwrap_or_else(|e| panic!("{SCRIPT}: {e}"))
}

fn parse(json: &[u8]) -> NodeInfo {
    serde_json::from_slice(json).unwrap_or_else(|e| {
        panic!(
            "the launcher printed {:?}: {e}",
            String::from_utf8_lossy(json)
        )
    })
}

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/brokers");

/// Starting is all processor time: more at once only makes each slower than
/// its deadline.
static STARTING: Semaphore = Semaphore::const_new(2);
