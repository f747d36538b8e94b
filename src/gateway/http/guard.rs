//! Who may talk to the server. Without a token only loopback is served, and a
//! web page must not reach it through the user's browser: `Host` must name
//! loopback (against DNS rebinding), and so must `Origin` when there is one.

use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};

use super::{App, HttpOptions, problem::Problem};

/// Checks a request, and gives every refusal of the framework's own the form
/// of a problem.
pub(super) async fn guard(State(app): State<App>, request: Request, next: Next) -> Response {
    if let Err(problem) = check(&app, &request) {
        return problem.into_response();
    }
    let response = next.run(request).await;
    if is_bare(&response) {
        return explain(response).await;
    }
    response
}

fn check(app: &App, request: &Request) -> Result<(), Problem> {
    let headers = request.headers();
    let Some(token) = app.token() else {
        let authority = request.uri().authority().map(|a| a.as_str());
        return check_local(app.options(), headers, authority);
    };
    if matches!(request.uri().path(), "/healthz" | "/ready") {
        return Ok(());
    }
    let given = headers
        .get(header::AUTHORIZATION)
        .map(HeaderValue::as_bytes)
        .and_then(|v| v.split_at_checked(BEARER.len()))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case(BEARER))
        .map(|(_, token)| token);
    match given {
        Some(given) if same(given, token.expose().as_bytes()) => Ok(()),
        _ => Err(Problem::http(
            StatusCode::UNAUTHORIZED,
            "UNAUTHORIZED",
            "send the server's token as Authorization: Bearer <token>",
        )),
    }
}

fn check_local(
    options: &HttpOptions,
    headers: &HeaderMap,
    authority: Option<&str>,
) -> Result<(), Problem> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let host = match (hosts.next(), hosts.next()) {
        (Some(host), None) => host.to_str().ok(),
        (None, _) => authority,
        (Some(_), Some(_)) => None,
    };
    let allowed = |host: &str| is_local(host) || names(&options.allowed_hosts, host);
    if !host.is_some_and(allowed) {
        return Err(forbidden(format!(
            "this server has no token and serves loopback only, but the request's Host is {:?}; use localhost, 127.0.0.1 or [::1], or start it with a token",
            host.unwrap_or_default()
        )));
    }
    for origin in headers.get_all(header::ORIGIN) {
        let text = origin.to_str().unwrap_or_default();
        let local = text
            .split_once("://")
            .is_some_and(|(scheme, host)| matches!(scheme, "http" | "https") && is_local(host));
        if !local && !names(&options.allowed_origins, text) {
            return Err(forbidden(format!(
                "pages of {origin:?} may not use this server, which has no token"
            )));
        }
    }
    Ok(())
}

/// Whether a list has `given`, written with or without its port.
fn names(list: &[String], given: &str) -> bool {
    let bare = given
        .rsplit_once(':')
        .filter(|(_, port)| port.parse::<u16>().is_ok())
        .map(|(name, _)| name);
    list.iter()
        .any(|n| n.eq_ignore_ascii_case(given) || bare.is_some_and(|b| n.eq_ignore_ascii_case(b)))
}

fn forbidden(detail: String) -> Problem {
    Problem::http(StatusCode::FORBIDDEN, "FORBIDDEN", detail)
}

/// Whether `host`, with or without a port, is this machine by a name that DNS
/// cannot redefine.
fn is_local(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((name, port)) if port.is_empty() || is_port(port) => name,
            _ => return false,
        },
        None => match host.split_once(':') {
            Some((name, port)) if is_port(&format!(":{port}")) => name,
            Some(_) => return false,
            None => host,
        },
    };
    name.eq_ignore_ascii_case("localhost")
        || name
            .parse::<std::net::IpAddr>()
            .is_ok_and(|ip| ip.is_loopback())
}

fn is_port(text: &str) -> bool {
    text.strip_prefix(':')
        .is_some_and(|port| port.parse::<u16>().is_ok())
}

/// Compares without telling by its time where the first difference is.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |diff, (x, y)| diff | (x ^ y)) == 0
}

/// An error that no handler of ours wrote.
fn is_bare(response: &Response) -> bool {
    let status = response.status();
    (status.is_client_error() || status.is_server_error())
        && response
            .headers()
            .get(header::CONTENT_TYPE)
            .is_none_or(|t| t.as_bytes().starts_with(b"text/plain"))
}

async fn explain(response: Response) -> Response {
    let (parts, body) = response.into_parts();
    let text = axum::body::to_bytes(body, MAX_TEXT)
        .await
        .unwrap_or_default();
    let detail = String::from_utf8_lossy(&text);
    let code = if parts.status == StatusCode::METHOD_NOT_ALLOWED {
        "METHOD_NOT_ALLOWED"
    } else {
        "INVALID_REQUEST"
    };
    let detail = if detail.is_empty() {
        "the request cannot be served".to_owned()
    } else {
        detail.into_owned()
    };
    let mut problem = Problem::http(parts.status, code, detail).into_response();
    if let Some(allow) = parts.headers.get(header::ALLOW) {
        problem.headers_mut().insert(header::ALLOW, allow.clone());
    }
    problem
}

const BEARER: &[u8] = b"Bearer ";

/// Of a foreign error text at most this much is passed on.
const MAX_TEXT: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_machine_are_local() {
        for host in [
            "localhost",
            "LOCALHOST:8090",
            "127.0.0.1",
            "127.0.0.1:1",
            "[::1]",
            "[::1]:8090",
        ] {
            assert!(is_local(host), "{host}");
        }
        for host in [
            "",
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example:80",
            "localhost:80:80",
            "localhost:x",
            "[::1",
            "10.0.0.1",
            "0.0.0.0",
        ] {
            assert!(!is_local(host), "{host}");
        }
    }

    #[test]
    fn an_origin_must_be_local_or_named_too() {
        let options = &mut HttpOptions {
            address: ([127, 0, 0, 1], 0).into(),
            token: None,
            allowed_hosts: vec!["hub.internal".into()],
            allowed_origins: vec!["https://ui.example".into()],
        };
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, HeaderValue::from_static("localhost:8090"));
        assert!(check_local(options, &headers, None).is_ok());
        headers.insert(
            header::ORIGIN,
            HeaderValue::from_static("http://127.0.0.1:3000"),
        );
        assert!(check_local(options, &headers, None).is_ok());
        for origin in ["https://evil.example", "null"] {
            headers.insert(header::ORIGIN, HeaderValue::from_static(origin));
            headers.insert(header::ORIGIN, HeaderValue::from_static(origin));
            assert!(check_local(options, &headers, None).is_err(), "{origin}");
        }
        headers.insert(header::HOST, HeaderValue::from_static("hub.internal:80"));
        headers.insert(
            header::ORIGIN,
            HeaderValue::from_static("https://ui.example"),
        );
        assert!(check_local(options, &headers, None).is_ok());
        headers.insert(header::HOST, HeaderValue::from_static("other.internal"));
        assert!(check_local(options, &headers, None).is_err());
    }
}
