//! The checks. Each is an async function over a [`Fixture`]; its name is its
//! function's.

mod closing;
mod delivery;
mod fields;
mod handlers;
mod order;
mod queues;
mod refusals;
mod restarts;
mod settling;
mod streams;

use std::{future::Future, pin::Pin, time::Duration};

use super::{Capability, Failure, Fixture, Kind};

/// One check.
#[derive(Clone, Copy, Debug)]
pub struct Check {
    /// Its name, the same for queue and stream.
    pub name: &'static str,
    /// What it runs over.
    pub kinds: &'static [Kind],
    /// What the backend must have declared.
    pub needs: &'static [Capability],
    /// Whether it kills the server.
    pub restarts: bool,
    /// How long it may take.
    pub deadline: Duration,
    pub(crate) run: fn(Fixture) -> CheckFuture,
}

type CheckFuture = Pin<Box<dyn Future<Output = Result<(), Failure>> + Send>>;

/// Every check, in the order in which they run.
#[must_use]
pub fn all() -> &'static [Check] {
    CHECKS
}

/// How long a check may take; generous, because a slow machine is no failure.
const DEADLINE: Duration = Duration::from_secs(90);

/// How long a check that restarts the server may take.
const RESTART_DEADLINE: Duration = Duration::from_secs(240);

const QUEUE: &[Kind] = &[Kind::Queue];
const STREAM: &[Kind] = &[Kind::Stream];
const BOTH: &[Kind] = Kind::ALL;

macro_rules! checks {
    ($($kinds:ident $module:ident::$name:ident [$($need:ident),*] $($restarts:ident)?;)*) => {
        const CHECKS: &[Check] = &[$(Check {
            name: stringify!($name),
            kinds: $kinds,
            needs: &[$(Capability::$need),*],
            restarts: checks!(@restarts $($restarts)?),
            deadline: checks!(@deadline $($restarts)?),
            run: |fixture| Box::pin($module::$name(fixture)),
        }),*];
    };
    (@restarts) => { false };
    (@restarts restarts) => { true };
    (@deadline) => { DEADLINE };
    (@deadline restarts) => { RESTART_DEADLINE };
}

checks! {
    BOTH delivery::everything_published_arrives_once_and_unaltered [];
    BOTH delivery::many_publishers_and_subscribers_share_the_work [];
    BOTH delivery::many_topics_at_once_each_get_their_own [];
    BOTH delivery::topics_do_not_leak_into_each_other [];
    BOTH delivery::what_closed_publishers_left_arrives [OutlivesClient];
    BOTH delivery::every_batch_size_gives_an_outcome_for_each [];
    BOTH delivery::an_empty_batch_gives_no_outcomes [];
    BOTH delivery::late_subscribers_get_what_was_published_before [];
    BOTH delivery::ten_runs_at_once_do_not_disturb_each_other [];
    STREAM delivery::receipts_tell_the_position [];
    BOTH settling::what_is_given_back_twice_still_arrives [];
    BOTH settling::the_next_message_is_withheld_until_the_ack [BoundedPrefetch];
    BOTH settling::what_was_acked_never_returns [OutlivesClient];
    BOTH settling::what_is_dropped_unsettled_returns [];
    BOTH settling::acks_out_of_order_never_pass_an_unsettled_message [OutlivesClient];
    BOTH settling::acks_never_pass_a_message_that_was_given_back [OutlivesClient];
    BOTH settling::subscribers_that_refuse_everything_lose_nothing [];
    QUEUE settling::what_is_given_back_is_marked_redelivered [RedeliveredInQueues];
    STREAM settling::what_is_given_back_is_marked_redelivered [RedeliveredInStreams];
    BOTH settling::an_ack_after_close_fails [];
    BOTH settling::unsettled_messages_are_bounded_and_acks_resume [BoundedPrefetch];
    BOTH settling::a_stuck_reader_holds_a_bounded_number [BoundedPrefetch];
    BOTH settling::a_dead_letter_leaves_and_can_be_read [DeadLetters];
}
