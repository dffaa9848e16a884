//! The images of a disk, from its own down its backing chain, and the bitmaps of ours on them: which of them can be believed,
//! and what else has to be read (ADR 0019).
//!
//! A bitmap is believed on the very image that it was made on, and nowhere else: whoever puts an overlay on a disk may give it
//! bitmaps of the same names, and those have seen nothing of what was written before. Where that image is now below others, what changed
//! since the bitmap's point is
//!
//! ```text
//!    overlay   [....X..........X...]   what it has allocated      everything written since it was put on, and more
//!    overlay   [..X.....X..........]   what it has allocated
//!    image     [#......#....#......]   what the bitmap marks      everything written to it since the point
//!              [#.X.X..#X...#..X...]   all of it together
//! ```
//!
//! since whatever no overlay has allocated is read from the image, and that differs from the point only where the bitmap
//! says so. It holds whoever made the overlays, whenever, and whatever became of them meanwhile.

use crate::{
    command,
    error::{Error, ErrorKind, Result},
    graph::Graph,
    image_id::ImageId,
    inspect::{Bitmap, Inserted, qmp_error},
    names::ChainName,
};
use std::path::Path;
use stillpoint_model::{
    BitmapName, DiskName, Generation, Granularity, Length, NodeName, Offset, Range, TargetId,
};
use stillpoint_nbd::{Client, MetaContext, Options};
use stillpoint_qmp::Qmp;

/// Longest backing chain that is followed: QEMU itself gets slow long before.
const MOST_LAYERS: usize = 256;
/// What one question for what is allocated covers.
const MAP_WINDOW: Length = Length::new(64 << 30);

/// Drivers that pass on to another node whatever they are asked, and may be what a front end is on.
const FILTERS: [&str; 6] =
    ["throttle", "copy-on-read", "compress", "preallocate", "blkdebug", "blklogwrites"];

/// A bitmap of ours, whatever its state.
#[derive(Debug, Clone)]
pub(crate) struct ChainBitmap {
    /// The node that it is on.
    pub(crate) node: NodeName,
    /// How many images are above that node's.
    pub(crate) above: u64,
    pub(crate) name: BitmapName,
    pub(crate) target: TargetId,
    pub(crate) generation: Generation,
    pub(crate) granularity: Granularity,
    /// Why it cannot be relied on, if so.
    pub(crate) fault: Option<&'static str>,
}

/// What is wrong with a bitmap that has a name of ours and is not ours.
pub(crate) const FOREIGN: &str = "its bitmap was made by someone else";

/// The images of one disk.
#[derive(Debug, Default)]
pub(crate) struct Layers {
    /// The disk's own image.
    pub(crate) image: Option<ImageId>,
    /// The bitmaps of ours on it and below.
    pub(crate) bitmaps: Vec<ChainBitmap>,
}

impl Layers {
    /// Looks at `top` and what backs it, in the QEMU whose process is `qemu`.
    pub(crate) async fn of(
        graph: &Graph,
        qemu: Option<u32>,
        disk: &DiskName,
        top: &Inserted,
    ) -> Result<Self> {
        let mut layers = Self::default();
        let mut layer = Some(top);
        for above in 0..MOST_LAYERS {
            let Some(found) = layer else { break };
            let Some(node) = &found.node_name else { break };
            let image = image_of(graph, qemu, found).await;
            for bitmap in &found.dirty_bitmaps {
                let bitmap = chain_bitmap(bitmap, disk, node, found, image.as_ref(), top)?;
                layers.bitmaps.extend(bitmap.map(|bitmap| ChainBitmap { above: above as u64, ..bitmap }));
            }
            if above == 0 {
                layers.image = image;
            }
            layer = graph.child(node, "backing");
        }
        Ok(layers)
    }
}

async fn image_of(graph: &Graph, qemu: Option<u32>, layer: &Inserted) -> Option<ImageId> {
    let node = layer.node_name.as_ref()?;
    if FILTERS.contains(&layer.drv.as_str()) {
        // Its bitmaps are in this QEMU's memory, and see all that passes, whatever image is below.
        return Some(ImageId::of_node(node.as_str()));
    }
    let bottom = graph.bottom(layer);
    ImageId::of(qemu, &bottom.drv, &bottom.file).await
}

fn chain_bitmap(
    bitmap: &Bitmap,
    disk: &DiskName,
    node: &NodeName,
    layer: &Inserted,
    image: Option<&ImageId>,
    top: &Inserted,
) -> Result<Option<ChainBitmap>> {
    let Some(name) = &bitmap.name else { return Ok(None) };
    let Some(told) = ChainName::parse(name) else { return Ok(None) };
    let fault = if told.disk != *disk {
        Some("its image was another disk's when the bitmap was made")
    } else if image != Some(&told.image) {
        Some("its bitmap was made on another image: this one is a copy of that, or was put on it")
    } else if bitmap.inconsistent {
        Some("its bitmap is inconsistent: QEMU did not end cleanly")
    } else if bitmap.busy {
        Some("its bitmap is in use by something else")
    } else if !bitmap.recording {
        // It may have missed writes while it was off, and nothing tells since when.
        Some("its bitmap was disabled by someone else")
    } else if bitmap.persistent != layer.keeps_bitmaps() {
        // We make them persistent wherever that is possible, so this one is not ours, whatever its name.
        Some(FOREIGN)
    } else if layer.image.virtual_size != top.image.virtual_size {
        Some("the disk was resized since an overlay was put on the image that has its bitmap")
    } else {
        None
    };
    let wrong = |error: Box<dyn std::error::Error + Send + Sync>| {
        Error::new(ErrorKind::Inconsistent, "QEMU describes a dirty bitmap that cannot be").because(error)
    };
    Ok(Some(ChainBitmap {
        node: node.clone(),
        above: 0,
        name: name.parse().map_err(|error: stillpoint_model::NameError| wrong(error.into()))?,
        target: told.target,
        generation: told.generation,
        granularity: Granularity::try_from(bitmap.granularity).map_err(|error| wrong(error.into()))?,
        fault,
    }))
}

/// Which granules the images above a bitmap's have allocated.
#[derive(Debug)]
pub(crate) struct Allocated {
    granularity: Granularity,
    size: Length,
    bits: Vec<u64>,
}

impl Allocated {
    /// Asks QEMU what the `above` uppermost images of `node` have, through an export of that name for a moment. What is
    /// allocated while it is asked is not all seen: a bitmap has to record meanwhile.
    pub(crate) async fn ask(
        qmp: &Qmp,
        server: &Path,
        id: &str,
        (node, size): (&NodeName, Length),
        above: u64,
        granularity: Granularity,
    ) -> Result<Self> {
        let added = qmp.execute(command::add_depth_export(id, node)).await;
        added.map_err(|error| qmp_error("export what the images of a disk have", error))?;
        let failed = |error| Error::new(ErrorKind::Read, "ask which image of a disk has what").because(error);
        let context = MetaContext::qemu_allocation_depth();
        let options = Options::new(id).context(context.clone());
        let client = Client::connect_unix(server, options).await.map_err(failed)?;
        let mut allocated = Self::new(size, granularity);
        let mut at = Offset::ZERO;
        while at.get() < size.get() {
            let map = client.map(&context, at, MAP_WINDOW).await.map_err(failed)?;
            for part in &map {
                if (1..=above).contains(&part.flags.bits()) {
                    allocated.set(part.range);
                }
            }
            at = map.last().map_or(Offset::new(size.get()), |part| part.range.end());
        }
        client.disconnect().await.map_err(failed)?;
        Ok(allocated)
    }

    fn new(size: Length, granularity: Granularity) -> Self {
        let granules = size.get().div_ceil(u64::from(granularity.get()));
        let words = usize::try_from(granules.div_ceil(64)).unwrap_or(usize::MAX);
        Self { granularity, size, bits: vec![0; words] }
    }

    fn set(&mut self, range: Range) {
        let granule = u64::from(self.granularity.get());
        for index in range.start().get() / granule..range.end().get().div_ceil(granule) {
            if let Some(word) = usize::try_from(index / 64).ok().and_then(|at| self.bits.get_mut(at)) {
                *word |= 1 << (index % 64);
            }
        }
    }

    fn has(&self, index: u64) -> bool {
        let word = usize::try_from(index / 64).ok().and_then(|at| self.bits.get(at));
        // Beyond what was asked for nothing is known.
        word.is_none_or(|word| word >> (index % 64) & 1 == 1)
    }

    /// `range` in parts, in order and without gaps: whether each is allocated.
    pub(crate) fn parts(&self, range: Range) -> Vec<(Range, bool)> {
        let granule = u64::from(self.granularity.get());
        let mut parts: Vec<(Range, bool)> = Vec::new();
        let mut rest = range;
        while !rest.is_empty() {
            let index = rest.start().get() / granule;
            let has = self.has(index);
            let mut end = index.saturating_add(1);
            while end.saturating_mul(granule) < rest.end().get() && self.has(end) == has {
                end = end.saturating_add(1);
            }
            let (part, after) = rest.split(Offset::new(end.saturating_mul(granule).min(rest.end().get())));
            parts.push((part, has));
            rest = after;
        }
        debug_assert!(range.end().get() <= self.size.get());
        parts
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn whatever_is_set_is_found_and_parts_follow_on_one_another(
            size in 1u64..3_000_000,
            sets in proptest::collection::vec((0u64..3_000_000, 1u64..200_000), 0..8),
            (from, length) in (0u64..3_000_000, 1u64..3_000_000),
        ) {
            let granularity = Granularity::try_from(4096u64).unwrap();
            let mut allocated = Allocated::new(Length::new(size), granularity);
            let clip = |start: u64, length: u64| {
                let start = start.min(size);
                Range::between(Offset::new(start), Offset::new(start.saturating_add(length).min(size))).unwrap()
            };
            let sets: Vec<_> = sets.into_iter().map(|(start, length)| clip(start, length)).collect();
            sets.iter().for_each(|set| allocated.set(*set));
            let asked = clip(from, length);
            let parts = allocated.parts(asked);
            let mut at = asked.start();
            for (part, has) in &parts {
                prop_assert_eq!(part.start(), at);
                prop_assert!(!part.is_empty());
                at = part.end();
                let touched = sets.iter().any(|set| set.intersect(*part).is_some_and(|both| !both.is_empty()));
                prop_assert!(*has || !touched, "{part:?} is called clean");
            }
            prop_assert_eq!(at, asked.end());
            // No more than whole granules around what was set.
            let marked: u64 = parts.iter().filter(|(_, has)| *has).map(|(part, _)| part.length().get()).sum();
            let most: u64 = sets.iter().map(|set| set.length().get() + 2 * 4096).sum();
            prop_assert!(marked <= most);
        }
    }
}
