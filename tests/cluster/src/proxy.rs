//! A way to the API that lets so many writes through and no more: whoever uses it can be ended right after any one of them.

use std::{
    convert::Infallible,
    fs,
    future::pending,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, Ordering},
    },
};

use http_body_util::BodyExt;
use hyper::{Method, Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use kube::{Client, client::Body};
use serde_json::json;
use tokio::{net::TcpListener, sync::Notify};

/// What is lost when no more writes come through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// The answer to the last one that did.
    Answer,
    /// The next one.
    Write,
}

/// How many more writes come through, and whether what is to be lost is.
#[derive(Debug)]
struct Gate {
    left: AtomicI64,
    lost: Lost,
    spent: Notify,
}

impl Gate {
    fn of(writes: i64, lost: Lost) -> Arc<Self> {
        Arc::new(Self { left: AtomicI64::new(writes), lost, spent: Notify::new() })
    }
}

/// It listens on the loopback device, and speaks to the API as `client` does.
#[derive(Debug)]
pub struct Proxy {
    gate: Arc<Mutex<Arc<Gate>>>,
    /// Leads to it.
    pub kubeconfig: PathBuf,
}

impl Proxy {
    /// Starts it; everything comes through.
    pub async fn start(client: Client, dir: &Path, name: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let server = format!("http://{}", listener.local_addr().expect("it is bound"));
        let kubeconfig = dir.join(format!("{name}.kubeconfig"));
        let config = json!({"apiVersion": "v1", "kind": "Config", "current-context": "it", "users": [],
            "clusters": [{"name": "it", "cluster": {"server": server}}],
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "", "namespace": "default"}}]});
        fs::write(&kubeconfig, config.to_string()).expect("a kubeconfig");
        let gate = Arc::new(Mutex::new(Gate::of(i64::MAX, Lost::Write)));
        let current = Arc::clone(&gate);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (client, current) = (client.clone(), Arc::clone(&current));
                let service = service_fn(move |request| {
                    let gate = Arc::clone(&current.lock().expect("nobody panics with it"));
                    forward(client.clone(), gate, request)
                });
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        Self { gate, kubeconfig }
    }

    /// From now on so many writes come through.
    pub fn allow(&self, writes: i64, lost: Lost) {
        *self.gate.lock().expect("nobody panics with it") = Gate::of(writes, lost);
    }

    /// Everything comes through again.
    pub fn open(&self) {
        self.allow(i64::MAX, Lost::Write);
    }

    /// Until an answer or a write is lost.
    pub async fn spent(&self) {
        let gate = Arc::clone(&self.gate.lock().expect("nobody panics with it"));
        gate.spent.notified().await;
    }
}

/// Leases and events come and go with the clock: they are not counted.
async fn forward(client: Client, gate: Arc<Gate>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let (mut parts, body) = request.into_parts();
    let counts = parts.method != Method::GET && !["/leases", "/events"].iter().any(|kind| parts.uri.path().contains(kind));
    let left = if counts { gate.left.fetch_sub(1, Ordering::SeqCst) } else { i64::MAX };
    if left <= 0 {
        if gate.lost == Lost::Write {
            gate.spent.notify_one();
        }
        return pending().await;
    }
    parts.headers.remove("host");
    let Ok(body) = body.collect().await else { return pending().await };
    let answer = client.send(Request::from_parts(parts, Body::from(body.to_bytes()))).await.expect("the API answers");
    if left == 1 && gate.lost == Lost::Answer {
        gate.spent.notify_one();
        return pending().await;
    }
    Ok(answer)
}
