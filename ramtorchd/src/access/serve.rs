//! The two ways in: the unix socket, and TCP with TLS. Both end in the same services behind the same gate.

use super::gate::Gate;
use super::health;
use super::idle::{Limits, Line, Timer};
use super::places::{Place, Places};
use super::tls::{Peer, Tls};
use crate::rpc::{Context as Services, JobsService, NodeService};
use ramtorch_proto::FILE_DESCRIPTOR_SET;
use ramtorch_proto::v1::jobs_server::JobsServer;
use ramtorch_proto::v1::node_server::NodeServer;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_rustls::server::TlsStream;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::transport::server::{Connected, UdsConnectInfo};

/// A TLS handshake may take so long, and what HTTP/2 begins with as long after it.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Pause after an error of accept, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Connections that are closed for want of a place are told of once in so long.
const QUIET: Duration = Duration::from_secs(10);
/// Connections that are ready and wait for the server to take them.
const READY: usize = 64;
/// Streams of one HTTP/2 connection; clients wait with more.
const STREAMS_PER_CONNECTION: u32 = 2048;
/// Largest header list, in bytes.
const HEADERS_MAX: u32 = 16 << 10;
/// A silent TCP peer is asked for a sign of life after so long, and has as long to give one as is next. Of a process on this machine the
/// kernel tells the end; one that is only stopped keeps its watches.
const KEEPALIVE: Duration = Duration::from_secs(60);
const KEEPALIVE_ANSWER: Duration = Duration::from_secs(20);

/// A server's end: told to stop, and waited for.
pub type Running = (oneshot::Sender<()>, JoinHandle<()>);

/// Of whatever kind of way in.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Connections at once.
    pub connections: usize,
    /// One without a call is closed after so long.
    pub idle: Duration,
}

impl Bounds {
    fn timer(&self) -> Timer {
        Timer::new(Limits { preface: HANDSHAKE_LIMIT.min(self.idle), idle: self.idle })
    }
}

/// A connection that counts, and ends when nobody uses it.
struct Connection<T, I> {
    io: T,
    peer: I,
    timer: Timer,
    _place: Box<dyn Send + Sync>,
}

impl<T, I: Clone + Send + Sync + 'static> Connected for Connection<T, I> {
    type ConnectInfo = Line<I>;
    fn connect_info(&self) -> Line<I> {
        Line { peer: self.peer.clone(), calls: self.timer.calls().clone() }
    }
}

impl<T: Unpin, I: Unpin> Connection<T, I> {
    /// What writing came to; a peer that does not read does not hold up the end.
    fn written<R>(&mut self, c: &mut Context<'_>, done: Poll<io::Result<R>>) -> Poll<io::Result<R>> {
        if done.is_pending() && self.timer.poll(c).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        done
    }
}

impl<T: AsyncRead + Unpin, I: Unpin> AsyncRead for Connection<T, I> {
    fn poll_read(mut self: Pin<&mut Self>, c: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.io).poll_read(c, buffer);
        if read.is_pending() {
            // Nothing in the buffer: the end.
            return self.timer.poll(c).map(Ok);
        }
        self.timer.has_read(buffer.filled().len() - before);
        read
    }
}

impl<T: AsyncWrite + Unpin, I: Unpin> AsyncWrite for Connection<T, I> {
    fn poll_write(mut self: Pin<&mut Self>, c: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(c, bytes);
        self.written(c, written)
    }
    fn poll_flush(mut self: Pin<&mut Self>, c: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.io).poll_flush(c);
        self.written(c, flushed)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, c: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(c)
    }
    fn poll_write_vectored(mut self: Pin<&mut Self>, c: &mut Context<'_>, bytes: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(c, bytes);
        self.written(c, written)
    }
    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

/// Serves clients on the unix socket.
///
/// # Errors
/// Reflection cannot be set up.
pub async fn unix(
    services: Services,
    gate: Gate,
    bounds: Bounds,
    listener: UnixListener,
) -> Result<Running, tonic_reflection::server::Error> {
    let (ready, incoming) = mpsc::channel(READY);
    let places = Places::new(bounds.connections);
    let own = nix::unistd::geteuid().as_raw();
    let accepting = tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((io, _)) => {
                    let peer = UdsConnectInfo { peer_addr: io.peer_addr().ok().map(Arc::new), peer_cred: io.peer_cred().ok() };
                    // Whom the kernel does not name is nobody.
                    let uid = peer.peer_cred.map(|c| c.uid());
                    let place = match places.take(uid, uid.is_some_and(|uid| uid == 0 || uid == own)) {
                        Ok(place) => place,
                        Err(why) => {
                            closed(&format!("user {}", uid.map_or_else(|| "unknown".to_string(), |uid| uid.to_string())), why);
                            continue;
                        }
                    };
                    if ready.send(Ok(Connection { io, peer, timer: bounds.timer(), _place: Box::new(place) })).await.is_err() {
                        return;
                    }
                }
                Err(e) => not_accepted(&e).await,
            }
        }
    });
    serve(services, gate, true, ReceiverStream::new(incoming), accepting, None).await
}

/// Serves clients on TCP.
///
/// # Errors
/// As [`unix`].
pub async fn tcp(
    services: Services,
    gate: Gate,
    bounds: Bounds,
    listener: TcpListener,
    tls: Tls,
    reflection: bool,
) -> Result<Running, tonic_reflection::server::Error> {
    let (ready, incoming) = mpsc::channel(READY);
    let places = Places::new(bounds.connections);
    let tls = Arc::new(tls);
    let accepting = tokio::spawn(async move {
        loop {
            match listener.accept().await {
                // A peer that is slow to shake hands holds up nobody but itself, and not for long.
                Ok((io, from)) => {
                    let place: Place<_> = match places.take(from.ip(), false) {
                        Ok(place) => place,
                        Err(why) => {
                            closed(&from.ip().to_string(), why);
                            continue;
                        }
                    };
                    let (tls, ready) = (tls.clone(), ready.clone());
                    tokio::spawn(async move {
                        match tokio::time::timeout(HANDSHAKE_LIMIT, shake_hands(io, &tls)).await {
                            Ok(Ok((io, peer))) => {
                                let timer = bounds.timer();
                                drop(ready.send(Ok(Connection { io, peer, timer, _place: Box::new(place) })).await);
                            }
                            Ok(Err(e)) => tracing::info!(%from, "a TLS connection was not accepted: {e}"),
                            Err(_) => tracing::info!(%from, "a TLS handshake took longer than {} s", HANDSHAKE_LIMIT.as_secs()),
                        }
                    });
                }
                Err(e) => not_accepted(&e).await,
            }
        }
    });
    serve(services, gate, reflection, ReceiverStream::new(incoming), accepting, Some(KEEPALIVE)).await
}

async fn shake_hands(io: TcpStream, tls: &Arc<Tls>) -> io::Result<(TlsStream<TcpStream>, Peer)> {
    io.set_nodelay(true)?;
    let acceptor = tls.acceptor();
    let stream = acceptor.accept(io).await?;
    let (tls, certificates) = (tls.clone(), stream.get_ref().1.peer_certificates().map(<[_]>::to_vec));
    // Names of users may be looked up on another machine.
    let peer = tokio::task::spawn_blocking(move || tls.peer(certificates.as_deref())).await.map_err(io::Error::other)?;
    Ok((stream, peer))
}

/// Says so at most once in a while: whoever opens too many connections opens many.
fn closed(whose: &str, why: &str) {
    static LAST: std::sync::Mutex<Option<std::time::Instant>> = std::sync::Mutex::new(None);
    let mut last = LAST.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if last.is_none_or(|last| last.elapsed() > QUIET) {
        *last = Some(std::time::Instant::now());
        tracing::warn!("a connection of {whose} was closed: {why} ([limits] connections)");
    }
}

async fn not_accepted(e: &io::Error) {
    // It passes, and must not end the service.
    tracing::warn!("a connection was not accepted: {e}");
    tokio::time::sleep(ACCEPT_PAUSE).await;
}

async fn serve<T, I>(
    services: Services,
    gate: Gate,
    reflection: bool,
    incoming: impl Stream<Item = io::Result<Connection<T, I>>> + Send + 'static,
    accepting: JoinHandle<()>,
    keepalive: Option<Duration>,
) -> Result<Running, tonic_reflection::server::Error>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    I: Clone + Send + Sync + Unpin + 'static,
{
    let most = services.request_bytes;
    let pulse = services.pulse.clone();
    let jobs = JobsServer::new(JobsService::new(services.clone())).max_decoding_message_size(most);
    let node = NodeServer::new(NodeService::new(services)).max_decoding_message_size(most);
    let (reporter, health_service) = tonic_health::server::health_reporter();
    let following = health::begin(reporter, pulse).await;
    let mut server = Server::builder()
        .max_concurrent_streams(STREAMS_PER_CONNECTION)
        .http2_max_header_list_size(HEADERS_MAX)
        .http2_keepalive_interval(keepalive)
        .http2_keepalive_timeout(Some(KEEPALIVE_ANSWER))
        .layer(gate);
    let mut router = server.add_service(jobs).add_service(node).add_service(health_service);
    if reflection {
        let all = || {
            let own = tonic_reflection::server::Builder::configure().register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET);
            own.register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        router = router.add_service(all().build_v1()?).add_service(all().build_v1alpha()?);
    }
    let (stop, stopped) = oneshot::channel::<()>();
    let task = tokio::spawn(async move {
        let signal = async {
            let _ = stopped.await;
            accepting.abort();
        };
        if let Err(e) = router.serve_with_incoming_shutdown(incoming, signal).await {
            tracing::error!("the service for clients ended: {e}");
        }
        following.abort();
    });
    Ok((stop, task))
}
