//! From settings to addresses. Percent-encoding is undone here, so that a
//! password with any character works; errors never show what was given.

use lapin::uri::{AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo};

use super::{RabbitMqConfig, error::unsupported};
use crate::error::Result;

/// Every address of the cluster, in order.
pub(super) fn endpoints(config: &RabbitMqConfig) -> Result<Vec<AMQPUri>> {
    let mut uris = match &config.url {
        Some(url) if !url.is_empty() => from_urls(url.expose())?,
        _ => vec![from_parts(config)],
    };
    for uri in &mut uris {
        if config.tls.is_some() && uri.scheme == AMQPScheme::AMQP {
            uri.scheme = AMQPScheme::AMQPS;
        }
        if uri.authority.port == 0 {
            uri.authority.port = uri.scheme.default_port();
        }
        uri.query.heartbeat.get_or_insert_with(|| {
            // The wire has whole seconds, and 0 would turn it off.
            let seconds = config.heartbeat.as_millis().div_ceil(1000).max(1);
            u16::try_from(seconds).unwrap_or(u16::MAX)
        });
    }
    Ok(uris)
}

/// The address without credentials, such as `amqp://host:5672/vhost`.
pub(super) fn display(uri: &AMQPUri) -> String {
    let host = &uri.authority.host;
    let port = uri.authority.port;
    let vhost = if uri.vhost == "/" { "" } else { &uri.vhost };
    if host.contains(':') {
        format!("{}://[{host}]:{port}/{vhost}", uri.scheme)
    } else {
        format!("{}://{host}:{port}/{vhost}", uri.scheme)
    }
}

fn from_parts(config: &RabbitMqConfig) -> AMQPUri {
    AMQPUri {
        scheme: if config.tls.is_some() {
            AMQPScheme::AMQPS
        } else {
            AMQPScheme::AMQP
        },
        authority: AMQPAuthority {
            userinfo: AMQPUserInfo {
                username: config.username.clone(),
                password: config.password.expose().to_owned(),
            },
            host: config.host.clone(),
            port: config.port.unwrap_or(0),
        },
        vhost: config.vhost.clone(),
        query: AMQPQueryString::default(),
    }
}

/// `amqp://u:p@a:1/v,amqp://u:p@b:2/v`, or `amqp://u:p@a:1,b:2/v`: what a later
/// part leaves out it takes from the first, and the vhost from the last.
fn from_urls(text: &str) -> Result<Vec<AMQPUri>> {
    let mut uris: Vec<AMQPUri> = Vec::new();
    for (i, part) in text.split(',').map(str::trim).enumerate() {
        let wrong = |why: &str| {
            unsupported(format!(
                "rabbitmq url, address {}: {why}; expected amqp://USER:PASSWORD@HOST:PORT/VHOST with special characters percent-encoded",
                i + 1
            ))
        };
        if part.is_empty() {
            return Err(wrong("it is empty"));
        }
        if part.contains("://") {
            uris.push(parse(part).map_err(wrong)?);
            continue;
        }
        let Some(first) = uris.first().cloned() else {
            return Err(wrong("it does not begin with amqp:// or amqps://"));
        };
        let uri = parse(&format!("{}://{part}", first.scheme)).map_err(wrong)?;
        let has_path = part.contains('/');
        let next = AMQPUri {
            authority: AMQPAuthority {
                userinfo: first.authority.userinfo,
                ..uri.authority
            },
            vhost: if has_path {
                uri.vhost.clone()
            } else {
                first.vhost
            },
            query: if part.contains('?') {
                uri.query
            } else {
                first.query
            },
            scheme: first.scheme,
        };
        if has_path {
            for earlier in &mut uris {
                earlier.vhost.clone_from(&next.vhost);
                earlier.query.clone_from(&next.query);
            }
        }
        uris.push(next);
    }
    Ok(uris)
}

fn parse(text: &str) -> Result<AMQPUri, &'static str> {
    let (scheme, rest) = text.split_once("://").ok_or("it has no scheme")?;
    let scheme = match scheme.to_ascii_lowercase().as_str() {
        "amqp" => AMQPScheme::AMQP,
        "amqps" => AMQPScheme::AMQPS,
        _ => return Err("the scheme is neither amqp nor amqps"),
    };
    let (rest, query) = match rest.split_once('?') {
        Some((rest, query)) => (rest, parse_query(query)?),
        None => (rest, AMQPQueryString::default()),
    };
    let (authority, path) = match rest.split_once('/') {
        Some((authority, path)) => (authority, path),
        None => (rest, ""),
    };
    let (userinfo, host) = match authority.rsplit_once('@') {
        Some((userinfo, host)) => (Some(userinfo), host),
        None => (None, authority),
    };
    let userinfo = match userinfo {
        None => AMQPUserInfo::default(),
        Some(text) => {
            let (user, password) = text.split_once(':').unwrap_or((text, ""));
            AMQPUserInfo {
                username: decode(user)?,
                password: decode(password)?,
            }
        }
    };
    let (host, port) = host_and_port(host)?;
    Ok(AMQPUri {
        scheme,
        authority: AMQPAuthority {
            userinfo,
            host,
            port,
        },
        // A bare trailing slash is written by people who mean the default.
        vhost: if path.is_empty() {
            "/".to_owned()
        } else {
            decode(path)?
        },
        query,
    })
}

fn host_and_port(text: &str) -> Result<(String, u16), &'static str> {
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let (host, rest) = rest
            .split_once(']')
            .ok_or("the IPv6 address has no closing ]")?;
        match rest.strip_prefix(':') {
            Some(port) => (host.to_owned(), Some(port)),
            None if rest.is_empty() => (host.to_owned(), None),
            None => return Err("something that is no port follows the IPv6 address"),
        }
    } else {
        match text.split_once(':') {
            Some((host, port)) => (decode(host)?, Some(port)),
            None => (decode(text)?, None),
        }
    };
    if host.is_empty() {
        return Err("it has no host");
    }
    match port {
        None => Ok((host, 0)),
        Some(port) => match port.parse::<u16>() {
            Ok(port) if port > 0 => Ok((host, port)),
            _ => Err("the port is not a number from 1 to 65535"),
        },
    }
}

fn parse_query(text: &str) -> Result<AMQPQueryString, &'static str> {
    let mut query = AMQPQueryString::default();
    for pair in text.split('&').filter(|p| !p.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        match name {
            "heartbeat" => {
                query.heartbeat = Some(
                    value
                        .parse()
                        .map_err(|_| "heartbeat is not a number of seconds")?,
                );
            }
            "frame_max" => {
                query.frame_max = Some(
                    value
                        .parse()
                        .map_err(|_| "frame_max is not a number of bytes")?,
                );
            }
            "channel_max" => {
                query.channel_max = Some(value.parse().map_err(|_| "channel_max is not a number")?);
            }
            "auth_mechanism" => {
                query.auth_mechanism =
                    Some(value.parse().map_err(|_| "auth_mechanism is not known")?);
            }
            "connection_timeout" => {
                return Err("set connection_timeout in the settings, not in the address");
            }
            _ => {
                return Err(
                    "it has an unknown query parameter (known: heartbeat, frame_max, channel_max, auth_mechanism)",
                );
            }
        }
    }
    Ok(query)
}

fn decode(text: &str) -> Result<String, &'static str> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&b, tail)) = rest.split_first() {
        rest = tail;
        if b != b'%' {
            bytes.push(b);
            continue;
        }
        let digit = |at: usize| tail.get(at).and_then(|d| char::from(*d).to_digit(16));
        let (Some(high), Some(low)) = (digit(0), digit(1)) else {
            return Err("a % is not followed by two hexadecimal digits");
        };
        bytes.push(u8::try_from(high * 16 + low).unwrap_or_default());
        rest = tail.get(2..).unwrap_or_default();
    }
    String::from_utf8(bytes).map_err(|_| "what is percent-encoded is not UTF-8")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::Secret;

    fn urls(url: &str) -> Result<Vec<AMQPUri>> {
        endpoints(&RabbitMqConfig {
            url: Some(Secret::new(url)),
            ..RabbitMqConfig::default()
        })
    }

    #[test]
    fn fault_17_the_port_of_an_address_is_written_as_a_number() {
        // Fault 17: the port was printed as one character.
        for port in [1, 80, 5672, 25672, 65535] {
            let config = RabbitMqConfig {
                port: Some(port),
                ..RabbitMqConfig::default()
            };
            let uri = &endpoints(&config).unwrap()[0];
            assert_eq!(display(uri), format!("amqp://localhost:{port}/"));
            assert_eq!(uri.authority.port, port);
        }
    }

    #[test]
    fn credentials_and_vhost_may_have_any_character() {
        let uri = &urls("amqp://us%40er:p%2F%3A%40%25w@host:1234/my%2Fvhost").unwrap()[0];
        assert_eq!(uri.authority.userinfo.username, "us@er");
        assert_eq!(uri.authority.userinfo.password, "p/:@%w");
        assert_eq!(uri.vhost, "my/vhost");
        assert_eq!(display(uri), "amqp://host:1234/my/vhost");
    }

    #[test]
    fn what_is_left_out_has_its_default() {
        let uri = &urls("amqp://stage7:pw@rabbitmq").unwrap()[0];
        assert_eq!((uri.authority.port, uri.vhost.as_str()), (5672, "/"));
        assert_eq!(uri.query.heartbeat, Some(5));
        let uri = &urls("amqps://rabbitmq/").unwrap()[0];
        assert_eq!((uri.authority.port, uri.vhost.as_str()), (5671, "/"));
        assert_eq!(uri.authority.userinfo.username, "guest");
        let uri = &urls("amqp://[::1]:7000/%2f?heartbeat=9").unwrap()[0];
        assert_eq!(
            (uri.authority.host.as_str(), uri.authority.port),
            ("::1", 7000)
        );
        assert_eq!((uri.vhost.as_str(), uri.query.heartbeat), ("/", Some(9)));
    }

    #[test]
    fn tls_moves_the_default_port() {
        let config = RabbitMqConfig {
            tls: Some(Default::default()),
            ..RabbitMqConfig::default()
        };
        assert_eq!(
            display(&endpoints(&config).unwrap()[0]),
            "amqps://localhost:5671/"
        );
    }

    #[test]
    fn a_cluster_is_several_addresses() {
        let all: Vec<_> = urls("amqp://u:p@a:1,b:2,c/prod")
            .unwrap()
            .iter()
            .map(display)
            .collect();
        assert_eq!(
            all,
            ["amqp://a:1/prod", "amqp://b:2/prod", "amqp://c:5672/prod"]
        );
        let whole = urls("amqp://u:p@a:1/x, amqps://v:q@b/y").unwrap();
        assert_eq!(whole[1].authority.userinfo.username, "v");
        assert_eq!(display(&whole[1]), "amqps://b:5671/y");
    }

    #[test]
    fn errors_say_what_is_wrong_and_show_no_secret() {
        for bad in [
            "amqp://u:topsecret@h:70000",
            "http://u:topsecret@h",
            "amqp://u:topsecret%zz@h",
            "amqp://u:topsecret@",
            "amqp://u:topsecret@h?x=1",
            "topsecret",
        ] {
            let error = urls(bad).unwrap_err().to_string();
            assert!(!error.contains("topsecret"), "{error}");
            assert!(error.contains("INVALID_CONFIG"), "{error}");
        }
    }
}
