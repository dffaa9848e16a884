//! Memory for a disk's data.
//!
//! Disks are read, packed and written a MiB at a time, thousands of times. Fresh memory for each costs a page fault every
//! 4 KiB, about as much as the copy out of a socket, so it is kept and used again. It begins on a page, so that whoever
//! writes it past the page cache, or reads past it, need not copy it first.
//!
//! ```
//! let mut buffer = stillpoint_buffer::initialized(1 << 20);
//! buffer.fill(7); // whatever was there before is overwritten, all of it
//! let bytes = stillpoint_buffer::freeze(buffer);
//! assert_eq!(bytes[0], 7);
//! drop(bytes); // its memory is the next one's
//! ```

use bytes::{Buf as _, Bytes, BytesMut};
use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// What memory begins on a multiple of.
const ALIGNMENT: usize = 4096;
/// Less than this comes from the allocator, which has it at hand.
const SMALLEST: usize = 64 << 10;
/// More than this is too rare to keep: the largest pieces are of 4 MiB, and what they are packed into is a little larger.
const LARGEST: usize = (4 << 20) + (64 << 10);
/// The most that is kept while nobody uses it, in bytes: what one disk has on its way.
const KEPT: usize = 16 << 20;

static POOL: Mutex<Pool> = Mutex::new(Pool { kept: VecDeque::new(), bytes: 0 });

struct Pool {
    kept: VecDeque<BytesMut>,
    bytes: usize,
}

fn pool() -> MutexGuard<'static, Pool> {
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    fn take(&mut self, length: usize) -> Option<BytesMut> {
        let fits = |buffer: &BytesMut| (length..=length.saturating_mul(2)).contains(&buffer.capacity());
        // The last that came back is the likeliest to be in a cache of the processor.
        let buffer = self.kept.remove(self.kept.iter().rposition(fits)?)?;
        self.bytes = self.bytes.saturating_sub(buffer.capacity());
        Some(buffer)
    }

    fn give_back(&mut self, buffer: BytesMut) {
        if buffer.as_ptr().align_offset(ALIGNMENT) != 0 {
            return;
        }
        self.bytes = self.bytes.saturating_add(buffer.capacity());
        self.kept.push_back(buffer);
        while self.bytes > KEPT {
            let Some(oldest) = self.kept.pop_front() else { break };
            self.bytes = self.bytes.saturating_sub(oldest.capacity());
        }
    }
}

/// An empty buffer with room for `length` bytes.
#[must_use]
pub fn take(length: usize) -> BytesMut {
    if !(SMALLEST..=LARGEST).contains(&length) {
        return BytesMut::with_capacity(length);
    }
    let mut buffer = pool().take(length).unwrap_or_else(|| fresh(length));
    buffer.clear();
    buffer
}

/// A buffer of `length` bytes that begins on a page. They are whatever an earlier use left there: to be overwritten, all of
/// them, before anybody else gets to see them.
#[must_use]
pub fn initialized(length: usize) -> BytesMut {
    let kept = if (SMALLEST..=LARGEST).contains(&length) { pool().take(length) } else { None };
    let mut buffer = kept.unwrap_or_else(|| fresh(length));
    buffer.resize(length, 0);
    buffer
}

/// Zeroes from a page on, `length` of them or more.
fn fresh(length: usize) -> BytesMut {
    let mut buffer = BytesMut::zeroed(length.saturating_add(ALIGNMENT));
    let into_page = buffer.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
    buffer.advance(into_page);
    buffer
}

/// The same bytes, whose memory is used again when the last of their clones is dropped.
#[must_use]
pub fn freeze(buffer: BytesMut) -> Bytes {
    if (SMALLEST..=LARGEST + ALIGNMENT).contains(&buffer.capacity()) {
        Bytes::from_owner(Lent(buffer))
    } else {
        buffer.freeze()
    }
}

struct Lent(BytesMut);

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        pool().give_back(std::mem::take(&mut self.0));
    }
}

#[cfg(test)]
mod test {
    use super::*;

    /// The pool is one for the process; what other tests do to it shows in none of these.
    #[test]
    fn memory_is_used_again_when_its_last_clone_is_gone_and_begins_on_a_page() {
        // A length of which nobody else has any.
        let length = (3 << 20) + 12345;
        let mut buffer = take(length);
        assert!(buffer.is_empty() && buffer.capacity() >= length);
        assert_eq!(buffer.as_ptr().align_offset(ALIGNMENT), 0);
        buffer.resize(length, 7);
        let at = buffer.as_ptr();
        let bytes = freeze(buffer);
        let clone = bytes.slice(5..6);
        drop(bytes);
        assert_ne!(take(length).as_ptr(), at, "a clone still reads it");
        assert_eq!(&clone[..], [7]);
        drop(clone);
        let again = take(length);
        assert_eq!(again.as_ptr(), at);
        assert!(again.is_empty(), "what it held is not to be seen");
    }

    #[test]
    fn no_more_is_kept_than_is_said() {
        let mut pool = Pool { kept: VecDeque::new(), bytes: 0 };
        for _ in 0..100 {
            pool.give_back(take(1 << 20));
        }
        assert!(pool.bytes <= KEPT && pool.kept.len() == 15, "{} of {}", pool.kept.len(), pool.bytes);
        assert!(pool.take(1 << 20).is_some());
        assert!(pool.take(256 << 10).is_none(), "far too large for it");
        assert!(pool.take(2 << 20).is_none(), "too small for it");
    }
}
