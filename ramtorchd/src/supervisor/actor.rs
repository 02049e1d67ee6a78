//! The task that owns the books, and the ways to it.

use super::message::{Message, Refusal, RefusalKind, Reply};
use super::{Leftovers, Pulse, Supervisor};
use crate::notify::Watchdog;
use std::time::Instant;
use tokio::sync::{mpsc, oneshot};

/// Messages from calls and workers that may wait; whoever sends more waits himself.
const INBOX: usize = 1024;

/// The outer way in: bounded, for calls and for what workers say.
#[derive(Debug, Clone)]
pub struct Handle {
    sender: mpsc::Sender<Message>,
}

/// Both ends of the ways in.
#[derive(Debug)]
pub struct Inbox {
    outer: mpsc::Receiver<Message>,
    inner: mpsc::UnboundedReceiver<Message>,
}

/// The ways to a state task: the outer one, the inner one (for processes, timers and answers of `Outside`; their
/// number is bounded by what the task itself has started), and what it reads.
pub fn channel() -> (Handle, mpsc::UnboundedSender<Message>, Inbox) {
    let (sender, outer) = mpsc::channel(INBOX);
    let (inner_sender, inner) = mpsc::unbounded_channel();
    (Handle { sender }, inner_sender, Inbox { outer, inner })
}

impl Handle {
    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// The refusal, or that the daemon is gone.
    pub async fn ask<T>(&self, message: impl FnOnce(Reply<T>) -> Message) -> Result<T, Refusal> {
        let gone = || Refusal::new(RefusalKind::Stopping, "the daemon has stopped");
        let (reply, answer) = oneshot::channel();
        self.sender.send(message(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Tells. `false`: the daemon is gone.
    pub async fn tell(&self, message: Message) -> bool {
        self.sender.send(message).await.is_ok()
    }
}

/// Runs until the daemon was told to stop and is done, or its time is up. Returns what was left over.
///
/// The service manager's watchdog is fed from here, and `pulse` beats: a loop that hangs is noticed, whatever else still answers.
pub async fn run(mut supervisor: Supervisor, mut inbox: Inbox, mut watchdog: Watchdog, pulse: Pulse) -> Leftovers {
    supervisor.begin(Instant::now());
    let mut next_tick = Instant::now();
    let mut callers = true;
    loop {
        let now = Instant::now();
        if now >= next_tick {
            supervisor.tick(now);
            watchdog.feed(now, || supervisor.status());
            pulse.beat(now);
            next_tick = now + supervisor.idle_tick();
        }
        if supervisor.is_done() || supervisor.is_overdue(now) {
            return supervisor.leftovers();
        }
        // A message may have made the next look at the clock more urgent.
        next_tick = next_tick.min(now + supervisor.idle_tick());
        let sleep = if supervisor.pump() {
            // Those who were just woken, and whoever has called, have their turn before the next group.
            tokio::task::yield_now().await;
            now
        } else {
            next_tick
        };
        tokio::select! {
            biased;
            Some(message) = inbox.inner.recv() => supervisor.handle(message, Instant::now()),
            message = inbox.outer.recv(), if callers => match message {
                Some(message) => supervisor.handle(message, Instant::now()),
                // Nobody can call any more, so nobody could ever end what runs.
                None => {
                    callers = false;
                    supervisor.handle(Message::Stop, Instant::now());
                }
            },
            () = tokio::time::sleep_until(sleep.into()) => {}
        }
    }
}
