//! Chunks: disks are cut into pieces of one size, which are the blobs of the file that the disk is in the repository.

use stillpoint_model::{Granularity, Length};

/// Smallest and largest chunk. See ADR 0016.
const SMALLEST: u64 = 1 << 20;
const LARGEST: u64 = 4 << 20;
/// A disk has at most so many chunks as long as [`LARGEST`] allows it: each costs some 67 bytes of metadata a point.
const MOST: u64 = 256 << 10;

/// The chunk size of a disk of this size, which is also the granularity that its bitmap ought to have.
pub(crate) fn size_for(disk: Length) -> Granularity {
    let mut size = SMALLEST;
    while size < LARGEST && disk.get().div_ceil(size) > MOST {
        size = size.saturating_mul(2);
    }
    Granularity::try_from(size).unwrap_or(Granularity::DEFAULT)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn chunks_grow_with_the_disk() {
        let of = |gib: u64| size_for(Length::new(gib << 30)).get() >> 20;
        assert_eq!([0, 1, 16, 256, 257, 512, 513, 1024, 16384].map(of), [1, 1, 1, 1, 2, 2, 4, 4, 4]);
    }
}
