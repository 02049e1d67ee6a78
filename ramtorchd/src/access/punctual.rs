//! Bounds how long a request may take to come: a call whose request never ends would be open, and keep its connection, for ever.

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::Sleep;
use tonic::Status;
use tonic::body::Body;

/// A request has to be there after so long. The largest are a few MiB.
pub(super) const REQUEST_LIMIT: Duration = Duration::from_secs(60);

/// A request on its way.
pub(super) struct Punctual {
    body: Body,
    limit: Duration,
    /// Runs from when the request was waited for first.
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Punctual {
    /// One that has `limit` from now on.
    pub fn new(body: Body, limit: Duration) -> Punctual {
        Punctual { body, limit, sleep: None }
    }
}

impl HttpBody for Punctual {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(context) {
            return Poll::Ready(frame);
        }
        let limit = self.limit;
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        sleep.as_mut().poll(context).map(|()| {
            let text = format!("the request was not there after {} s; send it without pauses", limit.as_secs());
            Some(Err(Status::deadline_exceeded(text)))
        })
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
    use http_body_util::{BodyExt, Full};

    /// Nothing ever comes.
    struct Never;

    impl HttpBody for Never {
        type Data = Bytes;
        type Error = Status;
        fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            Poll::Pending
        }
    }

    #[tokio::test]
    async fn a_request_that_does_not_come_is_an_error() {
        let whole = Punctual::new(Body::new(Full::new(Bytes::from_static(b"request"))), Duration::ZERO);
        assert_eq!(whole.collect().await.unwrap().to_bytes(), "request");
        let never = Punctual::new(Body::new(Never), Duration::from_millis(1));
        assert_eq!(never.collect().await.unwrap_err().code(), tonic::Code::DeadlineExceeded);
    }
}
