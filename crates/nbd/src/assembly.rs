//! A request's answer while its pieces arrive.

use crate::{
    context::Descriptor,
    error::{Error, Result},
};
use bytes::BytesMut;
use stillpoint_buffer as buffer;
use stillpoint_model::Range;

/// How many separate stretches a read's pieces may form at a time. Servers send in order or nearly so; without a
/// bound, one-byte pieces at every other byte would cost far more memory than the read itself.
const MAX_STRETCHES: usize = 1024;

/// What a request waits for.
#[derive(Debug)]
pub(crate) enum Assembly {
    /// Success, nothing more.
    Nothing,
    /// The bytes of a read.
    Read(ReadAssembly),
    /// Per negotiated map its descriptors.
    Status(Vec<Option<Vec<Descriptor>>>),
}

/// Where a piece goes.
#[derive(Debug)]
pub(crate) enum Place<'a> {
    /// Behind what is there already; that many bytes.
    Append(&'a mut BytesMut, usize),
    /// Over zeroes that stand for bytes yet to come.
    Fill(&'a mut [u8]),
}

/// A read of `range`: every byte arrives exactly once, in any order.
#[derive(Debug)]
pub(crate) struct ReadAssembly {
    range: Range,
    bytes: BytesMut,
    /// Sorted, disjoint, not touching; relative to the range's start.
    stretches: Vec<(usize, usize)>,
}

impl ReadAssembly {
    /// Nothing is allocated until a byte arrives.
    pub(crate) fn new(range: Range) -> Self {
        Self::into(range, BytesMut::new())
    }

    /// Into an empty buffer that has room for it.
    pub(crate) fn into(range: Range, bytes: BytesMut) -> Self {
        Self { range, bytes, stretches: Vec::new() }
    }

    fn length(&self) -> usize {
        usize::try_from(self.range.length().get()).unwrap_or(usize::MAX)
    }

    /// Takes note of a piece; gives its place relative to the start.
    ///
    /// # Errors
    /// If it is empty, outside, or overlaps an earlier one.
    pub(crate) fn claim(&mut self, offset: u64, length: u64) -> Result<(usize, usize)> {
        let wrong = |how: &str| {
            Error::protocol(format!(
                "NBD server's piece at {offset} of {length} bytes {how} the read of {}",
                self.range
            ))
        };
        let start =
            offset.checked_sub(self.range.start().get()).and_then(|start| usize::try_from(start).ok());
        let piece = start.zip(usize::try_from(length).ok()).and_then(|(start, length)| {
            let end = start.checked_add(length)?;
            (length > 0 && end <= self.length()).then_some((start, end))
        });
        let Some((start, end)) = piece else { return Err(wrong("is not in")) };

        let next = self.stretches.partition_point(|&(known, _)| known < start);
        let before = next.checked_sub(1).and_then(|index| self.stretches.get(index)).copied();
        let after = self.stretches.get(next).copied();
        if before.is_some_and(|(_, known)| known > start) || after.is_some_and(|(known, _)| known < end) {
            return Err(wrong("overlaps another of"));
        }
        let from = before.filter(|&(_, known)| known == start).map_or(start, |(known, _)| known);
        let to = after.filter(|&(known, _)| known == end).map_or(end, |(_, known)| known);
        let first = if from < start { next.saturating_sub(1) } else { next };
        let last = if to > end { next.saturating_add(1) } else { next };
        self.stretches.splice(first..last, [(from, to)]);
        if self.stretches.len() > MAX_STRETCHES {
            return Err(wrong("makes too many pieces of"));
        }
        Ok((start, end))
    }

    /// Where a claimed piece's bytes go.
    pub(crate) fn place(&mut self, start: usize, end: usize) -> Place<'_> {
        if self.bytes.capacity() == 0 {
            self.bytes = buffer::take(self.length());
        }
        if start > self.bytes.len() {
            self.bytes.resize(start, 0);
        }
        if start == self.bytes.len() {
            return Place::Append(&mut self.bytes, end - start);
        }
        match self.bytes.get_mut(start..end) {
            Some(zeroes) => Place::Fill(zeroes),
            // Unclaimed bytes below the end always lie between two stretches, so a piece cannot stick out.
            None => Place::Fill(&mut []),
        }
    }

    /// Makes a claimed piece zeroes.
    pub(crate) fn zero(&mut self, start: usize, end: usize) {
        if self.bytes.capacity() == 0 && end == self.length() {
            self.bytes = BytesMut::zeroed(end);
        } else if let Place::Append(bytes, length) = self.place(start, end) {
            bytes.resize(bytes.len() + length, 0);
        }
    }

    /// Gives up the bytes; nobody waits for them. Claims are still checked.
    pub(crate) fn forget(&mut self) {
        self.bytes = BytesMut::new();
    }

    /// The whole.
    ///
    /// # Errors
    /// If a byte is missing.
    pub(crate) fn finish(self) -> Result<BytesMut> {
        if self.stretches != [(0, self.length())] || self.bytes.len() != self.length() {
            return Err(Error::protocol(format!(
                "NBD server ended the read of {} before its last byte",
                self.range
            )));
        }
        Ok(self.bytes)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;
    use stillpoint_model::{Length, Offset};

    fn assembly(start: u64, length: u64) -> ReadAssembly {
        ReadAssembly::new(Range::new(Offset::new(start), Length::new(length)).unwrap())
    }

    fn put(assembly: &mut ReadAssembly, offset: u64, data: &[u8]) -> Result<()> {
        let (start, end) = assembly.claim(offset, data.len() as u64)?;
        match assembly.place(start, end) {
            Place::Append(bytes, length) => bytes.extend_from_slice(&data[..length]),
            Place::Fill(zeroes) => zeroes.copy_from_slice(data),
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn any_order_of_pieces_gives_the_same_bytes(
            data in proptest::collection::vec(any::<u8>(), 1..2000),
            cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..20),
            order in any::<u64>(),
        ) {
            let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(data.len())).collect();
            at.extend([0, data.len()]);
            at.sort_unstable();
            at.dedup();
            let mut pieces: Vec<(usize, usize)> = at.windows(2).map(|pair| (pair[0], pair[1])).collect();
            pieces.sort_by_key(|&(start, _)| (start as u64).wrapping_mul(order | 1).rotate_left(17));
            let mut read = assembly(7, data.len() as u64);
            for (start, end) in pieces {
                put(&mut read, 7 + start as u64, &data[start..end]).unwrap();
                prop_assert!(put(&mut read, 7 + start as u64, &data[start..end]).is_err());
            }
            prop_assert_eq!(&read.finish().unwrap()[..], &data[..]);
        }
    }

    #[test]
    fn a_piece_outside_empty_or_twice_is_refused() {
        let mut read = assembly(100, 10);
        for (offset, length) in [(99, 1), (100, 0), (100, 11), (110, 1), (u64::MAX, 1), (105, u64::MAX)] {
            assert!(read.claim(offset, length).is_err(), "{offset}+{length}");
        }
        put(&mut read, 102, b"abc").unwrap();
        for (offset, length) in [(102, 3), (101, 2), (104, 1), (100, 10), (103, 1)] {
            assert!(read.claim(offset, length).is_err(), "{offset}+{length}");
        }
    }

    #[test]
    fn a_missing_byte_is_an_error_and_a_hole_is_zeroes() {
        let mut read = assembly(0, 6);
        put(&mut read, 4, b"yz").unwrap();
        let (start, end) = read.claim(0, 3).unwrap();
        read.zero(start, end);
        assert!(read.finish().is_err());

        let mut read = assembly(0, 6);
        put(&mut read, 4, b"yz").unwrap();
        let (start, end) = read.claim(0, 3).unwrap();
        read.zero(start, end);
        put(&mut read, 3, b"x").unwrap();
        assert_eq!(&read.finish().unwrap()[..], b"\0\0\0xyz");

        let mut hole = assembly(5, 1000);
        let (start, end) = hole.claim(5, 1000).unwrap();
        hole.zero(start, end);
        assert_eq!(hole.finish().unwrap(), vec![0; 1000]);
    }

    #[test]
    fn a_comb_of_pieces_is_bounded() {
        let mut read = assembly(0, 1 << 20);
        let refused = (0..1 << 19).find(|tooth| read.claim(tooth * 2, 1).is_err());
        assert_eq!(refused, Some(MAX_STRETCHES as u64));
    }
}
