//! The gRPC services: arguments are checked here, before anything is looked up.

mod identity;
mod node;

use std::path::PathBuf;

use crate::error::Error;

pub use identity::Identity;
pub use node::NodeService;

fn required(field: &str, value: &str) -> Result<String, Error> {
    if value.is_empty() { Err(Error::InvalidArgument(format!("{field} is missing"))) } else { Ok(value.to_owned()) }
}

fn required_path(field: &str, value: &str) -> Result<PathBuf, Error> {
    required(field, value).map(PathBuf::from)
}
