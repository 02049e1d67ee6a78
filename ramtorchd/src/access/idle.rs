//! Ends connections that nobody uses: each keeps a place ([`super::places`]) that others want.
//!
//! ```text
//!   accepted ─► the client's HTTP/2 preface ─► between calls ◄─► calls are open, however quiet
//!                    │ none in time                 │ for too long
//!                    └──────────► end of file ◄─────┘
//! ```
//! To the server it looks as if the client had closed the connection. Clients of gRPC connect again with their next call.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::time::Sleep;

/// Bytes with which every client of HTTP/2 begins.
const PREFACE_BYTES: u64 = 24;
/// What has come just now may be a call that is not counted yet.
const MARGIN: Duration = Duration::from_secs(1);

/// How long a connection may be without a call.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// From its acceptance to the client's preface.
    pub preface: Duration,
    /// Without an open call.
    pub idle: Duration,
}

/// Calls of one connection.
#[derive(Debug)]
pub(super) struct Calls(Mutex<State>);

#[derive(Debug, Clone, Copy)]
struct State {
    open: usize,
    /// When the last one ended, or the connection began.
    since: Instant,
}

/// An open call, until it is dropped.
#[derive(Debug)]
pub(super) struct Call(Arc<Calls>);

impl Calls {
    fn new(now: Instant) -> Arc<Calls> {
        Arc::new(Calls(Mutex::new(State { open: 0, since: now })))
    }

    /// A call has come.
    pub fn begin(self: &Arc<Calls>) -> Call {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).open += 1;
        Call(self.clone())
    }

    /// Since when there is none.
    fn idle_since(&self) -> Option<Instant> {
        let state = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (state.open == 0).then_some(state.since)
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let mut state = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.open -= 1;
        state.since = Instant::now();
    }
}

/// A connection and the peer's name, as services see them.
#[derive(Debug, Clone)]
pub(super) struct Line<I> {
    /// Who is at the other end.
    pub peer: I,
    /// Its calls.
    pub calls: Arc<Calls>,
}

/// Watches one connection.
#[derive(Debug)]
pub(super) struct Timer {
    limits: Limits,
    calls: Arc<Calls>,
    accepted: Instant,
    /// Bytes that have come, and when the last did.
    read: u64,
    last_read: Instant,
    sleep: Pin<Box<Sleep>>,
    over: bool,
}

impl Timer {
    /// Of a connection that begins now.
    pub fn new(limits: Limits) -> Timer {
        let now = Instant::now();
        let sleep = Box::pin(tokio::time::sleep(limits.preface.min(limits.idle)));
        Timer { limits, calls: Calls::new(now), accepted: now, read: 0, last_read: now, sleep, over: false }
    }

    /// Its calls.
    pub fn calls(&self) -> &Arc<Calls> {
        &self.calls
    }

    /// So many bytes have come.
    pub fn has_read(&mut self, bytes: usize) {
        if bytes > 0 {
            self.read += bytes as u64;
            self.last_read = Instant::now();
        }
    }

    /// Ready once the connection is to be ended, from then on always; else the task is woken when that may be so.
    pub fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        while !self.over {
            if self.sleep.as_mut().poll(context).is_pending() {
                return Poll::Pending;
            }
            let now = Instant::now();
            match self.left(now) {
                Some(left) => self.sleep.as_mut().reset((now + left).into()),
                None => self.over = true,
            }
        }
        Poll::Ready(())
    }

    /// How long the connection stays, if nothing comes. `None`: it is to be ended.
    fn left(&self, now: Instant) -> Option<Duration> {
        let rest = |limit: Duration, since: Instant| limit.checked_sub(now.saturating_duration_since(since)).filter(|left| !left.is_zero());
        if self.read < PREFACE_BYTES {
            return rest(self.limits.preface, self.accepted);
        }
        let Some(since) = self.calls.idle_since() else { return Some(self.limits.idle) };
        // Whoever sends other things than calls is not waited for any longer.
        rest(self.limits.idle, since).or_else(|| rest(MARGIN, self.last_read.min(since + self.limits.idle)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timer() -> Timer {
        Timer::new(Limits { preface: Duration::from_secs(10), idle: Duration::from_secs(600) })
    }

    #[tokio::test]
    async fn a_connection_begins_and_is_used_in_time_or_ends() {
        let mut t = timer();
        let start = t.accepted;
        let at = |t: &Timer, seconds| t.left(start + Duration::from_secs(seconds)).map(|left| left.as_secs());
        t.has_read(23);
        assert_eq!([at(&t, 9), at(&t, 10)], [Some(1), None], "no preface");
        t.read = PREFACE_BYTES;
        t.last_read = start;
        assert_eq!([at(&t, 10), at(&t, 599), at(&t, 600)], [Some(590), Some(1), None], "no call");
        let call = t.calls().begin();
        assert_eq!(at(&t, 100_000), Some(600), "a quiet watch");
        drop(call);
        t.calls.0.lock().unwrap().since = start + Duration::from_secs(1000);
        assert_eq!([at(&t, 1599), at(&t, 1600)], [Some(1), None]);
    }

    #[tokio::test]
    async fn bytes_that_are_no_call_put_the_end_off_a_little_only() {
        let mut t = timer();
        let start = t.accepted;
        t.read = 100;
        let at = |t: &Timer, ms| t.left(start + Duration::from_millis(ms)).map(|left| left.as_millis());
        t.last_read = start + Duration::from_millis(599_900);
        assert_eq!([at(&t, 600_000), at(&t, 600_900)], [Some(900), None]);
        t.last_read = start + Duration::from_millis(600_800);
        assert_eq!([at(&t, 600_900), at(&t, 601_000)], [Some(100), None]);
    }

    #[tokio::test]
    async fn the_end_stays_the_end() {
        let mut t = Timer::new(Limits { preface: Duration::from_millis(1), idle: Duration::from_millis(1) });
        std::future::poll_fn(|context| t.poll(context)).await;
        let _call = t.calls().begin();
        std::future::poll_fn(|context| t.poll(context)).await;
    }
}
