//! Writing past the page cache.
//!
//! A backup writes more than fits there and never reads it back, the memory is the guests', and copying into the cache and
//! flushing it at the end costs more time than writing at once.

use crate::Directory;
use std::{cell::RefCell, fs::File, io, os::unix::fs::FileExt as _};

/// Memory, offsets and lengths of direct I/O are multiples of this on every common device (open(2), `O_DIRECT`).
const ALIGNMENT: usize = 4096;
/// Most bytes of one write.
const PIECE: usize = 1 << 20;
/// Less than this is better collected in the page cache.
const SMALLEST: usize = 64 << 10;

/// A file that is open past the page cache, besides its ordinary descriptor.
#[derive(Debug)]
pub(crate) struct DirectFile(File);

impl DirectFile {
    /// `name`, which was just created; `None` if its file system cannot do this.
    pub(crate) fn open(directory: &Directory, name: &str) -> Option<Self> {
        directory.open_direct(name).map(Self)
    }

    /// Writes as much of the beginning of `data` as can be written so, and tells how much that was; the rest is for the
    /// ordinary descriptor.
    ///
    /// # Errors
    /// If it cannot be written at all. A device that wants a coarser alignment is no error: nothing was written then.
    pub(crate) fn write(&self, data: &[u8], at: u64) -> io::Result<usize> {
        let whole = data.len() / ALIGNMENT * ALIGNMENT;
        if whole < SMALLEST || !at.is_multiple_of(ALIGNMENT as u64) {
            return Ok(0);
        }
        let data = data.get(..whole).unwrap_or_default();
        if data.as_ptr().align_offset(ALIGNMENT) == 0 {
            return match self.0.write_all_at(data, at) {
                Ok(()) => Ok(whole),
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(0),
                Err(error) => Err(error),
            };
        }
        thread_local! {
            static ROOM: RefCell<Vec<u8>> = RefCell::new(vec![0; PIECE + ALIGNMENT]);
        }
        ROOM.with_borrow_mut(|room| {
            let start = room.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
            let room = room.get_mut(start..start.saturating_add(PIECE)).unwrap_or_default();
            let mut written = 0usize;
            for piece in data.chunks(PIECE) {
                let aligned = room.get_mut(..piece.len()).unwrap_or_default();
                aligned.copy_from_slice(piece);
                match self.0.write_all_at(aligned, at.saturating_add(written as u64)) {
                    Ok(()) => written = written.saturating_add(piece.len()),
                    Err(error) if error.kind() == io::ErrorKind::InvalidInput => break,
                    Err(error) => return Err(error),
                }
            }
            Ok(written)
        })
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn what_is_written_is_what_was_given_wherever_it_stands_in_memory() {
        let place = tempfile::tempdir().unwrap();
        let directory = Directory::open(place.path()).unwrap();
        let length = 2 * PIECE + 3 * ALIGNMENT;
        let memory: Vec<u8> =
            (0..length + 2 * ALIGNMENT).map(|at| u8::try_from(at * 7 % 251).unwrap()).collect();
        let page = memory.as_ptr().align_offset(ALIGNMENT);
        for (index, start) in [page, page + 16].into_iter().enumerate() {
            let name = format!("image-{index}");
            let file = directory.create_file(&name).unwrap();
            let Some(direct) = DirectFile::open(&directory, &name) else {
                println!("skipped: this file system has no direct I/O");
                return;
            };
            // What is no whole page is left to others, and so is what is not at one.
            let given = &memory[start..start + length - 100];
            assert_eq!(direct.write(given, 512).unwrap(), 0);
            let written = direct.write(given, 8192).unwrap();
            assert_eq!(written, length - ALIGNMENT);
            let mut read = vec![0; written];
            file.read_exact_at(&mut read, 8192).unwrap();
            assert!(read == given[..written], "{start}");
            assert_eq!(file.metadata().unwrap().len(), 8192 + written as u64);
        }
    }
}
