//! What the kubelet asks over HTTP: whether the process lives (`/livez`), and whether it is ready (`/readyz`). 200 is yes; 503 is no, and says why.
//!
//! A process that does not live is ended and started again. So that answer is about the process alone: a disk, the API server or the kubelet do not get
//! better by it.

use std::{
    convert::Infallible,
    fmt::Display,
    future::Future,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use http_body_util::Full;
use hyper::{Request, Response, StatusCode, body::Bytes, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tonic::transport::{self, Channel};
use tracing::{info, warn};

use crate::{
    csi::{GetPluginInfoRequest, ProbeRequest, identity_client::IdentityClient},
    endpoint::Endpoint,
};

/// The longest that an answer takes.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest that a connection may take to ask, and that it lasts, whatever its other end does.
const ASKED: Duration = Duration::from_secs(1);
const CONNECTION: Duration = Duration::from_secs(10);
/// So many connections at once: whoever can reach the port takes no more of the process's files.
const CONNECTIONS: usize = 32;
/// How long after an address could not be listened on it is tried again.
const AGAIN: Duration = Duration::from_secs(5);

/// What a process knows of itself, beside what its CSI socket answers.
pub trait Process: Send + Sync + 'static {
    /// Whether its threads do what they are for.
    fn alive(&self) -> impl Future<Output = Result<(), String>> + Send;

    /// Why it is not ready.
    fn ready(&self) -> Result<(), String>;
}

/// It has nothing but its socket.
impl Process for () {
    async fn alive(&self) -> Result<(), String> {
        Ok(())
    }

    fn ready(&self) -> Result<(), String> {
        Ok(())
    }
}

/// Reads ADDRESS:PORT; an IPv6 address with brackets or without, as the kubelet gives a pod's own.
///
/// # Errors
/// What an address looks like.
pub fn address(text: &str) -> Result<SocketAddr, String> {
    let parsed = text.rsplit_once(':').and_then(|(ip, port)| {
        let ip: IpAddr = ip.trim_start_matches('[').trim_end_matches(']').parse().ok()?;
        Some(SocketAddr::new(ip, port.parse().ok()?))
    });
    parsed.ok_or_else(|| "write an IP address and a port, as in 127.0.0.1:9808 or [::1]:9808".into())
}

/// Answers at this address, for ever, for the process that serves CSI on `endpoint`. If the address cannot be had it is tried again: nothing else of the
/// process need end for that.
pub async fn serve(address: SocketAddr, endpoint: Endpoint, process: Arc<impl Process>) {
    let connections = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let served = async {
            let listener = TcpListener::bind(address).await?;
            info!(%address, "answering /livez and /readyz");
            loop {
                let place = Arc::clone(&connections).acquire_owned().await;
                let (stream, _) = listener.accept().await?;
                let (endpoint, process) = (endpoint.clone(), Arc::clone(&process));
                tokio::spawn(async move {
                    let _place = place;
                    // Whoever asks and goes away needs no answer.
                    drop(tokio::time::timeout(CONNECTION, connection(stream, &endpoint, &*process)).await);
                });
            }
        };
        let served: Result<Infallible, std::io::Error> = served.await;
        let Err(error) = served;
        warn!(%address, %error, "nobody can ask for /livez and /readyz; tried again");
        tokio::time::sleep(AGAIN).await;
    }
}

async fn connection(stream: TcpStream, endpoint: &Endpoint, process: &impl Process) -> hyper::Result<()> {
    let service = service_fn(async |request: Request<_>| {
        Ok::<_, Infallible>(match request.uri().path() {
            "/livez" => answer(alive(endpoint, process)).await,
            "/readyz" => answer(ready(endpoint, process)).await,
            _ => said(StatusCode::NOT_FOUND, "there are /livez and /readyz"),
        })
    });
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(ASKED).keep_alive(false);
    server.serve_connection(TokioIo::new(stream), service).await
}

async fn answer(asked: impl Future<Output = Result<(), String>>) -> Response<Full<Bytes>> {
    match tokio::time::timeout(PATIENCE, asked).await {
        Ok(Ok(())) => said(StatusCode::OK, "ok"),
        Ok(Err(why)) => said(StatusCode::SERVICE_UNAVAILABLE, &why),
        Err(_) => said(StatusCode::SERVICE_UNAVAILABLE, &format!("no answer within {} s", PATIENCE.as_secs())),
    }
}

fn said(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(format!("{text}\n")));
    *response.status_mut() = status;
    response
}

/// Its socket answers a call that waits for nothing, and its threads do what they are for.
async fn alive(endpoint: &Endpoint, process: &impl Process) -> Result<(), String> {
    tokio::try_join!(answers(endpoint), process.alive()).map(drop)
}

async fn answers(endpoint: &Endpoint) -> Result<(), String> {
    let failed = |error: &dyn Display| format!("GetPluginInfo on {endpoint}: {error}");
    let mut client = identity(endpoint).await.map_err(|error| failed(&error))?;
    client.get_plugin_info(GetPluginInfoRequest {}).await.map(drop).map_err(|status| failed(&status.message()))
}

async fn ready(endpoint: &Endpoint, process: &impl Process) -> Result<(), String> {
    let failed = |error: &dyn Display| format!("Probe on {endpoint}: {error}");
    let mut client = identity(endpoint).await.map_err(|error| failed(&error))?;
    let answer = client.probe(ProbeRequest {}).await.map_err(|status| failed(&status.message()))?;
    if answer.into_inner().ready == Some(false) {
        return Err(failed(&"not ready"));
    }
    process.ready()
}

async fn identity(endpoint: &Endpoint) -> Result<IdentityClient<Channel>, transport::Error> {
    Ok(IdentityClient::new(transport::Endpoint::from_shared(endpoint.to_string())?.connect().await?))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tonic::{Response, Status, async_trait, transport::Server};

    use super::*;
    use crate::csi::{
        GetPluginInfoResponse, ProbeResponse,
        identity_server::{Identity, IdentityServer},
    };

    #[test]
    fn an_address_is_read_as_people_and_the_kubelet_write_it() {
        for (text, read) in [("0.0.0.0:1", "0.0.0.0:1"), ("[::]:9808", "[::]:9808"), ("fd00::1:9808", "[fd00::1]:9808")] {
            assert_eq!(address(text).map(|address| address.to_string()), Ok(read.into()));
        }
        for text in ["", "9808", ":9808", "localhost:9808", "1.2.3.4", "1.2.3.4:x", "1.2.3.4:65536"] {
            assert!(address(text).unwrap_err().contains("127.0.0.1:9808"), "{text}");
        }
    }

    /// Whose words are set from outside.
    #[derive(Default)]
    struct Puppet {
        socket_is_ready: AtomicBool,
        is_stuck: AtomicBool,
        is_refused: AtomicBool,
    }

    #[async_trait]
    impl Identity for Puppet {
        async fn get_plugin_info(&self, _: tonic::Request<GetPluginInfoRequest>) -> Result<Response<GetPluginInfoResponse>, Status> {
            Ok(Response::new(GetPluginInfoResponse::default()))
        }

        async fn probe(&self, _: tonic::Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
            Ok(Response::new(ProbeResponse { ready: Some(self.socket_is_ready.load(Ordering::Relaxed)) }))
        }
    }

    impl Process for Puppet {
        async fn alive(&self) -> Result<(), String> {
            if self.is_stuck.load(Ordering::Relaxed) { std::future::pending().await } else { Ok(()) }
        }

        fn ready(&self) -> Result<(), String> {
            if self.is_refused.load(Ordering::Relaxed) { Err("refused".into()) } else { Ok(()) }
        }
    }

    async fn connect(address: SocketAddr) -> TcpStream {
        loop {
            match TcpStream::connect(address).await {
                Ok(connection) => return connection,
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    }

    async fn get(address: SocketAddr, path: &str) -> String {
        let mut connection = connect(address).await;
        connection.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).await.unwrap();
        answer.split_once(' ').unwrap().1.to_owned()
    }

    #[tokio::test]
    async fn a_process_lives_if_its_socket_and_its_threads_answer_and_is_ready_when_it_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let endpoint: Endpoint = format!("unix://{}/csi.sock", dir.path().display()).parse().unwrap();
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let process = Arc::new(Puppet::default());
        tokio::spawn(serve(address, endpoint.clone(), Arc::clone(&process)));
        for path in ["/livez", "/readyz"] {
            let answer = get(address, path).await;
            assert!(answer.starts_with("503") && answer.contains(endpoint.path().to_str().unwrap()), "nobody serves: {answer}");
        }
        let incoming = endpoint.bind().unwrap();
        tokio::spawn(Server::builder().add_service(IdentityServer::from_arc(Arc::clone(&process))).serve_with_incoming(incoming));
        assert!(get(address, "/livez").await.starts_with("200"), "it lives although it is not ready");
        assert!(get(address, "/readyz").await.contains("not ready"));
        process.socket_is_ready.store(true, Ordering::Relaxed);
        assert!(get(address, "/readyz").await.starts_with("200"));
        process.is_refused.store(true, Ordering::Relaxed);
        assert!(get(address, "/readyz").await.ends_with("refused\n"));
        assert!(get(address, "/livez").await.starts_with("200"), "to be refused is no reason to end");
        assert!(get(address, "/metrics").await.starts_with("404"));
        process.is_stuck.store(true, Ordering::Relaxed);
        assert!(get(address, "/livez").await.ends_with("no answer within 5 s\n"));
        // Connections that ask nothing do not keep others out for ever.
        let mut silent = Vec::new();
        for _ in 0..CONNECTIONS + 1 {
            silent.push(connect(address).await);
        }
        assert!(tokio::time::timeout(Duration::from_secs(30), get(address, "/readyz")).await.unwrap().contains("refused"));
    }
}
