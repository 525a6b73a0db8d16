//! The kubelet's side of the registration, as grpc-go dials it.
#![allow(missing_docs)]

use std::{os::unix::net::UnixStream, path::Path, process::Command, time::Duration};

use lockstep_csi_node::rpc::Registration;
use serde_json::{Value, json};

fn register(socket: &Path) -> Result<Value, String> {
    let program = std::env::var_os("REGISTER").expect("REGISTER: run tests/cluster/run");
    let output = Command::new(program).arg(socket).output().expect("it starts");
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Ok(serde_json::from_slice(&output.stdout).expect("JSON"))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kubelet_registers_a_node_also_after_it_said_no_and_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    for _ in 0..2 {
        let served = dir.path().to_owned();
        let serving =
            tokio::spawn(async move { Registration::new("/host/csi.sock".into()).serve(&served).await.map_err(|error| error.to_string()) });
        let found = async {
            loop {
                // The kubelet leaves out what begins with a dot.
                let mut files = std::fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().path());
                if let Some(socket) = files.find(|path| !path.file_name().unwrap().to_str().unwrap().starts_with('.')) {
                    return socket;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let socket = tokio::time::timeout(Duration::from_secs(5), found).await.expect("a socket");
        let info = json!({"type": "CSIPlugin", "name": "csi.lockstep.io", "endpoint": "/host/csi.sock", "versions": ["1.0.0"]});
        for _ in 0..2 {
            assert_eq!(register(&socket), Ok(info.clone()));
        }
        // The file is still there when its process is gone, and the next one takes its place.
        serving.abort();
        drop(serving.await);
        assert!(socket.exists() && UnixStream::connect(&socket).is_err());
    }
}
