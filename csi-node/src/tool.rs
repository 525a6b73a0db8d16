//! The distribution's own tools: mkfs, fsck, blkid, mount.

use std::{ffi::OsStr, process::Command};

use lockstep_datapath::errand;

/// A tool that did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It could not be started.
    #[error("{program} cannot be started: {source}. Install the package that has it")]
    Start {
        /// Its name.
        program: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// It failed.
    #[error("{program} {args} failed ({status}): {said}")]
    Failed {
        /// Its name.
        program: &'static str,
        /// What it was given.
        args: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it said.
        said: String,
    },
}

impl ToolError {
    /// The exit code, if it ended by itself.
    pub fn code(&self) -> Option<i32> {
        match self {
            Self::Start { .. } => None,
            Self::Failed { status, .. } => status.code(),
        }
    }
}

/// Runs a tool to its end and gives what it printed. Blocks.
///
/// # Errors
/// If it cannot be started or does not exit with 0.
pub fn run<A: AsRef<OsStr>>(program: &'static str, args: impl IntoIterator<Item = A>) -> Result<String, ToolError> {
    let args: Vec<_> = args.into_iter().map(|arg| arg.as_ref().to_owned()).collect();
    tracing::debug!(program, ?args, "running");
    let mut command = Command::new(program);
    let output = errand::output_apart(command.args(&args)).map_err(|source| ToolError::Start { program, source })?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() {
        return Ok(text(&output.stdout));
    }
    let said = [text(&output.stderr), text(&output.stdout)].into_iter().find(|said| !said.is_empty()).unwrap_or_default();
    let args = args.iter().map(|arg| arg.to_string_lossy()).collect::<Vec<_>>().join(" ");
    Err(ToolError::Failed { program, args, status: output.status, said })
}
