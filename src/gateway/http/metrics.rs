//! The counters as JSON and for Prometheus.

use std::time::Duration;

use axum::{
    Json,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use prometheus::{
    Encoder, GaugeVec, IntCounterVec, Opts, Registry, TextEncoder,
    core::{Collector, Desc},
    proto,
};

use super::{App, problem::Problem};
use crate::{
    hub::{
        HubMetrics,
        breaker::BreakerState,
        state::{CanaryState, HubState, LaneState},
    },
    metrics::{BrokerMetrics, Histogram},
};

/// `GET /v1/metrics`.
pub(super) async fn json(State(app): State<App>) -> Json<HubMetrics> {
    Json(app.hub().metrics())
}

/// How long the queues' depths are waited for; the page does without them then.
const DEPTHS: Duration = Duration::from_secs(2);

/// `GET /metrics`, in Prometheus' text form.
pub(super) async fn prometheus(State(app): State<App>) -> Response {
    // A broker that stands still must not take the rest of the page with it: scrapers
    // give up after ten seconds.
    let depths = tokio::time::timeout(DEPTHS, app.hub().queue_depths()).await;
    let depths = depths.unwrap_or_default();
    let render = || -> Result<Vec<u8>, prometheus::Error> {
        // A registry for each scrape: the hub keeps the counts, this only
        // renders them.
        let page = Page(Registry::new());
        let metrics = app.hub().metrics();
        page.hub(&metrics)?;
        page.state(&app.hub().state())?;
        page.gauges(
            "messaging_queue_depth",
            "Messages ready in a queue",
            &["queue"],
            depths.iter().map(|(q, n)| (vec![q.as_str()], *n as f64)),
        )?;
        page.gauges(
            "messaging_replay_active",
            "Replays that are active",
            &[],
            [(vec![], app.hub().active_replays() as f64)],
        )?;
        let rate = metrics.dead_letters;
        page.gauges(
            "messaging_dlq_rate",
            "Dead letters of the last ten minutes for each message handed out in them",
            &[],
            [(vec![], rate.rate)],
        )?;
        page.gauges(
            "messaging_dlq_alarm",
            "1 while messaging_dlq_rate is at hub.dead_letter_alarm or above",
            &[],
            [(vec![], f64::from(u8::from(rate.alarm)))],
        )?;
        page.gauges(
            "messaging_scheduled_messages",
            "Messages that wait for their time",
            &[],
            [(vec![], metrics.scheduled as f64)],
        )?;
        page.gauges(
            "messaging_leases",
            "Deliveries leased over HTTP",
            &[],
            [(vec![], app.leases().len() as f64)],
        )?;
        let recorder = app.hub().recorder();
        page.histogram(
            "messaging_delivery_latency_seconds",
            "From a message's timestamp to its handler",
            &recorder.delivery_latency,
        )?;
        page.histogram(
            "messaging_publish_latency_seconds",
            "From publish to outcome",
            &recorder.publish_latency,
        )?;
        let mut out = Vec::new();
        TextEncoder::new().encode(&page.0.gather(), &mut out)?;
        Ok(out)
    };
    match render() {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(e) => Problem::http(
            StatusCode::INTERNAL_SERVER_ERROR,
            "UNKNOWN_ERROR",
            format!("the metrics could not be rendered: {e}"),
        )
        .into_response(),
    }
}

struct Page(Registry);

impl Page {
    fn hub(&self, metrics: &HubMetrics) -> prometheus::Result<()> {
        let hub = &metrics.hub;
        for (name, help, value) in [
            (
                "messaging_messages_published_total",
                "Publishes that were accepted, each counted once",
                hub.publish_successes,
            ),
            (
                "messaging_publish_failures_total",
                "Publishes that ended in an error",
                hub.publish_failures,
            ),
            (
                "messaging_messages_consumed_total",
                "Messages handed to readers",
                hub.messages_consumed,
            ),
            (
                "messaging_messages_retried_total",
                "Messages given another attempt",
                hub.messages_retried,
            ),
            (
                "messaging_dlq_messages_total",
                "Messages moved to the dead letters",
                hub.messages_dead_lettered,
            ),
            (
                "messaging_dlq_reprocessed_total",
                "Dead letters that were published again, or taken by a processor",
                hub.dead_letters_reprocessed,
            ),
            (
                "messaging_dlq_discarded_total",
                "Dead letters that were given up, with a reason",
                hub.dead_letters_discarded,
            ),
            (
                "messaging_spooled_messages_total",
                "Messages that the spool took",
                metrics.fallback_usages,
            ),
            (
                "messaging_duplicates_suppressed_total",
                "Deliveries that a group had handled already",
                metrics.duplicates_suppressed,
            ),
            (
                "messaging_repeats_joined_total",
                "Publishes of an id that had been accepted already",
                metrics.repeats_joined,
            ),
            (
                "messaging_dedup_overflows_total",
                "Ids that left a full dedup window before their time",
                metrics.dedup_overflows,
            ),
            (
                "messaging_handled_unkept_total",
                "Handled ids that the data folder does not have: after a restart their messages may be handed out again",
                metrics.handled_unkept,
            ),
        ] {
            self.counters(name, help, &[], [(vec![], value)])?;
        }
        self.gauges(
            "messaging_lanes",
            "Publishing lanes that are open",
            &[],
            [(vec![], metrics.lanes as f64)],
        )?;
        type Get = fn(&BrokerMetrics) -> u64;
        let of_brokers: [(&str, &str, Get); 9] = [
            (
                "messaging_broker_connection_attempts_total",
                "Connections tried",
                |m| m.connection_attempts,
            ),
            (
                "messaging_broker_reconnections_total",
                "Connections tried again after a loss",
                |m| m.reconnection_attempts,
            ),
            (
                "messaging_broker_consumers_revived_total",
                "Consumers that the server had lost and that were subscribed again",
                |m| m.consumers_revived,
            ),
            (
                "messaging_broker_published_total",
                "Publishes that the broker confirmed, moved ones included",
                |m| m.publish_successes,
            ),
            (
                "messaging_broker_received_total",
                "Messages received from the broker",
                |m| m.messages_received,
            ),
            (
                "messaging_broker_acked_total",
                "Messages acked at the broker",
                |m| m.messages_acked,
            ),
            (
                "messaging_broker_nacked_total",
                "Messages given back to the broker",
                |m| m.messages_nacked,
            ),
            (
                "messaging_broker_publish_timeouts_total",
                "Publishes without an outcome in time",
                |m| m.publish_timeouts,
            ),
            ("messaging_broker_errors_total", "Errors of any kind", |m| {
                m.total_errors
            }),
        ];
        for (name, help, get) in of_brokers {
            let rows = metrics
                .brokers
                .iter()
                .map(|(broker, m)| (vec![broker.as_str()], get(m)));
            self.counters(name, help, &["broker"], rows)?;
        }
        Ok(())
    }

    fn state(&self, state: &HubState) -> prometheus::Result<()> {
        let routes = || state.routes.iter();
        let named = |value: fn(&crate::hub::state::RouteState) -> f64| {
            routes()
                .map(|r| (vec![r.pattern.as_str()], value(r)))
                .collect::<Vec<_>>()
        };
        let states = [
            LaneState::Primary,
            LaneState::Draining,
            LaneState::Suspect,
            LaneState::Degraded,
        ];
        let rows = routes().flat_map(|r| {
            states.iter().map(|s| {
                (
                    vec![r.pattern.as_str(), s.as_str()],
                    f64::from(u8::from(*s == r.state)),
                )
            })
        });
        self.gauges(
            "messaging_route_state",
            "1 for the state that a route is in",
            &["route", "state"],
            rows,
        )?;
        for (name, help, rows) in [
            (
                "messaging_spool_messages",
                "Messages in the spool, those in doubt included",
                named(|r| r.spool.messages as f64),
            ),
            (
                "messaging_spool_in_doubt",
                "Messages whose fate at the primary is not known",
                named(|r| r.spool.in_doubt as f64),
            ),
            (
                "messaging_spool_bytes",
                "Bytes in the spool",
                named(|r| r.spool.bytes as f64),
            ),
            (
                "messaging_spool_oldest_age_seconds",
                "Age of the oldest message in the spool",
                named(|r| r.spool.oldest_age_ms as f64 / 1000.0),
            ),
            (
                "messaging_drain_rate",
                "Messages drained per second, lately",
                named(|r| r.drain.rate),
            ),
            (
                "messaging_drain_remaining",
                "Messages still to be drained",
                named(|r| r.drain.remaining as f64),
            ),
            (
                "messaging_drain_paused",
                "1 while an operator keeps a lane of the route from draining",
                named(|r| f64::from(u8::from(r.paused))),
            ),
        ] {
            self.gauges(name, help, &["route"], rows)?;
        }
        let canary = |value: fn(&CanaryState) -> Option<f64>| {
            routes()
                .filter_map(move |r| Some((vec![r.pattern.as_str()], value(r.canary.as_ref()?)?)))
        };
        for (name, help, rows) in [
            (
                "messaging_canary_up",
                "1 while the route's canary comes back in time",
                canary(|c| c.well.map(|well| f64::from(u8::from(well)))),
            ),
            (
                "messaging_canary_latency_seconds",
                "How long the route's last canary took",
                canary(|c| c.latency_ms.map(|ms| ms / 1000.0)),
            ),
        ] {
            self.gauges(name, help, &["route"], rows)?;
        }
        self.counters(
            "messaging_canary_failures_total",
            "Canaries of the route that did not come back in time",
            &["route"],
            routes().filter_map(|r| Some((vec![r.pattern.as_str()], r.canary.as_ref()?.failures))),
        )?;
        let breaker = state.brokers.iter().filter_map(|b| {
            let value = match b.breaker? {
                BreakerState::Closed => 0.0,
                BreakerState::HalfOpen => 1.0,
                BreakerState::Open => 2.0,
            };
            Some((vec![b.kind.as_str()], value))
        });
        self.gauges(
            "messaging_breaker_state",
            "0 closed, 1 half-open, 2 open",
            &["broker"],
            breaker,
        )?;
        let connected = state
            .brokers
            .iter()
            .map(|b| (vec![b.kind.as_str()], f64::from(u8::from(b.connected))));
        self.gauges(
            "messaging_broker_connected",
            "1 while the broker is connected",
            &["broker"],
            connected,
        )
    }

    fn counters<'a>(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
        rows: impl IntoIterator<Item = (Vec<&'a str>, u64)>,
    ) -> prometheus::Result<()> {
        let vec = IntCounterVec::new(Opts::new(name, help), labels)?;
        for (values, count) in rows {
            vec.get_metric_with_label_values(&values)?.inc_by(count);
        }
        self.0.register(Box::new(vec))
    }

    fn gauges<'a>(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
        rows: impl IntoIterator<Item = (Vec<&'a str>, f64)>,
    ) -> prometheus::Result<()> {
        let vec = GaugeVec::new(Opts::new(name, help), labels)?;
        for (values, value) in rows {
            vec.get_metric_with_label_values(&values)?.set(value);
        }
        self.0.register(Box::new(vec))
    }

    fn histogram(&self, name: &str, help: &str, from: &Histogram) -> prometheus::Result<()> {
        self.0.register(Box::new(Buckets::of(name, help, from)?))
    }
}

/// A histogram that was counted elsewhere.
struct Buckets {
    desc: Desc,
    family: proto::MetricFamily,
}

impl Buckets {
    fn of(name: &str, help: &str, from: &Histogram) -> prometheus::Result<Self> {
        let desc = Desc::new(
            name.to_owned(),
            help.to_owned(),
            Vec::new(),
            std::collections::HashMap::new(),
        )?;
        let counts = from.cumulative(BOUNDS_US);
        let summary = from.summary();
        let mut histogram = proto::Histogram::default();
        histogram.set_sample_count(summary.count);
        histogram.set_sample_sum(summary.sum_us as f64 / 1e6);
        let buckets: Vec<_> = BOUNDS_US
            .iter()
            .zip(counts)
            .map(|(bound, count)| {
                let mut bucket = proto::Bucket::default();
                bucket.set_upper_bound(*bound as f64 / 1e6);
                bucket.set_cumulative_count(count.min(summary.count));
                bucket
            })
            .collect();
        histogram.set_bucket(buckets);
        let mut metric = proto::Metric::default();
        metric.set_histogram(histogram);
        let mut family = proto::MetricFamily::default();
        family.set_name(name.to_owned());
        family.set_help(help.to_owned());
        family.set_field_type(proto::MetricType::HISTOGRAM);
        family.set_metric(vec![metric]);
        Ok(Self { desc, family })
    }
}

impl Collector for Buckets {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.desc]
    }

    fn collect(&self) -> Vec<proto::MetricFamily> {
        vec![self.family.clone()]
    }
}

/// Bounds in microseconds: from a tenth of a millisecond to ten seconds.
const BOUNDS_US: &[u64] = &[
    100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000,
    1_000_000, 2_500_000, 5_000_000, 10_000_000,
];
