//! Making a point.
//!
//! # Crash
//! ```text
//!  step                           a crash before the next step leaves
//!  Lock                           nothing (the kernel gives the lock back)
//!  remove partials of the dead    fewer of them
//!  create .partial-ID             a partial: not listed, removed by the next backup of the VM
//!  images, sums, config           a partial
//!  WriteManifest                  a partial that could be listed, but its name says that it is not whole
//!  SyncPartial                    the same, every byte and name in it durable
//!  Rename                         a partial or the point, never both, never half: whichever name the directory has
//!                                 on disk; the point is whole under either
//!  SyncParent                     the point
//! ```
//! The VM's bitmap is only told to forget after the last step (I3). If it is the last step that fails, the point may
//! or may not be there after a power cut, and that is what the error says.

use crate::{
    chain::Chain,
    disk::{self, Below, DiskTask},
    envelope::hex,
    error::{blocking, from_image, in_one_line},
    layout,
    lock::Lock,
    manifest::{Manifest, StoredConfig, StoredDisk},
    restore, target,
};
use async_trait::async_trait;
use std::{collections::HashMap, sync::Arc, time::Duration};
use stillpoint_image::{Directory, Qcow2Writer};
use stillpoint_model::{DiskName, Generation, Granularity, Length, PointId, VmName};
use stillpoint_provider::{
    Backup, BitmapMode, ConfigFile, DiskOffer, Error, ErrorKind, Incremental, PointRecord, Result, Volume,
    VolumeReport,
};
use tokio::task::JoinSet;

/// Disks taken at once. More would share the same link and cost memory each.
const DISKS: usize = 2;

/// How long cleaning up waits for blocking work of a run that was dropped.
const SETTLE: Duration = Duration::from_secs(60);

/// The steps of a commit, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    WriteManifest,
    SyncPartial,
    Rename,
    SyncParent,
    /// Not a step: after the last.
    End,
}

/// How far the run is, which is what cleaning up goes by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Nothing is stored, or part of it. Undone by removing the partial.
    Storing,
    /// All is stored and nothing listed. Undone by removing the partial.
    Stored,
    /// Renamed, and whether that lasts is unknown. Never undone: the bitmaps of both sides are kept.
    Unknown,
    /// Durable and listed. Never undone.
    Committed,
    /// Cleaned up.
    Ended,
}

/// A backup under way.
pub(crate) struct DirectoryBackup {
    vm: VmName,
    point: PointId,
    vm_directory: Arc<Directory>,
    partial: Arc<Directory>,
    granularities: HashMap<(DiskName, Generation), Granularity>,
    disks: Vec<StoredDisk>,
    config: Vec<StoredConfig>,
    phase: Phase,
    stop_before: Option<Step>,
    lock: Option<Lock>,
}

impl DirectoryBackup {
    pub(crate) fn begin(
        target: &Directory,
        vm: &VmName,
        point: &PointId,
        stop_before: Option<Step>,
    ) -> Result<Self> {
        let vm_directory = target.directory_or_create(vm.as_str()).map_err(from_image)?;
        let lock = Lock::take(&vm_directory, vm)?;
        // Under the lock no partial has a living owner.
        for name in vm_directory.names().map_err(from_image)? {
            if layout::is_partial(&name) {
                tracing::info!(%vm, name, "removing what an earlier run left");
                vm_directory.remove_tree(&name).map_err(from_image)?;
            }
        }
        if vm_directory.contains(point.as_str()).map_err(from_image)? {
            let path = vm_directory.path().join(point.as_str());
            return Err(Error::new(ErrorKind::Io, format!("there is a point {} already", path.display())));
        }
        let partial = vm_directory.create_directory(&layout::partial(point)).map_err(from_image)?;
        Ok(Self {
            vm: vm.clone(),
            point: point.clone(),
            vm_directory: Arc::new(vm_directory),
            partial: Arc::new(partial),
            granularities: HashMap::new(),
            disks: Vec::new(),
            config: Vec::new(),
            phase: Phase::Storing,
            stop_before,
            lock: Some(lock),
        })
    }

    /// Opens what `volume` is an increment to.
    async fn below(&self, volume: &Volume) -> Result<Option<Arc<Below>>> {
        if volume.bitmap_mode != BitmapMode::Reuse {
            return Ok(None);
        }
        let name = volume.name.clone();
        let base = volume.base.clone().ok_or_else(|| {
            Error::new(ErrorKind::Io, format!("disk {name} is an increment, but to which point was not told"))
        })?;
        let changes = self.granularities.get(&(name.clone(), base.clone())).copied();
        let size = volume.source.size();
        let (vm, directory) = (self.vm.clone(), Arc::clone(&self.vm_directory));
        blocking(move || {
            let chain = open_whole(&directory, &vm, &base, &name)?;
            if chain.size() != size {
                let context =
                    format!("disk {name} has {size} bytes, and {} at its base {base}", chain.size());
                return Err(Error::new(ErrorKind::Io, context));
            }
            let cluster = Qcow2Writer::cluster_for(size, changes);
            let base = chain.as_base(&base);
            Ok(base.map(|base| Arc::new(Below { chain, base, cluster })))
        })
        .await
    }

    async fn store_config(&mut self, config: &[ConfigFile]) -> Result<()> {
        restore::check_config(config.iter().map(|file| Length::new(file.content.len() as u64)))
            .map_err(|what| Error::new(ErrorKind::InvalidInput, what))?;
        let (files, partial) = (config.to_vec(), Arc::clone(&self.partial));
        self.config = blocking(move || {
            let directory = partial.create_directory(layout::CONFIG).map_err(from_image)?;
            for file in &files {
                directory.write_file(file.name.as_str(), &file.content).map_err(from_image)?;
            }
            directory.sync().map_err(from_image)?;
            let stored = files.into_iter().map(|file| StoredConfig {
                length: Length::new(file.content.len() as u64),
                blake3: hex(&file.content),
                name: file.name,
                role: file.role,
            });
            Ok(stored.collect())
        })
        .await?;
        Ok(())
    }

    async fn store_disks(&mut self, volumes: Vec<Volume>) -> Result<()> {
        let mut tasks = JoinSet::new();
        let mut stored: Vec<Option<StoredDisk>> = volumes.iter().map(|_| None).collect();
        let mut waiting = volumes.into_iter().enumerate();
        let mut failed = None;
        loop {
            while failed.is_none() && tasks.len() < DISKS {
                let Some((index, volume)) = waiting.next() else { break };
                let task = DiskTask {
                    below: self.below(&volume).await?,
                    name: volume.name,
                    source: volume.source,
                    directory: Arc::clone(&self.partial),
                };
                tasks.spawn(async move { (index, disk::store(task).await) });
            }
            match tasks.join_next().await {
                None => break,
                Some(Ok((index, Ok(disk)))) => {
                    if let Some(place) = stored.get_mut(index) {
                        *place = Some(disk);
                    }
                }
                Some(Ok((_, Err(error)))) => {
                    failed.get_or_insert(error);
                    tasks.abort_all();
                }
                Some(Err(_)) => {
                    failed.get_or_insert(Error::new(ErrorKind::Cancelled, "the run is ending"));
                    tasks.abort_all();
                }
            }
        }
        match failed {
            Some(error) => Err(error),
            None => {
                self.disks = stored.into_iter().flatten().collect();
                Ok(())
            }
        }
    }

    /// The record must be of what was stored: it is what a restore goes by.
    fn check_record(&self, record: &PointRecord) -> Result<()> {
        let same = |disk: &StoredDisk| {
            record.disks.iter().any(|recorded| {
                recorded.name == disk.name
                    && recorded.size == disk.size
                    && recorded.base.as_ref() == disk.base.as_ref().map(|base| &base.point)
            })
        };
        let fits = record.vm == self.vm
            && record.id == self.point
            && record.disks.len() == self.disks.len()
            && self.disks.iter().all(same);
        if fits && self.phase == Phase::Stored {
            return Ok(());
        }
        let (vm, point) = (&self.vm, &self.point);
        Err(Error::new(
            ErrorKind::Io,
            format!("the record of {vm}/{point} is not of the disks that were stored"),
        ))
    }
}

/// Opens a disk at a point if the point is there and whole.
fn open_whole(directory: &Directory, vm: &VmName, point: &PointId, disk: &DiskName) -> Result<Chain> {
    let own = directory.directory(point.as_str()).map_err(crate::error::stored)?;
    let manifest = Manifest::read(&own, vm, point)?;
    Chain::open(directory, &manifest, disk)
}

/// What to answer for one disk: the newest offered generation that is held whole at this size, or why none is.
fn answer(directory: &Directory, found: &[target::Found], offer: &DiskOffer) -> Incremental {
    let full = |reason: String| Incremental::Full { granularity: None, reason };
    let mut why_not = None;
    for point in found.iter().rev() {
        let offered = offer.bitmaps.iter().find(|bitmap| bitmap.generation == point.id);
        let Some(offered) = offered else { continue };
        let chain = match &point.manifest {
            Ok(manifest) => {
                Chain::open(directory, manifest, &offer.name).map_err(|error| in_one_line(&error))
            }
            Err(error) => Err(in_one_line(error)),
        };
        let recorded = point.manifest.as_ref().ok().and_then(|manifest| {
            let disk = manifest.point.disks.iter().find(|disk| disk.name == offer.name)?;
            disk.granularity
        });
        match chain {
            // Then it is not the one that was made for this point.
            Ok(_) if recorded != Some(offered.granularity) => {
                why_not
                    .get_or_insert(format!("its bitmap is not the one that was made for point {}", point.id));
            }
            Ok(chain) if chain.size() == offer.size => return Incremental::Since(point.id.clone()),
            Ok(chain) => {
                why_not.get_or_insert(format!("size changed from {} to {} bytes", chain.size(), offer.size));
            }
            Err(damage) => {
                why_not.get_or_insert(format!("point {} is damaged: {damage}", point.id));
            }
        }
    }
    if let Some(reason) = why_not {
        return full(reason);
    }
    let Some(latest) = found.last() else { return full("no earlier point in this target".to_owned()) };
    let manifest = match (&latest.manifest, latest.damage()) {
        (Ok(manifest), _) => manifest,
        (_, damage) => {
            let damage = damage.unwrap_or_default();
            return full(format!("latest point {} is damaged: {damage}", latest.id));
        }
    };
    full(match manifest.disk(&offer.name) {
        None => format!("latest point {} does not have this disk", latest.id),
        Some(disk) if disk.size != offer.size => {
            format!("size changed from {} to {} bytes", disk.size, offer.size)
        }
        Some(_) => format!("no bitmap for the latest point {}", latest.id),
    })
}

#[async_trait]
impl Backup for DirectoryBackup {
    async fn backup_vm_query_incremental(&mut self, disks: &[DiskOffer]) -> Result<Vec<Incremental>> {
        for offer in disks {
            for bitmap in &offer.bitmaps {
                let key = (offer.name.clone(), bitmap.generation.clone());
                self.granularities.insert(key, bitmap.granularity);
            }
        }
        let (vm, directory, offers) = (self.vm.clone(), Arc::clone(&self.vm_directory), disks.to_vec());
        blocking(move || {
            let found = target::points(&directory, &vm)?;
            Ok(offers.iter().map(|offer| answer(&directory, &found, offer)).collect())
        })
        .await
    }

    async fn backup_vm(&mut self, config: &[ConfigFile], volumes: Vec<Volume>) -> Result<Vec<VolumeReport>> {
        self.store_config(config).await?;
        self.store_disks(volumes).await?;
        self.phase = Phase::Stored;
        Ok(self
            .disks
            .iter()
            .map(|disk| VolumeReport { name: disk.name.clone(), stored: disk.stored })
            .collect())
    }

    async fn commit(&mut self, record: &PointRecord) -> Result<()> {
        self.check_record(record)?;
        let commit = Commit {
            record: record.clone(),
            disks: self.disks.clone(),
            config: self.config.clone(),
            vm_directory: Arc::clone(&self.vm_directory),
            partial: Arc::clone(&self.partial),
            stop_before: self.stop_before,
        };
        // Set before the work begins: if this future is dropped, the work goes on and its end is unknown.
        self.phase = Phase::Unknown;
        let committed = blocking(move || commit.run()).await;
        self.phase = match &committed {
            Ok(()) => Phase::Committed,
            Err(error) if error.kind() == ErrorKind::CommitUnknown => Phase::Unknown,
            Err(_) => Phase::Stored,
        };
        committed
    }

    async fn backup_cleanup(&mut self) -> Result<()> {
        let phase = std::mem::replace(&mut self.phase, Phase::Ended);
        let lock = self.lock.take();
        if !matches!(phase, Phase::Storing | Phase::Stored) {
            return Ok(());
        }
        // Blocking work of a run that was dropped cannot be stopped, and could make a file while its directory is
        // being removed. Each holds the directory until it ends.
        let deadline = tokio::time::Instant::now() + SETTLE;
        while Arc::strong_count(&self.partial) > 1 && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let (directory, name) = (Arc::clone(&self.vm_directory), layout::partial(&self.point));
        blocking(move || {
            let _until_it_is_gone = lock;
            directory.remove_tree(&name).and_then(|()| directory.sync()).map_err(from_image)
        })
        .await
    }
}

/// A commit, with all that it needs, to be run in one go on a blocking thread.
struct Commit {
    record: PointRecord,
    disks: Vec<StoredDisk>,
    config: Vec<StoredConfig>,
    vm_directory: Arc<Directory>,
    partial: Arc<Directory>,
    stop_before: Option<Step>,
}

impl Commit {
    /// A place where a test can end the run as a crash would.
    fn reach(&self, step: Step) -> Result<()> {
        if self.stop_before != Some(step) {
            return Ok(());
        }
        let kind = if step == Step::SyncParent { ErrorKind::CommitUnknown } else { ErrorKind::Io };
        Err(Error::new(kind, format!("stopped before {step:?}")))
    }

    fn run(self) -> Result<()> {
        let (vm, id) = (&self.record.vm, &self.record.id);
        self.reach(Step::WriteManifest)?;
        // Under the lock nobody else takes a number. Points that cannot be read still have theirs, which may be the last ones.
        let found = target::points(&self.vm_directory, vm)?;
        let unknown = found.iter().filter(|found| found.manifest.is_err()).count() as u64;
        let last =
            found.iter().map(target::Found::sequence).max().unwrap_or_default().saturating_add(unknown);
        let manifest = Manifest {
            sequence: last.max(found.len() as u64).saturating_add(1),
            point: self.record.clone(),
            disks: self.disks.clone(),
            config: self.config.clone(),
        };
        manifest.write(&self.partial)?;
        self.reach(Step::SyncPartial)?;
        self.partial.sync().map_err(from_image)?;
        self.reach(Step::Rename)?;
        let (from, to) = (layout::partial(id), id.as_str());
        let path = self.vm_directory.path().join(to);
        let unknown = |error| {
            let context = format!("whether point {} lasts is unknown", path.display());
            Error::new(ErrorKind::CommitUnknown, context).because(error)
        };
        if let Err(error) = self.vm_directory.rename(&from, to) {
            // Over a network an error may come back for what was done all the same.
            let still_partial = self.vm_directory.contains(&from).unwrap_or(false);
            return Err(if still_partial { from_image(error) } else { unknown(error) });
        }
        self.reach(Step::SyncParent)?;
        self.vm_directory.sync().map_err(unknown)?;
        self.reach(Step::End)
    }
}
