//! The gRPC services: arguments are checked here, before anything is looked up.

mod identity;
mod node;
mod registration;

use std::path::{Path, PathBuf};

use crate::{error::Error, mounts};

pub use identity::Identity;
pub use node::NodeService;
pub use registration::Registration;

fn required(field: &str, value: &str) -> Result<String, Error> {
    if value.is_empty() { Err(Error::InvalidArgument(format!("{field} is missing"))) } else { Ok(value.to_owned()) }
}

/// A path that a volume is to be at. Compared with the kernel's list of mounts, so without links.
fn required_path(field: &str, value: &str) -> Result<PathBuf, Error> {
    required(field, value).map(|path| mounts::resolve(Path::new(&path)))
}

/// A path where something is to be made.
fn absolute_path(field: &str, value: &str) -> Result<PathBuf, Error> {
    let path = required_path(field, value)?;
    if path.is_absolute() { Ok(path) } else { Err(Error::InvalidArgument(format!("{field} {value:?} is not an absolute path"))) }
}
