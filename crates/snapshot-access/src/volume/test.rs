use super::*;
use crate::direct::{ImageFile, ImageFormat};
use rustix::{
    fs::{FallocateFlags, fallocate},
    io::pwrite,
};
use std::collections::BTreeMap;
use stillpoint_nbd::{
    Errno, Options,
    server::{Export, Refusal, serve_one},
};

const CLUSTER: u64 = 65_536;
const SIZE: u64 = 8 * CLUSTER;

#[test]
fn a_read_stays_within_a_cluster_where_qemu_mixes_them_up() {
    assert_eq!(reads_within((7, 2, 22), Granularity::DEFAULT, false), Granularity::DEFAULT.length());
    assert_eq!(reads_within((7, 2, 22), Granularity::DEFAULT, true), READ_MOST, "nothing is kept aside");
    assert_eq!(reads_within((8, 1, 0), Granularity::DEFAULT, false), READ_MOST);
}

/// What QEMU's export of the snapshot would answer: `O` everywhere, until the snapshot breaks.
struct Snapshot {
    broken: Arc<std::sync::atomic::AtomicBool>,
    asked: Arc<AtomicU64>,
    trimmed: Arc<Mutex<Vec<Range>>>,
}

impl Snapshot {
    fn holds(&self) -> Result<(), Refusal> {
        if self.broken.load(Ordering::SeqCst) { Err(Refusal::new(Errno::EINVAL, "broken")) } else { Ok(()) }
    }
}

#[async_trait]
impl Export for Snapshot {
    fn size(&self) -> Length {
        Length::new(SIZE)
    }

    fn dirty_context(&self) -> Option<&str> {
        None
    }

    async fn read(&self, range: Range) -> Result<Bytes, Refusal> {
        self.holds()?;
        self.asked.fetch_add(range.length().get(), Ordering::SeqCst);
        Ok(Bytes::from(vec![b'O'; usize::try_from(range.length().get()).unwrap()]))
    }

    async fn extents(&self, from: Offset) -> Result<Vec<Extent>, Refusal> {
        self.holds()?;
        let range = Range::between(from, Offset::new(SIZE)).unwrap();
        Ok(vec![Extent { range, kind: ExtentKind::Data }])
    }

    async fn trim(&self, range: Range) -> Result<(), Refusal> {
        self.holds()?;
        self.trimmed.lock().unwrap().push(range);
        Ok(())
    }
}

/// A disk whose image is read past "QEMU", with what surrounds it.
struct Scene {
    volume: AccessVolume,
    image: tempfile::NamedTempFile,
    fleecing: Arc<FleecingImage>,
    broken: Arc<std::sync::atomic::AtomicBool>,
    /// Bytes that were read through "QEMU".
    asked: Arc<AtomicU64>,
    /// What "QEMU" was told to keep aside no longer.
    trimmed: Arc<Mutex<Vec<Range>>>,
    _stop: watch::Sender<Option<Stop>>,
    _directory: tempfile::TempDir,
}

/// `None` where the file system does not tell what it has allocated; then nothing is read past QEMU either.
async fn scene() -> Option<Scene> {
    // Not on a tmpfs.
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let image = tempfile::NamedTempFile::new_in(directory.path()).unwrap();
    pwrite(&image, &vec![b'O'; usize::try_from(SIZE).unwrap()], 0).unwrap();
    let size = Length::new(SIZE);
    let fleecing = Arc::new(FleecingImage::create(directory.path(), size, &mut |_| Ok(())).unwrap());
    if !fleecing.tells_what_is_kept() {
        eprintln!("skipped: the file system of /var/tmp does not tell what is allocated");
        return None;
    }
    let (broken, asked, trimmed) = (Arc::default(), Arc::default(), Arc::default());
    let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
    let export: Arc<dyn Export> = Arc::new(Snapshot {
        broken: Arc::clone(&broken),
        asked: Arc::clone(&asked),
        trimmed: Arc::clone(&trimmed),
    });
    tokio::spawn(async move { serve_one(theirs, &BTreeMap::from([("disk".to_owned(), export)])).await });
    let options = Options::new("disk").context(MetaContext::base_allocation());
    let data = Client::from_stream(ours, options).await.unwrap();
    let (stop, stopped) = watch::channel(None);
    let found = ImageFile::find(std::process::id(), image.path(), ImageFormat::Raw).await.unwrap();
    let opened = found.open(size).await.unwrap();
    let volume = AccessVolume {
        name: "vda".parse().unwrap(),
        size,
        dirty: None,
        allocated: None,
        discards: Some(Mutex::new(DiscardPlanner::new(Granularity::DEFAULT, size))),
        image: Some(Arc::new(opened)),
        proof: Some(Arc::new(Proof::new(data.clone(), Arc::clone(&fleecing), size))),
        fleecing: Some(Arc::clone(&fleecing)),
        data,
        piece: READ_MOST,
        stop: stopped,
        read: AtomicU64::new(0),
        past_qemu: AtomicU64::new(0),
        passed: AtomicU64::new(0),
    };
    Some(Scene { volume, image, fleecing, broken, asked, trimmed, _stop: stop, _directory: directory })
}

impl Scene {
    /// The guest overwrites a cluster; its old data was kept aside by `keep` before.
    fn overwrite(&self, cluster: u64, keep: impl Fn(u64)) {
        keep(cluster * CLUSTER);
        pwrite(&self.image, &vec![b'N'; usize::try_from(CLUSTER).unwrap()], cluster * CLUSTER).unwrap();
    }

    fn copy(&self, at: u64) {
        pwrite(self.fleecing.descriptor(), &vec![b'O'; usize::try_from(CLUSTER).unwrap()], at).unwrap();
    }

    /// What QEMU does with a cluster that was zero.
    fn allocate(&self, at: u64) {
        fallocate(self.fleecing.descriptor(), FallocateFlags::ZERO_RANGE, at, CLUSTER).unwrap();
    }
}

fn whole() -> Range {
    Range::whole(Length::new(SIZE)).unwrap()
}

#[tokio::test]
async fn what_nobody_overwrote_does_not_come_through_qemu() {
    let Some(scene) = scene().await else { return };
    let bytes = scene.volume.read(whole()).await.unwrap();
    assert!(bytes.len() as u64 == SIZE && bytes.iter().all(|&byte| byte == b'O'));
    assert_eq!(scene.asked.load(Ordering::SeqCst), 0);
    assert_eq!(scene.volume.past_qemu.load(Ordering::Relaxed), SIZE);
}

#[tokio::test]
async fn what_was_kept_aside_comes_through_qemu_zeroes_too() {
    let Some(scene) = scene().await else { return };
    scene.overwrite(2, |at| scene.copy(at));
    scene.overwrite(5, |at| scene.allocate(at));
    let bytes = scene.volume.read(whole()).await.unwrap();
    assert!(bytes.iter().all(|&byte| byte == b'O'), "new data was taken for old");
    assert_eq!(scene.asked.load(Ordering::SeqCst), 2 * CLUSTER);
    // Looking for data alone would have missed the second.
    let second = Range::new(Offset::new(5 * CLUSTER), Length::new(CLUSTER)).unwrap();
    assert_eq!(scene.fleecing.first_data(second), None);
    // A part of a cluster is as good as all of it.
    let part = Range::new(Offset::new(5 * CLUSTER + 512), Length::new(1024)).unwrap();
    assert!(scene.volume.read(part).await.unwrap().iter().all(|&byte| byte == b'O'));
}

/// Without the proof the same read gives the guest's new data: what the tests above see is the proof's doing.
#[tokio::test]
async fn without_the_proof_new_data_is_taken_for_old() {
    let Some(mut scene) = scene().await else { return };
    scene.overwrite(2, |at| scene.copy(at));
    scene.volume.proof = None;
    let bytes = scene.volume.read(whole()).await.unwrap();
    assert!(bytes.contains(&b'N'));
}

#[tokio::test]
async fn nothing_is_read_of_a_snapshot_that_broke() {
    let Some(scene) = scene().await else { return };
    // Nothing is kept aside any more, so nothing tells.
    scene.overwrite(3, |_| ());
    scene.broken.store(true, Ordering::SeqCst);
    let error = scene.volume.read(whole()).await.unwrap_err();
    assert!(error.to_string().contains("can no longer be read"), "{error}");
}

#[tokio::test]
async fn many_reads_at_once_each_get_their_own_answer() {
    let Some(scene) = scene().await else { return };
    for cluster in [1, 4, 6] {
        scene.overwrite(cluster, |at| scene.copy(at));
    }
    let pieces: Vec<_> = whole().chunks(Length::new(CLUSTER / 2)).collect();
    let reads = futures_util::future::join_all(pieces.iter().map(|piece| scene.volume.read(*piece))).await;
    assert!(reads.into_iter().all(|read| read.unwrap().iter().all(|&byte| byte == b'O')));
    assert_eq!(scene.asked.load(Ordering::SeqCst), 3 * CLUSTER);
}

#[tokio::test]
async fn an_image_that_ends_early_is_left_to_qemu() {
    let Some(scene) = scene().await else { return };
    scene.image.as_file().set_len(CLUSTER).unwrap();
    assert!(scene.volume.read(whole()).await.unwrap().iter().all(|&byte| byte == b'O'));
    assert_eq!(scene.asked.load(Ordering::SeqCst), SIZE);
}

#[tokio::test]
async fn what_was_read_is_given_back_unless_it_is_to_be_kept() {
    let Some(mut scene) = scene().await else { return };
    let whole = Range::new(Offset::ZERO, Length::new(SIZE)).unwrap();
    let parts: Vec<_> = whole.chunks(Length::new(1 << 20)).collect();
    for part in &parts {
        scene.volume.release(*part).await.unwrap();
    }
    scene.volume.discard(DiscardPlanner::flush).await.unwrap();
    let trimmed = std::mem::take(&mut *scene.trimmed.lock().unwrap());
    assert_eq!(trimmed.iter().map(|range| range.length().get()).sum::<u64>(), SIZE);
    scene.volume.discards = None;
    for part in &parts {
        scene.volume.release(*part).await.unwrap();
    }
    assert_eq!(*scene.trimmed.lock().unwrap(), []);
    assert_eq!(scene.volume.passed.load(Ordering::SeqCst), 2 * SIZE);
}

#[tokio::test]
async fn nothing_is_read_of_old_data_that_was_given_up() {
    let Some(scene) = scene().await else { return };
    let whole = Range::whole(Length::new(SIZE)).unwrap();
    assert!(scene.volume.read(whole).await.is_ok());
    // As the watcher's process does it, on its own descriptor.
    let theirs = scene.fleecing.descriptor().try_clone_to_owned().unwrap();
    pwrite(&theirs, &[1], 0).unwrap();
    crate::fleecing::mark_given_up(&theirs).unwrap();
    crate::fleecing::take_back(&theirs, SIZE).unwrap();
    assert_eq!(scene.fleecing.used(), Length::ZERO);
    assert_eq!(rustix::fs::fstat(&theirs).unwrap().st_size, i64::try_from(SIZE).unwrap());
    let error = scene.volume.read(whole).await.unwrap_err();
    assert!(error.to_string().contains("was given up"), "{error}");
    assert!(scene.volume.regions(Offset::ZERO).await.is_err());
}
