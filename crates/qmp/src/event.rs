//! What QEMU tells unasked.

use serde_json::Value;
use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::sync::Notify;

/// How many events wait for a subscriber that does not look, and how many bytes their lines had.
const EVENTS: usize = 4096;
const BYTES: usize = 16 << 20;

/// An event, of any name: also one that this program has never heard of.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name, such as `BLOCK_EXPORT_DELETED`.
    pub name: String,
    /// Its data, an object; `Null` if it has none.
    pub data: Value,
    /// Time since the epoch on the host's clock, to the microsecond; zero if QEMU could not tell the time.
    pub timestamp: Duration,
}

/// The subscriber did not look for so long that events were dropped, which are gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lagged {
    /// How many.
    pub missed: u64,
}

impl fmt::Display for Lagged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} events were dropped because nobody took them", self.missed)
    }
}

impl std::error::Error for Lagged {}

/// Every event since the subscription, in QEMU's order.
///
/// It keeps up to 4096 events or 16 MiB of them. What comes after that is dropped and counted: [`Lagged`] stands in
/// the stream exactly where events are missing. It does not keep the connection open.
#[derive(Debug)]
pub struct EventStream {
    queue: Arc<Queue>,
}

impl EventStream {
    /// The next event; `None` once the connection has ended and all events before its end were taken.
    ///
    /// # Errors
    /// [`Lagged`] in place of the events that were dropped; the stream goes on after it.
    ///
    /// # Cancellation
    /// Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<Result<Event, Lagged>> {
        loop {
            // Made before the look, so that what arrives in between is not slept through.
            let arrival = self.queue.arrived.notified();
            {
                let mut waiting = self.queue.lock();
                if let Some(item) = waiting.take() {
                    return Some(item);
                }
                if waiting.ended {
                    return None;
                }
            }
            arrival.await;
        }
    }

    /// An event that has already arrived; `None` if there is none now.
    ///
    /// # Errors
    /// As [`EventStream::next`].
    pub fn try_next(&mut self) -> Option<Result<Event, Lagged>> {
        self.queue.lock().take()
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        *self.queue.lock() = Waiting { ended: true, ..Waiting::default() };
    }
}

/// A subscriber's events, between the connection that puts and the stream that takes.
#[derive(Debug)]
pub(crate) struct Queue {
    waiting: Mutex<Waiting>,
    arrived: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    /// Events with the length of their lines, and gaps, which count as no bytes.
    items: VecDeque<(Result<Event, Lagged>, usize)>,
    bytes: usize,
    ended: bool,
}

impl Waiting {
    fn take(&mut self) -> Option<Result<Event, Lagged>> {
        let (item, bytes) = self.items.pop_front()?;
        self.bytes -= bytes;
        Some(item)
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an event whose line had `bytes` bytes; false if nobody will ever take it.
    pub(crate) fn put(&self, event: &Event, bytes: usize) -> bool {
        let mut waiting = self.lock();
        if waiting.ended {
            return false;
        }
        let full = waiting.items.len() >= EVENTS || waiting.bytes + bytes > BYTES;
        match waiting.items.back_mut() {
            // A single event larger than all may be is still one event: an idle subscriber gets it.
            Some((Err(lagged), _)) if full => lagged.missed += 1,
            Some(_) if full => waiting.items.push_back((Err(Lagged { missed: 1 }), 0)),
            _ => {
                waiting.bytes += bytes;
                waiting.items.push_back((Ok(event.clone()), bytes));
            }
        }
        drop(waiting);
        self.arrived.notify_one();
        true
    }

    /// Says that nothing more will come.
    pub(crate) fn end(&self) {
        self.lock().ended = true;
        self.arrived.notify_one();
    }
}

/// A stream and the connection's end of it.
pub(crate) fn subscription() -> (Arc<Queue>, EventStream) {
    let queue = Arc::new(Queue { waiting: Mutex::default(), arrived: Notify::new() });
    (Arc::clone(&queue), EventStream { queue })
}

#[cfg(test)]
mod test {
    use super::*;

    fn event(number: usize) -> Event {
        Event { name: number.to_string(), data: Value::Null, timestamp: Duration::ZERO }
    }

    #[test]
    fn an_overflow_stands_where_events_are_missing() {
        let (queue, mut stream) = subscription();
        for number in 0..EVENTS + 3 {
            assert!(queue.put(&event(number), 10));
        }
        for number in 0..2 {
            assert_eq!(stream.try_next(), Some(Ok(event(number))));
        }
        assert!(queue.put(&event(9000), 10));
        for number in 2..EVENTS {
            assert_eq!(stream.try_next(), Some(Ok(event(number))));
        }
        assert_eq!(stream.try_next(), Some(Err(Lagged { missed: 3 })));
        assert_eq!(stream.try_next(), Some(Ok(event(9000))));
        assert_eq!(stream.try_next(), None);
    }

    #[test]
    fn bytes_are_bounded_too() {
        let (queue, mut stream) = subscription();
        queue.put(&event(0), 2 * BYTES);
        queue.put(&event(1), 1);
        assert_eq!(stream.try_next(), Some(Ok(event(0))));
        assert_eq!(stream.try_next(), Some(Err(Lagged { missed: 1 })));
        queue.put(&event(2), BYTES);
        assert_eq!(stream.try_next(), Some(Ok(event(2))));
    }

    #[tokio::test]
    async fn an_end_comes_after_what_was_before_it() {
        let (queue, mut stream) = subscription();
        queue.put(&event(0), 1);
        queue.end();
        assert_eq!(stream.next().await, Some(Ok(event(0))));
        assert_eq!(stream.next().await, None);
        assert!(!queue.put(&event(1), 1));
    }

    #[test]
    fn a_dropped_stream_takes_no_more() {
        let (queue, stream) = subscription();
        drop(stream);
        assert!(!queue.put(&event(0), 1));
    }
}
