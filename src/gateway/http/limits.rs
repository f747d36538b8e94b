//! Every bound of the HTTP server, by name.

use std::time::Duration;

/// Connections served at once. More wait in the kernel's backlog until one
/// closes.
pub(super) const MAX_CONNECTIONS: usize = 4096;

/// Bytes of one request's head. Holds a `Last-Event-ID` that names a few
/// thousand partitions.
pub(super) const MAX_HEAD_BYTES: usize = 256 * 1024;

/// Headers of one request.
pub(super) const MAX_HEADERS: usize = 200;

/// How long a client may take to send a request's head.
pub(super) const HEAD_TIMEOUT: Duration = Duration::from_secs(15);

/// How long a body that is read whole may bring nothing.
pub(super) const BODY_IDLE: Duration = Duration::from_secs(60);

/// Bytes that an envelope needs beside its payload (ids, headers, attributes).
pub(super) const ENVELOPE_OVERHEAD: usize = 64 * 1024;

/// Bytes of an array or a CloudEvents batch, at least; one message of the
/// largest size always fits. Longer input is what NDJSON is for.
pub(super) const MAX_BATCH_BYTES: usize = 32 * 1024 * 1024;

/// Messages of an array or batch.
pub(super) const MAX_BATCH_MESSAGES: usize = 10_000;

/// Bytes of a body that carries only parameters.
pub(super) const MAX_COMMAND_BYTES: usize = 1024 * 1024;

/// Answers of one NDJSON request that may be outstanding: lines published and
/// not answered yet. A client that does not read its answers stops here.
pub(super) const NDJSON_WINDOW: usize = 1024;

/// Events that may wait in a stream's body for the socket.
pub(super) const STREAM_BUFFER: usize = 64;

/// Events of a grouped stream that may be handed out and not committed.
/// Beyond them the stream waits for the client's commit (`ack=cursor`) or for
/// the socket (`ack=auto`).
pub(super) const STREAM_MAX_UNCOMMITTED: usize = 10_000;

/// Bytes of events that may be handed out and not committed; one event more than
/// that, for it is not known before how large it is.
pub(super) const STREAM_MAX_HELD: usize = 64 * 1024 * 1024;

/// Bytes of a stream that may wait for the socket, and one event more.
pub(super) const STREAM_MAX_BYTES: usize = 16 * 1024 * 1024;

/// A client that takes nothing of what is there for it for so long is gone.
pub(super) const STREAM_STANDSTILL: Duration = Duration::from_secs(300);

/// Streams with `ack=cursor` that are open at once.
pub(super) const MAX_STREAMS: usize = 2048;

/// How often a silent stream gets a comment, so that dead peers are noticed.
pub(super) const HEARTBEAT: Duration = Duration::from_secs(15);

/// How long a stream may take to become live before it is refused.
pub(super) const STREAM_START_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a group that is to go back to a cursor may be in no state for it, as while
/// Kafka waits for a static member (`SubscribeOptions::session_timeout`).
pub(super) const STREAM_RESUME_TIMEOUT: Duration = Duration::from_secs(15);

/// How often that is tried.
pub(super) const STREAM_RESUME_AGAIN: Duration = Duration::from_millis(200);

/// How long a client is told to wait before it reconnects a stream, in
/// milliseconds.
pub(super) const STREAM_RETRY_MS: u64 = 1000;

/// Leases outstanding in this process.
pub(super) const MAX_LEASES: usize = 100_000;

/// Deliveries in one lease answer.
pub(super) const MAX_LEASE_BATCH: usize = 1000;

/// How long a lease request may wait for a first delivery.
pub(super) const MAX_LEASE_WAIT: Duration = Duration::from_secs(60);

/// How long a lease lasts when the client does not say.
pub(super) const DEFAULT_LEASE: Duration = Duration::from_secs(30);

/// The longest lease, and the longest extension. RabbitMQ closes a channel
/// whose delivery is unacked for 30 minutes.
pub(super) const MAX_LEASE: Duration = Duration::from_secs(25 * 60);

/// Tokens acked by one request.
pub(super) const MAX_ACK_BATCH: usize = 10_000;

/// Lanes, or messages, of one look at the spool when the client does not say.
pub(super) const DEFAULT_SPOOL_PAGE: usize = 100;

/// Lanes of one look at the spool.
pub(super) const MAX_SPOOL_LANES: usize = 10_000;

/// Dead letters of one list, or that are reprocessed by one request.
pub(super) const MAX_DEAD_LETTERS: usize = 1_000;

/// The JSON envelope of a payload of `max_message_bytes` is at most this long:
/// base64 takes four bytes for three.
pub(super) const fn envelope_bytes(max_message_bytes: usize) -> usize {
    max_message_bytes
        .saturating_add(2)
        .saturating_div(3)
        .saturating_mul(4)
        .saturating_add(ENVELOPE_OVERHEAD)
}

/// What a lease request waits at least: even a full queue needs a moment until
/// the broker has taken the subscription and hands out.
pub(super) const MIN_LEASE_WAIT: Duration = Duration::from_millis(250);
