//! Points that are damaged: what a restore would still get back, and dropping those that are beyond use.
//!
//! A point is judged as a restore would: by each disk's chain, and in it by the records that show through. A record that is damaged
//! but covered by a later point's is no loss to that later point, which therefore still needs the file that holds it.
//!
//! # Consistency
//! Points are judged without the VM's lock, since reading them takes long and none ever changes. They are dropped under it, after
//! another look at what is there; a point that was made meanwhile counts as good.
//!
//! # Crash
//! A point is dropped by one rename to the name of a partial, and its files are removed afterwards. A crash between the two leaves a
//! partial, which the next backup of the VM or the next call of this removes. Whichever of several points are dropped when it
//! ends, none that is left has lost anything.

use crate::{
    chain::{self, Chain, StoredLayer},
    error::{cancelled, from_image, in_one_line, may_pass},
    layout,
    lock::Lock,
    manifest::{Manifest, StoredDisk},
    restore,
    target::{self, Found},
};
use serde::Serialize;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io::Read as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};
use stillpoint_image::{self as image, Directory};
use stillpoint_model::{DiskName, Length, PointId, Range, VmName};
use stillpoint_provider::{Progress, Result};

/// Which damaged points are dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropping {
    /// Those of which nothing can be restored.
    BeyondUse,
    /// Those too of which something can be restored, but not all.
    Any,
}

/// A point, judged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Judged {
    /// The VM.
    pub vm: VmName,
    /// The point.
    pub point: PointId,
    /// Whether it stays; in a dry run, whether it would.
    pub keep: bool,
    /// What is wrong with it, if anything is.
    pub damage: Option<String>,
    /// Its disks that can be restored.
    pub restorable: Vec<DiskName>,
    /// Why it stays although it is damaged.
    pub kept_because: Option<String>,
    /// Points of the same VM that are increments to it, directly or by others.
    pub dependents: Vec<PointId>,
}

/// What is known of one point of a VM.
struct Point {
    found: Found,
    /// By disk: why it cannot be restored, if so.
    disks: BTreeMap<DiskName, Option<String>>,
    config: Option<String>,
}

impl Point {
    fn damage(&self) -> Option<String> {
        let disk =
            || self.disks.iter().find_map(|(disk, why)| Some(format!("disk {disk}: {}", why.as_ref()?)));
        self.found.damage().or_else(disk).or_else(|| self.config.clone())
    }

    fn restorable(&self) -> Vec<DiskName> {
        self.disks.iter().filter(|(_, why)| why.is_none()).map(|(disk, _)| disk.clone()).collect()
    }

    fn is_damaged(&self, which: Dropping) -> bool {
        let beyond_use = match &self.found.manifest {
            Err(_) => true,
            Ok(manifest) if manifest.disks.is_empty() => self.config.is_some(),
            Ok(_) => self.restorable().is_empty(),
        };
        beyond_use || which == Dropping::Any && self.damage().is_some()
    }
}

/// Judges all points of `vm` or of each VM, and drops.
pub(crate) fn drop_damaged(
    target: &Directory,
    vm: Option<&VmName>,
    which: Dropping,
    dry_run: bool,
    progress: Arc<dyn Progress>,
    abandoned: Arc<AtomicBool>,
) -> Result<Vec<Judged>> {
    let vms = vm.map_or_else(|| target::vms(target), |vm| Ok(vec![vm.clone()]))?;
    let mut examination = Examination { progress, abandoned, total: Length::ZERO };
    let mut all = Vec::new();
    for vm in &vms {
        let directory = match target::vm(target, vm) {
            Ok(Some(directory)) => directory,
            // A file or link that has a name as a VM could have it.
            Err(error) if error.kind() == stillpoint_provider::ErrorKind::Damaged => continue,
            other => match other? {
                Some(directory) => directory,
                None => continue,
            },
        };
        let points = examination.points(&directory, vm)?;
        all.extend(of_vm(&directory, vm, points, which, dry_run, &examination)?);
    }
    Ok(all)
}

fn of_vm(
    directory: &Directory,
    vm: &VmName,
    points: Vec<Point>,
    which: Dropping,
    dry_run: bool,
    examination: &Examination,
) -> Result<Vec<Judged>> {
    let below = Below::of(points.iter().map(|point| &point.found));
    let mut needed_by = BTreeMap::new();
    for point in points.iter().filter(|point| !point.is_damaged(which)) {
        for disk in point.restorable() {
            for base in below.of_disk(&point.found.id, &disk) {
                needed_by.entry(base).or_insert_with(|| point.found.id.clone());
            }
        }
    }
    let mut judged = Vec::new();
    for point in &points {
        let id = &point.found.id;
        let (mut keep, mut kept_because) = (true, None);
        if point.is_damaged(which) {
            let chain = below.all(id).into_iter().chain([id.clone()]);
            let illegible = chain.map(|id| examination.read_through(directory, id.as_str()));
            let illegible = illegible.collect::<Result<Vec<_>>>()?.into_iter().flatten().next();
            kept_because = match (needed_by.get(id), illegible) {
                (Some(other), _) => Some(format!("{vm}/{other} is restored from it")),
                (_, Some(why)) => Some(format!("this may be no damage, since a file cannot be read: {why}")),
                (None, None) => None,
            };
            keep = kept_because.is_some();
        } else if point.damage().is_some() {
            kept_because = Some("part of it can be restored".to_owned());
        }
        judged.push(Judged {
            vm: vm.clone(),
            point: id.clone(),
            keep,
            damage: point.damage(),
            restorable: point.restorable(),
            kept_because,
            dependents: points
                .iter()
                .map(|point| &point.found.id)
                .filter(|other| below.all(other).contains(id))
                .cloned()
                .collect(),
        });
    }
    if !dry_run && judged.iter().any(|point| !point.keep) {
        drop_points(directory, vm, &mut judged)?;
    }
    Ok(judged)
}

/// Drops what is not to be kept, newest first.
fn drop_points(directory: &Directory, vm: &VmName, judged: &mut [Judged]) -> Result<()> {
    let _lock = Lock::take(directory, vm)?;
    let now = target::points(directory, vm)?;
    let below = Below::of(now.iter());
    let known: BTreeSet<_> = judged.iter().map(|point| point.point.clone()).collect();
    for new in now.iter().filter(|found| !known.contains(&found.id)) {
        let needed = below.all(&new.id);
        for point in judged.iter_mut().filter(|point| !point.keep && needed.contains(&point.point)) {
            point.keep = true;
            point.kept_because =
                Some(format!("{vm}/{} was made meanwhile, and is an increment to it", new.id));
        }
    }
    for point in judged.iter().rev().filter(|point| !point.keep) {
        let (from, to) = (point.point.as_str(), layout::partial(&point.point));
        // Somebody else may have been as quick.
        if directory.contains(from).map_err(from_image)? {
            directory.rename(from, &to).map_err(from_image)?;
            directory.sync().map_err(from_image)?;
        }
        stillpoint_failpoint::reached("point-dropped");
    }
    // Under the lock no partial has a living owner.
    for name in directory.names().map_err(from_image)?.iter().filter(|name| layout::is_partial(name)) {
        directory.remove_tree(name).map_err(from_image)?;
    }
    directory.sync().map_err(from_image)
}

/// Which points each point is an increment to, disk by disk, as far as manifests tell.
struct Below(HashMap<PointId, BTreeMap<DiskName, PointId>>);

impl Below {
    fn of<'a>(points: impl Iterator<Item = &'a Found>) -> Self {
        let bases = |manifest: &Manifest| {
            let disks = manifest.disks.iter();
            disks.filter_map(|disk| Some((disk.name.clone(), disk.base.as_ref()?.point.clone()))).collect()
        };
        let known = points.filter_map(|found| Some((found.id.clone(), bases(found.manifest.as_ref().ok()?))));
        Self(known.collect())
    }

    fn of_disk(&self, point: &PointId, disk: &DiskName) -> BTreeSet<PointId> {
        let mut all = BTreeSet::new();
        let mut at = point;
        // Whatever manifests say, the walk ends where it has been before.
        while let Some(base) = self.0.get(at).and_then(|bases| bases.get(disk)) {
            if !all.insert(base.clone()) {
                break;
            }
            at = base;
        }
        all
    }

    fn all(&self, point: &PointId) -> BTreeSet<PointId> {
        let disks = self.0.get(point).into_iter().flat_map(BTreeMap::keys);
        disks.flat_map(|disk| self.of_disk(point, disk)).collect()
    }
}

/// Reading what is stored, each file once.
struct Examination {
    progress: Arc<dyn Progress>,
    abandoned: Arc<AtomicBool>,
    total: Length,
}

/// What was found out about the chain of a disk at a point.
enum Known {
    /// Every byte of every layer is as it was written.
    Whole,
    /// Something is not.
    Not,
}

type Bad = HashMap<(PointId, DiskName), Vec<Range>>;

impl Examination {
    fn check(&self) -> Result<()> {
        if self.abandoned.load(Ordering::Relaxed) { Err(cancelled()) } else { Ok(()) }
    }

    /// Judges the points of a VM, in the order in which they were made, so that a base is known before what is an increment to it.
    fn points(&mut self, directory: &Directory, vm: &VmName) -> Result<Vec<Point>> {
        let (mut bad, mut known) = (Bad::new(), HashMap::new());
        let mut points: Vec<Point> = Vec::new();
        for found in target::points(directory, vm)? {
            let mut point = Point { found, disks: BTreeMap::new(), config: None };
            if let Ok(manifest) = &point.found.manifest {
                let config = restore::read_config(directory, manifest);
                point.config = config.into_iter().find_map(Result::err).map(|error| in_one_line(&error));
                for disk in &manifest.disks {
                    let below = disk.base.as_ref().is_none_or(|base| {
                        let before = points.iter().find(|before| before.found.id == base.point);
                        let before = before.and_then(|before| before.found.manifest.as_ref().ok());
                        let is_base =
                            before.is_some_and(|below| chain::is_base(manifest, disk, base, below).is_ok());
                        is_base
                            && matches!(
                                known.get(&(base.point.clone(), disk.name.clone())),
                                Some(Known::Whole)
                            )
                    });
                    let key = (manifest.point.id.clone(), disk.name.clone());
                    let records = self.layer(directory, manifest, disk)?;
                    let own = records.as_ref().is_ok_and(Vec::is_empty);
                    bad.insert(key.clone(), records.unwrap_or_default());
                    known.insert(key, if own && below { Known::Whole } else { Known::Not });
                    let why = if own && below { None } else { why_lost(directory, manifest, disk, &bad)? };
                    point.disks.insert(disk.name.clone(), why);
                }
            }
            points.push(point);
        }
        Ok(points)
    }

    /// The records of a point's own image of `disk` that are not as they were written; an error of its own if it cannot be opened.
    fn layer(
        &mut self,
        directory: &Directory,
        manifest: &Manifest,
        disk: &StoredDisk,
    ) -> Result<Result<Vec<Range>>> {
        let opened = directory.directory(manifest.point.id.as_str()).map_err(from_image);
        let layer = match opened.and_then(|own| StoredLayer::open(&own, &manifest.point.id, disk)) {
            Ok(layer) => layer,
            Err(error) => return Ok(Err(error)),
        };
        self.total = self.total.saturating_add(layer.sums.data());
        self.progress.total(self.total);
        let (mut bad, mut bytes) = (Vec::new(), Vec::new());
        for index in 0..layer.sums.page_count() {
            let page = match layer.sums.page(index) {
                Ok(page) => page,
                Err(error) => return Ok(Err(error)),
            };
            for record in page.iter().filter(|record| record.sum.is_some()) {
                self.check()?;
                bytes.resize(usize::try_from(record.range.length().get()).unwrap_or_default(), 0);
                if layer.read(record, &mut bytes).is_err() {
                    bad.push(record.range);
                }
                self.progress.advanced(record.range.length());
            }
        }
        Ok(Ok(bad))
    }

    /// Why the system does not let us read all files of a point, if so. What is missing is no such reason.
    fn read_through(&self, directory: &Directory, name: &str) -> Result<Option<String>> {
        let own = match directory.directory(name) {
            Ok(own) => own,
            Err(error) => return Ok(self.reason(error)),
        };
        for parent in [Ok(own), directory.directory(name).and_then(|own| own.directory(layout::CONFIG))] {
            let (parent, names) = match parent.and_then(|parent| parent.names().map(|names| (parent, names)))
            {
                Ok(listed) => listed,
                Err(error) => match self.reason(error) {
                    Some(reason) => return Ok(Some(reason)),
                    None => continue,
                },
            };
            for name in names {
                let mut buffer = vec![0; 1 << 20];
                let mut file = match parent.open_file(&name) {
                    Ok(file) => file,
                    Err(error) => match self.reason(error) {
                        Some(reason) => return Ok(Some(reason)),
                        None => continue,
                    },
                };
                loop {
                    self.check()?;
                    match file.read(&mut buffer) {
                        Ok(0) => break,
                        Ok(_) => {}
                        Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                        Err(error) => {
                            return Ok(Some(format!("{}: {error}", parent.path().join(&name).display())));
                        }
                    }
                }
            }
        }
        Ok(None)
    }

    fn reason(&self, error: image::Error) -> Option<String> {
        let error = from_image(error);
        may_pass(&error).then(|| in_one_line(&error))
    }
}

/// Why `disk` cannot be restored at the point of `manifest`; `None` if it can, whatever is wrong below.
fn why_lost(
    directory: &Directory,
    manifest: &Manifest,
    disk: &StoredDisk,
    bad: &Bad,
) -> Result<Option<String>> {
    let chain = match Chain::open(directory, manifest, &disk.name) {
        Ok(chain) => chain,
        Err(error) => return Ok(Some(in_one_line(&error))),
    };
    let bad_in = |layer: &StoredLayer| bad.get(&(layer.point.clone(), disk.name.clone()));
    match chain.first_shown(|layer| bad_in(layer).map_or(&[], Vec::as_slice)) {
        Ok(None) => Ok(None),
        Ok(Some((path, range))) => {
            Ok(Some(format!("{} is not what was written, at {}", path.display(), range.start())))
        }
        Err(error) => Ok(Some(in_one_line(&error))),
    }
}
