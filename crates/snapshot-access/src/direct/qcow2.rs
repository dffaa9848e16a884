//! Where a qcow2 image has a cluster of the disk, read from the image's own tables while QEMU changes them (ADR 0018).
//!
//! Only what cannot move is used: the entry of a cluster that is allocated, as it is, in the image itself. Everything else
//! (backing files, compressed and zero clusters) is QEMU's to read. Two things make that entry right:
//!
//! * QEMU has flushed its tables after the instant and said so; so the entry of a cluster that the guest has not written since is
//!   the same in the file as in QEMU's memory. That the guest has not is what [`Proof`](super::Proof) tells afterwards.
//! * A table is only believed if header and level 1 still point to it after it was read: a table that was given up since, as the
//!   deletion of an internal snapshot does, may hold anything.
//!
//! The format: QEMU, `docs/interop/qcow2.txt`.

use rustix::io::{Errno, pread};
use std::{
    collections::VecDeque,
    fs::File,
    io,
    sync::{Arc, Mutex, PoisonError},
};
use stillpoint_buffer as buffer;
use stillpoint_model::{Length, Range};

/// What is read at once, and begins on a multiple of it.
const BLOCK: u64 = 4096;
const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Incompatible features that change nothing here: `dirty`, which is about reference counts, and the kind of compression.
const HARMLESS_FEATURES: u64 = 1 | 1 << 3;
/// Bits of an entry that are a place in the file.
const PLACE: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// Tables that are kept, of mostly 64 KiB, each for mostly 512 MiB of the disk.
const TABLES: usize = 16;

/// A part of the disk, and where the file has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) range: Range,
    pub(super) at: u64,
}

/// The tables of an image.
#[derive(Debug)]
pub(super) struct Tables {
    cluster_bits: u32,
    level_1: u64,
    level_1_entries: u64,
    kept: Mutex<VecDeque<(u64, Arc<Vec<u64>>)>>,
}

impl Tables {
    /// Looks at the header; `None` if this image is nothing for us.
    pub(super) fn open(file: &File, size: Length) -> Option<Self> {
        let header = read(file, 0, 104).ok()?;
        let version = number(&header, 4, 4)?;
        let cluster_bits = u32::try_from(number(&header, 20, 4)?).ok()?;
        let features = if version >= 3 { number(&header, 72, 8)? } else { 0 };
        let fits = header.starts_with(&MAGIC)
            && (2..=3).contains(&version)
            && (9..=21).contains(&cluster_bits)
            && number(&header, 24, 8)? == size.get()
            && number(&header, 32, 4)? == 0
            && features & !HARMLESS_FEATURES == 0;
        fits.then_some(Self {
            cluster_bits,
            level_1_entries: number(&header, 36, 4)?,
            level_1: number(&header, 40, 8)?,
            kept: Mutex::default(),
        })
    }

    /// Where `range` is in the file, as far as that can be told; the rest is QEMU's. Tables are read from `file`, which blocks.
    ///
    /// # Errors
    /// If a table cannot be read; `WouldBlock` if one has to be and there is no `file`.
    pub(super) fn places(&self, file: Option<&File>, range: Range) -> io::Result<Vec<Place>> {
        let cluster = 1u64 << self.cluster_bits;
        let mut places: Vec<Place> = Vec::new();
        for part in range.chunks(Length::new(cluster)) {
            let Some(start) = self.place(file, part.start().get() >> self.cluster_bits)? else { continue };
            let at = start.saturating_add(part.start().get() % cluster);
            match places.last_mut() {
                Some(last)
                    if last.range.end() == part.start()
                        && last.at.saturating_add(last.range.length().get()) == at =>
                {
                    last.range = Range::between(last.range.start(), part.end()).map_err(io::Error::other)?;
                }
                _ => places.push(Place { range: part, at }),
            }
        }
        Ok(places)
    }

    fn place(&self, file: Option<&File>, cluster: u64) -> io::Result<Option<u64>> {
        let entries = 1u64 << (self.cluster_bits - 3);
        let Some(table) = self.table(file, cluster / entries)? else { return Ok(None) };
        let entry = usize::try_from(cluster % entries).ok().and_then(|index| table.get(index).copied());
        let entry = entry.unwrap_or(0);
        let place = entry & PLACE;
        let plain =
            entry & (COMPRESSED | ZERO) == 0 && place != 0 && place.trailing_zeros() >= self.cluster_bits;
        Ok(plain.then_some(place))
    }

    fn table(&self, file: Option<&File>, index: u64) -> io::Result<Option<Arc<Vec<u64>>>> {
        let kept = || self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, table)) = kept().iter().find(|(known, _)| *known == index) {
            return Ok(Some(Arc::clone(table)));
        }
        let file = file.ok_or(io::ErrorKind::WouldBlock)?;
        let place = self.level_1_entry(file, index)?;
        if place == 0 || place.trailing_zeros() < self.cluster_bits {
            return Ok(None);
        }
        let bytes = read(file, place, 1 << self.cluster_bits)?;
        if self.level_1_entry(file, index)? != place {
            return Ok(None);
        }
        let (entries, _) = bytes.as_chunks::<8>();
        let table = Arc::new(entries.iter().map(|entry| u64::from_be_bytes(*entry)).collect());
        let mut kept = kept();
        kept.push_back((index, Arc::clone(&table)));
        if kept.len() > TABLES {
            kept.pop_front();
        }
        Ok(Some(table))
    }

    /// Where level 1 says that a table of level 2 is; 0 if it says nothing, or is not where it was.
    fn level_1_entry(&self, file: &File, index: u64) -> io::Result<u64> {
        let header = read(file, 36, 12)?;
        let moved = number(&header, 0, 4) != Some(self.level_1_entries)
            || number(&header, 4, 8) != Some(self.level_1);
        if moved || index >= self.level_1_entries {
            return Ok(0);
        }
        let entry = read(file, self.level_1.saturating_add(index.saturating_mul(8)), 8)?;
        Ok(number(&entry, 0, 8).unwrap_or(0) & PLACE)
    }
}

/// What of `range` is in none of `places`, which are in order.
pub(super) fn elsewhere(range: Range, places: &[Place]) -> Vec<Range> {
    let mut rest = Vec::new();
    let mut at = range.start();
    let ends = places.iter().map(|place| place.range);
    let end = Range::between(range.end(), range.end()).into_iter();
    for place in ends.chain(end) {
        rest.extend(Range::between(at, place.start()).ok().filter(|gap| !gap.is_empty()));
        at = place.end();
    }
    rest
}

/// The number of `length` bytes at `at`, as the format has them.
fn number(bytes: &[u8], at: usize, length: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(length)?)?;
    Some(bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

/// `length` bytes at `at`, in whole blocks of memory that begins on a page, as `O_DIRECT` wants it.
fn read(file: &File, at: u64, length: usize) -> io::Result<Vec<u8>> {
    let start = at / BLOCK * BLOCK;
    let before = usize::try_from(at - start).map_err(io::Error::other)?;
    let wanted = before.saturating_add(length);
    let mut bytes =
        buffer::initialized(wanted.next_multiple_of(usize::try_from(BLOCK).map_err(io::Error::other)?));
    let mut done = 0;
    while done < wanted {
        let rest = bytes.get_mut(done..).unwrap_or_default();
        match pread(file, rest, start.saturating_add(done as u64)) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => done = done.saturating_add(count),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(bytes.get(before..wanted).unwrap_or_default().to_vec())
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, reason = "a panic is a failed test")]
mod test;
