//! Entrances for other languages. Each gateway speaks one protocol and knows
//! the hub's public API only; none of them keeps messages of its own.

pub mod http;
