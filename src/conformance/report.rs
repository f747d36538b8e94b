//! What a run found, as a table for people and as JSON.

use std::{collections::BTreeMap, fmt, time::Duration};

use serde::Serialize;

use super::checks::all;

/// What became of a check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "status", content = "reason", rename_all = "snake_case")]
pub enum Status {
    /// It holds.
    Pass,
    /// It does not, with what was expected and seen.
    Fail(String),
    /// The backend does not declare what it needs.
    NotApplicable(String),
}

/// One line of a report.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// The check with its kind, such as `queue/ordered`.
    pub check: String,
    /// What became of it.
    #[serde(flatten)]
    pub status: Status,
    /// How long it ran.
    pub seconds: f64,
}

impl Row {
    pub(crate) fn new(check: String, status: Status, took: Duration) -> Self {
        Self {
            check,
            status,
            seconds: took.as_secs_f64(),
        }
    }
}

/// What a run over one backend found.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    /// The backend.
    pub name: String,
    /// One row for each check and kind.
    pub rows: Vec<Row>,
}

impl Report {
    /// A report whose rows stand in the order of the checks, in whatever order
    /// they ended.
    #[must_use]
    pub fn of(name: String, mut rows: Vec<Row>) -> Self {
        let place = |row: &Row| {
            let name = row.check.split('/').next_back().unwrap_or_default();
            let at = all().iter().position(|check| check.name == name);
            (at, row.check.clone())
        };
        rows.sort_by_cached_key(place);
        Self { name, rows }
    }

    /// With the rows of another run over the same backend.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self::of(self.name, [self.rows, other.rows].concat())
    }

    /// The checks that do not hold, with the reasons.
    pub fn failures(&self) -> impl Iterator<Item = (&str, &str)> {
        self.rows.iter().filter_map(|row| match &row.status {
            Status::Fail(why) => Some((row.check.as_str(), why.as_str())),
            Status::Pass | Status::NotApplicable(_) => None,
        })
    }

    /// How many hold, do not hold, and do not apply.
    #[must_use]
    pub fn counts(&self) -> (usize, usize, usize) {
        let count = |wanted: fn(&Status) -> bool| {
            let rows = self.rows.iter();
            rows.filter(|row| wanted(&row.status)).count()
        };
        (
            count(|s| matches!(s, Status::Pass)),
            count(|s| matches!(s, Status::Fail(_))),
            count(|s| matches!(s, Status::NotApplicable(_))),
        )
    }

    /// The report as JSON.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::to_value(self).unwrap_or_default()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Table(std::slice::from_ref(self)).fmt(f)
    }
}

/// Several reports side by side: checks down, backends across; below it the
/// reason of each failure.
#[derive(Clone, Copy, Debug)]
pub struct Table<'a>(&'a [Report]);

impl<'a> Table<'a> {
    /// A table of reports, in this order.
    #[must_use]
    pub fn new(reports: &'a [Report]) -> Self {
        Self(reports)
    }

    /// The reports as JSON.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::to_value(self.0).unwrap_or_default()
    }
}

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns: Vec<BTreeMap<&str, &Row>> = self
            .0
            .iter()
            .map(|report| report.rows.iter().map(|r| (r.check.as_str(), r)).collect())
            .collect();
        let mut checks: Vec<&str> = Vec::new();
        for row in self.0.iter().flat_map(|report| &report.rows) {
            if !checks.contains(&row.check.as_str()) {
                checks.push(&row.check);
            }
        }
        let widest = checks.iter().map(|c| c.len()).max().unwrap_or(0);
        let first = widest.max(HEAD.len());
        let width = |report: &Report| report.name.len().max(CELL);

        write!(f, "| {HEAD:first$} |")?;
        for report in self.0 {
            write!(f, " {:w$} |", report.name, w = width(report))?;
        }
        write!(f, "\n|{:-<w$}|", "", w = first + 2)?;
        for report in self.0 {
            write!(f, "{:-<w$}|", "", w = width(report) + 2)?;
        }
        writeln!(f)?;
        for check in checks {
            write!(f, "| {check:first$} |")?;
            for (report, column) in self.0.iter().zip(&columns) {
                let cell = column.get(check).map_or_else(String::new, |row| cell(row));
                write!(f, " {cell:w$} |", w = width(report))?;
            }
            writeln!(f)?;
        }
        for report in self.0 {
            let (passed, failed, not_applicable) = report.counts();
            let seconds: f64 = report.rows.iter().map(|r| r.seconds).sum();
            writeln!(
                f,
                "{}: {passed} passed, {failed} failed, {not_applicable} n/a in {seconds:.1} s",
                report.name
            )?;
            for (check, why) in report.failures() {
                writeln!(f, "  FAIL {check}: {why}")?;
            }
        }
        Ok(())
    }
}

fn cell(row: &Row) -> String {
    match row.status {
        Status::Pass => format!("PASS {:.1} s", row.seconds),
        Status::Fail(_) => format!("FAIL {:.1} s", row.seconds),
        Status::NotApplicable(_) => "n/a".to_owned(),
    }
}

const HEAD: &str = "check";
/// `PASS 123.4 s`
const CELL: usize = 12;

#[cfg(test)]
mod tests {
    use super::*;

    fn report(name: &str, rows: &[(&str, Status)]) -> Report {
        let took = Duration::from_millis(1500);
        let rows = rows.iter().cloned();
        Report {
            name: name.to_owned(),
            rows: rows
                .map(|(check, status)| Row::new(check.to_owned(), status, took))
                .collect(),
        }
    }

    #[test]
    fn the_table_puts_reports_side_by_side_and_names_reasons() {
        let one = report(
            "one",
            &[
                ("queue/a", Status::Pass),
                ("queue/b", Status::Fail("no".into())),
            ],
        );
        let two = report("two", &[("queue/b", Status::NotApplicable("-".into()))]);
        let text = Table::new(&[one, two]).to_string();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "| check   | one          | two          |");
        assert_eq!(lines[2], "| queue/a | PASS 1.5 s   |              |");
        assert_eq!(lines[3], "| queue/b | FAIL 1.5 s   | n/a          |");
        assert!(text.contains("one: 1 passed, 1 failed, 0 n/a in 3.0 s"));
        assert!(text.contains("  FAIL queue/b: no"));
    }

    #[test]
    fn json_has_status_and_reason() {
        let one = report("one", &[("queue/b", Status::Fail("no".into()))]);
        let row = &one.to_json()["rows"][0];
        assert_eq!(row["status"], "fail");
        assert_eq!(row["reason"], "no");
    }
}
