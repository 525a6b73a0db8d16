//! Which file system was made on a volume, to its end: its object says so, and so does each of its legs. Objects may be older than the data (an
//! API server restored from a backup); what a leg knows of is never made again.

use std::{path::PathBuf, time::Duration};

use lockstep_datapath::core::status::LegState;
use lockstep_proto::objects::{FormatState, FormatStatus};
use lockstep_store::Store;
use tracing::warn;

use crate::{
    error::Error,
    legs,
    mirror::OpenVolume,
    node::{Node, blocking},
    staged::Staged,
};

/// How long the disks may take to say or to be told.
const PATIENCE: Duration = Duration::from_secs(5);

impl<S: Store> Node<S> {
    /// What is on record of the volume's file system: what its object says, unless a leg knows better.
    ///
    /// # Errors
    /// `Error::DataLoss` if the object knows of no file system and a leg does; `Error::State` if what a leg says cannot be read.
    pub(crate) async fn format_on_record(&self, staged: &Staged, said: FormatStatus) -> Result<FormatStatus, Error> {
        if said.state == FormatState::Formatted {
            return Ok(said);
        }
        let dirs = staged.legs.clone();
        let Some(uuid) = blocking(&staged.volume, move || on_legs(&dirs)).await? else { return Ok(said) };
        if said.state == FormatState::Never {
            return Err(Error::DataLoss(format!(
                "the volume was never formatted, says its object, but its copies say that the file system {uuid} was made: was an older copy of the objects restored? It is left alone: set status.format of the object to state Formatted, fsUuid {uuid}"
            )));
        }
        // The object was not told any more, or is older than that.
        warn!(uuid, "mkfs was cut off, says the volume's object, but its copies say that it was not: it is not formatted again");
        Ok(FormatStatus { state: FormatState::Formatted, fs_uuid: Some(uuid) })
    }

    /// Every leg that counts says from now on that this file system was made.
    ///
    /// # Errors
    /// What the system says; a disk that takes too long.
    pub(crate) async fn record_on_legs(&self, staged: &Staged, open: &OpenVolume, uuid: &str) -> Result<(), Error> {
        let counted: Vec<String> = {
            let status = open.volume.status();
            let status = status.borrow();
            status.legs.iter().filter(|leg| leg.state == LegState::In).map(|leg| format!("{}.{}", staged.uid, leg.id)).collect()
        };
        let named = |dir: &&PathBuf| dir.file_name().is_some_and(|name| counted.iter().any(|leg| name == leg.as_str()));
        let dirs: Vec<PathBuf> = staged.legs.iter().filter(named).cloned().collect();
        let uuid = uuid.to_owned();
        let record = blocking(&staged.volume, move || Ok(dirs.iter().try_for_each(|dir| legs::record_file_system(dir, &uuid))?));
        tokio::time::timeout(PATIENCE, record).await.unwrap_or_else(|_| {
            let late = std::io::Error::from(std::io::ErrorKind::TimedOut);
            Err(Error::io("recording on the volume's disks that it is formatted")(late))
        })
    }
}

/// What the legs say. One that says so is enough; where none does, each must be readable.
fn on_legs(dirs: &[PathBuf]) -> Result<Option<String>, Error> {
    let mut unreadable = None;
    for dir in dirs {
        match legs::file_system(dir) {
            Ok(Some(uuid)) => return Ok(Some(uuid)),
            Ok(None) => {}
            Err(error) => unreadable = Some(error),
        }
    }
    unreadable.map_or(Ok(None), |error| Err(error.into()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use lockstep_datapath::core::units::LegId;
    use lockstep_proto::objects::MirrorVolume;

    use super::*;

    #[test]
    fn one_leg_that_says_so_is_enough_and_none_that_does_is_only_so_if_all_can_be_read() {
        let root = tempfile::tempdir().unwrap();
        let spec = serde_json::from_str(r#"{"csiName":"v","capacityBytes":1,"node":"n","volumeMode":"Filesystem"}"#).unwrap();
        let volume = MirrorVolume::new("v", spec);
        let dirs = ["a", "b"].map(|name| root.path().join(name));
        for dir in &dirs {
            legs::prepare(dir, &volume, "u", LegId([7; 16]), None).unwrap();
        }
        assert_eq!(on_legs(&dirs).unwrap(), None);
        fs::write(dirs[1].join("volume.yaml"), "{").unwrap();
        assert!(on_legs(&dirs).unwrap_err().to_string().contains("volume.yaml"));
        legs::record_file_system(&dirs[0], "1-2").unwrap();
        assert_eq!(on_legs(&dirs).unwrap().as_deref(), Some("1-2"));
    }
}
