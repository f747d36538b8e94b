//! How often each fault struck in each state of a lane.

use std::fmt;

use super::faults::Fault;
use crate::hub::state::LaneState;

/// Counts of (state, fault).
#[derive(Clone, Default)]
pub(super) struct Table([[u64; Fault::ALL.len()]; STATES.len()]);

const STATES: [LaneState; 4] = [
    LaneState::Primary,
    LaneState::Suspect,
    LaneState::Degraded,
    LaneState::Draining,
];

impl Table {
    pub(super) fn hit(&mut self, state: LaneState, fault: Fault) {
        if let Some(row) = STATES.iter().position(|s| *s == state) {
            self.0[row][fault as usize] += 1;
        }
    }

    pub(super) fn add(&mut self, other: &Self) {
        for (row, more) in self.0.iter_mut().zip(&other.0) {
            for (count, more) in row.iter_mut().zip(more) {
                *count += more;
            }
        }
    }

    /// The pair that was hit least.
    pub(super) fn least(&self) -> u64 {
        self.0.iter().flatten().copied().min().unwrap_or(0)
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<24}", "fault")?;
        for state in STATES {
            write!(f, "{:>12}", state.as_str())?;
        }
        writeln!(f)?;
        for fault in Fault::ALL {
            write!(f, "{:<24}", fault.name())?;
            for row in &self.0 {
                write!(f, "{:>12}", row[fault as usize])?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}
