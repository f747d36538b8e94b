//! Publishing lanes of the hub: [`machine`] decides, [`task`] does.

mod hedge;
pub(crate) mod keeper;
pub(crate) mod machine;
pub(crate) mod task;
#[cfg(test)]
mod tests;
