//! Making a point.

use crate::{
    blob::{BlobKind, Id},
    chunk,
    disk::{self, DiskTask, Parent, Workshop},
    error::{blocking, in_one_line},
    index::{Index, Location},
    lock::Lock,
    pack::Saver,
    repository::Repository,
    snapshot::{self, ConfigEntry, Description, Listing, PointFile, SnapshotFile},
    tree::TreeWriter,
};
use async_trait::async_trait;
use std::{collections::HashMap, sync::Arc, time::Duration};
use stillpoint_model::{DiskName, Granularity, Length, PointId, VmName};
use stillpoint_provider::{
    Backup, BitmapMode, ConfigFile, DiskOffer, Error, ErrorKind, Incremental, PointRecord, Result, Volume,
    VolumeReport,
};

/// How long a run that has failed, or was cancelled, waits for its store.
const CLEANUP: Duration = Duration::from_secs(4);

/// Chunk size of a disk that has an earlier point, so that its chunks go on matching.
#[derive(Clone)]
struct EarlierDisk {
    content: Arc<[Id]>,
    size: Length,
    chunk: Granularity,
}

/// The disks of an earlier point, or why it is not whole.
type EarlierPoint = std::result::Result<HashMap<DiskName, EarlierDisk>, String>;

/// A disk that is stored.
struct StoredDisk {
    name: DiskName,
    size: Length,
    chunk: Granularity,
    base: Option<PointId>,
    content: Vec<Id>,
}

/// The backup of one VM.
pub(crate) struct ResticBackup {
    repository: Arc<Repository>,
    lock: Option<Lock>,
    vm: VmName,
    point: PointId,
    listing: Listing,
    /// Of the disks that were asked about, by the answer that was given.
    bases: HashMap<(DiskName, PointId), EarlierDisk>,
    /// Chunk sizes to use for full reads.
    chunks: HashMap<DiskName, Granularity>,
    index: Option<Index>,
    workshop: Option<Arc<Workshop>>,
    saver: Saver,
    disks: Vec<StoredDisk>,
    config: Vec<(ConfigEntry, Vec<u8>)>,
    committed: bool,
}

impl ResticBackup {
    pub(crate) async fn begin(repository: Arc<Repository>, vm: &VmName, point: &PointId) -> Result<Self> {
        let lock = Lock::take(&repository, false).await?;
        let (opened, name) = (Arc::clone(&repository), vm.clone());
        let read = blocking(move || Ok((snapshot::list(&opened, Some(&name))?, Index::load(&opened)?))).await;
        let (listing, index) = match read {
            Ok(read) => read,
            Err(error) => {
                lock.release().await;
                return Err(error);
            }
        };
        Ok(Self {
            saver: Saver::new(Arc::clone(&repository)),
            repository,
            lock: Some(lock),
            vm: vm.clone(),
            point: point.clone(),
            listing,
            bases: HashMap::new(),
            chunks: HashMap::new(),
            index: Some(index),
            workshop: None,
            disks: Vec::new(),
            config: Vec::new(),
            committed: false,
        })
    }

    /// What to answer for one disk: the newest offered generation that is held whole at this size, or why none is.
    fn answer(&mut self, offer: &DiskOffer, points: &[(PointId, EarlierPoint)]) -> Incremental {
        let mut why_not = None;
        for (id, earlier) in points.iter().rev() {
            let disk = earlier.as_ref().ok().and_then(|disks| disks.get(&offer.name));
            if let Some(disk) = disk {
                self.chunks.entry(offer.name.clone()).or_insert(disk.chunk);
            }
            let Some(offered) = offer.bitmaps.iter().find(|bitmap| bitmap.generation == *id) else {
                continue;
            };
            let index = self.index.as_ref();
            let missing = |disk: &EarlierDisk| {
                disk.content.iter().find(|id| !index.is_some_and(|index| index.known.is_indexed(id))).copied()
            };
            let why = match (earlier, disk) {
                (Err(why), _) => format!("point {id} is damaged: {why}"),
                (Ok(_), None) => format!("point {id} does not have this disk"),
                (_, Some(disk)) if disk.size != offer.size => {
                    format!("size changed from {} to {} bytes", disk.size, offer.size)
                }
                (_, Some(disk)) if offered.granularity.get() % disk.chunk.get() != 0 => format!(
                    "its bitmap tells changes by {} bytes, but its chunks have {}",
                    offered.granularity.get(),
                    disk.chunk.get()
                ),
                (_, Some(disk)) => match missing(disk) {
                    Some(blob) => format!("point {id} is damaged: data blob {blob} is in no index"),
                    None => {
                        self.bases.insert((offer.name.clone(), id.clone()), disk.clone());
                        self.chunks.insert(offer.name.clone(), disk.chunk);
                        return Incremental::Since(id.clone());
                    }
                },
            };
            why_not.get_or_insert(why);
        }
        let reason = why_not.unwrap_or_else(|| match points.last() {
            None => "no earlier point in this target".to_owned(),
            Some((id, Err(why))) => format!("latest point {id} is damaged: {why}"),
            Some((id, Ok(disks))) => match disks.get(&offer.name) {
                None => format!("latest point {id} does not have this disk"),
                Some(disk) if disk.size != offer.size => {
                    format!("size changed from {} to {} bytes", disk.size, offer.size)
                }
                Some(_) => format!("no bitmap for the latest point {id}"),
            },
        });
        let chunk = *self.chunks.entry(offer.name.clone()).or_insert_with(|| chunk::size_for(offer.size));
        Incremental::Full { granularity: Some(chunk), reason }
    }

    /// The record must be of what was stored: it is what a restore goes by.
    fn check_record(&self, record: &PointRecord) -> Result<()> {
        let same = |disk: &StoredDisk| {
            record.disks.iter().any(|recorded| {
                recorded.name == disk.name && recorded.size == disk.size && recorded.base == disk.base
            })
        };
        let fits = record.vm == self.vm
            && record.id == self.point
            && record.disks.len() == self.disks.len()
            && self.disks.iter().all(same);
        if fits {
            return Ok(());
        }
        let (vm, point) = (&self.vm, &self.point);
        Err(Error::new(
            ErrorKind::Io,
            format!("the record of {vm}/{point} is not of the disks that were stored"),
        ))
    }

    async fn save(&mut self, kind: BlobKind, content: Vec<u8>) -> Result<Id> {
        let workshop = self.workshop()?;
        let (id, sealed) = match kind {
            BlobKind::Data => blocking(move || workshop.work(&content)).await?,
            BlobKind::Tree => blocking(move || workshop.seal_tree(&content)).await?,
        };
        if let Some(sealed) = sealed {
            self.saver.add(kind, id, sealed).await?;
        }
        Ok(id)
    }

    fn workshop(&self) -> Result<Arc<Workshop>> {
        self.workshop.clone().ok_or_else(ended)
    }

    /// Writes everything but the snapshot.
    async fn save_tree(&mut self, record: &PointRecord) -> Result<(Id, Description)> {
        let time = &record.time;
        self.disks.sort_by_key(|disk| snapshot::file_of(&disk.name));
        let mut disks = TreeWriter::new(time);
        for disk in &self.disks {
            disks.file(&snapshot::file_of(&disk.name), disk.size.get(), &disk.content)?;
        }
        let disks = self.save(BlobKind::Tree, disks.finish()).await?;
        let mut files = std::mem::take(&mut self.config);
        files.sort_by(|a, b| a.0.name.cmp(&b.0.name));
        let mut config = TreeWriter::new(time);
        let mut entries = Vec::new();
        for (entry, content) in files {
            let size = content.len() as u64;
            let blob =
                if content.is_empty() { None } else { Some(self.save(BlobKind::Data, content).await?) };
            config.file(entry.name.as_str(), size, blob.as_slice())?;
            entries.push(entry);
        }
        let config = self.save(BlobKind::Tree, config.finish()).await?;
        let description = Description {
            sequence: self
                .listing
                .points
                .iter()
                .map(snapshot::Found::sequence)
                .max()
                .unwrap_or(0)
                .saturating_add(1),
            stored: Length::new(self.saver.added()),
            chunks: self.disks.iter().map(|disk| (disk.name.clone(), disk.chunk.get().into())).collect(),
            record: record.clone(),
        };
        let point = PointFile::new(description.clone(), entries);
        let json = serde_json::to_vec_pretty(&point)
            .map_err(|error| Error::new(ErrorKind::Io, "the point cannot be described").because(error))?;
        let size = json.len() as u64;
        let point = self.save(BlobKind::Data, json).await?;
        let mut root = TreeWriter::new(time);
        root.directory(snapshot::CONFIG, &config)?;
        root.directory(snapshot::DISKS, &disks)?;
        root.file(snapshot::POINT, size, &[point])?;
        let root = self.save(BlobKind::Tree, root.finish()).await?;
        self.saver.finish().await?;
        Ok((root, description))
    }
}

fn ended() -> Error {
    Error::new(ErrorKind::Io, "calls of a backup came out of order")
}

/// The disks of an earlier point.
fn earlier_disks(
    repository: &Repository,
    trees: &HashMap<Id, Location>,
    found: &snapshot::Found,
) -> Result<HashMap<DiskName, EarlierDisk>> {
    let point = found.point.as_ref().map_err(|why| crate::error::damaged(why.clone()))?;
    let mut nodes = snapshot::read_disks(repository, trees, &found.tree)?;
    let mut disks = HashMap::new();
    for record in &point.record.disks {
        let missing = || crate::error::damaged(format!("disk {} is missing or cut short", record.name));
        let node = nodes.remove(&snapshot::file_of(&record.name)).ok_or_else(missing)?;
        let chunk = point.chunks.get(&record.name).copied().ok_or_else(missing)?;
        let content = node.content.unwrap_or_default();
        let whole =
            node.size == record.size.get() && content.len() as u64 == node.size.div_ceil(chunk.max(1));
        let chunk = Granularity::try_from(chunk).ok().filter(|_| whole).ok_or_else(missing)?;
        disks.insert(record.name.clone(), EarlierDisk { content: content.into(), size: record.size, chunk });
    }
    Ok(disks)
}

#[async_trait]
impl Backup for ResticBackup {
    async fn backup_vm_query_incremental(&mut self, disks: &[DiskOffer]) -> Result<Vec<Incremental>> {
        let offered = |id: &PointId| {
            disks.iter().any(|disk| disk.bitmaps.iter().any(|bitmap| bitmap.generation == *id))
        };
        let latest = self.listing.points.last().map(|point| point.point_id.clone());
        let of_use =
            |found: &&snapshot::Found| offered(&found.point_id) || latest.as_ref() == Some(&found.point_id);
        let found: Vec<_> = self.listing.points.iter().filter(of_use).cloned().collect();
        let (repository, index) = (Arc::clone(&self.repository), self.index.take().ok_or_else(ended)?);
        let (index, points) = blocking(move || {
            let earlier = |found: snapshot::Found| {
                let disks = earlier_disks(&repository, &index.trees, &found);
                (found.point_id, disks.map_err(|error| in_one_line(&error)))
            };
            let points: Vec<_> = found.into_iter().map(earlier).collect();
            Ok((index, points))
        })
        .await?;
        self.index = Some(index);
        let answers = disks.iter().map(|offer| self.answer(offer, &points)).collect();
        let Index { known, .. } = self.index.take().ok_or_else(ended)?;
        self.workshop =
            Some(Arc::new(Workshop::new(self.repository.key.clone(), self.repository.compress, known)));
        Ok(answers)
    }

    async fn backup_vm(&mut self, config: &[ConfigFile], volumes: Vec<Volume>) -> Result<Vec<VolumeReport>> {
        let workshop = self.workshop()?;
        let (mut reports, mut last) = (Vec::new(), None);
        for volume in volumes {
            let base = match (&volume.bitmap_mode, &volume.base) {
                (BitmapMode::Reuse, Some(base)) => {
                    let base = self.bases.get(&(volume.name.clone(), base.clone()));
                    Some(base.cloned().ok_or_else(|| {
                        Error::new(
                            ErrorKind::Io,
                            format!("disk {} comes with a base that was not agreed on", volume.name),
                        )
                    })?)
                }
                _ => None,
            };
            let size = volume.source.size();
            let default = || self.chunks.get(&volume.name).copied().unwrap_or_else(|| chunk::size_for(size));
            let chunk = base.as_ref().map_or_else(default, |base| base.chunk);
            let incremental = base.is_some();
            let task = DiskTask {
                source: Arc::clone(&volume.source),
                chunk,
                parent: base.map(|base| Parent { content: base.content }),
            };
            let before = self.saver.added();
            let source = Arc::clone(&volume.source);
            // A store that does not answer must not keep a run that was cancelled.
            let content = tokio::select! {
                stored = disk::store(task, &workshop, &mut self.saver) => stored?,
                error = source.ended() => return Err(error),
            };
            let stored = Length::new(self.saver.added().saturating_sub(before));
            reports.push(VolumeReport { name: volume.name.clone(), stored });
            last = Some(source);
            let base = volume.base.filter(|_| incremental);
            self.disks.push(StoredDisk { name: volume.name, size, chunk, base, content });
        }
        if let Some(last) = last {
            tokio::select! {
                settled = self.saver.settle() => settled?,
                error = last.ended() => return Err(error),
            }
        }
        self.config = config
            .iter()
            .map(|file| (ConfigEntry { name: file.name.clone(), role: file.role }, file.content.clone()))
            .collect();
        Ok(reports)
    }

    async fn commit(&mut self, record: &PointRecord) -> Result<()> {
        self.check_record(record)?;
        if self.workshop.is_none() {
            // A VM without disks is not asked about increments.
            let Index { known, .. } = self.index.take().ok_or_else(ended)?;
            self.workshop =
                Some(Arc::new(Workshop::new(self.repository.key.clone(), self.repository.compress, known)));
        }
        let (tree, description) = self.save_tree(record).await?;
        // Somebody who did not see our lock could have removed what this point is made of.
        match &self.lock {
            Some(lock) => lock.check().await?,
            None => return Err(ended()),
        }
        let bases: Vec<_> = self.disks.iter().filter_map(|disk| disk.base.as_ref()).collect();
        let parent = self.listing.points.iter().rev().find(|point| bases.contains(&&point.point_id));
        let snapshot = SnapshotFile {
            time: record.time.clone(),
            parent: parent.map(|parent| parent.id),
            tree,
            paths: vec![format!("/{}", snapshot::DISKS)],
            hostname: self.vm.to_string(),
            username: "stillpoint".to_owned(),
            tags: Some(vec![snapshot::TAG.to_owned(), snapshot::point_tag(&self.point)]),
            program_version: format!("stillpoint {}", record.stillpoint_version),
            description: serde_json::to_string(&description).ok(),
        };
        let repository = Arc::clone(&self.repository);
        stillpoint_failpoint::reached("restic-snapshot");
        // Should this future be dropped, the snapshot may be written all the same, and the next run finds it.
        self.committed = true;
        let written = blocking(move || snapshot::write(&repository, &snapshot)).await;
        self.committed = !matches!(&written, Err(error) if error.kind() != ErrorKind::CommitUnknown);
        written.map(|_| ())
    }

    async fn backup_cleanup(&mut self) -> Result<()> {
        let kept = match self.committed {
            true => Ok(()),
            false => tokio::time::timeout(CLEANUP, self.saver.abandon()).await.unwrap_or_else(|_| {
                Err(Error::new(
                    ErrorKind::Io,
                    "the repository does not answer; what was stored is left to prune",
                ))
            }),
        };
        if let Some(lock) = self.lock.take()
            && tokio::time::timeout(CLEANUP, lock.release()).await.is_err()
        {
            tracing::warn!("the repository does not answer; our lock on it ends by itself");
        }
        kept
    }
}
