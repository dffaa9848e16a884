//! What the handles of a connection share with its driver: who waits for what.

use crate::{
    connection::timed_out,
    error::{Error, ErrorKind, Result},
    event::{Event, EventStream, Queue, subscription},
};
use serde_json::Value;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};
use tokio::{sync::oneshot, time::timeout_at};

/// A reply, and when it was read from the socket.
type Arrival = (Result<Value>, Instant);

#[derive(Default)]
pub(crate) struct Shared {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next_id: u64,
    pending: HashMap<u64, (&'static str, oneshot::Sender<Arrival>)>,
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
        let Some((command, sender)) = self.lock().pending.remove(&id) else { return false };
        sender.send((result.map_err(|error| Error::refused("QEMU", command, error)), at)).is_ok()
    }

    pub(crate) fn event(&self, event: &Event, bytes: usize) {
        self.lock().subscribers.retain(|queue| queue.put(event, bytes));
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
    pub(crate) async fn wait(mut self, deadline: tokio::time::Instant) -> Arrival {
        match timeout_at(deadline, &mut self.reply).await {
            Ok(Ok(arrival)) => arrival,
            Ok(Err(_)) => {
                let error = Error::new(ErrorKind::Disconnected, format!("{} got no answer", self.command));
                (Err(error), Instant::now())
            }
            Err(_) => (Err(timed_out(self.command)), Instant::now()),
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
