//! Commands that the user gave, such as the one that starts a broker. They are
//! run by the shell, as they were written.

use std::process::{Command, Stdio};

use crate::cli::Failure;

/// Runs a command to its end.
///
/// # Errors
/// It could not be started, or its exit status is not 0.
pub(super) async fn run(command: &str) -> Result<(), Failure> {
    let mut shell = Command::new("sh");
    // What it says goes to stderr, and not where ours may be JSON.
    shell
        .args(["-c", command])
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    let done = tokio::task::spawn_blocking(move || shell.status()).await;
    let wrong = |why: String| Failure::new(format!("the command `{command}` failed: {why}"));
    let status = done
        .map_err(|e| wrong(e.to_string()))?
        .map_err(|e| wrong(e.to_string()))?;
    if status.success() {
        Ok(())
    } else {
        Err(wrong(status.to_string()))
    }
}
