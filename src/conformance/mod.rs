//! The public conformance suite: what every broker behind
//! [`MessageBroker`](crate::broker::MessageBroker), and the hub over them, must
//! do, as named checks that run against real backends.
//!
//! A backend joins by a [`Factory`]: how to connect, what it can do
//! ([`Capability`]), and, where the suite may kill the server, how
//! ([`Restart`]). [`run`] gives a [`Report`]; [`Table`] prints several side by
//! side. What a backend does not declare is reported as `n/a` with the reason;
//! what it declares runs and must hold.
//!
//! The suite covers: complete, exact and unaltered delivery (judged by
//! [`ledger`]), settling and redelivery, order, closing in every state, every
//! field of a message, refusals, priorities, expiry, schedules, queue
//! administration, groups, offsets and seeking, handlers, and kills of the
//! server. It measures no speed and knows no backend by name.
//!
//! ```no_run
//! # async fn f(factory: std::sync::Arc<dyn messaging_hub::conformance::Factory>) {
//! use messaging_hub::conformance::{Filter, Table, run};
//! let four_at_once = std::sync::Arc::new(tokio::sync::Semaphore::new(4));
//! let report = run(factory, &Filter::default(), four_at_once).await;
//! println!("{}", Table::new(&[report]));
//! # }
//! ```

mod checks;
pub mod embedded;
mod factory;
mod failure;
mod fixture;
pub mod hub;
#[cfg(feature = "journal")]
pub mod killed;
pub mod ledger;
mod log;
#[cfg(test)]
mod mutants;
mod reader;
mod report;
mod run;
mod target;

pub use checks::{Check, all as checks};
pub use factory::{Capabilities, Capability, Factory, Kind, Restart, Wanted};
pub use failure::Failure;
pub use fixture::Fixture;
pub use reader::Reader;
pub use report::{Report, Row, Status, Table};
pub use run::{Filter, run};
pub use target::Target;
