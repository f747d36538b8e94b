//! `config check|show`: a configuration, without a running hub.

use std::{path::PathBuf, process::ExitCode};

use clap::Subcommand;
use serde_json::json;

use super::{Failure, Target, say, serve::load};

/// Check or show a configuration.
#[derive(Debug, Subcommand)]
pub(super) enum Config {
    /// Say whether it can be used, and which guarantees it weakens.
    Check {
        /// Configuration file. Default: the built-in one and the environment.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Print what holds in the end, without secrets, as JSON.
    Show {
        /// Configuration file. Default: the built-in one and the environment.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
}

impl Config {
    pub(super) fn run(self, target: &Target) -> Result<ExitCode, Failure> {
        match self {
            Self::Check { config } => {
                let config = load(config.as_deref())?;
                if target.json {
                    let found = json!({
                        "ok": true,
                        "weakened": config.weakened(),
                        "warnings": config.warnings,
                    });
                    say(found.to_string())?;
                } else {
                    say(config.report().trim_end())?;
                    say("the configuration can be used")?;
                }
            }
            Self::Show { config } => {
                let shown = load(config.as_deref())?.redacted();
                say(if target.json {
                    shown.to_string()
                } else {
                    format!("{shown:#}")
                })?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}
