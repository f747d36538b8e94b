//! Runs checks, each under a deadline: several at once, since each works on
//! names of its own, and those that kill the server one after the other.

use std::{sync::Arc, time::Duration};

use futures_util::FutureExt;
use tokio::{
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, timeout},
};

use super::{
    Capability, Check, Factory, Failure, Fixture, Kind,
    checks::all,
    report::{Report, Row, Status},
};

/// Which checks run. Default: all.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    texts: Vec<String>,
    kills: Option<bool>,
}

impl Filter {
    /// Checks whose name (`queue/priority_is_honoured`) contains one of these
    /// comma-separated texts; an empty text means all.
    #[must_use]
    pub fn containing(texts: &str) -> Self {
        let texts = texts.split(',').map(str::trim).filter(|t| !t.is_empty());
        Self {
            texts: texts.map(str::to_owned).collect(),
            kills: None,
        }
    }

    /// Of these, only the checks that kill the server, or only the others: for
    /// backends that share a server, whose kills must meet no other check.
    #[must_use]
    pub fn kills(&self, kills: bool) -> Self {
        Self {
            texts: self.texts.clone(),
            kills: Some(kills),
        }
    }

    fn passes(&self, name: &str, check: &Check) -> bool {
        let named = self.texts.is_empty() || self.texts.iter().any(|text| name.contains(text));
        named && self.kills.is_none_or(|kills| kills == check.restarts)
    }
}

/// Runs the suite over one backend. Checks that share `at_once` run as many at
/// a time as it has permits. Over a backend that lives inside its client they
/// run one at a time, because they close that client, and take no permit.
pub async fn run(factory: Arc<dyn Factory>, filter: &Filter, at_once: Arc<Semaphore>) -> Report {
    let chosen = all().iter().flat_map(|check| {
        let named = check.kinds.iter().map(move |kind| (check, *kind));
        named.filter(|(check, kind)| filter.passes(&name(check, *kind), check))
    });
    let (kills, others): (Vec<_>, Vec<_>) = chosen.partition(|(check, _)| check.restarts);
    let alone = factory.one_client();
    let mut rows = Vec::new();
    let mut running = JoinSet::new();
    for (check, kind) in others {
        if alone {
            factory.begin();
            rows.push(row(&factory, check, kind).await);
            continue;
        }
        let (factory, at_once) = (factory.clone(), at_once.clone());
        running.spawn(async move {
            // Never closed.
            let _permit = at_once.acquire().await;
            row(&factory, check, kind).await
        });
    }
    rows.extend(running.join_all().await);
    for (check, kind) in kills {
        rows.push(row(&factory, check, kind).await);
    }
    Report::of(factory.name(), rows)
}

async fn row(factory: &Arc<dyn Factory>, check: &Check, kind: Kind) -> Row {
    let begun = Instant::now();
    let status = run_one(factory, check, kind).await;
    let row = Row::new(name(check, kind), status, begun.elapsed());
    tracing::info!(backend = factory.name(), check = row.check, status = ?row.status, "checked");
    row
}

fn name(check: &Check, kind: Kind) -> String {
    format!("{kind}/{}", check.name)
}

async fn run_one(factory: &Arc<dyn Factory>, check: &Check, kind: Kind) -> Status {
    if let Some(why) = not_applicable(&**factory, check, kind) {
        return Status::NotApplicable(why);
    }
    let fixture = Fixture::new(factory.clone(), kind);
    // A panic inside the backend's code must end this check, not the report.
    let running = std::panic::AssertUnwindSafe((check.run)(fixture.clone())).catch_unwind();
    let result = match timeout(check.deadline, running).await {
        Ok(Ok(result)) => result,
        Ok(Err(panic)) => Err(Failure::new(format!("panicked: {}", panic_text(&*panic)))),
        Err(_) => Err(Failure::new(format!(
            "expected to be done within {:?}, it was not",
            check.deadline
        ))),
    };
    let closing = timeout(CLOSE_DEADLINE, fixture.close()).await;
    let closed = closing.unwrap_or_else(|_| {
        Err(Failure::new(format!(
            "expected its clients to close within {CLOSE_DEADLINE:?}"
        )))
    });
    match result.and(closed.map_err(|e| e.during("closing the check's clients"))) {
        Ok(()) => Status::Pass,
        Err(failure) => Status::Fail(failure.to_string()),
    }
}

fn not_applicable(factory: &dyn Factory, check: &Check, kind: Kind) -> Option<String> {
    let can = factory.capabilities();
    if !can.has_kind(kind) {
        return Some(format!("no {kind}s declared"));
    }
    if let Some(missing) = check.needs.iter().find(|need| !can.has(**need)) {
        return Some(format!("{missing:?} not declared"));
    }
    if check.late && kind == Kind::Stream && !can.has(Capability::HistoryReplay) {
        return Some("publishes before anybody reads; HistoryReplay not declared".to_owned());
    }
    (check.restarts && factory.restart().is_none()).then(|| "no restart hook".to_owned())
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("(no text)")
}

/// How long the clients of a check may take to close.
const CLOSE_DEADLINE: Duration = Duration::from_secs(30);
