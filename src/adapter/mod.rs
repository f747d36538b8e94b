//! The brokers: one folder each, with the same file names in each (`mod`,
//! `config`, `connection`, `publisher`, `consumer`, `topology`, `error`). They
//! know [`crate::broker`] and nothing above it.

pub mod embedded;
pub mod kafka;
pub mod rabbitmq;
