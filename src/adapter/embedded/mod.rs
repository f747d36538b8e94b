//! The embedded broker: queues and streams in this process.
