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
    /// Whether it publishes before anybody reads: of a stream, that needs
    /// [`Capability::HistoryReplay`].
    pub late: bool,
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
    ($($kinds:ident $module:ident::$name:ident [$($need:ident),*] $($flag:ident)*;)*) => {
        const CHECKS: &[Check] = &[$(Check {
            name: stringify!($name),
            kinds: $kinds,
            needs: &[$(Capability::$need),*],
            late: checks!(@late $($flag)*),
            restarts: checks!(@restarts $($flag)*),
            deadline: if checks!(@restarts $($flag)*) { RESTART_DEADLINE } else { DEADLINE },
            run: |fixture| Box::pin($module::$name(fixture)),
        }),*];
    };
    (@late) => { false };
    (@late late $($rest:ident)*) => { true };
    (@late $other:ident $($rest:ident)*) => { checks!(@late $($rest)*) };
    (@restarts) => { false };
    (@restarts restarts $($rest:ident)*) => { true };
    (@restarts $other:ident $($rest:ident)*) => { checks!(@restarts $($rest)*) };
}

checks! {
    BOTH delivery::everything_published_arrives_once_and_unaltered [];
    BOTH delivery::many_publishers_and_subscribers_share_the_work [];
    BOTH delivery::many_topics_at_once_each_get_their_own [] late;
    BOTH delivery::topics_do_not_leak_into_each_other [];
    BOTH delivery::what_closed_publishers_left_arrives [OutlivesClient] late;
    BOTH delivery::every_batch_size_gives_an_outcome_for_each [] late;
    BOTH delivery::without_a_confirm_the_outcome_is_sent [Unconfirmed];
    BOTH delivery::declaring_twice_changes_nothing [] late;
    BOTH delivery::an_empty_batch_gives_no_outcomes [];
    BOTH delivery::late_subscribers_get_what_was_published_before [] late;
    BOTH delivery::ten_runs_at_once_do_not_disturb_each_other [];
    STREAM delivery::receipts_tell_the_position [] late;
    BOTH settling::what_is_given_back_twice_still_arrives [] late;
    BOTH settling::the_next_message_is_withheld_until_the_ack [BoundedPrefetch] late;
    BOTH settling::what_was_acked_never_returns [OutlivesClient] late;
    BOTH settling::what_is_dropped_unsettled_returns [] late;
    BOTH settling::acks_out_of_order_never_pass_an_unsettled_message [OutlivesClient] late;
    BOTH settling::acks_never_pass_a_message_that_was_given_back [OutlivesClient] late;
    BOTH settling::subscribers_that_refuse_everything_lose_nothing [] late;
    QUEUE settling::what_is_given_back_is_marked_redelivered [RedeliveredInQueues];
    STREAM settling::what_is_given_back_is_marked_redelivered [RedeliveredInStreams] late;
    BOTH settling::an_ack_after_close_fails [] late;
    BOTH settling::unsettled_messages_are_bounded_and_acks_resume [BoundedPrefetch] late;
    BOTH settling::a_stuck_reader_holds_a_bounded_number [BoundedPrefetch];
    BOTH settling::a_dead_letter_leaves_and_can_be_read [DeadLetters] late;
    BOTH order::one_reader_gets_publish_order [OrderedSingleConsumer] late;
    STREAM order::each_of_sixteen_keys_keeps_its_order [];
    QUEUE order::each_of_sixteen_keys_keeps_its_order [OrderedSingleConsumer];
    BOTH order::the_key_is_reported_byte_for_byte [] late;
    STREAM order::one_key_stays_in_one_partition [] late;
    STREAM order::handlers_of_one_key_run_in_order [PerKeyOrder];
    BOTH closing::readers_may_come_and_go_without_loss [] late;
    BOTH closing::ten_readers_closed_at_once_lose_nothing [] late;
    BOTH closing::a_dropped_reader_loses_nothing [] late;
    BOTH closing::a_lost_reader_leaves_its_share_to_the_others [];
    BOTH closing::stopping_wakes_a_waiting_reader [];
    BOTH closing::closing_ends_readers [];
    QUEUE closing::closing_twice_is_fine [];
    BOTH closing::closing_does_not_wait_for_unread_deliveries [];
    BOTH closing::closing_does_not_wait_for_unsettled_deliveries [] late;
    BOTH closing::every_handle_fails_after_close [];
    BOTH closing::closing_flushes_what_was_being_published [OutlivesClient] late;
    BOTH closing::an_abandoned_publish_harms_nobody [] late;
    BOTH closing::a_publisher_survives_the_runtime_that_used_it_first [] late;
    BOTH fields::every_field_comes_back [];
    BOTH fields::a_bare_message_comes_back_bare [];
    BOTH fields::a_transient_message_comes_back [];
    BOTH fields::task_attributes_come_back [];
    BOTH fields::event_attributes_come_back [];
    BOTH fields::headers_come_back_byte_for_byte [];
    BOTH fields::payloads_of_every_size_and_byte_come_back [];
    BOTH fields::readers_are_told_where_it_came_from [];
    BOTH refusals::a_publish_to_nowhere_is_refused [UnroutableRefused] late;
    BOTH refusals::messages_around_a_refused_one_are_kept [] late;
    BOTH refusals::reserved_headers_are_refused_and_never_arrive [] late;
    BOTH refusals::an_overlong_type_is_refused_and_never_arrives [] late;
    BOTH refusals::no_secret_is_shown [] late;
    QUEUE refusals::a_reader_of_a_missing_queue_does_not_harm_its_client [];
    QUEUE queues::higher_priorities_come_first [Priority];
    QUEUE queues::one_priority_keeps_publish_order [Priority];
    QUEUE queues::priority_is_honoured_under_prefetch [Priority, BoundedPrefetch];
    QUEUE queues::what_expired_is_not_handed_out [Ttl];
    QUEUE queues::a_scheduled_task_waits_for_its_time [Delay];
    QUEUE queues::queue_stats_count [QueueStats];
    QUEUE queues::a_purge_deletes_what_is_ready [Purge];
    QUEUE queues::a_queue_with_a_time_limit_expires_its_messages [QueueTtl];
    QUEUE queues::single_messages_can_be_taken [Dequeue];
    QUEUE queues::administration_of_an_unknown_queue_says_so [QueueStats, Purge];
    QUEUE queues::a_queue_declared_differently_is_refused [DeclareConflict];
    STREAM streams::each_group_gets_everything [Groups];
    STREAM streams::members_of_a_group_share_the_work [Groups];
    STREAM streams::a_groupless_reader_gets_everything_and_moves_no_group [GrouplessReaders, HistoryReplay];
    STREAM streams::a_new_group_starts_where_it_was_told [Groups, HistoryReplay];
    STREAM streams::a_reader_can_start_at_a_time_or_an_offset [GrouplessReaders, HistoryReplay];
    STREAM streams::a_reader_with_an_end_reads_to_it_and_ends [GrouplessReaders, HistoryReplay];
    STREAM streams::a_position_never_passes_an_unsettled_message [Offsets];
    STREAM streams::a_committed_position_is_where_a_group_goes_on [Offsets];
    STREAM streams::a_group_can_be_moved [Seek];
    STREAM streams::live_members_follow_a_move [Seek];
    STREAM streams::topic_metadata_tells_partitions_and_watermarks [TopicMetadata];
    STREAM streams::a_pattern_reads_every_stream_that_matches [] late;
    BOTH handlers::a_handler_gets_everything_once [];
    BOTH handlers::a_failing_handler_is_called_again [Retry];
    BOTH handlers::a_panic_is_a_failed_delivery [Retry];
    BOTH handlers::keyed_messages_survive_periodic_errors [Retry];
    BOTH handlers::unsubscribing_lets_handlers_finish [];
    BOTH handlers::what_a_filter_keeps_away_is_settled [HandlerOptions];
    BOTH handlers::a_handler_over_its_time_is_a_failed_delivery [HandlerOptions, Retry];
    BOTH handlers::with_auto_ack_a_failure_is_not_repeated [HandlerOptions];
    QUEUE handlers::a_retry_comes_not_before_its_delay [Retry];
    BOTH restarts::what_was_confirmed_survives_a_kill [Persistent] late restarts;
    BOTH restarts::while_the_server_is_away_no_delivery_is_claimed [Persistent] late restarts;
    BOTH restarts::a_reader_goes_on_after_a_kill [Persistent] restarts;
    BOTH restarts::publishers_and_readers_go_on_after_two_kills [Persistent] restarts;
}
