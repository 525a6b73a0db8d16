//! Whether there is anything on a block device: an error is never taken for nothing.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::Path,
};

use crate::tool::{self, ToolError};

/// Signatures are within this of one end or the other.
const ENDS: u64 = 4 << 20;

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Nothing that anybody knows.
    Nothing,
    /// Several things that contradict each other, by name; empty: nobody names them.
    Several(Vec<String>),
    /// This.
    Signature(Signature),
}

/// What blkid says of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Signature {
    /// Of a file system, or of what else one device has.
    pub kind: Option<String>,
    /// Its label.
    pub label: Option<String>,
    /// Its UUID.
    pub uuid: Option<String>,
    /// The type of a partition table.
    pub table: Option<String>,
}

/// It cannot be said.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProbeError {
    /// An end of it cannot be read.
    #[error("it cannot be read: {0}")]
    Read(io::Error),
    /// blkid failed.
    #[error(transparent)]
    Tool(#[from] ToolError),
}

/// Looks for signatures on the device at `path`, which is open as `file`. Blocks.
pub(crate) fn found(path: &Path, file: &File) -> Result<Found, ProbeError> {
    match blkid(path)? {
        // blkid says so too where it could not read. What is read here stays in the cache as long as the device is open.
        Found::Nothing => {
            readable(file).map_err(ProbeError::Read)?;
            Ok(blkid(path)?)
        }
        found => Ok(found),
    }
}

fn blkid(path: &Path) -> Result<Found, ToolError> {
    match tool::run("blkid", [Path::new("-p"), Path::new("-o"), Path::new("export"), path]) {
        Ok(said) => Ok(parse(&said)),
        Err(ToolError::Failed { status, said, .. }) if status.code() == Some(2) && said.is_empty() => Ok(Found::Nothing),
        Err(error) if error.code() == Some(8) => Ok(Found::Several(kinds(path))),
        Err(error) => Err(error),
    }
}

/// What a person is told of `Found::Several`.
pub(crate) fn several(kinds: &[String], path: &Path) -> String {
    if kinds.is_empty() {
        return format!("several signatures at once (`wipefs {}` lists them)", path.display());
    }
    format!("several signatures at once ({})", kinds.join(", "))
}

/// What blkid does not choose among: for people, so that it does not matter if it cannot be said.
fn kinds(path: &Path) -> Vec<String> {
    let listed = tool::run("wipefs", ["--noheadings", "--parsable", "--output", "TYPE"].map(Path::new).into_iter().chain([path]));
    let mut kinds: Vec<String> = listed.unwrap_or_default().lines().map(|line| line.trim().to_owned()).collect();
    kinds.sort();
    // A partition table is at both ends.
    kinds.dedup();
    kinds
}

fn parse(said: &str) -> Found {
    let about_content = |line: &&str| !line.trim().is_empty() && !line.starts_with("DEVNAME=") && !line.starts_with("PART_ENTRY_");
    if !said.lines().any(|line| about_content(&line)) {
        return Found::Nothing;
    }
    let value = |key: &str| said.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('=')).map(str::to_owned);
    Found::Signature(Signature { kind: value("TYPE"), label: value("LABEL"), uuid: value("UUID"), table: value("PTTYPE") })
}

fn readable(mut file: &File) -> io::Result<()> {
    let bytes = file.seek(SeekFrom::End(0))?;
    if bytes == 0 {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
    }
    let mut end = vec![0; usize::try_from(ENDS.min(bytes)).expect("4 MiB")];
    for at in [0, bytes.saturating_sub(ENDS)] {
        file.seek(SeekFrom::Start(at))?;
        file.read_exact(&mut end)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_partition_is_blank_although_blkid_knows_its_place() {
        let place = "DEVNAME=/dev/sdx1\nPART_ENTRY_SCHEME=gpt\nPART_ENTRY_UUID=u\nPART_ENTRY_TYPE=t\nPART_ENTRY_NUMBER=1\n";
        assert_eq!(parse(place), Found::Nothing);
        let Found::Signature(signature) = parse(&format!("{place}UUID=1\nTYPE=ext4\n")) else { panic!("blank") };
        assert_eq!((signature.kind.as_deref(), signature.uuid.as_deref()), (Some("ext4"), Some("1")));
        assert_eq!(parse("DEVNAME=/dev/sdx\nAMBIVALENT=x"), Found::Signature(Signature::default()));
    }

    #[test]
    fn what_cannot_be_read_is_not_blank() {
        // blkid says of both that there is nothing.
        for path in ["/proc/self/mem", "/proc/self"] {
            let probed = File::open(path).map(|file| found(Path::new(path), &file)).unwrap();
            assert!(matches!(probed, Err(ProbeError::Read(_))), "{path}: {probed:?}");
        }
    }

    #[test]
    fn what_contradicts_each_other_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(320 << 20).unwrap();
        tool::run("mkfs.xfs", [Path::new("-q"), file.path()]).unwrap();
        // A swap header: the version, the last page, the magic at the end of the page.
        for (at, bytes) in [(1024, &[1, 0, 0, 0, 99, 0, 0, 0][..]), (4086, b"SWAPSPACE2")] {
            file.as_file().write_all_at(bytes, at).unwrap();
        }
        assert_eq!(found(file.path(), file.as_file()).unwrap(), Found::Several(vec!["swap".into(), "xfs".into()]));
    }

    #[test]
    fn what_is_empty_is_blank() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(16 << 20).unwrap();
        assert_eq!(found(file.path(), file.as_file()).unwrap(), Found::Nothing);
    }
}
