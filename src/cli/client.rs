//! The HTTP client of the commands that talk to a running hub.

use reqwest::{Method, RequestBuilder, Response, Url};
use serde_json::Value;

use super::{Failure, Target};

/// A running hub.
#[derive(Clone, Debug)]
pub(super) struct Client {
    base: Url,
    target: Target,
    http: reqwest::Client,
}

impl Client {
    pub(super) fn new(target: &Target) -> Result<Self, Failure> {
        let base = Url::parse(&target.url)
            .ok()
            .filter(|u| u.scheme() == "http" && !u.cannot_be_a_base())
            .ok_or_else(|| {
                Failure::usage(format!(
                    "--url {:?} is not the address of a hub; write http://host:port",
                    target.url
                ))
            })?;
        // A hub is reached directly; nothing here goes through a proxy.
        let http = reqwest::Client::builder()
            .no_proxy()
            .build()
            .map_err(|e| Failure::new(format!("the HTTP client cannot be made: {e}")))?;
        Ok(Self {
            base,
            target: target.clone(),
            http,
        })
    }

    /// A request to a path given by its segments, which are escaped.
    pub(super) fn request(&self, method: Method, segments: &[&str]) -> RequestBuilder {
        let mut url = self.base.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(segments);
        }
        let request = self.http.request(method, url);
        match self.target.token.as_ref().filter(|t| !t.is_empty()) {
            Some(token) => request.bearer_auth(token.expose()),
            None => request,
        }
    }

    /// Sends it; anything but success is a failure that says why.
    pub(super) async fn send(&self, request: RequestBuilder) -> Result<Response, Failure> {
        let response = request.send().await.map_err(|e| self.unreachable(&e))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = response.bytes().await.unwrap_or_default();
        Err(problem(&body).unwrap_or_else(|| {
            Failure::new(format!(
                "{} answered {status} and nothing that a hub would say; is it a hub?",
                self.base
            ))
        }))
    }

    /// Sends it and reads the JSON of the answer.
    pub(super) async fn json(&self, request: RequestBuilder) -> Result<Value, Failure> {
        let response = self.send(request).await?;
        response.json().await.map_err(|e| self.broken(&e))
    }

    /// The connection broke in the middle of an answer.
    pub(super) fn broken(&self, e: &reqwest::Error) -> Failure {
        Failure::new(format!(
            "the answer of {} broke off: {}",
            self.base,
            innermost(e)
        ))
    }

    fn unreachable(&self, e: &reqwest::Error) -> Failure {
        if e.is_connect() {
            Failure::new(format!(
                "no hub answers at {} ({}); start one with `messaging-hub serve`, or name another with --url",
                self.base,
                innermost(e)
            ))
        } else {
            Failure::new(format!(
                "the request to {} failed: {}",
                self.base,
                innermost(e)
            ))
        }
    }
}

/// What a problem says.
pub(super) fn problem(body: &[u8]) -> Option<Failure> {
    let json: Value = serde_json::from_slice(body).ok()?;
    let code = json.get("code")?.as_str()?;
    let detail = json.get("detail").and_then(Value::as_str)?;
    let mut message = format!("{code}: {detail}");
    for field in ["topic", "id", "assume"] {
        if let Some(text) = json.get(field).and_then(Value::as_str) {
            message.push_str(&format!(" ({field} {text})"));
        }
    }
    Some(Failure {
        problem: Some(code.to_owned()),
        ..Failure::new(message)
    })
}

/// The cause that says most.
fn innermost(e: &(dyn std::error::Error + 'static)) -> String {
    let mut last = e;
    while let Some(next) = last.source() {
        last = next;
    }
    last.to_string()
}
