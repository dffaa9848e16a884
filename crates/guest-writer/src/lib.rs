//! What the write storm in the guest writes, in a form from which the oracle can compute it again.
//!
//! A *stream* is a thread that does one operation after the other: the next begins when the last was acknowledged. Each
//! disk has streams of its own; one more, the *ordering stream*, goes round the disks in turn, so that its order is an
//! order across disks. Each stream has a region of each disk it writes to, and what its n-th operation does follows from
//! the seed, the stream and n alone ([`Layout::operation`]).
//!
//! Every 4 KiB block written carries a [`Stamp`]: who wrote it, with which operation, and which operations of *all* streams
//! had been acknowledged when it was issued. So a block seen in an image proves that those are before it.
//!
//! ```text
//!   disk 0:  | stream 0 | stream 1 | ordering |      disk 1:  | stream 2 | stream 3 | ordering |
//! ```
//!
//! ```
//! use guest_writer::{Layout, Stamp};
//! let layout = Layout { seed: 1, per_disk: 2, disk_blocks: vec![4096, 8192], span: 512 };
//! let stream = layout.ordering_stream();
//! assert_ne!(layout.operation(stream, 1).disk, layout.operation(stream, 2).disk);
//! let mut block = vec![0; guest_writer::BLOCK];
//! let stamp = Stamp { run: 7, disk: 0, stream: 0, sequence: 3, block: 12, acked: vec![0; 5] };
//! stamp.write(&mut block);
//! assert_eq!(Stamp::read(&block), Some(stamp));
//! ```

#![allow(
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    reason = "a test's own program: its numbers are the test's, and a panic in it is a failed test"
)]

mod histogram;
mod layout;
mod stamp;

pub use histogram::{Histogram, Recorder};
pub use layout::{Layout, Operation};
pub use stamp::{BLOCK, STREAMS_MOST, Stamp, is_zero};
