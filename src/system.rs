//! The system built from a configuration.
