//! Maps of an export ("metadata contexts" in the protocol) and what their flags mean.

use crate::error::{Error, ErrorKind, Result};
use std::fmt;
use stillpoint_model::{BitmapName, Length, Range};

const BASE_ALLOCATION: &str = "base:allocation";
const ALLOCATION_DEPTH: &str = "qemu:allocation-depth";
const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";

/// A map that an export may have, by the name it is negotiated under.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct MetaContext(String);

impl MetaContext {
    /// What is allocated and what reads as zeroes (NBD spec: "`base:allocation` metadata context").
    pub fn base_allocation() -> Self {
        Self(BASE_ALLOCATION.to_owned())
    }

    /// What a dirty bitmap of QEMU's marks (QEMU: `docs/interop/nbd.txt`).
    pub fn qemu_dirty_bitmap(bitmap: &BitmapName) -> Self {
        Self(format!("{DIRTY_BITMAP}{bitmap}"))
    }

    /// Which layer of a backing chain holds the data (QEMU: `docs/interop/nbd.txt`).
    pub fn qemu_allocation_depth() -> Self {
        Self(ALLOCATION_DEPTH.to_owned())
    }

    /// Any other. Its flags mean nothing to us, so everything reads as data and as dirty.
    pub fn other(name: &str) -> Self {
        Self(name.to_owned())
    }

    /// The name as negotiated.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for MetaContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// An extent's flags, raw. What they mean depends on the map; whatever is not known to be harmless reads as data and
/// as dirty, since a wrong "zero" or "clean" loses data and a wrong "data" only costs time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StatusFlags(u64);

/// `NBD_STATE_HOLE`
const HOLE: u64 = 1;
/// `NBD_STATE_ZERO`
const ZERO: u64 = 1 << 1;

impl StatusFlags {
    /// The flags as sent: 32 bits, or 64 with extended headers.
    pub const fn new(bits: u64) -> Self {
        Self(bits)
    }

    /// The flags as sent.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Whether it surely reads as zeroes: `base:allocation` says so, and says nothing that we do not know.
    pub fn is_zero(self, context: &MetaContext) -> bool {
        context.as_str() == BASE_ALLOCATION && self.0 & ZERO != 0 && self.0 & !(HOLE | ZERO) == 0
    }

    /// Whether it takes no space. A hole may read as anything; only [`StatusFlags::is_zero`] says what it reads as.
    pub fn is_hole(self, context: &MetaContext) -> bool {
        context.as_str() == BASE_ALLOCATION && self.0 & HOLE != 0 && self.0 & !(HOLE | ZERO) == 0
    }

    /// Whether it may have changed: all but what a dirty bitmap says is clean without any flag set.
    pub fn is_dirty(self, context: &MetaContext) -> bool {
        !(context.as_str().starts_with(DIRTY_BITMAP) && self.0 == 0)
    }
}

/// A stretch with the same flags, following on the one before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Descriptor {
    /// How long; never zero.
    pub length: Length,
    /// What the map says of it.
    pub flags: StatusFlags,
}

impl Descriptor {
    /// See [`StatusFlags::is_zero`].
    pub fn is_zero(self, context: &MetaContext) -> bool {
        self.flags.is_zero(context)
    }

    /// See [`StatusFlags::is_dirty`].
    pub fn is_dirty(self, context: &MetaContext) -> bool {
        self.flags.is_dirty(context)
    }
}

/// A part of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MapExtent {
    /// Where; never empty.
    pub range: Range,
    /// What the map says of it.
    pub flags: StatusFlags,
}

impl MapExtent {
    /// See [`StatusFlags::is_zero`].
    pub fn is_zero(self, context: &MetaContext) -> bool {
        self.flags.is_zero(context)
    }

    /// See [`StatusFlags::is_dirty`].
    pub fn is_dirty(self, context: &MetaContext) -> bool {
        self.flags.is_dirty(context)
    }
}

/// One answer about a range: for each negotiated map at least one descriptor, the first at the range's start, none
/// past its end. It may cover less than was asked for, and one map less than another;
/// [`Client::map`](crate::Client::map) asks on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    maps: Vec<(MetaContext, Vec<Descriptor>)>,
}

impl Status {
    pub(crate) fn new(maps: Vec<(MetaContext, Vec<Descriptor>)>) -> Self {
        Self { maps }
    }

    /// What one map says.
    ///
    /// # Errors
    /// [`ErrorKind::MissingContext`] if it was not negotiated.
    pub fn of(&self, context: &MetaContext) -> Result<&[Descriptor]> {
        match self.maps.iter().find(|(known, _)| known == context) {
            Some((_, descriptors)) => Ok(descriptors),
            None => Err(missing(context)),
        }
    }

    /// All maps.
    pub fn iter(&self) -> impl Iterator<Item = (&MetaContext, &[Descriptor])> {
        self.maps.iter().map(|(context, descriptors)| (context, descriptors.as_slice()))
    }
}

pub(crate) fn missing(context: &MetaContext) -> Error {
    let name = crate::error::quote(context.as_str().as_bytes());
    Error::new(ErrorKind::MissingContext, format!("the NBD export has no map {name}"))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn only_an_explicit_zero_is_zero() {
        let base = MetaContext::base_allocation();
        let zero = |bits| StatusFlags::new(bits).is_zero(&base);
        assert!(zero(2) && zero(3));
        for data in [0, 1, 4, 6, 7, 1 << 40 | 2, u64::MAX] {
            assert!(!zero(data), "{data}");
        }
        assert!(!StatusFlags::new(2).is_zero(&MetaContext::qemu_allocation_depth()));
        assert!(!StatusFlags::new(3).is_zero(&MetaContext::other("x:y")));
    }

    #[test]
    fn only_no_flag_of_a_dirty_bitmap_is_clean() {
        let bitmap = MetaContext::qemu_dirty_bitmap(&"b0".parse().unwrap());
        assert_eq!(bitmap.as_str(), "qemu:dirty-bitmap:b0");
        assert!(!StatusFlags::new(0).is_dirty(&bitmap));
        for dirty in [1, 2, 1 << 33] {
            assert!(StatusFlags::new(dirty).is_dirty(&bitmap), "{dirty}");
        }
        assert!(StatusFlags::new(0).is_dirty(&MetaContext::base_allocation()));
    }
}
