//! Publishing over HTTP on the loopback: single messages over many connections,
//! and NDJSON of 1,000 lines a request, to a hub with the embedded broker in
//! memory and to a bare server that answers 202. Client and server share this
//! process, so that the ratio says what the hub adds to HTTP.
//!
//! A hub that runs already is measured the same way, from outside; what was
//! published there is leased back and acked after each run.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use reqwest::Method;
use tokio::task::JoinSet;

use super::{
    Plan,
    baseline::http::BareServer,
    latency::Tally,
    load::{Load, Shape},
    payload::Bodies,
    published::Published,
    readers::{self, Readers},
    report::Report,
    request::{self, Body, LINES},
    run::{Group, Row, Run},
    running, through_hub,
};
use crate::{
    broker::QueueType,
    cli::{Failure, Target, client::Client},
    gateway::http::{HttpOptions, HttpServer},
    hub::MessagingHub,
};

pub(super) async fn measure(plan: &Plan) -> Result<Report, Failure> {
    let bodies = Bodies::new(plan.shape.size, false)?;
    let bare = BareServer::start().await?;
    let bare = at(&format!("http://{}", bare.address), None).map(|client| (client, bare))?;
    let topic = format!("tasks.bench.{}", plan.suffix);
    let config = through_hub::config(&[(&topic, QueueType::Classic)], &[]);
    let mut own = None;
    let (client, hub) = match &plan.running {
        Some(target) => (at(&target.url, Some(target))?, None),
        None => {
            let system = through_hub::start(config.clone()).await?;
            let options = HttpOptions {
                address: ([127, 0, 0, 1], 0).into(),
                token: None,
                allowed_hosts: Vec::new(),
                allowed_origins: Vec::new(),
            };
            let server = HttpServer::start(system.hub(), options).await?;
            let client = at(&format!("http://{}", server.address()), None)?;
            let hub = system.hub();
            own = Some((system, server));
            (client, Some(hub))
        }
    };
    let side = |body: Body, connections: usize, client: &Client| Side {
        client: client.clone(),
        topic: topic.clone(),
        body,
        shape: Shape {
            producers: plan.options.connections().unwrap_or(connections),
            ..plan.shape.clone()
        },
        bodies: bodies.clone(),
    };
    let mut groups: Vec<Group> = Vec::new();
    for (body, connections) in [(Body::Single, SINGLES), (Body::Lines, NDJSON)] {
        groups.push(vec![
            Box::new(HubRow {
                side: side(body, connections, &client),
                hub: hub.clone(),
            }),
            Box::new(BareRow(side(body, connections, &bare.0))),
        ]);
    }
    let mut report = plan.measure(groups).await?;
    let connections = |default| plan.options.connections().unwrap_or(default);
    report.set("producers", connections(SINGLES));
    report.set("ndjson_producers", connections(NDJSON));
    report.set("confirm", 1);
    report.set("lines", LINES);
    match own {
        Some((system, server)) => {
            report.weakened(&config);
            server.stop(Duration::from_secs(5)).await;
            system.close().await;
        }
        None => {
            report.set("url", plan.running.as_ref().map(|t| t.url.clone()));
            report.set("weakened", running::weakened(&client).await?);
            report.note("what the running hub keeps, and where, is as it was configured; its queue of this bench is empty and stays");
        }
    }
    report.note("client and server share this process's cores; latency is that of a request");
    Ok(report)
}

/// A client of a server that is this machine's own, or of a running hub.
fn at(url: &str, running: Option<&Target>) -> Result<Client, Failure> {
    Client::new(&Target {
        url: url.to_owned(),
        json: false,
        token: running.and_then(|t| t.token.clone()),
    })
}

/// What both sides work with.
struct Side {
    client: Client,
    topic: String,
    body: Body,
    shape: Shape,
    bodies: Bodies,
}

impl Side {
    /// Sends requests over all connections; whether answers are a hub's.
    async fn publish(
        &self,
        time: Duration,
        hub: bool,
        most: u64,
    ) -> Result<(Published, Instant), Failure> {
        let mut loads = Load::split(&self.shape, time, &self.bodies);
        for load in &mut loads {
            load.most = most / load.producers as u64;
        }
        let started = loads.first().map_or_else(Instant::now, |l| l.started);
        let mut connections = JoinSet::new();
        for load in loads {
            let (client, topic, body) = (self.client.clone(), self.topic.clone(), self.body);
            connections.spawn(async move { send(&client, &topic, body, &load, hub).await });
        }
        Ok((through_hub::gather(connections).await?, started))
    }
}

/// One connection's requests, one after the other.
async fn send(
    client: &Client,
    topic: &str,
    body: Body,
    load: &Load,
    hub: bool,
) -> Result<Published, Failure> {
    let bytes = body.bytes(load);
    let mut turns = load.turns()?;
    let mut done = Published::new();
    while let Some(due) = turns.next().await {
        // The rest of the lines are due with the request or before it.
        let mut all = vec![due];
        while (all.len() as u64) < body.messages()
            && let Some(next) = turns.next().await
        {
            all.push(next);
        }
        if (all.len() as u64) < body.messages() {
            break;
        }
        let request = client
            .request(Method::POST, &["v1", "topics", topic, "messages"])
            .header("content-type", body.content_type())
            .body(bytes.clone());
        let answer = client.send(request).await?;
        let answer = answer.bytes().await.map_err(|e| client.broken(&e))?;
        if hub && matches!(body, Body::Lines) {
            request::accepted(&answer)?;
        }
        for _ in 0..body.messages() {
            done.note(due);
        }
    }
    Ok(done)
}

struct HubRow {
    side: Side,
    /// The hub of this process; none: one that runs elsewhere.
    hub: Option<MessagingHub>,
}

#[async_trait]
impl Row for HubRow {
    fn name(&self) -> String {
        format!("{}, hub", self.side.body.name())
    }

    fn durability(&self) -> &'static str {
        if self.hub.is_some() {
            "none"
        } else {
            "as configured"
        }
    }

    async fn run(&mut self, time: Duration) -> Result<Run, Failure> {
        let side = &self.side;
        let Some(hub) = &self.hub else {
            let (published, started) = side.publish(time, true, MOST_KEPT).await?;
            let back = running::lease_back(&side.client, &side.topic).await?;
            if back != published.messages() {
                return Err(Failure::new(format!(
                    "{} messages were published, and {back} came back",
                    published.messages()
                )));
            }
            return Ok(published.into_run(started));
        };
        let tally = Arc::new(Tally::new());
        let (consumers, prefetch) = (side.shape.consumers, side.shape.prefetch);
        let readers = Readers::of_queue(hub, &side.topic, consumers, prefetch, &tally).await?;
        let (published, started) = side.publish(time, true, u64::MAX).await?;
        readers::arrived(&tally, &published, 1, started).await?;
        readers.stop().await;
        Ok(published.into_run(started))
    }
}

struct BareRow(Side);

#[async_trait]
impl Row for BareRow {
    fn name(&self) -> String {
        format!("{}, bare axum", self.0.body.name())
    }

    fn durability(&self) -> &'static str {
        "none"
    }

    async fn run(&mut self, time: Duration) -> Result<Run, Failure> {
        let (published, started) = self.0.publish(time, false, u64::MAX).await?;
        Ok(published.into_run(started))
    }
}

/// Connections of single messages.
const SINGLES: usize = 64;
/// Connections of NDJSON.
const NDJSON: usize = 2;
/// Messages of one run that nobody consumes, a tenth below what a queue holds.
const MOST_KEPT: u64 = 900_000;
