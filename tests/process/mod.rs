//! Runs the real binary and talks to it.
#![allow(dead_code, unreachable_pub)]

use std::{
    io::{BufRead, BufReader, Read},
    process::{Child, Command, ExitStatus, Output, Stdio},
    time::{Duration, Instant},
};

/// How long anything may take before a test fails.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A running hub, killed when dropped.
pub struct Hub {
    child: Child,
    pub url: String,
    pub report: String,
}

/// The binary with nothing of this process's environment that it would read.
pub fn binary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_messaging-hub"));
    command.env_clear();
    command
}

/// Runs the binary to its end.
pub fn run(arguments: &[&str]) -> Output {
    binary()
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

impl Hub {
    pub fn start() -> Self {
        Self::start_with(&[], &[])
    }

    pub fn start_with(arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        let mut child = binary()
            .args(["serve", "--http", "127.0.0.1:0"])
            .args(arguments)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut report = String::new();
        let url = loop {
            let mut line = String::new();
            if out.read_line(&mut line).unwrap() == 0 {
                let mut why = String::new();
                let _ = child.stderr.take().unwrap().read_to_string(&mut why);
                panic!("the hub did not start: {why}");
            }
            if let Some(url) = line.trim().strip_prefix("listening ") {
                break url.to_owned();
            }
            report.push_str(&line);
        };
        Self { child, url, report }
    }

    pub fn at(&self, path: &str) -> String {
        format!("{}{path}", self.url)
    }

    pub fn address(&self) -> &str {
        self.url.strip_prefix("http://").unwrap()
    }

    /// Runs another command of the binary against this hub.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = binary();
        command.args(arguments).env("MESSAGING_URL", &self.url);
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// What `/v1/state` says.
    pub async fn state(&self) -> serde_json::Value {
        let answer = reqwest::get(self.at("/v1/state")).await.unwrap();
        answer.json().await.unwrap()
    }

    /// Messages in the spools of all routes.
    pub async fn spooled(&self) -> u64 {
        let state = self.state().await;
        let routes = state["routes"].as_array().unwrap().iter();
        routes.filter_map(|r| r["spool"]["messages"].as_u64()).sum()
    }

    /// The ids of what is scheduled, by their times.
    pub async fn scheduled(&self) -> Vec<String> {
        let page = reqwest::get(self.at("/v1/scheduled")).await.unwrap();
        let page: serde_json::Value = page.json().await.unwrap();
        let ids = page["scheduled"].as_array().unwrap().iter();
        ids.map(|s| s["id"].as_str().unwrap().to_owned()).collect()
    }

    /// What a queue hands out within `wait`.
    pub async fn lease(&self, queue: &str, max: usize, wait: Duration) -> Vec<serde_json::Value> {
        let leased = self.try_lease(queue, max, wait).await;
        leased.unwrap_or_else(|problem| panic!("{problem}"))
    }

    /// As `lease`, or the problem that the hub answers with.
    pub async fn try_lease(
        &self,
        queue: &str,
        max: usize,
        wait: Duration,
    ) -> Result<Vec<serde_json::Value>, serde_json::Value> {
        let wait = u64::try_from(wait.as_millis()).unwrap();
        let ask = serde_json::json!({"max": max, "wait_ms": wait});
        let path = self.at(&format!("/v1/queues/{queue}/lease"));
        let answer = reqwest::Client::new().post(path).json(&ask).send().await;
        let answer: serde_json::Value = answer.unwrap().json().await.unwrap();
        match answer["deliveries"].as_array() {
            Some(deliveries) => Ok(deliveries.clone()),
            None => Err(answer),
        }
    }

    /// Acks what was leased.
    pub async fn ack(&self, leased: &[serde_json::Value]) {
        if leased.is_empty() {
            return;
        }
        let tokens: Vec<_> = leased.iter().map(|d| &d["token"]).collect();
        let path = self.at("/v1/deliveries/ack");
        let ask = serde_json::json!({"tokens": tokens});
        let acked = reqwest::Client::new().post(path).json(&ask).send().await;
        assert!(acked.unwrap().status().is_success());
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends SIGTERM or the like.
    pub fn signal(&self, name: &str) {
        let done = Command::new("kill")
            .args(["-s", name, &self.child.id().to_string()])
            .status()
            .unwrap();
        assert!(done.success());
    }

    /// Waits for the end; stderr with it.
    #[allow(
        clippy::disallowed_methods,
        reason = "polls a process until a deadline, on the test's own thread"
    )]
    pub fn ended(&mut self) -> (ExitStatus, String) {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "the hub did not end");
            std::thread::sleep(Duration::from_millis(10));
        };
        let mut err = String::new();
        if let Some(mut from) = self.child.stderr.take() {
            let _ = from.read_to_string(&mut err);
        }
        (status, err)
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
