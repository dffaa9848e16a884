//! The stamp on each block.

use crate::layout::mix;

/// Bytes of a block: what a guest's page cache and most disks write at once.
pub const BLOCK: usize = 4096;
/// Streams that a stamp has room for.
pub const STREAMS_MOST: usize = 64;

const MAGIC: u64 = 0x5354_494c_4c50_4f49;
const WORDS: usize = BLOCK / 8;
/// Magic, run, disk and stream, sequence, block, number of streams; then one word a stream.
const HEADER: usize = 6;

/// What a block says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stamp {
    /// The storm.
    pub run: u64,
    /// Index of the disk.
    pub disk: u32,
    /// The stream.
    pub stream: u32,
    /// Its operation, from 1.
    pub sequence: u64,
    /// The block.
    pub block: u64,
    /// For each stream the last operation that had been acknowledged when this was issued.
    pub acked: Vec<u64>,
}

impl Stamp {
    /// Fills `block` with the stamp and, behind it, with bytes that follow from it, so that half a block cannot pass for
    /// a whole one.
    pub fn write(&self, block: &mut [u8]) {
        let streams = self.acked.len().min(STREAMS_MOST);
        let header = [
            MAGIC,
            self.run,
            u64::from(self.disk) << 32 | u64::from(self.stream),
            self.sequence,
            self.block,
            streams as u64,
        ];
        let mut words = header.iter().copied().chain(self.acked.iter().copied().take(streams));
        let mut sum = 0u64;
        let mut filler = 0u64;
        for (index, bytes) in block.chunks_exact_mut(8).take(WORDS).enumerate() {
            let word = match words.next() {
                Some(word) => {
                    sum = mix(sum ^ word);
                    word
                }
                None => {
                    filler = filler.wrapping_add(sum | 1);
                    filler ^ index as u64
                }
            };
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }

    /// The stamp of a block that is whole and unchanged; `None` for anything else.
    pub fn read(block: &[u8]) -> Option<Self> {
        let word = |index: usize| {
            let bytes = block.get(index.checked_mul(8)?..)?.first_chunk::<8>()?;
            Some(u64::from_le_bytes(*bytes))
        };
        if block.len() != BLOCK || word(0)? != MAGIC {
            return None;
        }
        let streams = usize::try_from(word(5)?).ok().filter(|streams| *streams <= STREAMS_MOST)?;
        let acked =
            (0..streams).map(|stream| word(HEADER.checked_add(stream)?)).collect::<Option<Vec<_>>>()?;
        let place = word(2)?;
        let stamp = Self {
            run: word(1)?,
            disk: u32::try_from(place >> 32).ok()?,
            stream: u32::try_from(place & 0xffff_ffff).ok()?,
            sequence: word(3)?,
            block: word(4)?,
            acked,
        };
        let mut expected = vec![0; BLOCK];
        stamp.write(&mut expected);
        (expected == block).then_some(stamp)
    }
}

/// Whether a block is all zeroes.
pub fn is_zero(block: &[u8]) -> bool {
    block.iter().all(|&byte| byte == 0)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_torn_or_changed_block_has_no_stamp() {
        let stamp = |sequence| Stamp { run: 1, disk: 2, stream: 3, sequence, block: 4, acked: vec![5; 7] };
        let (mut old, mut new) = (vec![0; BLOCK], vec![0; BLOCK]);
        stamp(1).write(&mut old);
        stamp(2).write(&mut new);
        assert_eq!(Stamp::read(&new), Some(stamp(2)));
        for sector in 1..8 {
            let torn = [&new[..sector * 512], &old[sector * 512..]].concat();
            assert_eq!(Stamp::read(&torn), None, "torn at sector {sector}");
        }
        for byte in (0..BLOCK).step_by(97) {
            let mut flipped = new.clone();
            flipped[byte] ^= 1;
            assert_eq!(Stamp::read(&flipped), None, "byte {byte}");
        }
    }
}
