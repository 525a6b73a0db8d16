//! The parameters of a StorageClass.

use std::collections::BTreeMap;

/// What the sidecars add; never ours.
const SIDECAR_PREFIX: &str = "csi.storage.k8s.io/";

/// Valid parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// How the mirror becomes a block device.
    pub transport: Transport,
}

/// How the mirror becomes a block device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// The best that the node has.
    #[default]
    Auto,
    /// FUSE and a loop device.
    Fuse,
}

/// What is wrong with a parameter.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParameterError {
    /// No such parameter.
    #[error("unknown parameter {name:?}: known are provisioning (thick) and transport (auto, fuse)")]
    Unknown {
        /// Its name.
        name: String,
    },
    /// No such value.
    #[error("parameter {name} cannot be {value:?}: {allowed}")]
    Value {
        /// Its name.
        name: &'static str,
        /// What was given.
        value: String,
        /// What can be given.
        allowed: &'static str,
    },
}

/// Validates the parameters of a CreateVolume or GetCapacity call.
///
/// # Errors
/// The first parameter, by name, that is unknown or has no such value.
pub fn parse(parameters: &BTreeMap<String, String>) -> Result<Parameters, ParameterError> {
    let mut parsed = Parameters::default();
    for (name, value) in parameters.iter().filter(|(name, _)| !name.starts_with(SIDECAR_PREFIX)) {
        match (name.as_str(), value.as_str()) {
            ("provisioning", "thick") => {}
            ("provisioning", _) => {
                return Err(ParameterError::Value { name: "provisioning", value: value.clone(), allowed: "only thick is supported" });
            }
            ("transport", "auto") => parsed.transport = Transport::Auto,
            ("transport", "fuse") => parsed.transport = Transport::Fuse,
            ("transport", _) => {
                return Err(ParameterError::Value { name: "transport", value: value.clone(), allowed: "use auto or fuse" });
            }
            _ => return Err(ParameterError::Unknown { name: name.clone() }),
        }
    }
    Ok(parsed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(pairs: &[(&str, &str)]) -> Result<Parameters, ParameterError> {
        parse(&pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn known_parameters_are_taken_and_the_sidecars_own_are_left_alone() {
        assert_eq!(given(&[]), Ok(Parameters::default()));
        let pairs = [("provisioning", "thick"), ("transport", "fuse"), ("csi.storage.k8s.io/fstype", "xfs")];
        assert_eq!(given(&pairs), Ok(Parameters { transport: Transport::Fuse }));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let unknown = given(&[("replicas", "3")]).unwrap_err();
        assert!(unknown.to_string().contains("replicas"), "{unknown}");
        for (name, value) in [("provisioning", "thin"), ("transport", "ublk"), ("transport", "")] {
            let wrong = given(&[(name, value)]).unwrap_err().to_string();
            assert!(wrong.contains(name) && wrong.contains(&format!("{value:?}")), "{wrong}");
        }
        assert!(given(&[("Transport", "fuse")]).is_err(), "names are exact");
    }
}
