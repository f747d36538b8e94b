//! Schemas of payloads: JSON Schema and Avro, from files or from a
//! Confluent-compatible registry. A route says what its payloads must look like;
//! what does not is refused at publish, or dead-lettered at consume.
//!
//! ```text
//!   route's guard --look--> fits | wrong | not known yet --ask--> registry (cached)
//! ```
//!
//! It refuses to guess: a payload whose schema cannot be had now is neither taken
//! nor thrown away. Nothing is converted on the way; [`SchemaRegistry::encode`] and
//! [`SchemaRegistry::decode`] are for those who want that.

mod compiled;
mod frame;
pub(crate) mod guard;
mod registry;

pub use crate::config::{CheckAt, RegistrySettings, SchemaFormat, SchemaSettings};
pub use frame::{frame, unframe};
pub use registry::SchemaRegistry;
