//! Reading ahead of a program that reads a file in order and in small pieces, so that a piece costs a way through FUSE and not
//! one to QEMU as well. Nothing is read ahead that the program might not read: not past a part that is data.

use crate::volume::ServedVolume;
use bytes::Bytes;
use futures_util::{
    FutureExt as _,
    future::{BoxFuture, Shared},
};
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};
use stillpoint_model::{ExtentKind, Length, Offset, Range};
use stillpoint_provider::Result;

/// Pieces of this length and more are read as they are asked for.
const SMALL: Length = Length::new(512 << 10);
/// What is read at once.
const BLOCK: Length = Length::new(1 << 20);
/// Blocks that are kept: the one that is being read, the next, and one for a second reader.
const BLOCKS: usize = 3;

/// A disk, and what was read of it ahead.
pub(super) struct ReadAhead {
    volume: Arc<ServedVolume>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Where the last piece ended.
    next: Offset,
    blocks: VecDeque<Block>,
}

#[derive(Clone)]
struct Block {
    range: Range,
    /// `None` if it could not be read: then each piece has an error of its own.
    bytes: Shared<BoxFuture<'static, Option<Bytes>>>,
}

impl ReadAhead {
    pub(super) fn new(volume: Arc<ServedVolume>) -> Self {
        Self { volume, state: Mutex::default() }
    }

    pub(super) fn volume(&self) -> &Arc<ServedVolume> {
        &self.volume
    }

    /// # Errors
    /// As [`ServedVolume::read`].
    pub(super) async fn read(&self, range: Range) -> Result<Bytes> {
        if range.length() < SMALL
            && let Some(block) = self.block(range)
            && let Some(bytes) = block.bytes.await
            && let Some(bytes) = part(&bytes, block.range, range)
        {
            self.volume.was_read(range);
            return Ok(bytes);
        }
        self.volume.read(range).await
    }

    /// The block that covers a piece, if the program reads in order; the one after it is on its way then.
    fn block(&self, range: Range) -> Option<Block> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let in_order = range.start() == state.next;
        state.next = range.end();
        let covers = |block: &&Block| block.range.intersect(range) == Some(range);
        let block = match state.blocks.iter().find(covers) {
            Some(block) => block.clone(),
            None if in_order => self.begin(range.start()).filter(|block| covers(&block))?,
            None => return None,
        };
        for wanted in [block.range.start(), block.range.end()] {
            if !state.blocks.iter().any(|block| block.range.start() == wanted) {
                let new =
                    if wanted == block.range.start() { Some(block.clone()) } else { self.begin(wanted) };
                state.blocks.extend(new);
            }
        }
        while state.blocks.len() > BLOCKS {
            state.blocks.pop_front();
        }
        Some(block)
    }

    fn begin(&self, at: Offset) -> Option<Block> {
        let extent = self.volume.all_regions(at).next().filter(|extent| extent.kind == ExtentKind::Data)?;
        let range = extent.range.chunks(BLOCK).next()?;
        let volume = Arc::clone(&self.volume);
        let reading = tokio::spawn(async move { volume.fetch(range).await.ok() });
        Some(Block { range, bytes: reading.map(|read| read.ok().flatten()).boxed().shared() })
    }
}

/// `wanted` out of `bytes`, which are `range`.
fn part(bytes: &Bytes, range: Range, wanted: Range) -> Option<Bytes> {
    let start = usize::try_from(wanted.start().get().checked_sub(range.start().get())?).ok()?;
    let end = start.checked_add(usize::try_from(wanted.length().get()).ok()?)?;
    (end <= bytes.len()).then(|| bytes.slice(start..end))
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::rpc::Activity;
    use async_trait::async_trait;
    use stillpoint_model::Extent;
    use stillpoint_provider::{BitmapMode, Error, ErrorKind, Volume, VolumeSource};

    const MIB: u64 = 1 << 20;

    fn range(start: u64, end: u64) -> Range {
        Range::between(Offset::new(start), Offset::new(end)).unwrap()
    }

    fn byte(at: u64) -> u8 {
        u8::try_from(at / 512 % 251).unwrap()
    }

    /// Data up to 3.5 MiB, a clean part up to 4 MiB, then data to the end at 5 MiB, the last half MiB of which cannot be read.
    struct Disk(Mutex<Vec<Range>>);

    #[async_trait]
    impl VolumeSource for Disk {
        fn size(&self) -> Length {
            Length::new(5 * MIB)
        }

        async fn regions(&self, from: Offset) -> Result<Vec<Extent>> {
            let parts = [
                (range(0, 7 * MIB / 2), ExtentKind::Data),
                (range(7 * MIB / 2, 4 * MIB), ExtentKind::Clean),
                (range(4 * MIB, 5 * MIB), ExtentKind::Data),
            ];
            let rest = |(range, kind): (Range, _)| Extent { range: range.split(from).1, kind };
            Ok(parts.map(rest).into_iter().filter(|extent| !extent.range.is_empty()).collect())
        }

        async fn read(&self, range: Range) -> Result<Bytes> {
            self.0.lock().unwrap().push(range);
            if range.end().get() > 9 * MIB / 2 {
                return Err(Error::new(ErrorKind::Source, "as a test"));
            }
            Ok((range.start().get()..range.end().get()).map(byte).collect())
        }

        async fn release(&self, _range: Range) -> Result<()> {
            Ok(())
        }
    }

    async fn ahead() -> (ReadAhead, Arc<Disk>) {
        let disk = Arc::new(Disk(Mutex::default()));
        let volume = Volume {
            name: "vda".parse().unwrap(),
            bitmap_mode: BitmapMode::Reuse,
            base: None,
            source: Arc::clone(&disk) as Arc<dyn VolumeSource>,
        };
        let volume = ServedVolume::new(&volume, None, Activity::new()).await.unwrap();
        (ReadAhead::new(Arc::new(volume)), disk)
    }

    async fn right(ahead: &ReadAhead, piece: Range) {
        let bytes = ahead.read(piece).await.unwrap();
        assert!(bytes.iter().copied().eq((piece.start().get()..piece.end().get()).map(byte)), "{piece}");
    }

    #[tokio::test]
    async fn small_pieces_in_order_are_right_and_cost_few_reads_and_none_of_what_is_clean() {
        let (ahead, disk) = ahead().await;
        // 60 KiB: pieces that reach from one block into the next are among them.
        for piece in range(0, 7 * MIB / 2).chunks(Length::new(60 << 10)) {
            right(&ahead, piece).await;
        }
        let reads = disk.0.lock().unwrap().clone();
        assert!(reads.len() <= 12, "{} reads for 60 pieces", reads.len());
        assert!(reads.iter().all(|read| read.end().get() <= 7 * MIB / 2), "{reads:?}");
        assert_eq!(
            ahead.read(range(7 * MIB / 2, 4 * MIB)).await.unwrap_err().kind(),
            ErrorKind::InvalidInput
        );
    }

    #[tokio::test]
    async fn what_is_asked_for_here_and_there_is_read_as_it_is_asked_for() {
        let (ahead, disk) = ahead().await;
        let pieces = [(2 * MIB, 4096), (MIB, 512), (5 * 512, 1000), (MIB + 100, 77)];
        for (start, length) in pieces {
            right(&ahead, range(start, start + length)).await;
        }
        let asked: Vec<_> = pieces.map(|(start, length)| range(start, start + length)).into();
        assert_eq!(*disk.0.lock().unwrap(), asked);
    }

    #[tokio::test]
    async fn what_was_read_ahead_is_not_taken_for_read_nor_its_error_for_the_disks() {
        let (ahead, _disk) = ahead().await;
        right(&ahead, range(0, 4096)).await;
        // The first block is there and the second on its way, and the program has 4 KiB.
        let missing = ahead.volume().prove_read().unwrap_err().to_string();
        assert!(missing.ends_with("has not read what is at 4096"), "{missing}");
        for start in (0..7 * MIB / 2).step_by(65_536) {
            right(&ahead, range(start, start + 65_536)).await;
        }
        right(&ahead, range(4 * MIB, 4 * MIB + 512)).await;
        right(&ahead, range(4 * MIB + 512, 4 * MIB + 1024)).await;
        assert!(ahead.volume().failure().is_none(), "the program never asked for what cannot be read");
        let error = ahead.read(range(5 * MIB - 512, 5 * MIB)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Source);
        assert!(ahead.volume().failure().is_some());
    }
}
