//! What to do when a step of a transaction does not succeed, and what its caller
//! may assume. Pure.
//!
//! ```text
//!   Prepare -> Begin -> Write -> Offsets -> Commit -> done
//!                         `--------`----------`-----> Abort
//! ```
//!
//! Only the commit makes a transaction visible, and only its own producer commits:
//! before that step nothing is ever visible, whatever becomes of the producer. From
//! there on it is unknown, unless the broker has turned the commit down.

use crate::error::Assume;

/// Where a transaction stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The producer is made the only one of its id.
    Prepare,
    /// It is begun.
    Begin,
    /// Records are written and their outcomes awaited.
    Write,
    /// The positions of the group that was read go into it.
    Offsets,
    /// It is committed.
    Commit,
    /// It is aborted.
    Abort,
}

/// What the client library says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// It is not done yet; the same call goes on with it.
    Passing,
    /// The transaction cannot be committed, its producer is well.
    Abortable,
    /// The producer is of no use any more.
    Fatal,
    /// Another producer of the id has taken its place, or the broker has aborted
    /// what was open for too long; both look alike.
    Fenced,
}

/// How late it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Clock {
    /// Whoever waits wants an answer now.
    pub(super) late: bool,
    /// The transaction is as old as the broker lets one get.
    pub(super) outlived: bool,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Call again.
    Again,
    /// Say that the outcome is unknown, and call again.
    Tell,
    /// Nothing was begun: leave the producer as it is.
    Leave,
    /// Abort; nothing of it is visible.
    Abort,
    /// Give the producer up. The next one of its id ends what it left open.
    Renew(Assume),
    /// The id is another's.
    End(Assume),
}

/// Decides.
pub(super) fn decide(stage: Stage, trouble: Trouble, clock: Clock) -> Step {
    let assume = match stage {
        Stage::Commit => Assume::Unknown,
        _ => Assume::NotSent,
    };
    match (trouble, stage) {
        // A fence of what was open for too long is the broker's own doing.
        (Trouble::Fenced, _) if !clock.outlived => Step::End(assume),
        (Trouble::Fenced | Trouble::Fatal, _) => Step::Renew(assume),
        (Trouble::Passing, Stage::Commit) if clock.late => Step::Tell,
        (Trouble::Passing, Stage::Prepare | Stage::Begin) if clock.late => Step::Leave,
        (Trouble::Passing, Stage::Write | Stage::Offsets) if clock.late || clock.outlived => {
            Step::Abort
        }
        // The broker has aborted it by now, and a new producer makes sure of it.
        (Trouble::Passing, Stage::Abort) if clock.outlived => Step::Renew(assume),
        (Trouble::Passing, _) => Step::Again,
        // Turned down, so certainly not committed.
        (Trouble::Abortable, Stage::Begin | Stage::Write | Stage::Offsets | Stage::Commit) => {
            Step::Abort
        }
        (Trouble::Abortable, Stage::Prepare | Stage::Abort) => Step::Renew(assume),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAGES: [Stage; 6] = [
        Stage::Prepare,
        Stage::Begin,
        Stage::Write,
        Stage::Offsets,
        Stage::Commit,
        Stage::Abort,
    ];

    fn clocks() -> impl Iterator<Item = Clock> {
        [(false, false), (true, false), (false, true), (true, true)]
            .into_iter()
            .map(|(late, outlived)| Clock { late, outlived })
    }

    #[test]
    fn only_a_commit_that_was_not_turned_down_is_unknown() {
        for stage in STAGES {
            for trouble in [Trouble::Passing, Trouble::Fatal, Trouble::Fenced] {
                for clock in clocks() {
                    let unknown = matches!(
                        decide(stage, trouble, clock),
                        Step::Tell | Step::Renew(Assume::Unknown) | Step::End(Assume::Unknown)
                    );
                    let waits = trouble == Trouble::Passing && !clock.late;
                    assert_eq!(
                        unknown,
                        stage == Stage::Commit && !waits,
                        "{stage:?} {trouble:?}"
                    );
                }
            }
            for clock in clocks() {
                let step = decide(stage, Trouble::Abortable, clock);
                assert!(matches!(step, Step::Abort | Step::Renew(Assume::NotSent)));
            }
        }
    }

    #[test]
    fn a_commit_is_never_given_up_for_being_late() {
        for clock in clocks() {
            let step = decide(Stage::Commit, Trouble::Passing, clock);
            assert!(matches!(step, Step::Again | Step::Tell), "{step:?}");
        }
    }

    #[test]
    fn everything_else_ends_once_it_is_as_old_as_the_broker_lets_it_get() {
        let clock = Clock {
            late: true,
            outlived: true,
        };
        for stage in STAGES.into_iter().filter(|s| *s != Stage::Commit) {
            assert_ne!(
                decide(stage, Trouble::Passing, clock),
                Step::Again,
                "{stage:?}"
            );
        }
    }

    #[test]
    fn a_fence_ends_the_publisher_unless_the_broker_ran_out_of_patience() {
        for stage in STAGES {
            let young = decide(stage, Trouble::Fenced, Clock::default());
            assert!(matches!(young, Step::End(_)), "{stage:?}");
            let clock = Clock {
                outlived: true,
                ..Clock::default()
            };
            assert!(matches!(
                decide(stage, Trouble::Fenced, clock),
                Step::Renew(_)
            ));
        }
    }
}
