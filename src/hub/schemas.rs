//! Schemas at the hub's two ends: what does not fit is refused at publish, and
//! goes to the dead letters before it is handed out.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use tokio_util::sync::CancellationToken;

use super::{MessagingHub, lock, publish::TopicEntry, route::RouteTable};
use crate::{
    broker::{Delivery, Received, Verdict},
    config::{CheckAt, RegistrySettings},
    error::{ErrorCode, Result},
    message::{Message, wire::Failure},
    schema::{
        SchemaRegistry,
        guard::{Guard, Guards, Looked, Question},
    },
};

/// Why a payload that does not fit is a dead letter.
pub(super) const REASON: &str = "schema";

/// From one question to the next while the registry gives no answer.
const PAUSE: Duration = Duration::from_secs(1);

/// What a span needs to look at payloads.
#[derive(Clone)]
pub(super) struct Checks {
    guards: Guards,
    routes: Arc<RouteTable>,
}

/// What became of a delivery.
pub(super) enum Checked {
    Fits(Delivery),
    /// It is among the dead letters.
    Gone,
    /// The registry has to be asked first.
    Ask(Delivery, Arc<Guard>, Question),
}

impl MessagingHub {
    /// Reads the schemas of routes, and brings those that are registered together
    /// with the registry. Call it before the first publish. A registry that gives
    /// no answer is asked when a schema is needed.
    ///
    /// # Errors
    /// `INVALID_CONFIG`: a file holds no schema; `SCHEMA_INVALID`: it is not
    /// compatible with its subject.
    pub async fn use_schemas(&self, registry: Option<&RegistrySettings>) -> Result<()> {
        let registry = registry.cloned().map(SchemaRegistry::new).transpose()?;
        let mut guards = HashMap::new();
        for route in self.0.config.effective_routes() {
            let Some(settings) = &route.schema else {
                continue;
            };
            let guard = Guard::new(settings, registry.as_ref())
                .map_err(|e| e.on(route.pattern.as_str()))?;
            match guard.start().await {
                Err(error) if error.code() == ErrorCode::SchemaUnavailable => {
                    tracing::warn!(route = %route.pattern, %error,
                        "the route's schema could not be compared with the registry's");
                }
                started => started.map_err(|e| e.on(route.pattern.as_str()))?,
            }
            guards.insert(route.pattern, Arc::new(guard));
        }
        *lock(&self.0.guards) = Arc::new(guards);
        Ok(())
    }

    /// Refuses a payload that is not as its route's schema says.
    pub(super) async fn check_schema(&self, entry: &TopicEntry, message: &Message) -> Result<()> {
        let guard = {
            let guards = lock(&self.0.guards);
            if guards.is_empty() {
                return Ok(());
            }
            guards.get(&entry.route.pattern).cloned()
        };
        match guard.filter(|g| g.looks_at(CheckAt::Publish)) {
            Some(guard) => guard
                .check(&entry.topic, &message.payload)
                .await
                .map_err(|e| e.on(entry.topic.as_str()).with_id(message.id.as_str())),
            None => Ok(()),
        }
    }

    /// What a span looks with; none: at nothing.
    pub(super) fn checks(&self) -> Option<Checks> {
        let guards = lock(&self.0.guards).clone();
        let any = guards.values().any(|g| g.looks_at(CheckAt::Consume));
        any.then(|| Checks {
            guards,
            routes: lock(&self.0.routes).clone(),
        })
    }
}

impl Checks {
    /// Looks at a delivery. Never waits.
    pub(super) fn look(&self, delivery: Delivery) -> Checked {
        let Some(guard) = self.guard(delivery.received()) else {
            return Checked::Fits(delivery);
        };
        match guard.look(&delivery.topic, &delivery.message.payload) {
            Looked::Fits => Checked::Fits(delivery),
            Looked::Ask(question) => Checked::Ask(delivery, guard.clone(), question),
            Looked::Wrong(why) => {
                tracing::warn!(topic = %delivery.topic, id = %delivery.message.id, why,
                    "a payload is not as its schema says; it goes to the dead letters");
                let earlier = delivery.marks.failure.as_deref();
                let failure = Failure::now(REASON, why, &delivery.topic, earlier);
                delivery.settle_now(Verdict::DeadLetter { failure });
                Checked::Gone
            }
        }
    }

    /// Looks at a payload, and asks the registry if need be.
    ///
    /// # Errors
    /// `SCHEMA_INVALID`, `SCHEMA_UNAVAILABLE`.
    pub(super) async fn check(&self, received: &Received) -> Result<()> {
        match self.guard(received) {
            Some(guard) => guard.check(&received.topic, &received.payload).await,
            None => Ok(()),
        }
    }

    fn guard(&self, received: &Received) -> Option<&Arc<Guard>> {
        if received.is_dead_letter() {
            // There it is read as it stands.
            return None;
        }
        let (_, route) = self.routes.find(received.topic.as_str())?;
        let guard = self.guards.get(&route.pattern)?;
        guard.looks_at(CheckAt::Consume).then_some(guard)
    }
}

/// Asks until there is an answer. Meanwhile the subscription takes nothing more,
/// and what it has goes back if it ends.
pub(super) fn ask(
    guard: Arc<Guard>,
    question: Question,
    closing: CancellationToken,
) -> BoxFuture<'static, ()> {
    Box::pin(async move {
        let mut told = false;
        loop {
            let Err(error) = guard.ask(&question).await else {
                return;
            };
            if !told {
                tracing::warn!(%error, "a subscription waits for the schema of what it got");
                told = true;
            }
            tokio::select! {
                () = tokio::time::sleep(PAUSE) => {}
                () = closing.cancelled() => return,
            }
        }
    })
}
