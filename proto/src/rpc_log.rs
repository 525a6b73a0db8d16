//! A layer for tonic's server: a span around each call, and a line in the log at its end.
//!
//! Requests and answers are never logged: they carry fields marked `csi_secret`.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Instant,
};

use tonic::{
    Code, Status,
    codegen::http::{Request, Response},
};
use tower::{Layer, Service};
use tracing::Instrument;

/// The layer: `Server::builder().layer(RpcLog::default())`.
#[derive(Clone, Debug, Default)]
pub struct RpcLog {
    last: Arc<AtomicU64>,
}

impl<S> Layer<S> for RpcLog {
    type Service = Logged<S>;

    fn layer(&self, inner: S) -> Logged<S> {
        Logged { inner, last: Arc::clone(&self.last) }
    }
}

/// A service whose calls are logged.
#[derive(Clone, Debug)]
pub struct Logged<S> {
    inner: S,
    /// The id of the last call.
    last: Arc<AtomicU64>,
}

impl<S, B, R> Service<Request<B>> for Logged<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let id = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let method = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
        let span = tracing::info_span!("rpc", id, method);
        let call = span.in_scope(|| self.inner.call(request));
        let logged = async move {
            let mut end = End { reads: reads(&method), started: Instant::now(), status: None };
            let response = call.await;
            end.status = Some(match &response {
                // A unary call that fails has its status in the headers; one that succeeds, in the trailers.
                Ok(response) => Status::from_header_map(response.headers()).unwrap_or_else(|| Status::ok("")),
                Err(_) => Status::internal("the server failed"),
            });
            response
        };
        Box::pin(logged.instrument(span))
    }
}

/// Whether the method changes nothing: it is called again and again, and is logged only when it fails.
fn reads(method: &str) -> bool {
    let name = method.trim_start_matches("Controller").trim_start_matches("Node");
    ["Get", "List", "Probe", "Validate"].iter().any(|prefix| name.starts_with(prefix))
}

/// The end of a call, also if its caller goes away.
struct End {
    reads: bool,
    started: Instant,
    status: Option<Status>,
}

impl Drop for End {
    fn drop(&mut self) {
        let took = self.started.elapsed();
        match &self.status {
            None => tracing::warn!(?took, "the caller went away"),
            Some(status) if status.code() != Code::Ok => {
                tracing::warn!(code = ?status.code(), ?took, message = status.message(), "refused");
            }
            Some(_) if self.reads => tracing::debug!(code = ?Code::Ok, ?took, "done"),
            Some(_) => tracing::info!(code = ?Code::Ok, ?took, "done"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{io, sync::Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Answers with the code in the request, or never.
    #[derive(Clone)]
    struct Answer;

    impl Service<Request<Option<Code>>> for Answer {
        type Response = Response<()>;
        type Error = std::convert::Infallible;
        type Future = Pin<Box<dyn Future<Output = Result<Response<()>, Self::Error>> + Send>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: Request<Option<Code>>) -> Self::Future {
            let Some(code) = *request.body() else { return Box::pin(std::future::pending()) };
            let response = match code {
                Code::Ok => Response::new(()),
                code => Status::new(code, "no such volume").into_http(),
            };
            Box::pin(async { Ok(response) })
        }
    }

    #[tokio::test]
    async fn each_call_has_an_id_and_its_end_is_logged_with_code_and_duration() {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
        let _guard = tracing::subscriber::set_default(subscriber);
        let mut service = RpcLog::default().layer(Answer);
        let request = |method: &str, code| Request::builder().uri(format!("/csi.v1.Controller/{method}")).body(code).unwrap();
        service.call(request("CreateVolume", Some(Code::Ok))).await.unwrap();
        service.call(request("Probe", Some(Code::Ok))).await.unwrap();
        service.call(request("ControllerGetVolume", Some(Code::NotFound))).await.unwrap();
        let hung = tokio::time::timeout(std::time::Duration::from_millis(1), service.call(request("DeleteVolume", None)));
        assert!(hung.await.is_err());
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        let logged: Vec<&str> = text.lines().collect();
        assert_eq!(logged.len(), 3, "what only reads is not logged when it succeeds: {text}");
        for (line, parts) in logged.iter().zip([
            ["id=1", "CreateVolume", "code=Ok", "took="],
            ["id=3", "ControllerGetVolume", "code=NotFound", "no such volume"],
            ["id=4", "DeleteVolume", "went away", "took="],
        ]) {
            assert!(parts.iter().all(|part| line.contains(part)), "{line} {parts:?}");
        }
    }
}
