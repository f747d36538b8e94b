//! restarts.
