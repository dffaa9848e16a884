//! Units and ranges.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;

/// The last byte that QEMU and the kernel can address (`BDRV_MAX_LENGTH` is below `i64::MAX`).
const MAX_END: u64 = i64::MAX as u64;

/// A position on a disk, in bytes from its start.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize, JsonSchema,
)]
#[serde(transparent)]
pub struct Offset(u64);

impl Offset {
    /// The first byte of a disk.
    pub const ZERO: Self = Self(0);

    /// A position `bytes` from the start.
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// Bytes from the start.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Offset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A number of bytes.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize, JsonSchema,
)]
#[serde(transparent)]
pub struct Length(u64);

impl Length {
    /// No byte at all.
    pub const ZERO: Self = Self(0);

    /// `bytes` bytes.
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// The number of bytes.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Whether there is nothing.
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// The sum, or the largest length there is.
    pub const fn saturating_add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    /// The difference, or nothing.
    pub const fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl fmt::Display for Length {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::iter::Sum for Length {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self::ZERO, Self::saturating_add)
    }
}

/// A range that nothing could address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("range at {offset} of {length} bytes ends past what a disk can have")]
pub struct RangeError {
    offset: u64,
    length: u64,
}

/// A half-open range of bytes, `start..end`; it may be empty, and its end always fits an `i64` (as in QEMU).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Range {
    start: u64,
    end: u64,
}

impl Range {
    /// The range of `length` bytes from `offset`.
    ///
    /// # Errors
    /// If it would end past `i64::MAX`.
    pub const fn new(offset: Offset, length: Length) -> Result<Self, RangeError> {
        match offset.0.checked_add(length.0) {
            Some(end) if end <= MAX_END => Ok(Self { start: offset.0, end }),
            _ => Err(RangeError { offset: offset.0, length: length.0 }),
        }
    }

    /// The range from `start` up to, not including, `end`.
    ///
    /// # Errors
    /// If `end` is before `start` or past `i64::MAX`.
    pub const fn between(start: Offset, end: Offset) -> Result<Self, RangeError> {
        if start.0 <= end.0 && end.0 <= MAX_END {
            Ok(Self { start: start.0, end: end.0 })
        } else {
            Err(RangeError { offset: start.0, length: end.0.saturating_sub(start.0) })
        }
    }

    /// A whole disk of `size` bytes.
    ///
    /// # Errors
    /// If `size` is more than `i64::MAX`.
    pub const fn whole(size: Length) -> Result<Self, RangeError> {
        Self::new(Offset::ZERO, size)
    }

    /// First byte.
    pub const fn start(self) -> Offset {
        Offset(self.start)
    }

    /// The byte after the last.
    pub const fn end(self) -> Offset {
        Offset(self.end)
    }

    /// How many bytes.
    pub const fn length(self) -> Length {
        Length(self.end - self.start)
    }

    /// Whether there is no byte in it.
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// Whether every byte of `other` is in it.
    pub const fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// What both have; `None` if that is nothing.
    pub fn intersect(self, other: Self) -> Option<Self> {
        let (start, end) = (self.start.max(other.start), self.end.min(other.end));
        (start < end).then_some(Self { start, end })
    }

    /// The part before `at` and the part from `at` on; either may be empty.
    pub fn split(self, at: Offset) -> (Self, Self) {
        let at = at.0.clamp(self.start, self.end);
        (Self { start: self.start, end: at }, Self { start: at, end: self.end })
    }

    /// Consecutive parts of at most `most` bytes (`most` of zero counts as one byte). Parts end on multiples of
    /// `most` from the start of the disk, so that neighbouring ranges are cut at the same places.
    pub fn chunks(self, most: Length) -> impl Iterator<Item = Self> {
        let most = most.0.max(1);
        let mut rest = self;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let boundary = (rest.start / most).saturating_add(1).saturating_mul(most);
            let (part, after) = rest.split(Offset(boundary));
            rest = after;
            Some(part)
        })
    }

    /// The smallest range of whole granules around it, cut at the end of a disk of `size` bytes.
    pub fn align_outward(self, granularity: Granularity, size: Length) -> Self {
        let g = u64::from(granularity.0);
        let start = self.start / g * g;
        let end = self.end.checked_next_multiple_of(g).unwrap_or(MAX_END).min(size.0.max(self.end));
        Self { start, end }
    }

    /// The whole granules within it; a granule that the end of a disk of `size` bytes cuts counts as whole.
    /// Empty (at its own start) if there is none.
    pub fn align_inward(self, granularity: Granularity, size: Length) -> Self {
        let g = u64::from(granularity.0);
        let end = if self.end >= size.0 { self.end } else { self.end / g * g };
        match self.start.checked_next_multiple_of(g) {
            Some(start) if start < end => Self { start, end },
            _ => Self { start: self.start, end: self.start },
        }
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.start, self.end - self.start)
    }
}

/// How many bytes one bit of a dirty bitmap stands for: a power of two from 512 bytes to 2 GiB (QEMU's limits).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "u64", into = "u64")]
pub struct Granularity(u32);

/// A granularity that QEMU would not take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("granularity {0} is not a power of two from 512 to 2147483648")]
pub struct GranularityError(u64);

impl Granularity {
    /// 64 KiB: QEMU's own choice for qcow2, and the cluster of its copy-before-write filter.
    pub const DEFAULT: Self = Self(65_536);

    /// Bytes a bit.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// Bytes a bit, as a length.
    pub const fn length(self) -> Length {
        Length(self.0 as u64)
    }
}

impl TryFrom<u64> for Granularity {
    type Error = GranularityError;

    fn try_from(bytes: u64) -> Result<Self, Self::Error> {
        match u32::try_from(bytes) {
            Ok(small) if small.is_power_of_two() && (512..=1 << 31).contains(&small) => Ok(Self(small)),
            _ => Err(GranularityError(bytes)),
        }
    }
}

impl From<Granularity> for u64 {
    fn from(granularity: Granularity) -> Self {
        granularity.0.into()
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    fn range() -> impl Strategy<Value = Range> {
        (0..1u64 << 40, 0..1u64 << 30)
            .prop_map(|(offset, length)| Range::new(Offset::new(offset), Length::new(length)).unwrap())
    }

    fn granularity() -> impl Strategy<Value = Granularity> {
        (9u32..32).prop_map(|shift| Granularity::try_from(1u64 << shift).unwrap())
    }

    proptest! {
        #[test]
        fn chunks_cover_the_range_without_gap_or_overlap(range in range(), most in 1u64 << 20..1u64 << 26) {
            let mut at = range.start();
            for part in range.chunks(Length::new(most)) {
                prop_assert_eq!(part.start(), at);
                prop_assert!(!part.is_empty() && part.length().get() <= most);
                at = part.end();
            }
            prop_assert_eq!(at, range.end());
        }

        #[test]
        fn inward_is_within_and_outward_around(range in range(), g in granularity(), more in 0u64..1 << 20) {
            let size = Length::new(range.end().get() + more);
            let inward = range.align_inward(g, size);
            let outward = range.align_outward(g, size);
            prop_assert!(range.contains(inward));
            prop_assert!(outward.contains(range));
            prop_assert!(outward.end().get() <= size.get());
            let whole = |offset: Offset| offset.get().is_multiple_of(u64::from(g.get()));
            prop_assert!(whole(outward.start()) && (whole(outward.end()) || outward.end().get() == size.get()));
            if !inward.is_empty() {
                prop_assert!(whole(inward.start()) && (whole(inward.end()) || inward.end().get() == size.get()));
            }
        }
    }

    #[test]
    fn a_range_past_what_qemu_addresses_is_refused() {
        assert!(Range::new(Offset::new(u64::MAX), Length::new(1)).is_err());
        assert!(Range::new(Offset::new(i64::MAX as u64), Length::new(1)).is_err());
        assert!(Range::between(Offset::new(2), Offset::new(1)).is_err());
    }

    #[test]
    fn granularity_follows_qemus_limits() {
        for bad in [0, 1, 256, 513, 65_537, 1 << 32] {
            assert!(Granularity::try_from(bad).is_err(), "{bad}");
        }
        for good in [512, 65_536, 1 << 31] {
            assert_eq!(u64::from(Granularity::try_from(good).unwrap()), good);
        }
    }
}
