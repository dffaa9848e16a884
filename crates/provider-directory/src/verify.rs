//! Reading all of a point again.
//!
//! Everything that the point depends on is covered: its manifest and those below it, all sums, configuration files,
//! and every byte of every image of every chain. Data is compared with its records; what no record covers has to be a
//! hole or zero in a raw image, and unallocated in an overlay; and what in an overlay's file is no data at all has a
//! sum of its own.

use crate::{
    chain::{Chain, StoredLayer},
    cover::tables_sum,
    error::{cancelled, damaged, in_one_line, stored},
    restore,
    sums::Record,
};
use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};
use stillpoint_image::{Directory, Format, Mapping, is_zero};
use stillpoint_model::{DiskName, Length, Offset, PointId, Range, VmName};
use stillpoint_provider::{ErrorKind, Finding, Progress, Result, VerifyReport};

/// Findings told of one image; a file of rubbish need not fill a screen.
const MOST_FINDINGS: usize = 32;

/// One examination.
pub(crate) struct Verify {
    pub(crate) progress: Arc<dyn Progress>,
    /// Set when nobody waits for the outcome any more.
    pub(crate) abandoned: Arc<AtomicBool>,
    report: VerifyReport,
    /// Records that are damaged, by the image that they are in.
    bad: HashMap<PathBuf, Vec<Range>>,
}

impl Verify {
    pub(crate) fn new(progress: Arc<dyn Progress>, abandoned: Arc<AtomicBool>) -> Self {
        Self { progress, abandoned, report: VerifyReport::default(), bad: HashMap::new() }
    }

    pub(crate) fn run(mut self, target: &Directory, vm: &VmName, point: &PointId) -> Result<VerifyReport> {
        let (vm_directory, manifest) = match restore::find(target, vm, point) {
            Ok(found) => found,
            Err(error) if error.kind() == ErrorKind::Damaged => {
                self.find(None, None, in_one_line(&error));
                return Ok(self.report);
            }
            Err(error) => return Err(error),
        };
        for config in restore::read_config(&vm_directory, &manifest) {
            match config {
                Ok(file) => self.checked(Length::new(file.content.len() as u64)),
                Err(error) => self.find(None, None, in_one_line(&error)),
            }
        }
        let mut chains = Vec::new();
        for disk in &manifest.disks {
            let (layers, findings) = Chain::examine(&vm_directory, &manifest, &disk.name);
            let opened = findings.is_empty();
            self.report.findings.extend(findings);
            chains.push((&disk.name, layers, opened));
        }
        self.progress
            .total(chains.iter().flat_map(|(_, layers, _)| layers).map(|layer| layer.sums.data()).sum());
        for (disk, layers, opened) in &mut chains {
            for layer in layers.iter() {
                let before = self.report.findings.len();
                if let Err(error) = self.layer(disk, layer) {
                    if error.kind() == ErrorKind::Cancelled {
                        return Err(error);
                    }
                    *opened = false;
                    self.find(Some(disk), None, in_one_line(&error));
                }
                let found = self.report.findings.len() - before;
                if found > MOST_FINDINGS {
                    self.report.findings.truncate(before + MOST_FINDINGS);
                    let more = found - MOST_FINDINGS;
                    self.find(Some(disk), None, format!("{} has {more} more", layer.image.path().display()));
                }
            }
        }
        if !self.report.findings.is_empty() {
            for (disk, layers, opened) in chains {
                if opened && self.is_restorable(layers) {
                    self.report.restorable.push(disk.clone());
                }
            }
        }
        Ok(self.report)
    }

    fn find(&mut self, disk: Option<&DiskName>, offset: Option<Offset>, what: String) {
        self.report.findings.push(Finding { disk: disk.cloned(), offset, what });
    }

    fn checked(&mut self, bytes: Length) {
        self.report.checked = self.report.checked.saturating_add(bytes);
        self.progress.advanced(bytes);
    }

    fn layer(&mut self, disk: &DiskName, layer: &StoredLayer) -> Result<()> {
        self.records(disk, layer)?;
        self.allocation(disk, layer)?;
        if let Some(wanted) = &layer.disk.tables_blake3
            && tables_sum(&layer.image)? != *wanted
        {
            let path = layer.image.path().display();
            self.find(Some(disk), None, format!("{path} has tables that are not what was written"));
        }
        Ok(())
    }

    /// Whether a restore gets the disk back all the same.
    fn is_restorable(&self, layers: Vec<StoredLayer>) -> bool {
        let none: &[Range] = &[];
        let bad = |layer: &StoredLayer| self.bad.get(layer.image.path()).map_or(none, Vec::as_slice);
        Chain::of(layers).is_some_and(|chain| matches!(chain.first_shown(bad), Ok(None)))
    }

    /// Every record's data.
    fn records(&mut self, disk: &DiskName, layer: &StoredLayer) -> Result<()> {
        let mut bytes = Vec::new();
        for index in 0..layer.sums.page_count() {
            for record in layer.sums.page(index)?.iter().filter(|record| record.sum.is_some()) {
                if self.abandoned.load(Ordering::Relaxed) {
                    return Err(cancelled());
                }
                bytes.resize(usize::try_from(record.range.length().get()).unwrap_or_default(), 0);
                if let Err(error) = layer.read(record, &mut bytes) {
                    self.bad.entry(layer.image.path().to_owned()).or_default().push(record.range);
                    self.find(Some(disk), Some(record.range.start()), in_one_line(&error));
                }
                self.checked(record.range.length());
            }
        }
        Ok(())
    }

    /// That the image has what the records say and nothing else.
    fn allocation(&mut self, disk: &DiskName, layer: &StoredLayer) -> Result<()> {
        let mut at = Offset::ZERO;
        while let Some((range, mapping)) = layer.image.mapping(at).map_err(stored)? {
            for part in range.chunks(Length::new(64 << 20)) {
                let mut rest = part;
                for record in layer.sums.records_in(part)? {
                    let Some(covered) = record.range.intersect(rest) else { continue };
                    let (before, after) = rest.split(covered.start());
                    self.part(disk, layer, before, mapping, None)?;
                    self.part(disk, layer, covered, mapping, Some(&record))?;
                    rest = after.split(covered.end()).1;
                }
                self.part(disk, layer, rest, mapping, None)?;
            }
            at = range.end();
        }
        Ok(())
    }

    fn part(
        &mut self,
        disk: &DiskName,
        layer: &StoredLayer,
        part: Range,
        mapping: Mapping,
        record: Option<&Record>,
    ) -> Result<()> {
        if part.is_empty() {
            return Ok(());
        }
        let data = record.map(|record| record.sum.is_some());
        let wrong = match (layer.disk.format, mapping, data) {
            // Whether a raw image has a hole or zeroes does not matter, and a copy of it may have lost its holes.
            (Format::Raw, Mapping::Data(_), None) => {
                self.zeroes(disk, layer, part)?;
                None
            }
            (Format::Raw, _, _) => None,
            (Format::Qcow2, Mapping::Absent, None) | (Format::Qcow2, Mapping::Zero, Some(_)) => None,
            (Format::Qcow2, Mapping::Data(_), Some(true)) => None,
            (Format::Qcow2, Mapping::Absent, Some(_)) => Some("lacks clusters that were written"),
            (Format::Qcow2, Mapping::Data(_) | Mapping::Zero, _) => {
                Some("has clusters that were never written")
            }
        };
        if let Some(wrong) = wrong {
            let what = format!("{} {wrong}, at {part}", layer.image.path().display());
            self.find(Some(disk), Some(part.start()), what);
        }
        Ok(())
    }

    fn zeroes(&mut self, disk: &DiskName, layer: &StoredLayer, part: Range) -> Result<()> {
        let mut bytes = Vec::new();
        for piece in part.chunks(Length::new(1 << 20)) {
            bytes.resize(usize::try_from(piece.length().get()).unwrap_or_default(), 0);
            layer.image.read(piece.start(), &mut bytes).map_err(|error| {
                damaged(format!("{} cannot be read at {}", layer.image.path().display(), piece.start()))
                    .because(error)
            })?;
            if !is_zero(&bytes) {
                let what =
                    format!("{} has data where there was none, at {piece}", layer.image.path().display());
                self.find(Some(disk), Some(piece.start()), what);
            }
        }
        Ok(())
    }
}
