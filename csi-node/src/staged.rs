//! The staged record: all that is needed to serve a volume again or to take it down, without any object.

use std::path::PathBuf;

use lockstep_proto::objects::{FsType, VolumeMode};
use serde::{Deserialize, Serialize};

use crate::state_dir::{self, StateDir, StateError};

/// The version of the record's format that this csi-node writes.
const VERSION: u32 = 1;

/// That version. A record of another one is refused before anything of the volume is touched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Version;

impl TryFrom<u32> for Version {
    type Error = String;

    fn try_from(version: u32) -> Result<Self, String> {
        let other = || format!("its version is {version}, and this csi-node knows {VERSION}: start the csi-node that wrote it");
        (version == VERSION).then_some(Self).ok_or_else(other)
    }
}

impl From<Version> for u32 {
    fn from(_: Version) -> Self {
        VERSION
    }
}

/// Written, durably, before NodeStageVolume does anything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Staged {
    /// Of what follows.
    #[serde(default)]
    pub version: Version,
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

/// A record that cannot be read.
#[derive(Debug)]
pub struct Unreadable {
    /// Its volume's id, if it says so much: each version of the record does.
    pub volume: Option<String>,
    /// Why.
    pub error: StateError,
}

/// All records, and those that cannot be read.
///
/// # Errors
/// `StateError::Io` if their directory cannot be read.
pub fn all(state: &StateDir) -> Result<(Vec<Staged>, Vec<Unreadable>), StateError> {
    #[derive(Deserialize)]
    struct Whose {
        volume: String,
    }
    let files = state_dir::list(&state.staged_dir())?.into_iter();
    let records = files.filter(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    let hidden = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
    let (mut readable, mut unreadable) = (Vec::new(), Vec::new());
    for path in records.filter(|path| !hidden(path)) {
        match state_dir::read_record(&path) {
            Ok(record) => readable.extend::<Option<Staged>>(record),
            Err(error) => {
                let volume = state_dir::read_record::<Whose>(&path).ok().flatten().map(|whose| whose.volume);
                unreadable.push(Unreadable { volume, error });
            }
        }
    }
    Ok((readable, unreadable))
}

/// The record of a volume, by its id.
///
/// # Errors
/// `StateError::Unreadable` if its record is, or may be, one that cannot be read.
pub fn of(state: &StateDir, volume: &str) -> Result<Option<Staged>, StateError> {
    let (records, unreadable) = all(state)?;
    match records.into_iter().find(|staged| staged.volume == volume) {
        None => {
            let mut its = unreadable.into_iter().filter(|record| record.volume.as_ref().is_none_or(|other| other == volume));
            its.next().map_or(Ok(None), |record| Err(record.error))
        }
        found => Ok(found),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_damaged_record_keeps_nobody_else_from_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path(), false).unwrap();
        let text = "volume: v\nuid: u\nstagingPath: /s\nvolumeMode: Block\n";
        fs::write(state.staged("u"), text).unwrap();
        assert_eq!(of(&state, "w").unwrap(), None);
        fs::write(state.staged("later"), "version: 2\nvolume: x\nother: fields\n").unwrap();
        assert_eq!((of(&state, "v").unwrap().unwrap().uid.as_str(), of(&state, "w").unwrap()), ("u", None));
        assert!(of(&state, "x").unwrap_err().to_string().contains("its version is 2"));
        fs::write(state.staged("damaged"), "{").unwrap();
        assert_eq!(of(&state, "v").unwrap().unwrap().uid, "u");
        assert!(of(&state, "w").unwrap_err().to_string().contains("damaged.yaml"));
    }
}
