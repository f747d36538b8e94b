//! queues.
