//! A whole map out of partial answers.

use crate::{
    client::Client,
    context::{MapExtent, MetaContext},
    error::{Error, Result},
};
use stillpoint_model::{Length, Offset, Range};

/// The most extents one map may have, 24 bytes each. Fragmented further, a disk is mapped window by window.
const MAX_EXTENTS: usize = 4 << 20;
/// How many answers a map may take for a start, and then one more for each of these bytes: a server that makes
/// progress byte by byte is not one to wait for.
const FREE_ANSWERS: u64 = 1024;
const BYTES_PER_ANSWER: u64 = 512;

impl Client {
    /// What one map says of the `most` bytes after `from`, or of all up to the export's end if that comes first: the
    /// extents follow on each other from `from`, neighbours differ in flags, and nothing is left out. An answer that
    /// stops short is asked on; a map that cannot be completed is an error.
    ///
    /// # Errors
    /// [`MissingContext`](crate::ErrorKind::MissingContext) if the map was not negotiated,
    /// [`Limits`](crate::ErrorKind::Limits) if `from` is past the end or the map has more than 4 Mi extents
    /// (ask for less), otherwise as for [`Client::block_status`].
    pub async fn map(&self, context: &MetaContext, from: Offset, most: Length) -> Result<Vec<MapExtent>> {
        self.require(context)?;
        let past = |_| Error::limits(format!("a map from {from} in an NBD export of {} bytes", self.size()));
        let size = Offset::new(self.size().get());
        let rest = Range::between(from, size).map_err(past)?;
        let (wanted, _) = rest.split(Offset::new(from.get().saturating_add(most.get())));
        let mut map = Map { wanted, at: from, extents: Vec::new() };
        let most_answers = FREE_ANSWERS.saturating_add(wanted.length().get() / BYTES_PER_ANSWER);
        for _ in 0..most_answers {
            if map.at >= wanted.end() {
                return Ok(map.extents);
            }
            let ask = self.widen(map.at, wanted.end()).map_err(past)?;
            let status = self.block_status(ask).await?;
            let before = map.at;
            let mut start = ask.start();
            for descriptor in status.of(context)? {
                let extent = Range::new(start, descriptor.length).map_err(past)?;
                start = extent.end();
                map.push(extent, descriptor.flags)?;
            }
            if map.at <= before {
                return Err(Error::protocol(format!("NBD server's map does not get past {before}")));
            }
        }
        if map.at >= wanted.end() {
            return Ok(map.extents);
        }
        Err(Error::protocol(format!("NBD server's map of {wanted} comes in pieces that are too small")))
    }

    /// The range in whole blocks, as far as the export has them.
    fn widen(&self, start: Offset, end: Offset) -> Result<Range, stillpoint_model::RangeError> {
        let block = u64::from(self.block_sizes().minimum);
        let start = start.get() - start.get() % block;
        let end = end.get().checked_next_multiple_of(block).unwrap_or(u64::MAX).min(self.size().get());
        Range::between(Offset::new(start), Offset::new(end))
    }
}

struct Map {
    wanted: Range,
    /// Up to where it is complete.
    at: Offset,
    extents: Vec<MapExtent>,
}

impl Map {
    /// Takes the part that is wanted and new.
    fn push(&mut self, extent: Range, flags: crate::StatusFlags) -> Result<()> {
        let (_, new) = extent.split(self.at);
        let Some(range) = new.intersect(self.wanted) else { return Ok(()) };
        self.at = range.end();
        if let Some(last) = self.extents.last_mut()
            && last.flags == flags
            && let Ok(joined) = Range::between(last.range.start(), range.end())
        {
            last.range = joined;
            return Ok(());
        }
        if self.extents.len() >= MAX_EXTENTS {
            return Err(Error::limits(format!(
                "the map of {} has more than {MAX_EXTENTS} extents",
                self.wanted
            )));
        }
        self.extents.push(MapExtent { range, flags });
        Ok(())
    }
}
