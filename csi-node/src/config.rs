//! The node's configuration: which disks it may use.

use std::path::{Path, PathBuf};

use serde::Deserialize;

/// `node.yaml`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The disks that belong to Lockstep, all of each.
    #[serde(default)]
    pub disks: Vec<DiskSelector>,
}

/// Selects disks.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSelector {
    /// A path or a glob pattern, best of names that a disk keeps wherever it is plugged in: `/dev/disk/by-id/nvme-*`.
    pub path: String,
}

/// What is wrong with the configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is not what it should be.
    #[error("{path} is not a valid configuration: {reason}. Expected is: disks: [{{path: /dev/disk/by-id/PATTERN}}]")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        reason: String,
    },
    /// A selector cannot be used.
    #[error("{path}: disks[{index}].path {pattern:?}: {reason}")]
    Pattern {
        /// The file.
        path: PathBuf,
        /// Which selector.
        index: usize,
        /// What it says.
        pattern: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl Config {
    /// Reads and checks it.
    ///
    /// # Errors
    /// Each names the file, the field and the remedy.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let config: Self =
            serde_saphyr::from_str(&text).map_err(|error| ConfigError::Syntax { path: path.to_owned(), reason: error.to_string() })?;
        for (index, selector) in config.disks.iter().enumerate() {
            let wrong = |reason: String| ConfigError::Pattern { path: path.to_owned(), index, pattern: selector.path.clone(), reason };
            if !selector.path.starts_with('/') {
                return Err(wrong("it must be an absolute path".into()));
            }
            glob::Pattern::new(&selector.path).map_err(|error| wrong(error.to_string()))?;
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Config::read(file.path()).map_err(|error| error.to_string())
    }

    #[test]
    fn selectors_are_read_in_order() {
        let config = read("disks:\n- path: /dev/disk/by-id/nvme-*\n- path: /dev/sdb\n").unwrap();
        assert_eq!(config.disks.iter().map(|disk| disk.path.as_str()).collect::<Vec<_>>(), ["/dev/disk/by-id/nvme-*", "/dev/sdb"]);
        assert_eq!(read("disks: []").unwrap(), Config::default());
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert!(read("disk: []").unwrap_err().contains("disk"));
        assert!(read("disks:\n- device: /dev/sdb\n").unwrap_err().contains("device"));
        assert!(read("disks:\n- path: sdb\n").unwrap_err().contains("disks[0].path \"sdb\": it must be an absolute path"));
        assert!(read("disks:\n- path: /dev/[\n").unwrap_err().contains("disks[0].path"));
        assert!(Config::read(Path::new("/nonexistent/node.yaml")).unwrap_err().to_string().contains("/nonexistent/node.yaml"));
    }
}
