//! The hub's process: the real binary with a data folder, killed, stopped,
//! paused and started again, behind the proxies that are its clients' network.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{TcpProxy, wait};

pub struct Hub {
    child: Child,
    /// What it prints after it listens is nothing, but it must not block.
    _out: BufReader<ChildStdout>,
    folder: PathBuf,
    /// Where it really listens; clients go through `proxy`.
    own_url: String,
    /// What publishers go through.
    pub proxy: TcpProxy,
    /// What readers go through.
    pub reader_proxy: TcpProxy,
    life: Arc<AtomicU32>,
    client: reqwest::Client,
}

/// What `/v1/state` said of the one route that a cell uses.
#[derive(Debug, Clone, PartialEq)]
pub struct Seen {
    pub state: String,
    pub messages: u64,
    pub in_doubt: u64,
    pub remaining: u64,
    pub durable: bool,
    pub connected: bool,
}

impl Seen {
    /// The spool is empty and the route is primary.
    pub fn is_well(&self) -> bool {
        self.state == "primary" && self.messages == 0
    }
}

impl Hub {
    /// Starts it with `folder/hub.yaml` on `folder/data`.
    pub async fn start(folder: &Path) -> Self {
        let (child, out, own_url) = spawn(folder).await;
        let proxy = TcpProxy::start(address(&own_url)).await.unwrap();
        let reader_proxy = TcpProxy::start(address(&own_url)).await.unwrap();
        Self {
            child,
            _out: out,
            folder: folder.to_owned(),
            own_url,
            proxy,
            reader_proxy,
            life: Arc::new(AtomicU32::new(1)),
            client: reqwest::Client::builder()
                .timeout(Duration::from_secs(5))
                .build()
                .unwrap(),
        }
    }

    /// For publishers: stays when the process is another.
    pub fn url(&self) -> String {
        format!("http://{}", self.proxy.address())
    }

    /// For readers.
    pub fn reader_url(&self) -> String {
        format!("http://{}", self.reader_proxy.address())
    }

    /// Counts the processes, from 1.
    pub fn life(&self) -> Arc<AtomicU32> {
        self.life.clone()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What `/v1/state` says, past the proxy; none when it does not answer.
    pub async fn seen(&self) -> Option<Seen> {
        let url = format!("{}/v1/state", self.own_url);
        let state: Value = self.client.get(url).send().await.ok()?.json().await.ok()?;
        let route = state["routes"]
            .as_array()?
            .iter()
            .find(|r| r["pattern"] == crate::site::PATTERN)?;
        let broker = state["brokers"]
            .as_array()?
            .iter()
            .find(|b| b["type"] == route["primary"])?;
        Some(Seen {
            state: route["state"].as_str()?.to_owned(),
            messages: route["spool"]["messages"].as_u64()?,
            in_doubt: route["spool"]["in_doubt"].as_u64()?,
            remaining: route["drain"]["remaining"].as_u64()?,
            durable: route["spool"]["durable"].as_bool()?,
            connected: broker["connected"].as_bool()?,
        })
    }

    /// Asks until it is as it is wanted, and panics with all that the hub says
    /// when that takes longer than `limit`.
    pub async fn until(
        &self,
        limit: Duration,
        pause: Duration,
        wanted: &str,
        good: impl Fn(&Seen) -> bool,
    ) {
        let deadline = Instant::now() + limit;
        while !self.seen().await.is_some_and(|seen| good(&seen)) {
            assert!(
                Instant::now() < deadline,
                "{wanted}: not after {limit:?}; the hub says {}",
                self.everything().await
            );
            tokio::time::sleep(pause).await;
        }
    }

    /// All it says, for the report of a failure.
    pub async fn everything(&self) -> String {
        let url = format!("{}/v1/state", self.own_url);
        match self.client.get(url).send().await {
            Ok(answer) => answer.text().await.unwrap_or_default(),
            Err(error) => error.to_string(),
        }
    }

    pub fn kill(&mut self) {
        signal(self.pid(), "KILL");
        self.child.wait().unwrap();
    }

    pub fn pause(&self) {
        signal(self.pid(), "STOP");
    }

    pub fn resume(&self) {
        signal(self.pid(), "CONT");
    }

    /// Ends it in good order.
    pub async fn stop(&mut self) -> ExitStatus {
        signal(self.pid(), "TERM");
        wait::value(STOP, "the hub ends on a signal", || {
            let status = self.child.try_wait().unwrap();
            async move { status }
        })
        .await
    }

    /// The next process on the same folder.
    pub async fn start_again(&mut self) {
        let (child, out, own_url) = spawn(&self.folder).await;
        self.life.fetch_add(1, Ordering::SeqCst);
        self.child = child;
        self._out = out;
        self.proxy.set_target(address(&own_url));
        self.reader_proxy.set_target(address(&own_url));
        self.own_url = own_url;
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        // A stopped process is killed as well.
        let _already_gone = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends a signal at once, without the launcher's detours.
pub fn signal(pid: u32, name: &str) {
    let done = Command::new("kill")
        .args(["-s", name, &pid.to_string()])
        .status()
        .unwrap();
    assert!(done.success(), "kill -s {name} {pid}");
}

async fn spawn(folder: &Path) -> (Child, BufReader<ChildStdout>, String) {
    let folder = folder.to_owned();
    tokio::task::spawn_blocking(move || {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(folder.join("hub.log"))
            .unwrap();
        #[allow(
            clippy::zombie_processes,
            reason = "whoever gets the child waits for it"
        )]
        let mut child = Command::new(env!("CARGO_BIN_EXE_messaging-hub"))
            .env_clear()
            .args(["serve", "--http", "127.0.0.1:0", "--config"])
            .arg(folder.join("hub.yaml"))
            .arg("--data")
            .arg(folder.join("data"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        loop {
            let mut line = String::new();
            if out.read_line(&mut line).unwrap() == 0 {
                let _ = child.wait();
                panic!("the hub did not start: {}", tail(&folder.join("hub.log")));
            }
            if let Some(url) = line.trim().strip_prefix("listening ") {
                return (child, out, url.to_owned());
            }
        }
    })
    .await
    .unwrap()
}

/// The last lines of a file.
pub fn tail(file: &Path) -> String {
    let lines: Vec<String> = File::open(file).map_or_else(
        |_| Vec::new(),
        |file| BufReader::new(file).lines().map_while(Result::ok).collect(),
    );
    lines[lines.len().saturating_sub(30)..].join("\n")
}

fn address(url: &str) -> std::net::SocketAddr {
    url.strip_prefix("http://").unwrap().parse().unwrap()
}

const STOP: Duration = Duration::from_secs(45);
