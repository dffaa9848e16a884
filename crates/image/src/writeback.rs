//! Starts writing to the disk early, so that the final fsync does not pay for everything and the page cache is not
//! filled with data that nobody will read soon.

use rustix::fs::{Advice, fadvise};
use std::{
    fs::File,
    sync::atomic::{AtomicU64, Ordering},
};

/// How much may be dirty before writing starts.
const STEP: u64 = 32 << 20;

#[derive(Debug, Default)]
pub(crate) struct Writeback {
    written: AtomicU64,
}

impl Writeback {
    /// Told after each write. For each [`STEP`] the kernel is asked to drop the file's pages: on Linux that starts
    /// writing the dirty ones without waiting for them, and drops those that the call before had started. It is
    /// advice; a file system that does not take it loses nothing but time.
    pub(crate) fn wrote(&self, file: &File, bytes: usize) {
        let bytes = bytes as u64;
        let before = self.written.fetch_add(bytes, Ordering::Relaxed);
        if before / STEP != before.saturating_add(bytes) / STEP {
            let _advice = fadvise(file, 0, None, Advice::DontNeed);
        }
    }
}
