//! Measures a full of a disk held in memory against a plain copy of it, both durable at the end.
//!
//! `cargo run --release --example throughput -- DIRECTORY [MIB]`
#![allow(clippy::unwrap_used)]

use async_trait::async_trait;
use bytes::Bytes;
use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};
use stillpoint_model::{Extent, ExtentKind, Length, Offset, PointId, Range};
use stillpoint_provider::{BitmapMode, Provider, Result, Volume, VolumeSource};
use stillpoint_provider_directory::DirectoryProvider;

/// Incompressible bytes, the same 64 MiB over and over.
struct Memory {
    bytes: Bytes,
    size: u64,
}

impl Memory {
    fn part(&self, range: Range) -> Bytes {
        let start = usize::try_from(range.start().get()).unwrap() % (63 << 20);
        self.bytes.slice(start..start + usize::try_from(range.length().get()).unwrap())
    }
}

#[async_trait]
impl VolumeSource for Memory {
    fn size(&self) -> Length {
        Length::new(self.size)
    }
    async fn regions(&self, from: Offset) -> Result<Vec<Extent>> {
        let range = Range::between(from, Offset::new(self.size)).unwrap();
        Ok(vec![Extent { range, kind: ExtentKind::Data }])
    }
    async fn read(&self, range: Range) -> Result<Bytes> {
        Ok(self.part(range))
    }
    async fn release(&self, _range: Range) -> Result<()> {
        Ok(())
    }
}

fn tell(what: &str, size: u64, took: Duration) {
    println!(
        "{what:<24} {:7.2} s  {:6.0} MiB/s",
        took.as_secs_f64(),
        (size >> 20) as f64 / took.as_secs_f64()
    );
}

#[tokio::main]
async fn main() {
    let mut arguments = std::env::args_os().skip(1);
    let directory = PathBuf::from(arguments.next().expect("a directory to write in"));
    let mib: u64 = arguments.next().map_or(2048, |text| text.to_str().unwrap().parse().unwrap());
    let mut state = 1u64;
    let words = (0..8 << 20).flat_map(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state ^ (state >> 29)).to_le_bytes()
    });
    let source = Arc::new(Memory { bytes: words.collect::<Vec<u8>>().into(), size: mib << 20 });
    for round in 0..3 {
        let path = directory.join("plain.raw");
        let began = Instant::now();
        let file = File::create(&path).unwrap();
        for part in Range::whole(source.size()).unwrap().chunks(Length::new(1 << 20)) {
            file.write_all_at(&source.part(part), part.start().get()).unwrap();
        }
        file.sync_all().unwrap();
        tell("plain copy and fsync", source.size, began.elapsed());
        std::fs::remove_file(&path).unwrap();

        let target = directory.join("target");
        let provider = DirectoryProvider::new(target.clone());
        provider.job_init().await.unwrap();
        let id = PointId::new(jiff::Timestamp::now(), round);
        let began = Instant::now();
        let mut backup = provider.backup_init(&"bench".parse().unwrap(), &id).await.unwrap();
        let name = "vda".parse().unwrap();
        let volume =
            Volume { name, bitmap_mode: BitmapMode::New, base: None, source: Arc::clone(&source) as _ };
        backup.backup_vm(&[], vec![volume]).await.unwrap();
        tell("full into the directory", source.size, began.elapsed());
        backup.backup_cleanup().await.unwrap();
        std::fs::remove_dir_all(&target).unwrap();
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    println!("{}", status.lines().find(|line| line.starts_with("VmHWM")).unwrap());
}
