//! The node's Lease: a controller that sees it grow old knows that nobody will claim a new volume here.

use std::time::Duration;

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use lockstep_store::{Error, Store};
use tracing::warn;

const RENEW: Duration = Duration::from_secs(10);
const LASTS: i32 = 40;

async fn renew<S: Store>(store: &S, node: &str) -> Result<(), Error> {
    let spec = LeaseSpec {
        holder_identity: Some(node.to_owned()),
        lease_duration_seconds: Some(LASTS),
        renew_time: Some(MicroTime(Timestamp::now())),
        ..LeaseSpec::default()
    };
    match store.get::<Lease>(node).await? {
        Some(mut lease) => {
            lease.spec = Some(spec);
            store.update(lease).await.map(drop)
        }
        None => {
            let metadata = ObjectMeta { name: Some(node.to_owned()), ..ObjectMeta::default() };
            store.create(Lease { metadata, spec: Some(spec) }).await.map(drop)
        }
    }
}

/// Renews it until the process ends.
pub async fn keep<S: Store>(store: &S, node: &str) {
    loop {
        if let Err(error) = renew(store, node).await {
            warn!(%error, "the node's lease could not be renewed");
        }
        tokio::time::sleep(RENEW).await;
    }
}
