//! The staged record: all that is needed to serve a volume again or to take it down, without any object.

use std::{fs, path::PathBuf};

use lockstep_proto::objects::{FsType, VolumeMode};
use serde::{Deserialize, Serialize};

use crate::state_dir::{self, StateDir, StateError};

/// Written, durably, before NodeStageVolume does anything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Staged {
    /// The volume's id.
    pub volume: String,
    /// The UID of its object.
    pub uid: String,
    /// Where it is staged.
    pub staging_path: PathBuf,
    /// How it is used.
    pub volume_mode: VolumeMode,
    /// Its file system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fs_type: Option<FsType>,
    /// Mount options.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mount_flags: Vec<String>,
    /// Its parameters.
    #[serde(default, skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    pub parameters: std::collections::BTreeMap<String, String>,
    /// Where its legs were found.
    #[serde(default)]
    pub legs: Vec<PathBuf>,
    /// Its device, once it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<PathBuf>,
}

impl Staged {
    /// Writes it.
    ///
    /// # Errors
    /// `StateError::Io`.
    pub fn write(&self, state: &StateDir) -> Result<(), StateError> {
        state_dir::write_record(&state.staged(&self.uid), self)
    }

    /// Whether the volume is staged in the same way.
    pub fn same_as(&self, other: &Self) -> bool {
        let arguments = |staged: &Self| (staged.staging_path.clone(), staged.volume_mode, staged.fs_type, staged.mount_flags.clone());
        arguments(self) == arguments(other)
    }
}

/// All records.
///
/// # Errors
/// `StateError::Unreadable`: it is named; the others can still be found one by one.
pub fn all(state: &StateDir) -> Result<Vec<Staged>, StateError> {
    let dir = state.staged_dir();
    let entries = fs::read_dir(&dir).map_err(|source| StateError::Io { path: dir, source })?.flatten();
    let records = entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    let hidden = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
    records.filter(|path| !hidden(path)).filter_map(|path| state_dir::read_record(&path).transpose()).collect()
}

/// The record of a volume, by its id.
///
/// # Errors
/// `StateError::Unreadable` if its record may be the one that cannot be read.
pub fn of(state: &StateDir, volume: &str) -> Result<Option<Staged>, StateError> {
    Ok(all(state)?.into_iter().find(|staged| staged.volume == volume))
}
