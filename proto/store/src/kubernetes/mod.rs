//! The Kubernetes API as the store.
//!
//! The API itself has the semantics that the crate promises; here its answers become ours. Objects are sent and read as JSON first, so that one
//! that this version cannot understand is named and does not hide the others.

mod events;
mod watch;

use std::{any::TypeId, future::Future, io, path::Path, time::Duration};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Api, Client, Config, Resource,
    api::{ApiResource, DeleteParams, DynamicObject, ListParams, PostParams, Preconditions},
    config::{KubeConfigOptions, Kubeconfig},
    core::{DynamicResourceScope, NamespaceResourceScope, Status, TypeMeta},
};
use serde::Serialize;
use serde_json::Value;

use self::{events::Events, watch::Watches};
use crate::{Changes, Error, Listing, News, Object, Store, is_name, merge};

/// How long one request may take: whoever waits for it hears that it is not known what became of it.
const PATIENCE: Duration = Duration::from_secs(30);

/// The group of the objects that belong to a node, which their `spec.node` names. Their definitions make that field selectable.
const GROUP: &str = "lockstep.io";
/// Who events are from.
const REPORTER: &str = "csi.lockstep.io";

/// Objects in a Kubernetes API server. Those of a namespaced kind are in one namespace: the pod's, or the kubeconfig's.
///
/// Nothing is asked of the server before the first call: a process starts without it.
#[derive(Clone)]
pub struct Kubernetes {
    client: Client,
    watches: Watches,
    events: Events,
    /// Whose objects are listed and watched; none: everybody's.
    node: Option<String>,
}

impl std::fmt::Debug for Kubernetes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kubernetes").finish_non_exhaustive()
    }
}

impl Kubernetes {
    /// With the current context of a kubeconfig file.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub async fn with_kubeconfig(path: &Path) -> Result<Self, Error> {
        let wrong = |reason: String| Error::Unreadable { path: path.to_owned(), reason };
        let file = Kubeconfig::read_from(path).map_err(|error| wrong(error.to_string()))?;
        let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await;
        Self::with(config.map_err(|error| wrong(error.to_string()))?)
    }

    /// As the service account of the pod that this process is in.
    ///
    /// # Errors
    /// If it is in none.
    pub fn in_pod() -> Result<Self, Error> {
        let config = Config::incluster()
            .map_err(|error| Error::Io { what: "finding the service account of a pod".into(), source: io::Error::other(error) })?;
        Self::with(config)
    }

    fn with(config: Config) -> Result<Self, Error> {
        let client = Client::try_from(config).map_err(|error| failed("making a client".into(), error))?;
        let events = Events::new(client.clone(), REPORTER, None);
        Ok(Self { client, watches: Watches::default(), events, node: None })
    }

    /// As a node sees it: only its own disks and volumes are listed and watched. Any other can be asked for by its name.
    #[must_use]
    pub fn of_node(self, node: &str) -> Self {
        let events = Events::new(self.client.clone(), REPORTER, Some(node.to_owned()));
        Self { watches: Watches::default(), events, node: Some(node.to_owned()), ..self }
    }

    /// What is listed and watched of a kind.
    fn selector<K: Object>(&self) -> Option<String> {
        self.node.as_ref().filter(|_| K::group(&()) == GROUP).map(|node| format!("spec.node={node}"))
    }

    /// Objects of kind `K`, read as `T`.
    fn api<K: Object, T: Resource<DynamicType = ApiResource, Scope = DynamicResourceScope>>(&self) -> Api<T> {
        let resource = ApiResource::erase::<K>(&());
        if TypeId::of::<K::Scope>() == TypeId::of::<NamespaceResourceScope>() {
            Api::namespaced_with(self.client.clone(), self.client.default_namespace(), &resource)
        } else {
            Api::all_with(self.client.clone(), &resource)
        }
    }

    /// Replaces the object or its status, with what this version does not know of it.
    async fn replace<K: Object>(&self, object: K, status: bool) -> Result<K, Error> {
        let (name, api) = (named(&object)?, self.api::<K, DynamicObject>());
        let stored = asked::<K, _>("reading", &name, api.get(&name)).await?;
        let (is, was) = (&stored.metadata, object.meta());
        if is.uid != was.uid || is.resource_version != was.resource_version {
            return Err(Error::Conflict { kind: kind::<K>(), name });
        }
        let known: K = from_dynamic(stored.clone(), &api)?;
        let stored = encoded::<K>(&stored)?;
        let new = merge::merged(&stored, &encoded::<K>(&known)?, encoded::<K>(&object)?);
        let (new, params) = (dynamic::<K>(new)?, PostParams::default());
        let replaced = if status {
            asked::<K, _>("updating the status of", &name, api.replace_status(&name, &params, &new)).await?
        } else {
            asked::<K, _>("updating", &name, api.replace(&name, &params, &new)).await?
        };
        from_dynamic(replaced, &api)
    }
}

fn kind<K: Object>() -> String {
    K::kind(&()).into_owned()
}

fn failed(what: String, source: kube::Error) -> Error {
    Error::Api { what, source: Box::new(source) }
}

fn valid(name: &str) -> Result<&str, Error> {
    if is_name(name) { Ok(name) } else { Err(Error::Name { name: name.into() }) }
}

fn named<K: Object>(object: &K) -> Result<String, Error> {
    let name = object.meta().name.clone().unwrap_or_default();
    valid(&name)?;
    Ok(name)
}

/// What the server says, within our patience.
async fn asked<K: Object, T>(what: &str, name: &str, request: impl Future<Output = kube::Result<T>>) -> Result<T, Error> {
    let described = || format!("{what} {} {name}", K::kind(&())).trim_end().to_owned();
    let answer = tokio::time::timeout(PATIENCE, request);
    let answer = answer.await.map_err(|_| Error::Io { what: described(), source: io::ErrorKind::TimedOut.into() })?;
    answer.map_err(|error| match &error {
        kube::Error::Api(status) => refused(status, kind::<K>(), name).unwrap_or_else(|| failed(described(), error)),
        _ => failed(described(), error),
    })
}

/// A refusal that the crate has a word for.
fn refused(status: &Status, kind: String, name: &str) -> Option<Error> {
    let name = name.to_owned();
    match (status.code, status.reason.as_str()) {
        (404, "NotFound") if !name.is_empty() && names_an_object(status) => Some(Error::NotFound { kind, name }),
        (409, "AlreadyExists") => Some(Error::AlreadyExists { kind, name }),
        (409, _) => Some(Error::Conflict { kind, name }),
        _ => None,
    }
}

/// Not so a path that the server does not serve at all, because the CustomResourceDefinition is not there: its objects may be.
fn names_an_object(status: &Status) -> bool {
    status.details.as_ref().is_some_and(|details| !details.name.is_empty())
}

fn unencodable<K: Object>(error: serde_json::Error) -> Error {
    Error::Io { what: format!("encoding {}", K::kind(&())), source: error.into() }
}

fn encoded<K: Object>(object: &impl Serialize) -> Result<Value, Error> {
    serde_json::to_value(object).map_err(unencodable::<K>)
}

fn dynamic<K: Object>(object: Value) -> Result<DynamicObject, Error> {
    serde_json::from_value(object).map_err(unencodable::<K>)
}

fn from_dynamic<K: Object>(mut object: DynamicObject, api: &Api<DynamicObject>) -> Result<K, Error> {
    let path = format!("{}/{}", api.resource_url(), object.metadata.name.as_deref().unwrap_or_default());
    // The items of a list need not say what they are.
    object.types.get_or_insert_with(TypeMeta::resource::<K>);
    let json = serde_json::to_value(object).and_then(serde_json::from_value);
    json.map_err(|error| Error::Unreadable { path: path.into(), reason: error.to_string() })
}

async fn read<K: Object>(api: &Api<DynamicObject>, name: &str) -> Result<Option<K>, Error> {
    match asked::<K, _>("reading", name, api.get(valid(name)?)).await {
        Ok(object) => from_dynamic(object, api).map(Some),
        Err(Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

impl Store for Kubernetes {
    async fn get<K: Object>(&self, name: &str) -> Result<Option<K>, Error> {
        read(&self.api::<K, DynamicObject>(), name).await
    }

    async fn get_in<K: Object>(&self, namespace: &str, name: &str) -> Result<Option<K>, Error> {
        let api = Api::namespaced_with(self.client.clone(), valid(namespace)?, &ApiResource::erase::<K>(&()));
        read(&api, name).await
    }

    async fn list<K: Object>(&self) -> Result<Listing<K>, Error> {
        let api = self.api::<K, DynamicObject>();
        let params = ListParams { field_selector: self.selector::<K>(), ..ListParams::default() };
        let mut listed = asked::<K, _>("listing all of", "", api.list(&params)).await?.items;
        listed.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
        let mut listing = Listing { objects: Vec::new(), unreadable: Vec::new() };
        for object in listed {
            match from_dynamic(object, &api) {
                Ok(object) => listing.objects.push(object),
                Err(error) => listing.unreadable.push(error),
            }
        }
        Ok(listing)
    }

    async fn create<K: Object>(&self, object: K) -> Result<K, Error> {
        let (name, api) = (named(&object)?, self.api::<K, DynamicObject>());
        let object = dynamic::<K>(encoded::<K>(&object)?)?;
        from_dynamic(asked::<K, _>("creating", &name, api.create(&PostParams::default(), &object)).await?, &api)
    }

    async fn update<K: Object>(&self, object: K) -> Result<K, Error> {
        self.replace(object, false).await
    }

    async fn update_status<K: Object>(&self, object: K) -> Result<K, Error> {
        self.replace(object, true).await
    }

    async fn delete<K: Object>(&self, name: &str, unchanged: Option<&K>) -> Result<(), Error> {
        let name = valid(name)?;
        let preconditions = unchanged
            .map(Resource::meta)
            .map(|meta| Preconditions { resource_version: meta.resource_version.clone(), uid: meta.uid.clone() });
        let params = DeleteParams { preconditions, ..DeleteParams::default() };
        let api = self.api::<K, DynamicObject>();
        asked::<K, _>("deleting", name, api.delete(name, &params)).await.map(drop)
    }

    async fn tell(&self, about: &ObjectReference, news: &News) -> Result<(), Error> {
        let name = about.name.as_deref().unwrap_or_default();
        let what = || format!("telling {} {name} of {}", about.kind.as_deref().unwrap_or_default(), news.reason);
        let told = tokio::time::timeout(PATIENCE, self.events.tell(about, news));
        let told = told.await.map_err(|_| Error::Io { what: what(), source: io::ErrorKind::TimedOut.into() })?;
        told.map_err(|error| failed(what(), error))
    }

    async fn changes<K: Object>(&self) -> Result<impl Changes, Error> {
        Ok(self.watches.changes(self.api::<K, _>(), ApiResource::erase::<K>(&()), self.selector::<K>()))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn status(code: u16, reason: &str, name: &str) -> Status {
        serde_json::from_value(json!({"code": code, "reason": reason, "details": {"name": name}})).unwrap()
    }

    #[test]
    fn only_an_object_that_the_server_names_is_absent() {
        let refused = |status: Status| refused(&status, "MirrorVolume".into(), "v");
        assert!(matches!(refused(status(404, "NotFound", "v")), Some(Error::NotFound { .. })));
        assert!(refused(status(404, "NotFound", "")).is_none(), "the definition is missing, not the object");
        let api = |source| Error::Api { what: "listing".into(), source: Box::new(source) };
        let undefined = api(kube::Error::Api(Box::new(status(404, "NotFound", ""))));
        assert!(undefined.is_undefined() && !undefined.is_unreachable());
        let forbidden = api(kube::Error::Api(Box::new(status(403, "Forbidden", ""))));
        assert!(!forbidden.is_undefined() && !forbidden.is_unreachable());
        let away = api(kube::Error::Service("no route".into()));
        assert!(!away.is_undefined() && away.is_unreachable());
        assert!(matches!(refused(status(409, "AlreadyExists", "v")), Some(Error::AlreadyExists { .. })));
        assert!(matches!(refused(status(409, "Conflict", "v")), Some(Error::Conflict { .. })));
        for (code, reason) in
            [(401, "Unauthorized"), (403, "Forbidden"), (422, "Invalid"), (429, "TooManyRequests"), (500, "InternalError")]
        {
            assert!(refused(status(code, reason, "v")).is_none(), "{reason} says nothing about what exists");
        }
    }
}
