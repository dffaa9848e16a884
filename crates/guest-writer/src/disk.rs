//! The guest's disks, past its page cache.

use guest_writer::BLOCK;
use rustix::fs::FallocateFlags;
use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::PathBuf,
};

/// On x86-64. Past the guest's page cache, so that acknowledged means that the disk has it.
const O_DIRECT: i32 = 0o40_000;
/// Acknowledged means that it is on stable storage.
const O_DSYNC: i32 = 0o10_000;

/// The disk of `size` bytes.
pub(crate) fn open(size: u64, durable: bool) -> Result<File, String> {
    let disks = fs::read_dir("/sys/block").map_err(|error| error.to_string())?;
    for disk in disks.flatten() {
        let sectors = fs::read_to_string(disk.path().join("size")).unwrap_or_default();
        if sectors.trim().parse::<u64>().ok().map(|sectors| sectors * 512) == Some(size) {
            let path = PathBuf::from("/dev").join(disk.file_name());
            let flags = O_DIRECT | if durable { O_DSYNC } else { 0 };
            let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path);
            return file.map_err(|error| format!("{}: {error}", path.display()));
        }
    }
    Err(format!("no disk of {size} bytes"))
}

/// Zeroes a part of a disk: with its own command, by which it may unmap the part or not, as `unmap` says; a disk without
/// such a command gets zeroes written.
pub(crate) fn zero(disk: &File, offset: u64, zeroes: &[u8], unmap: bool) -> io::Result<()> {
    let how = if unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
    match rustix::fs::fallocate(disk, how | FallocateFlags::KEEP_SIZE, offset, zeroes.len() as u64) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::OPNOTSUPP) => disk.write_all_at(zeroes, offset),
        Err(error) => Err(error.into()),
    }
}

/// Writes a pattern to a part of a disk, once.
pub(crate) fn fill(size: u64, offset: u64, length: u64) -> Result<(), String> {
    const AT_ONCE: u64 = 1 << 20;
    let disk = open(size, false)?;
    let mut buffer = Aligned::new(AT_ONCE as usize);
    let (mut at, end) = (offset, offset + length);
    while at < end {
        let piece = (end - at).min(AT_ONCE);
        let bytes = buffer.bytes(piece as usize);
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = (index as u8).wrapping_mul(31).wrapping_add((at >> 20) as u8) | 1;
        }
        disk.write_all_at(bytes, at).map_err(|error| error.to_string())?;
        at += piece;
    }
    Ok(())
}

/// A buffer that starts on a block, as `O_DIRECT` wants it.
pub(crate) struct Aligned {
    bytes: Vec<u8>,
    start: usize,
}

impl Aligned {
    pub(crate) fn new(length: usize) -> Self {
        let bytes = vec![0; length + BLOCK];
        let start = bytes.as_ptr().align_offset(BLOCK);
        Self { bytes, start }
    }

    pub(crate) fn bytes(&mut self, length: usize) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + length]
    }
}
