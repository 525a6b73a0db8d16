//! Gives the API of KUBECONFIG the definitions of our objects.

use lockstep_cluster_tests::{client, define};

#[tokio::main]
async fn main() {
    let client = client().await;
    for crd in lockstep_proto::crds::all() {
        define(&client, &crd).await;
    }
}
