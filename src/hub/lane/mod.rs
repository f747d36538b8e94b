//! Publishing lanes of the hub: [`machine`] decides, [`task`] does.

mod alarm;
pub(crate) mod ask;
mod groups;
#[cfg(test)]
mod groups_tests;
mod hedge;
pub(crate) mod keeper;
mod limit;
pub(crate) mod machine;
pub(crate) mod task;
#[cfg(test)]
mod tests;
