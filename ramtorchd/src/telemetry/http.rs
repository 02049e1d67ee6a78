//! `GET /metrics`, and nothing else.

use super::exposition::CONTENT_TYPE;
use super::rpc::RpcCounters;
use crate::access::serve::Running;
use crate::supervisor::{Handle, Message};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, oneshot};

/// Connections at once.
const CONNECTIONS: usize = 32;
/// A request's head has to be there after so long; a kept connection may be idle for as long.
const HEAD_LIMIT: Duration = Duration::from_secs(30);
/// The state task answers in milliseconds, or something is wrong.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Serves metrics.
pub fn serve(listener: TcpListener, handle: Handle, counters: Arc<RpcCounters>) -> Running {
    let (stop, mut stopped) = oneshot::channel::<()>();
    let task = tokio::spawn(async move {
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        let mut open = tokio::task::JoinSet::new();
        loop {
            while open.try_join_next().is_some() {}
            let accepted = tokio::select! {
                _ = &mut stopped => return,
                accepted = accept(&listener, &places) => accepted,
            };
            let Some((io, place)) = accepted else {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let (handle, counters) = (handle.clone(), counters.clone());
            open.spawn(async move {
                let service = service_fn(move |request| answer(request, handle.clone(), counters.clone()));
                let connection = http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEAD_LIMIT)
                    .serve_connection(TokioIo::new(io), service);
                // A peer that goes away is no news.
                let _ = connection.await;
                drop(place);
            });
        }
    });
    (stop, task)
}

async fn accept(listener: &TcpListener, places: &Arc<Semaphore>) -> Option<(tokio::net::TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let place = places.clone().acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((io, _)) => Some((io, place)),
        Err(e) => {
            tracing::warn!("a connection for metrics was not accepted: {e}");
            None
        }
    }
}

async fn answer(request: Request<Incoming>, handle: Handle, counters: Arc<RpcCounters>) -> Result<Response<Full<Bytes>>, Infallible> {
    if request.uri().path() != "/metrics" {
        return Ok(plain(StatusCode::NOT_FOUND, "see /metrics\n"));
    }
    if request.method() != Method::GET {
        return Ok(plain(StatusCode::METHOD_NOT_ALLOWED, "GET only\n"));
    }
    let asked = tokio::time::timeout(ANSWER_LIMIT, handle.ask(|reply| Message::Telemetry { reply })).await;
    Ok(match asked {
        Ok(Ok(snapshot)) => {
            let mut response = plain(StatusCode::OK, super::page(&snapshot, &counters));
            response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(CONTENT_TYPE));
            response
        }
        Ok(Err(e)) => plain(StatusCode::SERVICE_UNAVAILABLE, format!("{e}\n")),
        Err(_) => plain(StatusCode::SERVICE_UNAVAILABLE, "the daemon's state task does not answer\n"),
    })
}

fn plain(status: StatusCode, text: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = status;
    response
}
