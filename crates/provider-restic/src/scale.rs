//! How memory and time grow, with a repository and a disk of a size that no test machine has.
//!
//! `cargo test --release -p stillpoint-provider-restic -- --ignored --nocapture a_tebibyte`

use crate::{
    blob::{BlobKind, Id},
    index::{self, IndexBlob, IndexPack},
    password::PasswordSource,
    provider::{ResticProvider, Settings},
};
use async_trait::async_trait;
use bytes::Bytes;
use std::{num::NonZeroU32, path::Path, sync::Arc, time::Instant};
use stillpoint_model::{DiskName, Extent, ExtentKind, Granularity, Length, Offset, PointId, Range, VmName};
use stillpoint_provider::{
    BitmapMode, Consistency, DiskOffer, DiskRecord, Incremental, OfferedBitmap, PointRecord, Provider as _,
    Result, Volume, VolumeSource,
};

/// A disk with a MiB of data in each so many bytes, and zeroes or clean parts between them.
struct Sparse {
    size: u64,
    each: u64,
    data: u64,
    rest: ExtentKind,
    /// What tells its data from another point's.
    salt: u64,
}

#[async_trait]
impl VolumeSource for Sparse {
    fn size(&self) -> Length {
        Length::new(self.size)
    }

    async fn regions(&self, from: Offset) -> Result<Vec<Extent>> {
        let (mut at, mut regions) = (from.get(), Vec::new());
        while at < self.size && regions.len() < 1000 {
            let within = at % self.each;
            let (kind, end) = if within < self.data {
                (ExtentKind::Data, at - within + self.data)
            } else {
                (self.rest, at - within + self.each)
            };
            let end = end.min(self.size);
            let range = Range::between(Offset::new(at), Offset::new(end)).unwrap();
            regions.push(Extent { range, kind });
            at = end;
        }
        Ok(regions)
    }

    async fn read(&self, range: Range) -> Result<Bytes> {
        // As a VM's disk is read.
        let mut bytes = stillpoint_buffer::initialized(usize::try_from(range.length().get()).unwrap());
        bytes.fill(0);
        for (at, word) in (range.start().get()..).step_by(64).zip(bytes.chunks_mut(64)) {
            word[..8].copy_from_slice(&(at ^ self.salt).to_le_bytes());
        }
        Ok(stillpoint_buffer::freeze(bytes))
    }

    async fn release(&self, _: Range) -> Result<()> {
        Ok(())
    }
}

fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() >> 10
}

fn provider(directory: &Path) -> ResticProvider {
    let password = PasswordSource::Command(vec!["echo".into(), "x".into()]);
    ResticProvider::new(Settings { repository: directory.join("repository").display().to_string(), password })
}

/// Makes a point of one disk and returns how long it took and what it added, in bytes.
async fn backup(provider: &ResticProvider, number: u32, disk: Sparse, base: Option<u32>) -> (f64, u64) {
    let started = Instant::now();
    let id = |number| PointId::new("2026-11-24T00:00:00Z".parse().unwrap(), number);
    let (vm, name): (VmName, DiskName) = ("vm".parse().unwrap(), "vda".parse().unwrap());
    let mut backup = provider.backup_init(&vm, &id(number)).await.unwrap();
    println!("peak when the index is known {} MiB", peak());
    let size = Length::new(disk.size);
    let granularity: Granularity = crate::chunk::size_for(size);
    let bitmaps = base.map(|base| OfferedBitmap { generation: id(base), granularity }).into_iter().collect();
    let offer = DiskOffer { name: name.clone(), size, bitmaps };
    let answer = backup.backup_vm_query_incremental(&[offer]).await.unwrap();
    assert_eq!(matches!(answer[0], Incremental::Since(_)), base.is_some(), "{answer:?}");
    let bitmap_mode = if base.is_some() { BitmapMode::Reuse } else { BitmapMode::New };
    let volume = Volume { name: name.clone(), bitmap_mode, base: base.map(id), source: Arc::new(disk) };
    backup.backup_vm(&[], vec![volume]).await.unwrap();
    println!("peak while data is stored {} MiB", peak());
    let record = PointRecord {
        vm,
        id: id(number),
        time: "2026-11-24T00:00:00Z".to_owned(),
        consistency: Consistency::CrashConsistent,
        consistency_reason: String::new(),
        pause_ms: 0.0,
        qemu_version: String::new(),
        stillpoint_version: String::new(),
        skipped: Vec::new(),
        disks: vec![DiskRecord {
            name,
            size,
            format: "raw".to_owned(),
            bitmap_mode,
            base: base.map(id),
            reason: String::new(),
            granularity: Some(granularity),
            image: None,
        }],
    };
    backup.commit(&record).await.unwrap();
    backup.backup_cleanup().await.unwrap();
    let points = provider.points(None).await.unwrap();
    (started.elapsed().as_secs_f64(), points.last().unwrap().stored.get())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes half a minute and a GiB of disk; by hand"]
async fn a_tebibyte_into_a_repository_of_ten() {
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let provider = provider(directory.path());
    provider.create().await.unwrap();
    let repository = provider.repository().await.unwrap();
    // 10 TiB of chunks of 1 MiB, as packs that nobody reads.
    let chunks = (10_u64 << 40) / (1 << 20);
    for file in 0..chunks / 50_000 {
        let packs = (0..1000_u64).map(|pack| {
            let number = file * 1000 + pack;
            let blob = |index: u64| IndexBlob {
                id: Id::of(&(number * 50 + index).to_le_bytes()),
                kind: BlobKind::Data,
                offset: u32::try_from(index * 600_000).unwrap(),
                length: 600_000,
                uncompressed_length: NonZeroU32::new(1 << 20),
            };
            IndexPack { id: Id::of(&number.to_be_bytes()), blobs: (0..50).map(blob).collect() }
        });
        index::write(&repository, packs.collect()).unwrap();
    }
    println!("{chunks} chunks in the index; peak while that was made {} MiB", peak());
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let disk = |data, rest| Sparse { size: 1 << 40, each: 4 << 30, data, rest, salt: 0 };
    let (seconds, stored) = backup(&provider, 1, disk(64 << 20, ExtentKind::Zero), None).await;
    println!("full, 16 GiB of data in 1 TiB: {seconds:.1} s, {stored} bytes stored, peak {} MiB", peak());
    assert!(peak() < 476, "500 MB");
    // Runs are processes of their own.
    let again = std::env::current_exe().unwrap();
    let mut again = std::process::Command::new(again);
    again.args(["--ignored", "--nocapture", "--exact", "scale::increments_of_a_tebibyte"]);
    let status = again.env("STILLPOINT_SCALE", directory.path()).status().unwrap();
    assert!(status.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a part of the one before"]
async fn increments_of_a_tebibyte() {
    let Some(directory) = std::env::var_os("STILLPOINT_SCALE") else { return };
    let provider = provider(Path::new(&directory));
    let clean = |data, each| Sparse { size: 1 << 40, each, data, rest: ExtentKind::Clean, salt: 1 };
    let (seconds, stored) = backup(&provider, 2, clean(4 << 20, 4 << 30), Some(1)).await;
    println!(
        "incremental, 1 GiB changed in 1 TiB: {seconds:.1} s, {stored} bytes stored, peak {} MiB",
        peak()
    );
    assert!(peak() < 476, "500 MB");
    let (seconds, stored) = backup(&provider, 3, clean(0, 1 << 40), Some(2)).await;
    println!("incremental, nothing changed in 1 TiB: {seconds:.1} s, {stored} bytes stored");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes half a minute; by hand"]
async fn an_incremental_costs_what_changed_and_not_what_the_disk_is() {
    let mut times = Vec::new();
    for gib in [16_u64, 256] {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let provider = provider(directory.path());
        provider.create().await.unwrap();
        let size = gib << 30;
        let disk = |data, rest, salt| Sparse { size, each: size / 16, data, rest, salt };
        backup(&provider, 1, disk(0, ExtentKind::Zero, 0), None).await;
        let mut taken = Vec::new();
        for number in 2..7 {
            // 16 times 16 MiB.
            let (seconds, _) = backup(
                &provider,
                number,
                disk(16 << 20, ExtentKind::Clean, u64::from(number) << 50),
                Some(number - 1),
            )
            .await;
            taken.push(seconds);
        }
        taken.sort_by(f64::total_cmp);
        println!("{gib} GiB, 256 MiB changed: {taken:.3?} s");
        times.push(taken[2]);
    }
    println!("ratio {:.2}", times[1] / times[0]);
}
