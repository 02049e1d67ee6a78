//! Stands before every service: finds out who calls, counts, and keeps one user's calls within bounds.

use super::config::LimitsConfig;
use super::idle::{Call, Line};
use super::punctual::{Punctual, REQUEST_LIMIT};
use super::tls::Peer;
use super::{Caller, Policy};
use crate::supervisor::{Refusal, RefusalKind};
use crate::telemetry::rpc::RpcCounters;
use bytes::Bytes;
use http::{Extensions, Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use std::collections::HashMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Instant;
use tonic::body::Body;
use tonic::transport::server::UdsConnectInfo;
use tonic::{Code, Status};
use tower::{Layer, Service};

/// The only services whose calls have more than one request.
const REFLECTION: &str = "/grpc.reflection.";

/// Who may call, how much, and what was called.
#[derive(Clone)]
pub struct Gate {
    shared: Arc<Shared>,
}

struct Shared {
    policy: Policy,
    limits: LimitsConfig,
    users: Mutex<HashMap<u32, Arc<User>>>,
    counters: Arc<RpcCounters>,
}

/// What one user uses.
struct User {
    bucket: Mutex<Bucket>,
    open: AtomicUsize,
}

/// Calls that may be made now, and when they were counted.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    tokens: f64,
    at: Instant,
}

impl Bucket {
    /// Takes one, if there is one.
    fn take(&mut self, rate: f64, most: f64, now: Instant) -> bool {
        let elapsed = now.saturating_duration_since(std::mem::replace(&mut self.at, now));
        self.tokens = (self.tokens + elapsed.as_secs_f64() * rate).min(most);
        let granted = self.tokens >= 1.0;
        if granted {
            self.tokens -= 1.0;
        }
        granted
    }
}

/// One open call of a user.
struct Ticket(Arc<User>);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Gate {
    /// A gate of a daemon.
    pub fn new(policy: Policy, limits: LimitsConfig, counters: Arc<RpcCounters>) -> Gate {
        Gate { shared: Arc::new(Shared { policy, limits, users: Mutex::default(), counters }) }
    }

    async fn admit(&self, peer: Result<u32, String>) -> Result<(Caller, Ticket), Refusal> {
        let denied = |text: String| Refusal::new(RefusalKind::Denied, text);
        let uid = peer.map_err(denied)?;
        let verdict = match self.shared.policy.known(uid, Instant::now()) {
            Some(verdict) => verdict,
            None => {
                let shared = self.shared.clone();
                // The user database may be on another machine.
                let judged = tokio::task::spawn_blocking(move || shared.policy.judge(uid, Instant::now())).await;
                judged.map_err(|e| denied(format!("cannot find out who calls: {e}")))?
            }
        };
        let caller = verdict.map_err(|e| denied(e.0))?;
        Ok((caller, self.ticket(uid, Instant::now())?))
    }

    fn ticket(&self, uid: u32, now: Instant) -> Result<Ticket, Refusal> {
        let limits = &self.shared.limits;
        let burst = f64::from(limits.calls_burst);
        let user = {
            // Only users who are let in get here, so that their number is bounded.
            let mut users = self.shared.users.lock().unwrap_or_else(PoisonError::into_inner);
            let new = || Arc::new(User { bucket: Mutex::new(Bucket { tokens: burst, at: now }), open: AtomicUsize::new(0) });
            users.entry(uid).or_insert_with(new).clone()
        };
        let busy = |text: String| Refusal::new(RefusalKind::Busy, text);
        if !user.bucket.lock().unwrap_or_else(PoisonError::into_inner).take(limits.calls_per_second, burst, now) {
            let rate = limits.calls_per_second;
            return Err(busy(format!("more than {rate} calls a second of this user (limits.calls_per_second); slow down")));
        }
        if user.open.fetch_add(1, Ordering::Relaxed) >= limits.open_calls_per_user {
            user.open.fetch_sub(1, Ordering::Relaxed);
            let most = limits.open_calls_per_user;
            return Err(busy(format!("{most} calls of this user are open already (limits.open_calls_per_user); end some")));
        }
        Ok(Ticket(user))
    }
}

/// Puts the peer where services look for it, and counts the call of its connection.
fn unwrap(extensions: &mut Extensions) -> Option<Call> {
    if let Some(Line { peer, calls }) = extensions.remove::<Line<UdsConnectInfo>>() {
        extensions.insert(peer);
        return Some(calls.begin());
    }
    let Line { peer, calls } = extensions.remove::<Line<Peer>>()?;
    extensions.insert(peer);
    Some(calls.begin())
}

/// The user behind a connection: the kernel's word on a unix socket, the certificate's on TCP.
fn peer(extensions: &Extensions) -> Result<u32, String> {
    if let Some(peer) = extensions.get::<Peer>() {
        return peer.uid();
    }
    if let Some(UdsConnectInfo { peer_cred: Some(cred), .. }) = extensions.get::<UdsConnectInfo>() {
        return Ok(cred.uid());
    }
    Err("the kernel does not say who calls".into())
}

impl<S> Layer<S> for Gate {
    type Service = Gated<S>;
    fn layer(&self, inner: S) -> Gated<S> {
        Gated { inner, gate: self.clone() }
    }
}

/// A service behind the gate.
#[derive(Clone)]
pub struct Gated<S> {
    inner: S,
    gate: Gate,
}

type Answer<E> = Pin<Box<dyn Future<Output = Result<Response<Body>, E>> + Send>>;

impl<S> Service<Request<Body>> for Gated<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Answer<S::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        // The clone has not been asked whether it is ready; this one has.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        let gate = self.gate.clone();
        let open = unwrap(request.extensions_mut());
        Box::pin(async move {
            let begun = Instant::now();
            let counters = gate.shared.counters.clone();
            let call = counters.begin(request.uri().path());
            let (caller, ticket) = match gate.admit(peer(request.extensions())).await {
                Ok(admitted) => admitted,
                Err(refusal) => {
                    let status = Status::from(refusal);
                    counters.answered(call, status.code(), begun.elapsed());
                    return Ok(status.into_http());
                }
            };
            request.extensions_mut().insert(caller);
            // A conversation: its requests come when its client likes.
            if !request.uri().path().starts_with(REFLECTION) {
                request = request.map(|body| Body::new(Punctual::new(body, REQUEST_LIMIT)));
            }
            let response = inner.call(request).await?;
            // A call that is refused before it has said anything carries its status here, others at their end.
            let code = response.headers().get(Status::GRPC_STATUS).map_or(Code::Ok, |v| Code::from_bytes(v.as_bytes()));
            counters.answered(call, code, begun.elapsed());
            Ok(response.map(|body| Body::new(Held { body, _ticket: ticket, _open: open })))
        })
    }
}

/// An answer on its way; the call is open until it is gone.
struct Held {
    body: Body,
    _ticket: Ticket,
    _open: Option<Call>,
}

impl HttpBody for Held {
    type Data = Bytes;
    type Error = Status;
    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }
    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::config::AccessConfig;
    use std::time::Duration;

    fn gate(limits: LimitsConfig) -> Gate {
        Gate::new(Policy::new(AccessConfig::default()), limits, Arc::default())
    }

    #[test]
    fn calls_come_at_a_rate_and_in_bursts() {
        let now = Instant::now();
        let mut bucket = Bucket { tokens: 3.0, at: now };
        let mut take = |ms: u64| bucket.take(10.0, 3.0, now + Duration::from_millis(ms));
        assert_eq!([take(0), take(0), take(0), take(0)], [true, true, true, false]);
        assert_eq!([take(50), take(100), take(100)], [false, true, false]);
        assert_eq!([take(60_000), take(60_000), take(60_000), take(60_000)], [true, true, true, false], "a burst, not an hour's worth");
        assert!(!take(0), "time that goes back gives nothing");
    }

    #[test]
    fn open_calls_are_counted_until_they_end_and_for_each_user() {
        let g = gate(LimitsConfig { open_calls_per_user: 2, ..Default::default() });
        let now = Instant::now();
        let first = g.ticket(1, now).unwrap();
        let _second = g.ticket(1, now).unwrap();
        let refusal = g.ticket(1, now).err().unwrap();
        assert!(refusal.kind == RefusalKind::Busy && refusal.message.contains("open_calls_per_user"));
        assert!(g.ticket(2, now).is_ok());
        drop(first);
        assert!(g.ticket(1, now).is_ok());
    }

    #[tokio::test]
    async fn nobody_comes_in_unknown() {
        let g = gate(LimitsConfig::default());
        assert!(g.admit(peer(&Extensions::new())).await.is_err());
        assert!(g.admit(Ok(u32::MAX - 7)).await.is_err());
        assert!(g.admit(Ok(0)).await.unwrap().0.admin);
    }
}
