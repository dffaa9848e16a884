//! What the handles of a connection share with its driver: who waits for what, and whether the peer answers at all.
//!
//! QEMU runs the commands of a monitor one after the other. So if one of them is not answered in time, none behind it is
//! either, and whatever is sent on top is only queued, to take effect when nobody expects it any more. From then on the
//! peer is *silent*: what is pending fails, and nothing more is sent, until it has answered all that was.

use crate::{
    connection::timed_out,
    error::{Error, ErrorKind, Result},
    event::{Event, EventStream, Queue, subscription},
};
use serde_json::Value;
use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tokio::{
    sync::{oneshot, watch},
    time::{Instant as TokioInstant, timeout, timeout_at},
};

/// A reply, and when it was read from the socket.
type Arrival = (Result<Value>, Instant);

/// How long an answer that has arrived may take to be read.
const UNREAD: Duration = Duration::from_millis(500);

/// Whose deadline a wait has, and so what it means when it is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wait {
    /// The connection's own: a peer that does not answer within it is silent.
    AsThePeerIsGiven,
    /// The caller's own: it has no more time, whatever the peer does.
    AsTheCallerLikes,
}

/// Since when the peer owes an answer that is overdue.
#[derive(Debug, Clone)]
struct Silence {
    error: Error,
    since: TokioInstant,
}

#[derive(Default)]
pub(crate) struct Shared {
    state: Mutex<State>,
    silent: watch::Sender<bool>,
    handed_over: watch::Sender<bool>,
}

#[derive(Default)]
struct State {
    next_id: u64,
    pending: HashMap<u64, (&'static str, oneshot::Sender<Arrival>)>,
    /// Commands that were not answered in time, and that the peer may still answer.
    overdue: HashSet<u64>,
    silence: Option<Silence>,
    /// How often the peer fell silent.
    silences: u32,
    subscribers: Vec<Arc<Queue>>,
    /// Why the connection ended; nothing is added to the rest after that.
    end: Option<Error>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for the reply to a command that is about to be sent.
    pub(crate) fn slot(self: &Arc<Self>, command: &'static str) -> Result<Slot> {
        let mut state = self.lock();
        if let Some(end) = &state.end {
            return Err(end.during(command));
        }
        if let Some(silence) = &state.silence {
            return Err(silence.error.instead_of(command));
        }
        let id = state.next_id;
        state.next_id += 1;
        let (sender, reply) = oneshot::channel();
        state.pending.insert(id, (command, sender));
        drop(state);
        Ok(Slot { id, command, reply, shared: Arc::clone(self) })
    }

    pub(crate) fn subscribe(&self) -> EventStream {
        let (queue, stream) = subscription();
        let mut state = self.lock();
        if state.end.is_some() {
            queue.end();
        } else {
            // A dropped stream is otherwise noticed at the next event, which may never come.
            state.subscribers.retain(|queue| Arc::strong_count(queue) > 1);
            state.subscribers.push(queue);
        }
        stream
    }

    /// Gives a reply to whom it belongs; false if to nobody, or to nobody any more.
    pub(crate) fn reply(&self, id: u64, at: Instant, result: Result<Value, crate::error::PeerError>) -> bool {
        let mut state = self.lock();
        if state.overdue.remove(&id) && state.overdue.is_empty() && state.silence.take().is_some() {
            tracing::debug!(id, "QEMU answers again");
            self.silent.send_replace(false);
        }
        let Some((command, sender)) = state.pending.remove(&id) else { return false };
        drop(state);
        sender.send((result.map_err(|error| Error::refused("QEMU", command, error)), at)).is_ok()
    }

    pub(crate) fn event(&self, event: &Event, bytes: usize) {
        self.lock().subscribers.retain(|queue| queue.put(event, bytes));
    }

    /// A command was not answered within the connection's own deadline: the peer is silent, and all that wait behind it
    /// are told so.
    fn fell_silent(&self, id: u64, command: &'static str) {
        let error = timed_out(command);
        let at = Instant::now();
        let mut state = self.lock();
        if state.end.is_some() {
            return;
        }
        state.pending.remove(&id);
        state.overdue.insert(id);
        if state.silence.is_none() {
            tracing::debug!(command, "QEMU does not answer; nothing more is sent to it");
            state.silences = state.silences.saturating_add(1);
            state.silence = Some(Silence { error: error.clone(), since: TokioInstant::now() });
        }
        let behind = std::mem::take(&mut state.pending);
        state.overdue.extend(behind.keys());
        drop(state);
        for (command, sender) in behind.into_values() {
            // Whoever dropped its slot in between does not want to know.
            let _ = sender.send((Err(error.behind(command)), at));
        }
        self.silent.send_replace(true);
    }

    pub(crate) fn is_silent(&self) -> bool {
        self.lock().silence.is_some()
    }

    /// Waits until the peer falls silent.
    pub(crate) async fn silence(&self) {
        // The sender is in `self`.
        let _ = self.silent.subscribe().wait_for(|silent| *silent).await;
    }

    /// Waits until a silence is over, but no longer than `grace` from its beginning; tells whether it is. A peer that
    /// falls silent again is not waited for.
    pub(crate) async fn answers_again(&self, grace: Duration) -> bool {
        let Some((since, silences)) = ({
            let state = self.lock();
            state.silence.as_ref().map(|silence| (silence.since, state.silences))
        }) else {
            return true;
        };
        if silences > 1 {
            return false;
        }
        let mut silent = self.silent.subscribe();
        timeout_at(since + grace, silent.wait_for(|silent| !*silent)).await.is_ok() && !self.is_silent()
    }

    /// Ends the use of the socket from here.
    pub(crate) fn hand_over(&self) {
        self.end(Error::new(ErrorKind::Silent, "the connection to QEMU was left to the guest's guard"));
        self.handed_over.send_replace(true);
    }

    /// Waits for [`Self::hand_over`].
    pub(crate) async fn handed_over(&self) {
        let _ = self.handed_over.subscribe().wait_for(|over| *over).await;
    }

    /// The connection is over: everybody who waits is told why, and everybody who comes later.
    pub(crate) fn end(&self, why: Error) {
        let at = Instant::now();
        let mut state = self.lock();
        let pending = std::mem::take(&mut state.pending);
        let subscribers = std::mem::take(&mut state.subscribers);
        let why = state.end.get_or_insert(why).clone();
        drop(state);
        for (command, sender) in pending.into_values() {
            // Whoever dropped its slot in between does not want to know.
            let _ = sender.send((Err(why.during(command)), at));
        }
        for queue in subscribers {
            queue.end();
        }
    }
}

/// Where the reply to one command will be. Dropping it abandons the reply, not the command.
pub(crate) struct Slot {
    id: u64,
    command: &'static str,
    reply: oneshot::Receiver<Arrival>,
    shared: Arc<Shared>,
}

impl Slot {
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// The reply, and when it was read or given up.
    pub(crate) async fn wait(mut self, deadline: TokioInstant, wait: Wait) -> Arrival {
        match timeout_at(deadline, &mut self.reply).await {
            Ok(Ok(arrival)) => arrival,
            Ok(Err(_)) => {
                let error = Error::new(ErrorKind::Disconnected, format!("{} got no answer", self.command));
                (Err(error), Instant::now())
            }
            Err(_) if wait == Wait::AsTheCallerLikes => (Err(timed_out(self.command)), Instant::now()),
            // If this process was stopped meanwhile, the answer may be there and only unread.
            Err(_) => match timeout(UNREAD, &mut self.reply).await {
                Ok(Ok(arrival)) => arrival,
                _ => {
                    self.shared.fell_silent(self.id, self.command);
                    (Err(timed_out(self.command)), Instant::now())
                }
            },
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.shared.lock().pending.remove(&self.id);
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn an_abandoned_reply_leaves_nothing_behind() {
        let shared = Arc::new(Shared::default());
        let (first, second) = (shared.slot("stop").unwrap(), shared.slot("cont").unwrap());
        let (gone, kept) = (first.id(), second.id());
        drop(first);
        assert_eq!(shared.lock().pending.keys().collect::<Vec<_>>(), [&kept]);
        assert!(!shared.reply(gone, Instant::now(), Ok(Value::Null)));
        assert!(shared.reply(kept, Instant::now(), Ok(Value::Null)));
        assert!(shared.lock().pending.is_empty());
    }

    #[test]
    fn subscribers_that_are_gone_are_not_collected() {
        let shared = Shared::default();
        let streams = [(); 10].map(|()| shared.subscribe());
        drop(streams);
        let _stream = shared.subscribe();
        assert_eq!(shared.lock().subscribers.len(), 1);
    }
}
