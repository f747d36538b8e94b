//! Runs checks one after the other, each under a deadline.

use std::{sync::Arc, time::Duration};

use futures_util::FutureExt;
use tokio::time::{Instant, timeout};

use super::{
    Check, Factory, Failure, Fixture, Kind,
    checks::all,
    report::{Report, Row, Status},
};

/// Which checks run. Default: all.
#[derive(Clone, Debug, Default)]
pub struct Filter(Vec<String>);

impl Filter {
    /// Checks whose name (`queue/priority_is_honoured`) contains one of these
    /// comma-separated texts; an empty text means all.
    #[must_use]
    pub fn containing(texts: &str) -> Self {
        let texts = texts.split(',').map(str::trim).filter(|t| !t.is_empty());
        Self(texts.map(str::to_owned).collect())
    }

    fn passes(&self, name: &str) -> bool {
        self.0.is_empty() || self.0.iter().any(|text| name.contains(text))
    }
}

/// Runs the suite over one backend.
pub async fn run(factory: Arc<dyn Factory>, filter: &Filter) -> Report {
    let mut rows = Vec::new();
    for check in all() {
        for &kind in check.kinds {
            let name = format!("{kind}/{}", check.name);
            if filter.passes(&name) {
                let begun = Instant::now();
                let status = run_one(&factory, check, kind).await;
                let row = Row::new(name, status, begun.elapsed());
                tracing::info!(backend = factory.name(), check = row.check, status = ?row.status, "checked");
                rows.push(row);
            }
        }
    }
    Report {
        name: factory.name(),
        rows,
    }
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
    (check.restarts && factory.restart().is_none()).then(|| "no restart hook".to_owned())
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("(no text)")
}

/// How long the clients of a check may take to close.
const CLOSE_DEADLINE: Duration = Duration::from_secs(30);
