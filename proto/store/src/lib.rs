//! Where Lockstep's objects live.
//!
//! ```text
//! controller --\                                    one YAML file an object (standalone)
//!               >--- Store: get list create update delete changes
//! node -------/                                     the Kubernetes API
//! ```
//! Controller and node meet only here and never know which of the two they have. The semantics are those of the Kubernetes API:
//! - a created object gets a UID, a resourceVersion and a creation time; creating a name that exists is refused;
//! - an update carries the resourceVersion it was made from; if the object changed since, it is refused (`Error::Conflict`);
//! - an update of the object leaves the status alone, an update of the status leaves the rest alone;
//! - deleting an object with finalizers marks it; it goes when the last finalizer is removed.
//!
//! `conformance::check` is what every implementation must pass.

pub mod conformance;
mod directory;
mod kubernetes;
mod merge;
mod told;

use std::{fmt::Debug, future::Future, path::PathBuf};

pub use directory::Directory;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::Resource;
pub use kubernetes::Kubernetes;
use serde::{Serialize, de::DeserializeOwned};

/// What can be stored: a cluster-scoped resource, or a namespaced one of which the store has one namespace.
pub trait Object:
    Resource<DynamicType = (), Scope: 'static> + Serialize + DeserializeOwned + Clone + Debug + Send + Sync + 'static
{
}

impl<T> Object for T where
    T: Resource<DynamicType = (), Scope: 'static> + Serialize + DeserializeOwned + Clone + Debug + Send + Sync + 'static
{
}

/// Whether an object can have this name: a DNS-1123 subdomain.
pub fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let label = |label: &str| {
        let bytes = label.as_bytes();
        bytes.first().copied().is_some_and(plain)
            && bytes.last().copied().is_some_and(plain)
            && bytes.iter().all(|b| plain(*b) || *b == b'-')
    };
    name.len() <= 253 && name.split('.').all(label)
}

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such object.
    #[error("{kind} {name} does not exist")]
    NotFound {
        /// Its kind.
        kind: String,
        /// Its name.
        name: String,
    },
    /// The name is taken.
    #[error("{kind} {name} exists already")]
    AlreadyExists {
        /// Its kind.
        kind: String,
        /// Its name.
        name: String,
    },
    /// The object changed since it was read, or is not the one that was meant. Read it again.
    #[error("{kind} {name} was changed by somebody else in the meantime")]
    Conflict {
        /// Its kind.
        kind: String,
        /// Its name.
        name: String,
    },
    /// The name cannot be an object's.
    #[error("{name:?} cannot be an object's name: 1 to 253 of a-z, 0-9, '-' and '.', beginning and ending with a letter or digit")]
    Name {
        /// What was given.
        name: String,
    },
    /// A file, or an object of the API (`path` is its path there), cannot be understood. It is never overwritten.
    #[error("{path} cannot be read: {reason}. Repair it, or move it away")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and where.
        reason: String,
    },
    /// The Kubernetes API refuses it or cannot be reached. What was to be written may have been.
    #[error("{what}: {source}")]
    Api {
        /// What was tried.
        what: String,
        /// What the API said, or what kept us from it.
        source: Box<kube::Error>,
    },
    /// The system failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
}

impl Error {
    /// Whether the Kubernetes API has no definition of this kind of object: there are none, and none can be made.
    pub fn is_undefined(&self) -> bool {
        matches!(self, Self::Api { source, .. } if matches!(&**source, kube::Error::Api(status) if status.code == 404))
    }

    /// Whether the next request will meet the same: the store did not answer.
    pub fn is_unreachable(&self) -> bool {
        match self {
            Self::Io { .. } => true,
            Self::Api { source, .. } => !matches!(&**source, kube::Error::Api(_)),
            _ => false,
        }
    }
}

/// All objects of a kind.
#[derive(Debug)]
pub struct Listing<K> {
    /// Those that could be read, by name.
    pub objects: Vec<K>,
    /// Those that could not. Whoever adds up space must not take them for absent.
    pub unreadable: Vec<Error>,
}

/// What people should hear of an object.
#[derive(Clone, Debug, PartialEq)]
pub struct News {
    /// Something is wrong.
    pub warning: bool,
    /// What it is, in one CamelCase word.
    pub reason: &'static str,
    /// In a sentence: what, where, what happens next and what to do.
    pub message: String,
    /// The disk that it is about. The same reason with another one is other news.
    pub related: Option<ObjectReference>,
}

/// Tells when objects of a kind may have changed.
pub trait Changes: Send {
    /// Ends when something may have changed since the last call, or after a while in any case.
    fn next(&mut self) -> impl Future<Output = ()> + Send;
}

/// The store.
pub trait Store: Send + Sync + 'static {
    /// One object. `None`: it does not exist.
    fn get<K: Object>(&self, name: &str) -> impl Future<Output = Result<Option<K>, Error>> + Send;
    /// One object of a namespace that need not be ours. `None`: it does not exist. A directory has one namespace, which is every one.
    fn get_in<K: Object>(&self, namespace: &str, name: &str) -> impl Future<Output = Result<Option<K>, Error>> + Send;
    /// All objects of the kind.
    fn list<K: Object>(&self) -> impl Future<Output = Result<Listing<K>, Error>> + Send;
    /// Creates it. Its status is not taken.
    fn create<K: Object>(&self, object: K) -> impl Future<Output = Result<K, Error>> + Send;
    /// Replaces everything but the status. Refused unless `object` carries the current resourceVersion.
    fn update<K: Object>(&self, object: K) -> impl Future<Output = Result<K, Error>> + Send;
    /// Replaces the status. Refused unless `object` carries the current resourceVersion.
    fn update_status<K: Object>(&self, object: K) -> impl Future<Output = Result<K, Error>> + Send;
    /// Deletes it, or marks it if it has finalizers. With `unchanged`: only if it still has that UID and resourceVersion.
    fn delete<K: Object>(&self, name: &str, unchanged: Option<&K>) -> impl Future<Output = Result<(), Error>> + Send;
    /// Puts news among the object's events, where there are such things; of too many some are left out.
    fn tell(&self, about: &ObjectReference, news: &News) -> impl Future<Output = Result<(), Error>> + Send;
    /// Changes of the kind from now on.
    fn changes<K: Object>(&self) -> impl Future<Output = Result<impl Changes, Error>> + Send;
}
