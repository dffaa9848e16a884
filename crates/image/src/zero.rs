//! Telling zeroes from data.

use std::ops::Range;

/// Whether all of `bytes` is zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // A fold without an early exit is what the compiler turns into vector code; the exit is once per piece.
    bytes.chunks(4096).all(|piece| piece.iter().fold(0, |all, byte| all | byte) == 0)
}

/// The parts of `bytes` that are not zero, in whole blocks of `block` bytes counted from the start of the disk;
/// `position` is where `bytes` starts on it. Neighbours are one part, so that each is one write.
pub fn data_parts(position: u64, bytes: &[u8], block: u64) -> Vec<Range<usize>> {
    let block = block.max(1);
    let mut parts: Vec<Range<usize>> = Vec::new();
    let mut start = 0;
    while start < bytes.len() {
        let into_block = position.saturating_add(start as u64) % block;
        let length = usize::try_from(block - into_block).unwrap_or(usize::MAX);
        let end = start.saturating_add(length).min(bytes.len());
        if !bytes.get(start..end).is_none_or(is_zero) {
            match parts.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => parts.push(start..end),
            }
        }
        start = end;
    }
    parts
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn parts_keep_to_the_blocks_of_the_disk() {
        let mut bytes = vec![0; 40];
        *bytes.get_mut(3).unwrap() = 1;
        *bytes.get_mut(12).unwrap() = 1;
        *bytes.get_mut(39).unwrap() = 1;
        assert_eq!(data_parts(6, &bytes, 8), [2..18, 34..40]);
        assert!(data_parts(0, &[0; 100], 64).is_empty());
        assert!(data_parts(0, &[], 64).is_empty());
    }

    #[test]
    fn one_byte_anywhere_is_data() {
        for at in [0, 1, 4095, 4096, 8191, 9000] {
            let mut bytes = vec![0; 9001];
            assert!(is_zero(&bytes));
            *bytes.get_mut(at).unwrap() = 128;
            assert!(!is_zero(&bytes), "{at}");
        }
    }
}
