//! The parameters of a StorageClass.

use std::collections::BTreeMap;

/// What the sidecars add; never ours.
const SIDECAR_PREFIX: &str = "csi.storage.k8s.io/";

/// Those that are ours: without what the sidecars add.
pub fn own(parameters: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let own = parameters.iter().filter(|(name, _)| !name.starts_with(SIDECAR_PREFIX));
    own.map(|(name, value)| (name.clone(), value.clone())).collect()
}

/// Valid parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// How the mirror becomes a block device.
    pub transport: Transport,
    /// Whether writes may be answered before the slower copy has them.
    pub write_behind: WriteBehind,
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

/// Whether writes may be answered before the slower copy has them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WriteBehind {
    /// A write that was answered is on both copies.
    #[default]
    Off,
    /// If one of the two disks rotates and the other does not, writes do not wait for the one that does. A write that was answered and not
    /// flushed may be lost if the other disk and the node fail together.
    Rotational,
}

/// What is wrong with a parameter.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParameterError {
    /// No such parameter.
    #[error("unknown parameter {name:?}: known are provisioning (thick), transport (auto, fuse) and writeBehind (off, rotational)")]
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

/// The claim that a volume is made for, as namespace/name, where the provisioner says so (`--extra-create-metadata`).
pub fn claim(parameters: &BTreeMap<String, String>) -> Option<String> {
    let given = |name| parameters.get(&format!("{SIDECAR_PREFIX}pvc/{name}"));
    Some(format!("{}/{}", given("namespace")?, given("name")?))
}

/// Validates the parameters of a CreateVolume or GetCapacity call.
///
/// # Errors
/// The first parameter, by name, that is unknown or has no such value.
pub fn parse(parameters: &BTreeMap<String, String>) -> Result<Parameters, ParameterError> {
    let mut parsed = Parameters::default();
    for (name, value) in own(parameters) {
        match (name.as_str(), value.as_str()) {
            ("provisioning", "thick") => {}
            ("provisioning", _) => {
                return Err(ParameterError::Value { name: "provisioning", value, allowed: "only thick is supported" });
            }
            ("transport", "auto") => parsed.transport = Transport::Auto,
            ("transport", "fuse") => parsed.transport = Transport::Fuse,
            ("transport", _) => {
                return Err(ParameterError::Value { name: "transport", value, allowed: "use auto or fuse" });
            }
            ("writeBehind", "off") => parsed.write_behind = WriteBehind::Off,
            ("writeBehind", "rotational") => parsed.write_behind = WriteBehind::Rotational,
            ("writeBehind", _) => {
                return Err(ParameterError::Value { name: "writeBehind", value, allowed: "use off or rotational" });
            }
            _ => return Err(ParameterError::Unknown { name }),
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
        assert_eq!(given(&pairs), Ok(Parameters { transport: Transport::Fuse, ..Parameters::default() }));
        assert_eq!(given(&[("writeBehind", "rotational")]).unwrap().write_behind, WriteBehind::Rotational);
        assert_eq!(given(&[("writeBehind", "off")]), Ok(Parameters::default()));
        let pairs = ["csi.storage.k8s.io/fstype", "csi.storage.k8s.io", "transport"].map(|name| (name.to_owned(), String::new()));
        assert_eq!(own(&pairs.into()).into_keys().collect::<Vec<_>>(), ["csi.storage.k8s.io", "transport"]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let unknown = given(&[("replicas", "3")]).unwrap_err();
        assert!(unknown.to_string().contains("replicas"), "{unknown}");
        for (name, value) in [("provisioning", "thin"), ("transport", "ublk"), ("transport", ""), ("writeBehind", "on")] {
            let wrong = given(&[(name, value)]).unwrap_err().to_string();
            assert!(wrong.contains(name) && wrong.contains(&format!("{value:?}")), "{wrong}");
        }
        assert!(given(&[("Transport", "fuse")]).is_err(), "names are exact");
    }
}
