//! The command line. `serve` runs a hub; the other commands talk to a running
//! one over HTTP, or look at a configuration.
//!
//! Exit status: 0 done, 1 failed, 2 wrong usage. Results go to stdout, errors
//! and the log to stderr.

mod bench;
mod client;
mod config;
mod data;
mod dlq;
mod publish;
mod replay;
mod schedule;
mod serve;
mod signals;
mod spool;
mod sse;
mod state;
mod subscribe;
mod topology;

use std::process::ExitCode;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, parser::ValueSource};

use crate::secret::Secret;

/// Runs the command that this process was started with.
#[must_use]
pub fn run() -> ExitCode {
    let parsed = Cli::command().try_get_matches().and_then(|matches| {
        let given = is_url_given(&matches);
        Cli::from_arg_matches(&matches).map(|cli| (cli, given))
    });
    let (cli, url_given) = match parsed {
        Ok(parsed) => parsed,
        Err(e) => {
            // Help and version go to stdout and are no failure. A closed
            // terminal is nothing to fail on.
            let _ = e.print();
            return if e.use_stderr() {
                ExitCode::from(USAGE)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(e) => {
            eprintln!("error: the runtime cannot be started: {e}");
            return ExitCode::FAILURE;
        }
    };
    let code = match runtime.block_on(cli.run(url_given)) {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("error: {}", failure.message);
            failure.code
        }
    };
    // Not the end of a scope: a read from a terminal cannot be cancelled and
    // would hold the process.
    runtime.shutdown_background();
    code
}

/// One API over RabbitMQ and Kafka that never loses an accepted message.
#[derive(Debug, Parser)]
#[command(name = "messaging-hub", version, about, arg_required_else_help = true)]
struct Cli {
    #[command(flatten)]
    target: Target,
    #[command(subcommand)]
    command: Command,
}

/// Which hub to talk to, and how to answer.
#[derive(Clone, Debug, Args)]
struct Target {
    /// The running hub to talk to.
    #[arg(
        long,
        global = true,
        env = "MESSAGING_URL",
        default_value = "http://127.0.0.1:8090"
    )]
    url: String,
    /// Answer in JSON, for machines.
    #[arg(long, global = true)]
    json: bool,
    /// The token of the hub's HTTP server (serve: the one to ask for).
    #[arg(long = "http-token", global = true, env = "MESSAGING_HTTP_TOKEN", hide_env_values = true, value_parser = secret)]
    token: Option<Secret>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a hub until SIGINT or SIGTERM.
    Serve(serve::Serve),
    /// Publish a message, or a stream of them.
    Publish(publish::Publish),
    /// Print what arrives: streams are read, work queues are leased and acked.
    Subscribe(subscribe::Subscribe),
    /// Show routes, brokers and weakened guarantees.
    State(state::State),
    /// Look at the spool, pause and resume its drain, export it.
    #[command(subcommand)]
    Spool(spool::Spool),
    /// Publish again what streams have of a stretch of time.
    #[command(subcommand)]
    Replay(replay::Replay),
    /// Look at what waits for its time, and call it off.
    #[command(subcommand)]
    Schedule(schedule::Schedule),
    /// Look at dead letters, publish them again, give them up.
    #[command(subcommand)]
    Dlq(dlq::Dlq),
    /// Compare what should exist on the brokers with what does.
    #[command(subcommand)]
    Topology(topology::Topology),
    /// Check or show a configuration.
    #[command(subcommand)]
    Config(config::Config),
    /// Measure the hub side by side with the bare clients, files and channels
    /// that it stands on.
    Bench(bench::Bench),
    /// Ask a hub and its brokers whether they work.
    Health,
}

impl Cli {
    async fn run(self, url_given: bool) -> Result<ExitCode, Failure> {
        let target = self.target;
        match self.command {
            Command::Serve(serve) => serve.run(&target).await,
            Command::Publish(publish) => publish.run(&target).await,
            Command::Subscribe(subscribe) => subscribe.run(&target).await,
            Command::State(state) => state.run(&target).await,
            Command::Spool(spool) => spool.run(&target).await,
            Command::Replay(replay) => replay.run(&target).await,
            Command::Schedule(schedule) => schedule.run(&target).await,
            Command::Dlq(dlq) => dlq.run(&target).await,
            Command::Topology(topology) => topology.run(&target).await,
            Command::Config(config) => config.run(&target),
            Command::Bench(bench) => bench.run(&target, url_given).await,
            Command::Health => state::health(&target).await,
        }
    }
}

/// Whether the hub's address was written on the command line, rather than being
/// the default or the environment's.
fn is_url_given(matches: &clap::ArgMatches) -> bool {
    let (_, of_command) = matches.subcommand().unzip();
    // A global argument is known at the command that it was written behind.
    [Some(matches), of_command]
        .into_iter()
        .flatten()
        .any(|m| m.value_source("url") == Some(ValueSource::CommandLine))
}

/// Why a command failed: what, where, and what to do.
#[derive(Debug)]
struct Failure {
    message: String,
    code: ExitCode,
    /// The problem's code, when a hub answered with one.
    problem: Option<String>,
}

impl Failure {
    fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            code: ExitCode::FAILURE,
            problem: None,
        }
    }

    fn usage(message: impl Into<String>) -> Self {
        Self {
            code: ExitCode::from(USAGE),
            ..Self::new(message)
        }
    }
}

impl From<crate::Error> for Failure {
    fn from(e: crate::Error) -> Self {
        Self::new(e.to_string())
    }
}

impl From<std::io::Error> for Failure {
    fn from(e: std::io::Error) -> Self {
        Self::new(format!("stdout cannot be written: {e}"))
    }
}

fn secret(text: &str) -> Result<Secret, std::convert::Infallible> {
    Ok(Secret::new(text))
}

/// Writes a line to stdout and lets it be seen at once.
fn say(line: impl AsRef<[u8]>) -> std::io::Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    out.write_all(line.as_ref())?;
    out.write_all(b"\n")?;
    out.flush()
}

/// The exit status of wrong usage.
const USAGE: u8 = 2;
