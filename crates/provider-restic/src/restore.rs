//! Getting a point back.

use crate::{
    blob::{BlobKind, Id},
    error::{blocking, damaged},
    index::{self, Location},
    repository::Repository,
    snapshot::{self, Contents},
};
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{Arc, Mutex},
};
use stillpoint_model::{DiskName, Extent, ExtentKind, Length, Offset, Range};
use stillpoint_provider::{ConfigFile, Error, ErrorKind, PointRecord, Restore, Result, VolumeSource};
use tokio::sync::OnceCell;

/// Most that one read may ask for, as the contract says.
const MOST: Length = Length::new(32 << 20);
/// Most regions told at once.
const MOST_REGIONS: usize = 4096;
/// Bytes of chunks that are kept, since reads do not keep to their borders.
const CACHE: u64 = 24 << 20;

/// A point, open.
pub(crate) struct ResticRestore {
    repository: Arc<Repository>,
    contents: Contents,
}

impl ResticRestore {
    pub(crate) fn open(repository: Arc<Repository>, found: &snapshot::Found) -> Result<Self> {
        let trees = index::trees(&repository)?;
        let contents = Contents::open(&repository, &trees, &found.tree)?;
        let record = &contents.point.description.record;
        if record.vm != found.vm || record.id != found.point_id {
            return Err(damaged(format!(
                "the snapshot of {}/{} holds another point",
                found.vm, found.point_id
            )));
        }
        Ok(Self { repository, contents })
    }

    /// The chunks of a disk.
    pub(crate) fn chunks(&self, disk: &DiskName) -> Result<Chunks> {
        let record = &self.contents.point.description.record;
        let missing =
            || Error::new(ErrorKind::NotFound, format!("{}/{} has no disk {disk}", record.vm, record.id));
        let recorded = record.disks.iter().find(|recorded| recorded.name == *disk).ok_or_else(missing)?;
        let gone = || damaged(format!("disk {disk} is missing in the snapshot, or cut short"));
        let node = self.contents.disks.get(&snapshot::file_of(disk)).ok_or_else(gone)?;
        let chunk = self
            .contents
            .point
            .description
            .chunks
            .get(disk)
            .copied()
            .filter(|chunk| *chunk > 0)
            .ok_or_else(gone)?;
        let ids = node.content.clone().unwrap_or_default();
        if node.size != recorded.size.get() || ids.len() as u64 != node.size.div_ceil(chunk) {
            return Err(gone());
        }
        Ok(Chunks { ids, chunk, size: node.size })
    }
}

/// A disk as chunks.
pub(crate) struct Chunks {
    pub ids: Vec<Id>,
    pub chunk: u64,
    pub size: u64,
}

impl Chunks {
    /// Length of the chunk at `index`.
    pub(crate) fn length(&self, index: usize) -> u64 {
        let start = (index as u64).saturating_mul(self.chunk);
        self.chunk.min(self.size.saturating_sub(start))
    }

    /// The ids of chunks of nothing but zeroes.
    fn zeroes(&self) -> [Id; 2] {
        let of = |length: u64| Id::of(&vec![0; usize::try_from(length).unwrap_or(0)]);
        let whole = self.chunk.min(self.size);
        let last = self.size % self.chunk;
        let whole = of(whole);
        [whole, if last == 0 { whole } else { of(last) }]
    }
}

#[async_trait]
impl Restore for ResticRestore {
    fn record(&self) -> &PointRecord {
        &self.contents.point.description.record
    }

    async fn config(&self) -> Result<Vec<ConfigFile>> {
        let mut files = Vec::new();
        for entry in self.contents.point.config.clone() {
            let node = self.contents.config.get(entry.name.as_str());
            let node = node.ok_or_else(|| damaged(format!("/config/{} is missing", entry.name)))?;
            let (repository, ids, size) =
                (Arc::clone(&self.repository), node.content.clone().unwrap_or_default(), node.size);
            let content = blocking(move || snapshot::read_content(&repository, &ids)).await?;
            if content.len() as u64 != size {
                return Err(damaged(format!("/config/{} is cut short", entry.name)));
            }
            files.push(ConfigFile { name: entry.name, role: entry.role, content });
        }
        Ok(files)
    }

    async fn volume(&self, disk: &DiskName) -> Result<Arc<dyn VolumeSource>> {
        let chunks = self.chunks(disk)?;
        let repository = Arc::clone(&self.repository);
        let volume = blocking(move || StoredVolume::open(repository, chunks)).await?;
        Ok(Arc::new(volume))
    }
}

type Cached = Arc<OnceCell<Bytes>>;

/// A disk at a stored point.
struct StoredVolume {
    repository: Arc<Repository>,
    chunks: Chunks,
    zeroes: [Id; 2],
    places: HashMap<Id, Location>,
    cache: Mutex<VecDeque<(usize, Cached)>>,
}

impl StoredVolume {
    fn open(repository: Arc<Repository>, chunks: Chunks) -> Result<Self> {
        let wanted: HashSet<Id> = chunks.ids.iter().copied().collect();
        let places = index::locate(&repository, BlobKind::Data, &wanted)?;
        let zeroes = chunks.zeroes();
        Ok(Self { repository, zeroes, places, cache: Mutex::default(), chunks })
    }

    fn cached(&self, index: usize) -> Result<Cached> {
        let mut cache = self.cache.lock().map_err(|_| damaged("another read failed"))?;
        if let Some((_, found)) = cache.iter().find(|(cached, _)| *cached == index) {
            return Ok(Arc::clone(found));
        }
        let most = usize::try_from(CACHE / self.chunks.chunk).unwrap_or(1).clamp(4, 64);
        while cache.len() >= most {
            cache.pop_front();
        }
        let cell = Cached::default();
        cache.push_back((index, Arc::clone(&cell)));
        Ok(cell)
    }

    async fn chunk(&self, index: usize) -> Result<Bytes> {
        let cell = self.cached(index)?;
        let read = cell.get_or_try_init(async || {
            let at = (index as u64).saturating_mul(self.chunks.chunk);
            let lost = || damaged(format!("what is at {at} is in no index"));
            let id = *self.chunks.ids.get(index).ok_or_else(lost)?;
            let place = *self.places.get(&id).ok_or_else(lost)?;
            let (repository, length) = (Arc::clone(&self.repository), self.chunks.length(index));
            blocking(move || {
                let content = repository.read_blob(BlobKind::Data, &id, &place).map_err(|error| {
                    Error::new(error.kind(), format!("what is at {at} is damaged: {error}"))
                })?;
                if content.len() as u64 == length {
                    return Ok(content);
                }
                Err(damaged(format!("what is at {at} has not the length of a chunk")))
            })
            .await
        });
        read.await.cloned()
    }

    fn index_of(&self, offset: u64) -> usize {
        usize::try_from(offset / self.chunks.chunk).unwrap_or(usize::MAX)
    }
}

#[async_trait]
impl VolumeSource for StoredVolume {
    fn size(&self) -> Length {
        Length::new(self.chunks.size)
    }

    async fn regions(&self, from: Offset) -> Result<Vec<Extent>> {
        let mut regions: Vec<Extent> = Vec::new();
        let mut at = from.get();
        while at < self.chunks.size && regions.len() < MOST_REGIONS {
            let index = self.index_of(at);
            let end =
                (index as u64).saturating_add(1).saturating_mul(self.chunks.chunk).min(self.chunks.size);
            let zero = self.chunks.ids.get(index).is_some_and(|id| self.zeroes.contains(id));
            let kind = if zero { ExtentKind::Zero } else { ExtentKind::Data };
            let range = |start, end| {
                Range::between(Offset::new(start), Offset::new(end))
                    .map_err(|error| damaged("a chunk").because(error))
            };
            match regions.last_mut() {
                Some(last) if last.kind == kind => last.range = range(last.range.start().get(), end)?,
                _ => regions.push(Extent { range: range(at, end)?, kind }),
            }
            at = end;
        }
        Ok(regions)
    }

    async fn read(&self, range: Range) -> Result<Bytes> {
        if range.length() > MOST || range.end().get() > self.chunks.size {
            return Err(Error::new(
                ErrorKind::Io,
                format!("a read of {range} is too large, or beyond the disk"),
            ));
        }
        let (first, mut bytes) = (self.index_of(range.start().get()), BytesMut::new());
        let part = |index: usize, chunk: &Bytes| {
            let base = (index as u64).saturating_mul(self.chunks.chunk);
            let start = range.start().get().saturating_sub(base).min(chunk.len() as u64);
            let end = range.end().get().saturating_sub(base).min(chunk.len() as u64);
            let place = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
            chunk.slice(place(start)..place(end))
        };
        let last = self.index_of(range.end().get().saturating_sub(1));
        if first == last {
            return Ok(part(first, &self.chunk(first).await?));
        }
        for index in first..=last {
            bytes.extend_from_slice(&part(index, &self.chunk(index).await?));
        }
        Ok(bytes.freeze())
    }

    async fn release(&self, _range: Range) -> Result<()> {
        Ok(())
    }
}
