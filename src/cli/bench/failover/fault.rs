//! How RabbitMQ is taken away and given back: killed and started by the user's
//! commands, or cut off by a proxy in between.

use super::{
    super::{Plan, shell},
    proxy::Proxy,
};
use crate::cli::Failure;

/// A fault that can be struck once and mended once.
pub(super) enum Fault {
    /// The broker's process dies.
    Kill { kill: String, start: String },
    /// The link breaks; the broker does not notice more than that.
    Cut(Proxy),
}

impl Fault {
    /// The fault that was asked for, and the address that meets it.
    pub(super) async fn new(plan: &Plan, url: &str) -> Result<(Self, String), Failure> {
        let options = &plan.options;
        let pid = options.broker_pid.map(|pid| format!("kill -9 {pid}"));
        let kill = options.broker_kill.clone().or(pid);
        if let (Some(kill), Some(start)) = (kill, options.broker_start.clone()) {
            return Ok((Self::Kill { kill, start }, url.to_owned()));
        }
        let (target, rest) = target(url)?;
        let proxy = Proxy::start(target).await?;
        let through = rest.replace(HERE, &proxy.address().to_string());
        Ok((Self::Cut(proxy), through))
    }

    /// `kill` or `cut`.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Kill { .. } => "kill",
            Self::Cut(_) => "cut",
        }
    }

    pub(super) async fn strike(&self, plan: &Plan) -> Result<(), Failure> {
        match self {
            Self::Kill { kill, start } => {
                // Before it is dead: whatever happens, it is started again.
                plan.leftovers.killed(Some(start));
                shell::run(kill).await
            }
            Self::Cut(proxy) => {
                proxy.cut();
                Ok(())
            }
        }
    }

    pub(super) async fn mend(&self, plan: &Plan) -> Result<(), Failure> {
        match self {
            Self::Kill { start, .. } => {
                shell::run(start).await?;
                plan.leftovers.killed(None);
                Ok(())
            }
            Self::Cut(proxy) => {
                proxy.mend();
                Ok(())
            }
        }
    }
}

/// `host:port` of an address, and the address with [`HERE`] in its place.
fn target(url: &str) -> Result<(String, String), Failure> {
    let first = url.split(',').next().unwrap_or_default().trim();
    let Some(rest) = first.strip_prefix("amqp://") else {
        return Err(Failure::usage(
            "the link can be cut only of an amqp:// address: with TLS the proxy would be found out; give --broker-start and --broker-kill instead",
        ));
    };
    let (authority, path) = match rest.find(['/', '?']) {
        Some(at) => rest.split_at(at),
        None => (rest, ""),
    };
    let (user, host) = match authority.rsplit_once('@') {
        Some((user, host)) => (format!("{user}@"), host),
        None => (String::new(), authority),
    };
    let has_port = host
        .rsplit_once(':')
        .is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    let host = match (host.is_empty(), has_port) {
        (true, _) => "localhost:5672".to_owned(),
        (false, true) => host.to_owned(),
        (false, false) => format!("{host}:5672"),
    };
    Ok((host, format!("amqp://{user}{HERE}{path}")))
}

/// Stands where the proxy's address comes.
const HERE: &str = "\u{1}";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_proxy_takes_the_place_of_host_and_port_alone() {
        for (url, host, rest) in [
            ("amqp://u:p@h:1/%2f", "h:1", "amqp://u:p@\u{1}/%2f"),
            ("amqp://h", "h:5672", "amqp://\u{1}"),
            (
                "amqp://u:p%40@[::1]?heartbeat=5",
                "[::1]:5672",
                "amqp://u:p%40@\u{1}?heartbeat=5",
            ),
            ("amqp://a:1/v,amqp://b:2/v", "a:1", "amqp://\u{1}/v"),
        ] {
            let found = target(url).unwrap();
            assert_eq!(found, (host.to_owned(), rest.to_owned()), "{url}");
        }
        assert!(target("amqps://h").is_err());
    }
}
