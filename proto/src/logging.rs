//! Where both binaries log: to stderr.

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;

/// The environment variable that says what is logged, e.g. `debug` or `lockstep_csi_controller=debug,info`.
pub const VARIABLE: &str = "LOCKSTEP_LOG";

/// What is logged without it. notify tells of watches that are gone, which is no news.
const DEFAULT: &str = "info,notify=warn";

/// Why nothing can be logged.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// The environment variable is not understood.
    #[error("{VARIABLE} is not understood: {0}. Use e.g. {VARIABLE}=debug")]
    Filter(#[from] tracing_subscriber::filter::FromEnvError),
    /// It was set up before.
    #[error("logging is set up already: {0}")]
    Twice(#[from] Box<dyn std::error::Error + Send + Sync>),
}

/// Logs to stderr from now on: what `LOCKSTEP_LOG` says, `info` without it.
///
/// # Errors
/// If the variable is not understood, or logging was set up before.
pub fn init() -> Result<(), LoggingError> {
    let filter = match std::env::var_os(VARIABLE) {
        Some(_) => EnvFilter::try_from_env(VARIABLE)?,
        None => EnvFilter::new(DEFAULT),
    };
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(io::stderr().is_terminal()).try_init()?;
    Ok(())
}
