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
