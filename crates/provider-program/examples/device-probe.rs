//! Runs in a guest whose kernel has NBD, and proves what is promised of block devices there: each disk gets a device of its own
//! whoever holds others, nobody reads a guest's data while a device comes up, discards arrive, and nothing is left, also after a
//! death. Prints `device-probe: passed`, or what is wrong.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs, reason = "a test's own program")]

use async_trait::async_trait;
use bytes::Bytes;
use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{BufRead as _, BufReader, Read as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use stillpoint_model::{Extent, ExtentKind, Length, Offset, Range};
use stillpoint_provider::{BitmapMode, Result, Volume, VolumeSource};
use stillpoint_provider_program::{BlockDevices, sweep};

const SIZE: u64 = (1 << 20) + 512;

/// A disk whose bytes are all its number, with what looks like a partition table.
struct Disk {
    number: u8,
    handed_over: Arc<AtomicBool>,
    early: Arc<AtomicBool>,
    released: Arc<Mutex<Vec<Range>>>,
}

#[async_trait]
impl VolumeSource for Disk {
    fn size(&self) -> Length {
        Length::new(SIZE)
    }

    async fn regions(&self, from: Offset) -> Result<Vec<Extent>> {
        let range = Range::new(from, Length::new(SIZE - from.get())).unwrap();
        Ok(vec![Extent { range, kind: ExtentKind::Data }])
    }

    async fn read(&self, range: Range) -> Result<Bytes> {
        if !self.handed_over.load(Ordering::SeqCst) {
            self.early.store(true, Ordering::SeqCst);
        }
        Ok(Bytes::from(vec![self.number; usize::try_from(range.length().get()).unwrap()]))
    }

    async fn release(&self, range: Range) -> Result<()> {
        self.released.lock().unwrap().push(range);
        Ok(())
    }
}

fn volumes(first: u8, count: u8, of: &Disk) -> Vec<Volume> {
    let volume = |number| Volume {
        name: format!("disk{number}").parse().unwrap(),
        bitmap_mode: BitmapMode::New,
        base: None,
        source: Arc::new(Disk {
            number,
            handed_over: Arc::clone(&of.handed_over),
            early: Arc::clone(&of.early),
            released: Arc::clone(&of.released),
        }),
    };
    (first..first + count).map(volume).collect()
}

fn disk() -> Disk {
    let flag = || Arc::new(AtomicBool::new(false));
    Disk { number: 0, handed_over: flag(), early: flag(), released: Arc::default() }
}

fn connected() -> BTreeSet<PathBuf> {
    let devices = fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap().path());
    devices.filter(|path| path.join("pid").exists()).collect()
}

fn await_connected(count: usize) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while connected().len() != count {
        assert!(Instant::now() < deadline, "{:?} are connected, not {count}", connected());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Holds four devices until it is killed.
async fn hold(runtime: &Path) {
    let directory = tempfile::Builder::new().prefix("provider-").tempdir_in(runtime).unwrap();
    // As a run of a program has it: its owner is alive as long as the lock is held.
    let owner = File::create(directory.path().join("owner")).unwrap();
    rustix::fs::flock(&owner, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let devices = BlockDevices::start(directory.path(), &volumes(101, 4, &disk())).await.unwrap();
    println!("held {:?}", devices.paths());
    std::future::pending::<()>().await;
}

async fn probe() {
    let runtime = Path::new("/tmp/run");
    fs::create_dir_all(runtime).unwrap();
    let mut holder = Command::new("/proc/self/exe").arg("hold").stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(holder.stdout.take().unwrap()).read_line(&mut line).unwrap();
    println!("another process: {}", line.trim());
    assert_eq!(connected().len(), 4);
    let held = connected();

    let of = disk();
    let directory = tempfile::Builder::new().prefix("own-").tempdir_in(runtime).unwrap();
    let devices = BlockDevices::start(directory.path(), &volumes(1, 8, &of)).await.unwrap();
    of.handed_over.store(true, Ordering::SeqCst);
    println!("eight disks at once: {:?}", devices.paths());
    assert_eq!(connected().len(), 12);
    assert_eq!(devices.paths().iter().collect::<BTreeSet<_>>().len(), 8);
    for path in devices.paths() {
        assert!(
            path.starts_with("/dev")
                && !held.contains(&Path::new("/sys/block").join(path.file_name().unwrap()))
        );
    }
    assert!(!of.early.load(Ordering::SeqCst), "somebody read a guest's data while a device came up");
    let paths = devices.paths().to_vec();
    let read = tokio::task::spawn_blocking(move || {
        for (number, path) in (1_u8..).zip(&paths) {
            let mut bytes = Vec::new();
            File::open(path).unwrap().read_to_end(&mut bytes).unwrap();
            assert_eq!(bytes.len() as u64, SIZE);
            assert!(bytes.iter().all(|byte| *byte == number), "{} is not disk {number}", path.display());
        }
        let mut discard = Command::new("/bin/busybox");
        discard.args(["blkdiscard", "-o", "4096", "-l", "65536"]).arg(&paths[2]);
        assert!(discard.status().unwrap().success());
        // A write is refused, and the device goes on.
        let written = fs::write(&paths[3], [9; 4096]).and_then(|()| File::open(&paths[3])?.sync_all());
        let _ = written;
    });
    read.await.unwrap();
    let released = of.released.lock().unwrap().clone();
    assert_eq!(released, [Range::new(Offset::new(4096), Length::new(65536)).unwrap()], "a discard arrives");
    devices.end().await;
    assert_eq!(connected(), held, "something of ours is left, or something of others is gone");

    holder.kill().unwrap();
    holder.wait().unwrap();
    sweep(runtime);
    await_connected(0);
    assert_eq!(fs::read_dir(runtime).unwrap().count(), 1, "the directory of the dead is left");
    println!("device-probe: passed");
}

#[tokio::main]
async fn main() {
    if std::env::args().nth(1).as_deref() == Some("hold") {
        return hold(Path::new("/tmp/run")).await;
    }
    probe().await;
}
