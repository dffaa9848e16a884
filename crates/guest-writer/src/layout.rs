//! Where each operation of each stream writes.

/// The plan of a storm, shared by the guest that carries it out and the oracle that checks it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Decides every position and length.
    pub seed: u64,
    /// Streams that each disk has to itself.
    pub per_disk: u32,
    /// Whole 4 KiB blocks of each disk.
    pub disk_blocks: Vec<u64>,
    /// Most blocks of a region; a small one is overwritten often.
    pub span: u64,
}

/// One operation of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operation {
    /// Index of the disk.
    pub disk: usize,
    /// First block.
    pub block: u64,
    /// Number of blocks, 1 to 32.
    pub count: u64,
    /// Whether it zeroes the blocks instead of writing stamps.
    pub zero: bool,
}

impl Layout {
    /// Number of streams, the ordering stream included.
    pub fn streams(&self) -> u32 {
        let disks = u32::try_from(self.disk_blocks.len()).unwrap_or(u32::MAX);
        disks.saturating_mul(self.per_disk).saturating_add(1)
    }

    /// The stream that goes round the disks.
    pub fn ordering_stream(&self) -> u32 {
        self.streams().saturating_sub(1)
    }

    /// First block and length of the region of `stream` on `disk`; nothing if it never writes there.
    pub fn region(&self, stream: u32, disk: usize) -> Option<(u64, u64)> {
        let blocks = *self.disk_blocks.get(disk)?;
        let share = blocks / u64::from(self.per_disk.saturating_add(1));
        let index = if stream == self.ordering_stream() {
            self.per_disk
        } else if usize::try_from(stream / self.per_disk.max(1)).ok()? == disk {
            stream % self.per_disk.max(1)
        } else {
            return None;
        };
        let length = share.min(self.span);
        (length > 0).then(|| (share.saturating_mul(u64::from(index)), length))
    }

    /// The `sequence`-th operation (from 1) of `stream`.
    pub fn operation(&self, stream: u32, sequence: u64) -> Operation {
        let random =
            mix(self.seed ^ mix(u64::from(stream).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ mix(sequence)));
        let disks = self.disk_blocks.len().max(1);
        let disk = if stream == self.ordering_stream() {
            usize::try_from(sequence % disks as u64).unwrap_or(0)
        } else {
            usize::try_from(stream / self.per_disk.max(1)).unwrap_or(0)
        };
        let (base, length) = self.region(stream, disk).unwrap_or((0, 1));
        let sizes = [1, 1, 1, 2, 4, 8, 16, 32];
        let size = sizes.get(usize::try_from(random >> 61).unwrap_or(0)).copied().unwrap_or(1);
        let at = random % length;
        // The ordering stream never zeroes: its blocks have to tell which operation they are from.
        let zero = stream != self.ordering_stream() && (random >> 32).is_multiple_of(37);
        Operation {
            disk,
            block: base.saturating_add(at),
            count: size.min(length.saturating_sub(at)).max(1),
            zero,
        }
    }
}

/// SplitMix64's finisher: every bit of the input reaches every bit of the output.
pub(crate) fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn streams_never_share_a_block() {
        let layout = Layout { seed: 3, per_disk: 2, disk_blocks: vec![1000, 777], span: 300 };
        let mut owner = std::collections::HashMap::new();
        for stream in 0..layout.streams() {
            for sequence in 1..2000 {
                let operation = layout.operation(stream, sequence);
                for block in operation.block..operation.block + operation.count {
                    assert!(block < layout.disk_blocks[operation.disk]);
                    let first = *owner.entry((operation.disk, block)).or_insert(stream);
                    assert_eq!(first, stream, "disk {} block {block}", operation.disk);
                }
            }
        }
    }
}
