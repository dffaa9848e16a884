//! What a part of a disk holds, seen from a backup.

use crate::Range;

/// What a reader has to do about a part of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExtentKind {
    /// Unchanged since the generation that the bitmap is relative to; reading it is an error by design.
    Clean,
    /// Reads as zeroes; nothing has to be read.
    Zero,
    /// Has to be read.
    Data,
}

/// One part of a disk that is of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Where.
    pub range: Range,
    /// What.
    pub kind: ExtentKind,
}
