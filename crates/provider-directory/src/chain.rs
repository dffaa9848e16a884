//! The layers of a disk at a point, top first, read with every byte checked.

use crate::{
    error::{damaged, in_one_line, stored},
    manifest::{Base, Manifest, StoredDisk},
    plan::CELL,
    sums::{Record, Sums, sum},
};
use stillpoint_image::{Directory, Layer};
use stillpoint_model::{DiskName, Extent, ExtentKind, Length, Offset, PointId, Range, VmName};
use stillpoint_provider::{Error, ErrorKind, Finding, Result};

/// Most extents, and most of the disk, that one call for regions looks at.
const MOST_REGIONS: usize = 4096;
const MOST_CELLS: u64 = 16384;

/// One image with its sums.
#[derive(Debug)]
pub(crate) struct StoredLayer {
    pub(crate) point: PointId,
    pub(crate) disk: StoredDisk,
    pub(crate) image: Layer,
    pub(crate) sums: Sums,
}

impl StoredLayer {
    /// Opens the image of `disk` in the directory of `point`.
    pub(crate) fn open(directory: &Directory, point: &PointId, disk: &StoredDisk) -> Result<Self> {
        disk.check_lengths(directory)?;
        let sums = Sums::open(directory, disk)?;
        let image = Layer::open(directory, &disk.image, disk.format, disk.size).map_err(stored)?;
        Ok(Self { point: point.clone(), disk: disk.clone(), image, sums })
    }

    /// Reads what `record` says is there into `bytes`, which is as long, and makes sure that it is.
    pub(crate) fn read(&self, record: &Record, bytes: &mut [u8]) -> Result<()> {
        let at = record.range.start();
        self.image.read(at, bytes).map_err(|error| {
            damaged(format!("{} cannot be read at {at}", self.image.path().display())).because(error)
        })?;
        if record.sum.is_some_and(|wanted| wanted != sum(bytes)) {
            let (path, length) = (self.image.path().display(), record.range.length());
            return Err(damaged(format!(
                "{path} is not what was written, within the {length} bytes at {at}"
            )));
        }
        Ok(())
    }
}

/// A disk at a point.
#[derive(Debug)]
pub(crate) struct Chain {
    size: Length,
    layers: Vec<StoredLayer>,
}

fn size_of(range: Range) -> usize {
    usize::try_from(range.length().get()).unwrap_or(usize::MAX)
}

fn slice(bytes: &mut [u8], start: Offset, part: Range) -> Option<&mut [u8]> {
    let from = usize::try_from(part.start().get().checked_sub(start.get())?).ok()?;
    bytes.get_mut(from..from.checked_add(size_of(part))?)
}

impl Chain {
    /// Opens `disk` as it is at the point of `manifest`, down to the full image. Every manifest and all sums are
    /// checked, and of the images their length and header.
    pub(crate) fn open(vm_directory: &Directory, manifest: &Manifest, disk: &DiskName) -> Result<Self> {
        let mut first = None;
        let layers = walk(vm_directory, manifest, disk, |what| {
            first.get_or_insert(what);
        });
        match (first, layers.first().map(|layer| layer.disk.size)) {
            (None, Some(size)) => Ok(Self { size, layers }),
            (Some(error), _) => Err(error),
            (None, None) => Err(not_found(manifest, disk)),
        }
    }

    /// The same as far as it goes, for an examination: each layer that can be opened, and why others cannot.
    pub(crate) fn examine(
        vm_directory: &Directory,
        manifest: &Manifest,
        disk: &DiskName,
    ) -> (Vec<StoredLayer>, Vec<Finding>) {
        let mut findings = Vec::new();
        let layers = walk(vm_directory, manifest, disk, |error| {
            findings.push(Finding { disk: Some(disk.clone()), offset: None, what: in_one_line(&error) });
        });
        (layers, findings)
    }

    /// Of layers that go down to the full image, all there; `None` if there is none.
    pub(crate) fn of(layers: Vec<StoredLayer>) -> Option<Self> {
        Some(Self { size: layers.first()?.disk.size, layers })
    }

    pub(crate) fn size(&self) -> Length {
        self.size
    }

    /// Of the records that `bad` names by their ranges, layer by layer, one that a restore would need: no layer above has other data in
    /// its place.
    pub(crate) fn first_shown<'a>(
        &self,
        bad: impl Fn(&StoredLayer) -> &'a [Range],
    ) -> Result<Option<(std::path::PathBuf, Range)>> {
        for layer in &self.layers {
            for range in bad(layer) {
                let mut shown = false;
                // A record with data is within one cell.
                self.resolve(*range, |found, record, _| {
                    shown |= found.point == layer.point && record.range.start() == range.start();
                    Ok(())
                })?;
                if shown {
                    return Ok(Some((layer.image.path().to_owned(), *range)));
                }
            }
        }
        Ok(None)
    }

    /// What an overlay on top of this says of its base.
    pub(crate) fn as_base(&self, point: &PointId) -> Option<Base> {
        let top = &self.layers.first()?.disk;
        Some(Base { point: point.clone(), image: top.image.clone(), sums_blake3: top.sums_blake3.clone() })
    }

    /// Fills `bytes` with what the disk has from `start` on. Only the very bytes that were written come back.
    pub(crate) fn read(&self, start: Offset, bytes: &mut [u8]) -> Result<()> {
        let whole = Range::new(start, Length::new(bytes.len() as u64))
            .ok()
            .filter(|range| range.end().get() <= self.size.get())
            .ok_or_else(|| {
                let length = bytes.len();
                Error::new(
                    ErrorKind::Io,
                    format!("{length} bytes at {start} end past a disk of {} bytes", self.size),
                )
            })?;
        bytes.fill(0);
        for cell in whole.chunks(CELL) {
            self.resolve(cell, |layer, record, part| {
                if record.sum.is_none() {
                    return Ok(());
                }
                if part == record.range
                    && let Some(place) = slice(bytes, start, part)
                {
                    return layer.read(record, place);
                }
                // The sum is over all of the record, so all of it is read even where some would do.
                let mut all = vec![0; size_of(record.range)];
                layer.read(record, &mut all)?;
                if let (Some(to), Some(from)) =
                    (slice(bytes, start, part), slice(&mut all, record.range.start(), part))
                {
                    to.copy_from_slice(from);
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Tells, for each part of `cell` that some layer has, the topmost layer that has it and its record. What is told
    /// of no layer is zero.
    fn resolve(
        &self,
        cell: Range,
        mut found: impl FnMut(&StoredLayer, &Record, Range) -> Result<()>,
    ) -> Result<()> {
        let mut open = vec![cell];
        for layer in &self.layers {
            let mut below = Vec::new();
            for part in open {
                let mut rest = part;
                for record in layer.sums.records_in(part)? {
                    let Some(covered) = record.range.intersect(rest) else { continue };
                    let (before, after) = rest.split(covered.start());
                    if !before.is_empty() {
                        below.push(before);
                    }
                    found(layer, &record, covered)?;
                    rest = after.split(covered.end()).1;
                }
                if !rest.is_empty() {
                    below.push(rest);
                }
            }
            open = below;
            if open.is_empty() {
                break;
            }
        }
        Ok(())
    }

    /// The regions from `from` on, data or zero.
    pub(crate) fn regions(&self, from: Offset) -> Result<Vec<Extent>> {
        let mut extents: Vec<Extent> = Vec::new();
        let mut push = |range: Range, kind| match extents.last_mut() {
            _ if range.is_empty() => {}
            Some(last) if last.kind == kind => {
                last.range = Range::between(last.range.start(), range.end()).unwrap_or(last.range);
            }
            _ => extents.push(Extent { range, kind }),
        };
        let end = Offset::new(self.size.get());
        let Ok(left) = Range::between(from, end) else { return Ok(Vec::new()) };
        let most = left.split(Offset::new(from.get().saturating_add(MOST_CELLS * CELL.get()))).0;
        let mut count = 0;
        for cell in most.chunks(CELL) {
            let mut data = Vec::new();
            self.resolve(cell, |_, record, part| {
                if record.sum.is_some() {
                    data.push(part);
                }
                Ok(())
            })?;
            data.sort_unstable_by_key(|part| part.start());
            let mut rest = cell;
            for part in data {
                let (zero, after) = rest.split(part.start());
                push(zero, ExtentKind::Zero);
                push(part, ExtentKind::Data);
                rest = after.split(part.end()).1;
                count += 2;
            }
            push(rest, ExtentKind::Zero);
            count += 1;
            if count >= MOST_REGIONS {
                break;
            }
        }
        Ok(extents)
    }
}

fn not_found(manifest: &Manifest, disk: &DiskName) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!("point {}/{} has no disk {disk}", manifest.point.vm, manifest.point.id),
    )
}

/// Opens the layers of `disk` from the point of `manifest` downwards, and tells `wrong` of each thing that is.
fn walk(
    vm_directory: &Directory,
    manifest: &Manifest,
    disk: &DiskName,
    mut wrong: impl FnMut(Error),
) -> Vec<StoredLayer> {
    let mut layers = Vec::new();
    let mut manifest = std::borrow::Cow::Borrowed(manifest);
    loop {
        let Some(stored_disk) = manifest.disk(disk).cloned() else {
            wrong(not_found(&manifest, disk));
            return layers;
        };
        let opened = vm_directory
            .directory(manifest.point.id.as_str())
            .map_err(stored)
            .and_then(|directory| StoredLayer::open(&directory, &manifest.point.id, &stored_disk));
        match opened {
            Ok(layer) => layers.push(layer),
            Err(error) => wrong(error),
        }
        let Some(base) = &stored_disk.base else { return layers };
        match base_of(vm_directory, &manifest, &stored_disk, base) {
            Ok(below) => manifest = std::borrow::Cow::Owned(below),
            Err(error) => {
                wrong(error);
                return layers;
            }
        }
    }
}

/// The manifest of the point that `disk` is an increment to, if it is the very one.
pub(crate) fn base_of(
    vm_directory: &Directory,
    manifest: &Manifest,
    disk: &StoredDisk,
    base: &Base,
) -> Result<Manifest> {
    let directory = vm_directory.directory(base.point.as_str()).map_err(stored)?;
    let below = Manifest::read(&directory, &manifest.point.vm, &base.point)?;
    is_base(manifest, disk, base, &below).map(|()| below)
}

/// Whether `below` is what `disk` is an increment to.
pub(crate) fn is_base(manifest: &Manifest, disk: &StoredDisk, base: &Base, below: &Manifest) -> Result<()> {
    let (vm, id): (&VmName, &PointId) = (&manifest.point.vm, &manifest.point.id);
    let fits = below.disk(&disk.name).is_some_and(|found| {
        found.size == disk.size && found.image == base.image && found.sums_blake3 == base.sums_blake3
    });
    // Going down, the sequence gets smaller each time, so that no chain is endless.
    if fits && below.sequence < manifest.sequence {
        return Ok(());
    }
    Err(damaged(format!(
        "{vm}/{} is not the point that disk {} of {vm}/{id} is an increment to",
        base.point, disk.name
    )))
}
