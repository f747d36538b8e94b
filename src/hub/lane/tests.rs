//! The lane's machine, stepped by hand.
