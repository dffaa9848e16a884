//! A VM's disks in memory, with what every backup needs of them, and a driver for the calls of a run.
#![allow(dead_code, unreachable_pub, clippy::type_complexity)]

use async_trait::async_trait;
use bytes::Bytes;
use std::{
    collections::HashMap,
    path::Path,
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};
use stillpoint_model::{
    DiskName, Extent, ExtentKind, Generation, Granularity, Length, Offset, PointId, Range, VmName,
};
use stillpoint_provider::{
    Backup, BitmapMode, ConfigFile, ConfigRole, Consistency, DiskOffer, DiskRecord, Error, ErrorKind,
    Incremental, OfferedBitmap, PointRecord, Progress, Provider, Result, Volume, VolumeReport, VolumeSource,
};

/// A small generator: the same numbers for the same seed, everywhere.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        if end == 0 { 0 } else { self.next() % end }
    }

    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(length + 8);
        while bytes.len() < length {
            bytes.extend_from_slice(&self.next().to_le_bytes());
        }
        bytes.truncate(length);
        bytes
    }
}

pub fn granularity(bytes: u64) -> Granularity {
    Granularity::try_from(bytes).unwrap()
}

/// A disk of a guest, with one dirty bitmap.
pub struct Disk {
    pub name: DiskName,
    pub bytes: Vec<u8>,
    pub granularity: Granularity,
    pub dirty: Vec<bool>,
    pub generation: Option<Generation>,
}

impl Disk {
    pub fn new(name: &str, size: usize, granularity_bytes: u64) -> Self {
        let granules = size.div_ceil(usize::try_from(granularity_bytes).unwrap());
        Self {
            name: name.parse().unwrap(),
            bytes: vec![0; size],
            granularity: granularity(granularity_bytes),
            dirty: vec![true; granules],
            generation: None,
        }
    }

    fn touch(&mut self, start: usize, end: usize) {
        let granule = self.granularity.get() as usize;
        if start < end {
            self.dirty[start / granule..=(end - 1) / granule].fill(true);
        }
    }

    /// Some writes, zeroings and writes of zeroes within data, all over the disk.
    pub fn scribble(&mut self, random: &mut Random, count: usize) {
        let size = self.bytes.len() as u64;
        for _ in 0..count {
            let start = random.below(size);
            let most = [700, 70_000, 700_000][random.below(3) as usize];
            let length = (1 + random.below(most)).min(size - start);
            let (start, length) = (start as usize, length as usize);
            self.touch(start, start + length);
            let place = &mut self.bytes[start..start + length];
            match random.below(4) {
                0 => place.fill(0),
                _ => place.copy_from_slice(&random.bytes(length)),
            }
        }
    }

    /// The disk as it is now; all of it, or what is dirty.
    pub fn freeze(&self, incremental: bool) -> Frozen {
        let granule = self.granularity.get() as usize;
        let size = self.bytes.len();
        let mut extents: Vec<Extent> = Vec::new();
        // Zero regions as a file system would tell them: neither on the granularity nor on any sector.
        let step = 1777;
        let mut at = 0;
        while at < size {
            let end = (at + step).min(size).min((at / granule + 1) * granule);
            let kind = if incremental && !self.dirty[at / granule] {
                ExtentKind::Clean
            } else if self.bytes[at..end].iter().all(|byte| *byte == 0) {
                ExtentKind::Zero
            } else {
                ExtentKind::Data
            };
            match extents.last_mut() {
                Some(last) if last.kind == kind => {
                    last.range = Range::between(last.range.start(), Offset::new(end as u64)).unwrap();
                }
                _ => extents.push(Extent {
                    range: Range::between(Offset::new(at as u64), Offset::new(end as u64)).unwrap(),
                    kind,
                }),
            }
            at = end;
        }
        Frozen {
            bytes: Bytes::from(self.bytes.clone()),
            extents,
            fail_after: AtomicUsize::new(usize::MAX),
            released: Mutex::new(Vec::new()),
            read: AtomicU64::new(0),
        }
    }
}

/// A disk at one instant.
pub struct Frozen {
    pub bytes: Bytes,
    pub extents: Vec<Extent>,
    /// After so many reads every read fails.
    pub fail_after: AtomicUsize,
    pub released: Mutex<Vec<Range>>,
    pub read: AtomicU64,
}

#[async_trait]
impl VolumeSource for Frozen {
    fn size(&self) -> Length {
        Length::new(self.bytes.len() as u64)
    }

    async fn regions(&self, from: Offset) -> Result<Vec<Extent>> {
        // A few at a time, and cut at `from`, as a real map comes.
        let rest = self.extents.iter().filter(|extent| extent.range.end() > from).take(100);
        Ok(rest.map(|extent| Extent { range: extent.range.split(from).1, kind: extent.kind }).collect())
    }

    async fn read(&self, range: Range) -> Result<Bytes> {
        tokio::task::yield_now().await;
        let left =
            self.fail_after.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        if left.is_err() {
            return Err(Error::new(ErrorKind::Source, "the snapshot broke"));
        }
        let touched = self.extents.iter().filter(|extent| extent.range.intersect(range).is_some());
        for extent in touched {
            if extent.kind == ExtentKind::Clean {
                return Err(Error::new(ErrorKind::Source, format!("read of clean region {range}")));
            }
        }
        self.read.fetch_add(range.length().get(), Ordering::Relaxed);
        let (start, end) = (range.start().get() as usize, range.end().get() as usize);
        Ok(self.bytes.slice(start..end))
    }

    async fn release(&self, range: Range) -> Result<()> {
        self.released.lock().unwrap().push(range);
        Ok(())
    }
}

/// What the disks were at a point.
pub struct Taken {
    pub id: PointId,
    pub disks: Vec<(DiskName, Bytes)>,
    pub reports: Vec<VolumeReport>,
    pub answers: Vec<Incremental>,
}

pub struct Vm {
    pub name: VmName,
    pub disks: Vec<Disk>,
    pub count: u32,
}

pub fn config() -> Vec<ConfigFile> {
    let file = |name: &str, role, content: &[u8]| ConfigFile {
        name: name.parse().unwrap(),
        role,
        content: content.to_vec(),
    };
    vec![
        file("web01.conf", ConfigRole::Guest, b"cores: 4\n\xff\x00raw"),
        file("web01.fw", ConfigRole::Firewall, b"[RULES]\n"),
    ]
}

impl Vm {
    pub fn new(name: &str, disks: Vec<Disk>) -> Self {
        Self { name: name.parse().unwrap(), disks, count: 0 }
    }

    pub fn next_id(&mut self) -> PointId {
        self.count += 1;
        // All within one second, and with random parts that run backwards: order is not told by the name.
        PointId::new(jiff::Timestamp::from_second(1_795_000_000).unwrap(), 1_000_000 - self.count)
    }

    pub fn offers(&self) -> Vec<DiskOffer> {
        let offer = |disk: &Disk| DiskOffer {
            name: disk.name.clone(),
            size: Length::new(disk.bytes.len() as u64),
            bitmaps: disk
                .generation
                .iter()
                .map(|generation| OfferedBitmap {
                    generation: generation.clone(),
                    granularity: disk.granularity,
                })
                .collect(),
        };
        self.disks.iter().map(offer).collect()
    }

    pub fn record(&self, id: &PointId, answers: &[Incremental]) -> PointRecord {
        let disk = |(disk, answer): (&Disk, &Incremental)| DiskRecord {
            name: disk.name.clone(),
            size: Length::new(disk.bytes.len() as u64),
            format: "raw".to_owned(),
            bitmap_mode: if matches!(answer, Incremental::Since(_)) {
                BitmapMode::Reuse
            } else {
                BitmapMode::New
            },
            base: match answer {
                Incremental::Since(base) => Some(base.clone()),
                Incremental::Full { .. } => None,
            },
            reason: "test".to_owned(),
            granularity: Some(disk.granularity),
            image: None,
        };
        PointRecord {
            vm: self.name.clone(),
            id: id.clone(),
            time: "2026-11-18T09:46:40Z".to_owned(),
            consistency: Consistency::CrashConsistent,
            consistency_reason: "no agent".to_owned(),
            pause_ms: 11.3,
            qemu_version: "10.0.2".to_owned(),
            stillpoint_version: "0.1.0".to_owned(),
            skipped: Vec::new(),
            disks: self.disks.iter().zip(answers).map(disk).collect(),
        }
    }

    /// Goes as far as having everything stored.
    pub async fn store(
        &mut self,
        provider: &dyn Provider,
        fail_after: usize,
    ) -> (Box<dyn Backup>, PointId, Vec<Arc<Frozen>>, Vec<Incremental>, Result<Vec<VolumeReport>>) {
        provider.job_init().await.unwrap();
        let id = self.next_id();
        let mut backup = provider.backup_init(&self.name, &id).await.unwrap();
        let answers = backup.backup_vm_query_incremental(&self.offers()).await.unwrap();
        let mut volumes = Vec::new();
        let mut frozen = Vec::new();
        for (disk, answer) in self.disks.iter().zip(&answers) {
            let base = match answer {
                Incremental::Since(base) => Some(base.clone()),
                Incremental::Full { .. } => None,
            };
            let source = Arc::new(disk.freeze(base.is_some()));
            source.fail_after.store(fail_after, Ordering::Relaxed);
            frozen.push(Arc::clone(&source));
            volumes.push(Volume {
                name: disk.name.clone(),
                bitmap_mode: if base.is_some() { BitmapMode::Reuse } else { BitmapMode::New },
                base,
                source,
            });
        }
        let reports = backup.backup_vm(&config(), volumes).await;
        (backup, id, frozen, answers, reports)
    }

    /// A whole run, after which the bitmaps are relative to the new point.
    pub async fn back_up(&mut self, provider: &dyn Provider) -> Taken {
        let (mut backup, id, frozen, answers, reports) = self.store(provider, usize::MAX).await;
        let reports = reports.unwrap();
        backup.commit(&self.record(&id, &answers)).await.unwrap();
        backup.backup_cleanup().await.unwrap();
        provider.job_cleanup().await.unwrap();
        for (disk, source) in self.disks.iter_mut().zip(&frozen) {
            let mut released = source.released.lock().unwrap().clone();
            released.sort_by_key(|range| range.start());
            let mut at = 0;
            for range in released {
                assert_eq!(range.start().get(), at, "a part of {} was not given back, or twice", disk.name);
                at = range.end().get();
            }
            assert_eq!(at, disk.bytes.len() as u64);
            disk.dirty.fill(false);
            disk.generation = Some(id.clone());
        }
        let disks =
            self.disks.iter().zip(&frozen).map(|(disk, source)| (disk.name.clone(), source.bytes.clone()));
        Taken { id, disks: disks.collect(), reports, answers }
    }
}

/// Reads a whole disk of a stored point, checking what its map promises.
pub async fn read_all(source: &dyn VolumeSource) -> Result<Vec<u8>> {
    let size = source.size().get();
    let mut bytes = vec![0xaa; size as usize];
    let mut at = Offset::ZERO;
    while at.get() < size {
        let extents = source.regions(at).await?;
        assert!(!extents.is_empty());
        for extent in extents {
            assert_eq!(extent.range.start(), at);
            assert!(!extent.range.is_empty());
            at = extent.range.end();
            for part in extent.range.chunks(Length::new(3_000_001)) {
                let place = &mut bytes[part.start().get() as usize..part.end().get() as usize];
                match extent.kind {
                    ExtentKind::Clean => panic!("a stored disk has no clean regions"),
                    ExtentKind::Zero => place.fill(0),
                    ExtentKind::Data => place.copy_from_slice(&source.read(part).await?),
                }
            }
        }
    }
    assert_eq!(at.get(), size);
    Ok(bytes)
}

/// Makes sure that a point restores to what its disks were.
pub async fn assert_restores(provider: &dyn Provider, vm: &VmName, taken: &Taken) {
    let restore = provider.restore_vm_init(vm, &taken.id).await.unwrap();
    assert_eq!(restore.record().id, taken.id);
    assert_eq!(restore.config().await.unwrap(), config());
    for (name, bytes) in &taken.disks {
        let source = restore.volume(name).await.unwrap();
        let read = read_all(source.as_ref()).await.unwrap();
        assert!(read == *bytes, "{name} at {} differs", taken.id);
    }
}

#[derive(Default)]
pub struct Counted {
    pub total: AtomicU64,
    pub advanced: AtomicU64,
}

impl Progress for Counted {
    fn total(&self, bytes: Length) {
        self.total.store(bytes.get(), Ordering::Relaxed);
    }
    fn advanced(&self, bytes: Length) {
        self.advanced.fetch_add(bytes.get(), Ordering::Relaxed);
    }
}

pub async fn findings(provider: &dyn Provider, vm: &VmName, id: &PointId) -> Vec<String> {
    let report = provider.verify(vm, id, Arc::new(Counted::default())).await.unwrap();
    report.findings.into_iter().map(|finding| finding.what).collect()
}

/// Runs `qemu-img`; `None`, with the reason told, where it is not installed.
pub fn qemu_img(arguments: &[&str]) -> Option<()> {
    match Command::new("qemu-img").args(arguments).output() {
        Ok(output) => {
            let told = String::from_utf8_lossy(&output.stderr).into_owned()
                + &String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success(), "qemu-img {arguments:?}: {told}");
            Some(())
        }
        Err(error) => {
            eprintln!("SKIP: qemu-img cannot be run: {error}");
            None
        }
    }
}

/// All files below `path` with their content and time.
pub fn snapshot(path: &Path) -> HashMap<std::path::PathBuf, (Vec<u8>, std::time::SystemTime)> {
    let mut files = HashMap::new();
    let mut open = vec![path.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                open.push(entry.path());
            } else {
                let modified = entry.metadata().unwrap().modified().unwrap();
                files.insert(entry.path(), (std::fs::read(entry.path()).unwrap(), modified));
            }
        }
    }
    files
}
