//! `serve`: a hub with its HTTP server, until a signal.
//!
//! The first SIGINT or SIGTERM stops intake, lets running requests end, gives
//! leases back and closes the hub, all within the grace period. The second one
//! ends the process at once.

use std::{
    fmt::Display,
    io::{IsTerminal as _, Write as _},
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
};

use clap::Args;
use tokio::time::Instant;
use tracing_appender::non_blocking::{NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{EnvFilter, fmt::format::FmtSpan};

use super::{Failure, Target, say, signals::Signals};
use crate::{
    config::{FallbackKind, LogConfig, LogFormat, MessagingConfig},
    gateway::http::{HttpOptions, HttpServer},
    system::MessagingSystem,
};

/// Run a hub.
#[derive(Debug, Args)]
pub(super) struct Serve {
    /// Configuration file. Default: the built-in one and the environment.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Address of HTTP; port 0 takes a free one. Default 127.0.0.1:8090.
    #[arg(long, value_name = "ADDR")]
    http: Option<String>,
    /// Address of TCP. Refused: this version has no TCP gateway.
    #[arg(long, value_name = "ADDR")]
    tcp: Option<String>,
    /// Data folder: what is spooled, and the embedded broker's queues and
    /// streams, survive the process there. Default: one in the user's own
    /// data folder, named by the address.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Start although a broker refuses the credentials.
    #[arg(long)]
    start_degraded: bool,
}

impl Serve {
    pub(super) async fn run(self, target: &Target) -> Result<ExitCode, Failure> {
        if self.tcp.is_some() {
            return Err(Failure::usage(
                "--tcp cannot be honoured: this version has no TCP gateway; leave it out",
            ));
        }
        let mut config = load(self.config.as_deref())?;
        let given = self.http.is_some();
        if let Some(http) = self.http {
            config.server.http = http;
        }
        if let Some(data) = self.data {
            config.data_dir = Some(data);
        } else if config.data_dir.is_none() && config.fallback.kind == FallbackKind::Journal {
            config.data_dir = super::data::own_folder(&config.server.http);
        }
        let _folder = match &config.data_dir {
            Some(dir) => Some(super::data::DataFolder::take(dir)?),
            None => None,
        };
        let log = start_log(&config.log)?;
        let options = HttpOptions {
            address: resolve(&config.server.http)
                .await
                .map_err(|e| match given {
                    true => Failure::usage(e.message),
                    false => e,
                })?,
            token: target.token.clone().filter(|t| !t.is_empty()),
            allowed_hosts: config.server.allowed_hosts.clone(),
            allowed_origins: config.server.allowed_origins.clone(),
        };
        say(config.report().trim_end())?;
        let grace = config.hub.shutdown_grace;
        // From here on a signal is an orderly end.
        let mut signals = Signals::new()?;
        let system = MessagingSystem::new(config).with_start_degraded(self.start_degraded);
        tokio::select! {
            started = system.initialize() => started?,
            () = signals.next() => {
                log.tell("stopped before it was started");
                return Ok(ExitCode::SUCCESS);
            }
        }
        let server = match HttpServer::start(system.hub(), options).await {
            Ok(server) => server,
            Err(e) => {
                system.hub().close(grace).await;
                return Err(e.into());
            }
        };
        say(format!("listening http://{}", server.address()))?;
        signals.next().await;
        log.tell(format_args!(
            "stopping, within {} s; a second signal ends at once",
            grace.as_secs()
        ));
        tokio::select! {
            left = stop(&log, &server, &system, grace) => Ok(left),
            () = signals.next() => {
                log.tell("ended at once by a second signal; what was in memory is lost");
                Ok(ExitCode::FAILURE)
            }
        }
    }
}

async fn stop(
    log: &Log,
    server: &HttpServer,
    system: &MessagingSystem,
    grace: std::time::Duration,
) -> ExitCode {
    let deadline = Instant::now() + grace;
    // Half for requests, so that the lanes have time to flush.
    if !server.stop(grace / 2).await {
        log.tell("some requests did not end in time and were cut off");
    }
    let rest = deadline.saturating_duration_since(Instant::now());
    let report = system.hub().close(rest).await;
    if report.handlers_given_up > 0 {
        log.tell(format_args!(
            "{} handlers did not end in time; their messages were given back",
            report.handlers_given_up
        ));
    }
    if report.left_in_journal > 0 {
        log.tell(format_args!(
            "{} accepted messages are still in the data folder; the next start goes on with them",
            report.left_in_journal
        ));
    }
    if report.left_in_memory_spool > 0 {
        log.tell(format_args!("{} accepted messages were still in the memory spool and are lost; the brokers did not come back in time",
            report.left_in_memory_spool));
        return ExitCode::FAILURE;
    }
    log.tell("stopped");
    ExitCode::SUCCESS
}

/// The configuration of a file, or the built-in one, with the environment.
pub(super) fn load(file: Option<&std::path::Path>) -> Result<MessagingConfig, Failure> {
    Ok(match file {
        Some(file) => MessagingConfig::from_yaml(file)?,
        None => MessagingConfig::from_env()?,
    })
}

async fn resolve(text: &str) -> Result<SocketAddr, Failure> {
    let wrong = |why: String| {
        Failure::new(format!(
            "the HTTP address {text:?} cannot be used: {why}; write host:port, such as 127.0.0.1:8090"
        ))
    };
    let mut found = tokio::net::lookup_host(text)
        .await
        .map_err(|e| wrong(e.to_string()))?;
    found
        .next()
        .ok_or_else(|| wrong("it has no address".to_owned()))
}

/// What goes to standard error. A thread of its own writes: a reader that stands
/// still, or a pipe that nobody reads, must not hold back those who have something
/// to say. It is written to the end when this is dropped, if somebody reads.
struct Log {
    writer: NonBlocking,
    _guard: WorkerGuard,
}

impl Log {
    /// Says something to whoever started the hub, at any log level.
    fn tell(&self, text: impl Display) {
        // Takes it always; without room it drops it.
        let _ = self
            .writer
            .clone()
            .write_all(format!("{text}\n").as_bytes());
    }
}

fn start_log(log: &LogConfig) -> Result<Log, Failure> {
    let filter = EnvFilter::try_new(&log.level).map_err(|e| {
        Failure::new(format!(
            "the log level {:?} is not understood: {e}; use info, or info,messaging_hub=debug",
            log.level
        ))
    })?;
    // Colours are for eyes: a file or a collector would keep the escapes.
    let colours = std::io::stderr().is_terminal()
        && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let (writer, _guard) = NonBlockingBuilder::default()
        .buffered_lines_limit(LOG_LINES)
        .lossy(true)
        .thread_name("log")
        .finish(std::io::stderr());
    let base = tracing_subscriber::fmt()
        .with_ansi(colours)
        .with_env_filter(filter)
        .with_span_events(FmtSpan::NONE)
        .with_writer(writer.clone());
    let done = match log.format {
        LogFormat::Text => base.try_init(),
        LogFormat::Json => base.json().try_init(),
    };
    done.map_err(|e| Failure::new(format!("the log cannot be started: {e}")))?;
    Ok(Log { writer, _guard })
}

/// Lines that wait to be written at most; of more than that some are dropped.
const LOG_LINES: usize = 8192;
