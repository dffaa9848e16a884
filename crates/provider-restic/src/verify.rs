//! Reading everything again and comparing it with what was written.

use crate::{
    blob::{BlobKind, Id},
    crypto,
    error::{blocking, damaged, in_one_line, stored},
    index::{self, Index, IndexPack, Location},
    pack,
    repository::Repository,
    restore::ResticRestore,
    snapshot,
    store::Folder,
};
use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};
use stillpoint_buffer as buffer;
use stillpoint_model::{DiskName, Length, Offset};
use stillpoint_provider::{Depth, Finding, Progress, Restore as _, Result, VerifyReport};

/// Findings that are told; a repository that is gone would have a million.
const MOST_FINDINGS: usize = 1000;

/// Blobs that were read and found good.
#[derive(Default)]
pub(crate) struct Verified(Mutex<HashSet<Id>>);

impl Verified {
    fn has(&self, id: &Id) -> bool {
        self.0.lock().is_ok_and(|good| good.contains(id))
    }

    fn add(&self, ids: impl IntoIterator<Item = Id>) {
        if let Ok(mut good) = self.0.lock() {
            good.extend(ids);
        }
    }
}

/// What is shared by the threads that verify.
struct Work {
    repository: Arc<Repository>,
    verified: Arc<Verified>,
    progress: Arc<dyn Progress>,
    abandoned: Arc<AtomicBool>,
    report: Mutex<VerifyReport>,
}

impl Work {
    fn find(&self, disk: Option<&DiskName>, offset: Option<u64>, what: String) {
        if let Ok(mut report) = self.report.lock()
            && report.findings.len() < MOST_FINDINGS
        {
            report.findings.push(Finding { disk: disk.cloned(), offset: offset.map(Offset::new), what });
        }
    }

    fn checked(&self, bytes: u64) {
        self.progress.advanced(Length::new(bytes));
        if let Ok(mut report) = self.report.lock() {
            report.checked = report.checked.saturating_add(Length::new(bytes));
        }
    }

    /// Does `work` for each item, on all cores. Each has memory that is used again.
    fn each<T: Sync>(&self, items: &[T], work: impl Fn(&T, &mut Vec<u8>) + Sync) {
        let next = AtomicUsize::new(0);
        let run = || {
            let mut room = Vec::new();
            while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                if self.abandoned.load(Ordering::Relaxed) {
                    return;
                }
                work(item, &mut room);
            }
        };
        // One more than cores: one waits for the store while the others work.
        let threads = thread::available_parallelism().map_or(2, usize::from).min(items.len());
        thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(run);
            }
            run();
        });
    }
}

/// Runs `check` on a thread of its own, and stops it when nobody waits for it any more.
async fn run(
    repository: Arc<Repository>,
    verified: Arc<Verified>,
    progress: Arc<dyn Progress>,
    check: impl FnOnce(&Work) -> Result<()> + Send + 'static,
) -> Result<VerifyReport> {
    struct Abandon(Arc<AtomicBool>);
    impl Drop for Abandon {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let abandon = Abandon(Arc::default());
    let work =
        Work { repository, verified, progress, abandoned: Arc::clone(&abandon.0), report: Mutex::default() };
    blocking(move || {
        check(&work)?;
        work.report.into_inner().map_err(|_| damaged("verifying failed"))
    })
    .await
}

/// All data of a point.
pub(crate) async fn point(
    repository: Arc<Repository>,
    found: snapshot::Found,
    verified: Arc<Verified>,
    progress: Arc<dyn Progress>,
) -> Result<VerifyReport> {
    let opened = Arc::clone(&repository);
    let restore = blocking(move || Ok(ResticRestore::open(opened, &found))).await?;
    let restore = match restore {
        Ok(restore) => restore,
        Err(error) => {
            let finding = Finding { disk: None, offset: None, what: in_one_line(&error) };
            return Ok(VerifyReport { findings: vec![finding], ..VerifyReport::default() });
        }
    };
    let config = restore.config().await.err();
    run(repository, verified, progress, move |work| {
        if let Some(error) = config {
            work.find(None, None, in_one_line(&error));
        }
        verify_disks(work, &restore)
    })
    .await
}

/// A chunk to verify, with the first place where it stands.
struct Wanted {
    id: Id,
    disk: DiskName,
    at: u64,
    length: u64,
}

fn verify_disks(work: &Work, restore: &ResticRestore) -> Result<()> {
    let (mut wanted, mut seen) = (Vec::new(), HashSet::new());
    let mut total = 0u64;
    for disk in &restore.record().disks {
        let chunks = match restore.chunks(&disk.name) {
            Ok(chunks) => chunks,
            Err(error) => {
                work.find(Some(&disk.name), None, in_one_line(&error));
                continue;
            }
        };
        for (index, id) in chunks.ids.iter().enumerate() {
            // Chunks of one content have one length, whatever disk they are of.
            if seen.insert(*id) {
                let (at, length) = ((index as u64).saturating_mul(chunks.chunk), chunks.length(index));
                total = total.saturating_add(length);
                wanted.push(Wanted { id: *id, disk: disk.name.clone(), at, length });
            }
        }
    }
    drop(seen);
    work.progress.total(Length::new(total));
    let ids = wanted.iter().map(|chunk| chunk.id).collect();
    let places = index::locate(&work.repository, BlobKind::Data, &ids)?;
    let mut placed: Vec<(Location, Wanted)> = Vec::with_capacity(wanted.len());
    for chunk in wanted {
        match places.get(&chunk.id) {
            Some(place) => placed.push((*place, chunk)),
            None => {
                work.find(Some(&chunk.disk), Some(chunk.at), format!("data blob {} is in no index", chunk.id))
            }
        }
    }
    placed.sort_by_key(|(place, _)| (place.pack, place.offset));
    work.each(&placed, |(place, chunk), _| {
        if !work.verified.has(&chunk.id) {
            match work.repository.read_blob(BlobKind::Data, &chunk.id, place) {
                Ok(content) if content.len() as u64 == chunk.length => work.verified.add([chunk.id]),
                Ok(_) => {
                    work.find(Some(&chunk.disk), Some(chunk.at), "has not the length of a chunk".to_owned())
                }
                Err(error) => work.find(Some(&chunk.disk), Some(chunk.at), in_one_line(&error)),
            }
        }
        work.checked(chunk.length);
    });
    Ok(())
}

/// The whole repository: every file of it that has a meaning, whoever made it.
pub(crate) async fn target(
    repository: Arc<Repository>,
    depth: Depth,
    verified: Arc<Verified>,
    progress: Arc<dyn Progress>,
) -> Result<VerifyReport> {
    run(repository, verified, progress, move |work| {
        verify_keys(work)?;
        let packs = verify_index(work)?;
        verify_snapshots(work)?;
        let packs = match depth {
            Depth::Structure => Vec::new(),
            Depth::Sample(percent) => sample(packs, percent),
            Depth::Full => packs,
        };
        let total: u64 = packs.iter().map(|pack| pack::length(&pack.blobs)).sum();
        work.progress.total(Length::new(total));
        work.each(&packs, |pack, room| {
            match verify_pack(work, pack, room) {
                Ok(()) => work.verified.add(pack.blobs.iter().map(|blob| blob.id)),
                Err(error) => work.find(None, None, format!("pack {}: {}", pack.id, in_one_line(&error))),
            }
            work.checked(pack::length(&pack.blobs));
        });
        Ok(())
    })
    .await
}

/// Every name is the hash of what it names, so a sample by names is a random one. Another time it is another one.
fn sample(mut packs: Vec<IndexPack>, percent: u8) -> Vec<IndexPack> {
    let salt = jiff::Timestamp::now().as_nanosecond().to_be_bytes();
    let drawn = |pack: &IndexPack| {
        let mut bytes = pack.id.bytes().to_vec();
        bytes.extend(salt);
        Id::of(&bytes)
    };
    packs.sort_by_cached_key(drawn);
    packs.truncate(packs.len().saturating_mul(percent.into()).div_ceil(100));
    packs
}

fn verify_keys(work: &Work) -> Result<()> {
    let failed = |error| stored("cannot list the keys", error);
    for (name, _) in work.repository.store.list(Folder::Keys).map_err(failed)? {
        match work.repository.store.read(Folder::Keys, &name) {
            Ok(content) if Id::of(&content).to_string() == name => {}
            Ok(_) => work.find(None, None, format!("keys/{name} is not what was written")),
            Err(error) => work.find(None, None, format!("keys/{name} cannot be read: {error}")),
        }
    }
    Ok(())
}

/// Each index can be read, and each pack that one names is there, as long as it has to be. Returns the packs.
fn verify_index(work: &Work) -> Result<Vec<IndexPack>> {
    let list = |folder| {
        work.repository.store.list(folder).map_err(|error| stored("cannot list the repository", error))
    };
    let sizes: HashMap<String, u64> = list(Folder::Data)?.into_iter().collect();
    let packs: Mutex<HashMap<Id, IndexPack>> = Mutex::default();
    work.each(&list(Folder::Index)?, |(name, _), _| match index::read(&work.repository, name) {
        Ok(file) => {
            if let Ok(mut packs) = packs.lock() {
                packs.extend(file.packs.into_iter().map(|pack| (pack.id, pack)));
            }
        }
        Err(error) => work.find(None, None, in_one_line(&error)),
    });
    let packs = packs.into_inner().map_err(|_| damaged("reading the index failed"))?;
    let mut there = Vec::with_capacity(packs.len());
    for pack in packs.into_values() {
        let expected = pack::length(&pack.blobs);
        match sizes.get(&pack.id.to_string()) {
            Some(size) if *size == expected => there.push(pack),
            Some(size) => {
                work.find(None, None, format!("pack {} has {size} bytes, not {expected}", pack.id));
            }
            None => work.find(None, None, format!("pack {} is missing", pack.id)),
        }
    }
    Ok(there)
}

/// All that snapshots are made of is in the index.
fn verify_snapshots(work: &Work) -> Result<()> {
    let index = match Index::load(&work.repository) {
        Ok(index) => index,
        // That is a finding already.
        Err(_) => return Ok(()),
    };
    let mut seen = HashSet::new();
    for (name, snapshot) in snapshot::read_all(&work.repository)? {
        let snapshot = match snapshot {
            Ok(snapshot) => snapshot,
            Err(error) => {
                work.find(None, None, in_one_line(&error));
                continue;
            }
        };
        let mut trees = vec![snapshot.tree];
        while let Some(id) = trees.pop() {
            if !seen.insert(id) {
                continue;
            }
            match snapshot::read_tree(&work.repository, &index.trees, &id) {
                Ok(tree) => {
                    for node in tree.nodes {
                        trees.extend(node.subtree);
                        let content = node.content.unwrap_or_default();
                        let missing = content.iter().find(|id| !index.known.is_indexed(id));
                        if let Some(missing) = missing {
                            work.find(
                                None,
                                None,
                                format!("snapshot {name}: {}: data blob {missing} is in no index", node.name),
                            );
                        }
                    }
                }
                Err(error) => work.find(None, None, format!("snapshot {name}: {}", in_one_line(&error))),
            }
        }
    }
    Ok(())
}

fn verify_pack(work: &Work, pack: &IndexPack, content: &mut Vec<u8>) -> Result<()> {
    let read = work.repository.store.read_into(Folder::Data, &pack.id.to_string(), content);
    read.map_err(|error| stored("cannot be read", error))?;
    if Id::of(content) != pack.id {
        return Err(damaged("is not what was written"));
    }
    let mut blobs = pack.blobs.clone();
    blobs.sort_by_key(|blob| blob.offset);
    if pack::read_header(&work.repository.key, content)? != blobs {
        return Err(damaged("holds other blobs than the index says"));
    }
    for blob in blobs {
        let start = usize::try_from(blob.offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(usize::try_from(blob.length).unwrap_or(usize::MAX));
        let sealed = content.get(start..end).ok_or_else(|| damaged("is cut short"))?;
        let mut room = buffer::initialized(sealed.len());
        room.copy_from_slice(sealed);
        let plain = crypto::open_blob(
            &work.repository.key,
            room,
            blob.uncompressed_length.map(std::num::NonZeroU32::get),
        );
        let plain = plain.map_err(|error| damaged(format!("blob {} {error}", blob.id)))?;
        if Id::of(&plain) != blob.id {
            return Err(damaged(format!("blob {} is not what was written", blob.id)));
        }
    }
    Ok(())
}
