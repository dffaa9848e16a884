//! Dropping what is damaged: all that is beyond use, and nothing that a good point needs.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation)]

mod common;

use common::{Disk, Random, Taken, Vm, assert_restores};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};
use stillpoint_model::PointId;
use stillpoint_provider::{ErrorKind, Provider};
use stillpoint_provider_directory::{DirectoryProvider, Dropping, Judged};

const MIB: usize = 1 << 20;

struct Target {
    scratch: tempfile::TempDir,
    provider: DirectoryProvider,
    vm: Vm,
}

impl Target {
    fn new() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let provider = DirectoryProvider::new(scratch.path().to_owned());
        let disks = vec![Disk::new("vda", 3 * MIB, 65_536), Disk::new("vdb", 2 * MIB, 65_536)];
        let mut vm = Vm::new("web01", disks);
        for disk in &mut vm.disks {
            let bytes = Random(3).bytes(disk.bytes.len());
            disk.bytes.copy_from_slice(&bytes);
        }
        Self { scratch, provider, vm }
    }

    /// A point after `vda` got `value` from `start` to `end`.
    async fn point(&mut self, start: usize, end: usize, value: u8) -> Taken {
        let disk = &mut self.vm.disks[0];
        disk.bytes[start..end].fill(value);
        for at in start / 65_536..=(end - 1) / 65_536 {
            disk.dirty[at] = true;
        }
        self.vm.back_up(&self.provider).await
    }

    /// One that starts a chain of its own.
    async fn full(&mut self, value: u8) -> Taken {
        for disk in &mut self.vm.disks {
            disk.generation = None;
        }
        self.point(0, 100, value).await
    }

    fn file(&self, point: &Taken, name: &str) -> PathBuf {
        self.scratch.path().join("web01").join(point.id.as_str()).join(name)
    }

    fn flip(&self, point: &Taken, name: &str, at: usize) {
        let path = self.file(point, name);
        let mut bytes = fs::read(&path).unwrap();
        bytes[at] ^= 1;
        fs::write(path, bytes).unwrap();
    }

    async fn judge(&self, which: Dropping, dry_run: bool) -> Vec<Judged> {
        let progress = Arc::new(common::Counted::default());
        let judged = self.provider.drop_damaged(None, which, dry_run, progress).await.unwrap();
        for point in &judged {
            let path = self.scratch.path().join("web01").join(point.point.as_str());
            assert_eq!(path.exists(), point.keep || dry_run, "{point:?}");
        }
        judged
    }

    async fn dropped(&self, which: Dropping) -> Vec<PointId> {
        let dry: Vec<_> = self.judge(which, true).await;
        let done = self.judge(which, false).await;
        assert_eq!(dry, done);
        assert!(self.judge(which, false).await.iter().all(|point| point.keep));
        done.into_iter().filter(|point| !point.keep).map(|point| point.point).collect()
    }

    async fn listed(&self) -> Vec<PointId> {
        self.provider.points(None).await.unwrap().into_iter().map(|point| point.id).collect()
    }
}

fn ids(points: &[&Taken]) -> Vec<PointId> {
    points.iter().map(|point| point.id.clone()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_point_takes_what_stood_on_it_and_nothing_else() {
    let mut target = Target::new();
    let first = target.full(1).await;
    let second = target.point(MIB, MIB + 9, 2).await;
    let third = target.point(MIB, MIB + 9, 3).await;
    let fourth = target.full(4).await;
    let fifth = target.point(MIB, MIB + 9, 5).await;
    assert_eq!(target.dropped(Dropping::BeyondUse).await, []);
    assert_eq!(target.dropped(Dropping::Any).await, []);
    fs::remove_dir_all(target.file(&second, "")).unwrap();
    let judged = target.judge(Dropping::BeyondUse, true).await;
    assert!(judged.iter().all(|point| point.damage.is_some() == (point.point == third.id)), "{judged:?}");
    assert_eq!(judged[3].dependents, []);
    assert_eq!(judged[2].dependents, ids(&[&fifth]));
    assert_eq!(target.dropped(Dropping::BeyondUse).await, ids(&[&third]));
    for point in [&first, &fourth, &fifth] {
        assert_restores(&target.provider, &target.vm.name, point).await;
    }
    // The numbers go on, and so does the chain.
    let sixth = target.point(0, 9, 6).await;
    assert_eq!(target.listed().await, ids(&[&first, &fourth, &fifth, &sixth]));
    assert_restores(&target.provider, &target.vm.name, &sixth).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_that_a_later_point_hides_is_no_loss_to_it() {
    let mut target = Target::new();
    let first = target.full(1).await;
    let second = target.point(MIB, MIB + 9, 2).await;
    // All of the second cell is in the third point.
    let third = target.point(MIB, 2 * MIB, 3).await;
    let fourth = target.point(0, 9, 4).await;
    target.flip(&first, "vda.raw", MIB + 70_000);
    target.flip(&first, "vdb.raw", 70_000);
    // vdb is lost in all, vda up to the second point.
    let judged = target.judge(Dropping::BeyondUse, false).await;
    let restorable: Vec<_> = judged.iter().map(|point| point.restorable.len()).collect();
    assert_eq!(restorable, [0, 0, 1, 1]);
    for (point, keeps) in judged.iter().zip([true, true, true, true]) {
        assert_eq!(point.keep, keeps, "{point:?}");
        assert!(point.damage.is_some());
    }
    let why = judged[0].kept_because.clone().unwrap();
    assert!(why.contains("is restored from it") && why.contains(third.id.as_str()), "{why}");
    let restore = target.provider.restore_vm_init(&target.vm.name, &fourth.id).await.unwrap();
    let vda = restore.volume(&"vda".parse().unwrap()).await.unwrap();
    assert!(common::read_all(vda.as_ref()).await.unwrap() == fourth.disks[0].1);
    // An examination says so as well.
    let progress = Arc::new(common::Counted::default());
    let report = target.provider.verify(&target.vm.name, &fourth.id, progress).await.unwrap();
    assert!(!report.findings.is_empty());
    assert_eq!(report.restorable, ["vda".parse().unwrap()]);
    let progress = Arc::new(common::Counted::default());
    let report = target.provider.verify(&target.vm.name, &second.id, progress).await.unwrap();
    assert_eq!(report.restorable, []);
    // Whoever wants only whole points is left with none of these.
    assert_eq!(target.dropped(Dropping::Any).await, ids(&[&first, &second, &third, &fourth]));
    target.full(5).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_file_that_is_damaged_beyond_use() {
    for name in ["point.json", "vda.sums", "vda.qcow2", "vda.raw"] {
        let mut target = Target::new();
        let first = target.full(1).await;
        let second = target.point(MIB, 3 * MIB, 2).await;
        let third = target.point(MIB, MIB + 9, 3).await;
        let is_full = name == "vda.raw";
        let damaged = if is_full { &first } else { &second };
        let path = target.file(damaged, name);
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.set_len(file.metadata().unwrap().len() - 1).unwrap();
        // vdb is whole where the manifest is.
        let gone = if name == "point.json" { ids(&[&second, &third]) } else { Vec::new() };
        let mut dropped = target.dropped(Dropping::BeyondUse).await;
        dropped.sort();
        let mut wanted = gone.clone();
        wanted.sort();
        assert_eq!(dropped, wanted, "{name}");
        if !is_full {
            assert_restores(&target.provider, &target.vm.name, &first).await;
            let mut left = target.dropped(Dropping::Any).await;
            left.extend(dropped);
            left.sort();
            let mut wanted = ids(&[&second, &third]);
            wanted.sort();
            assert_eq!(left, wanted, "{name}");
        }
    }
    // The guest's configuration is no reason to drop its disks.
    let mut target = Target::new();
    let first = target.full(1).await;
    target.flip(&first, "config/web01.conf", 0);
    assert_eq!(target.dropped(Dropping::BeyondUse).await, []);
    let judged = target.judge(Dropping::BeyondUse, false).await;
    assert!(judged[0].damage.as_ref().unwrap().contains("web01.conf"), "{judged:?}");
}

/// A file, bound over another.
struct Bound(PathBuf);

impl Bound {
    fn over(path: &Path, source: &str) -> Option<Self> {
        let bound = Command::new("mount").args(["--bind", source]).arg(path).output().ok()?;
        if !bound.status.success() {
            eprintln!("SKIP: cannot mount: {}", String::from_utf8_lossy(&bound.stderr).trim());
            return None;
        }
        Some(Self(path.to_owned()))
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let _ended = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_read_is_not_taken_for_damaged() {
    for name in ["vda.raw", "point.json"] {
        let mut target = Target::new();
        let first = target.full(1).await;
        let second = target.point(MIB, MIB + 9, 2).await;
        fs::remove_file(target.file(&first, "vdb.raw")).unwrap();
        // Reading a process's memory at 0 is an I/O error, as that of a medium is.
        let memory = format!("/proc/{}/mem", std::process::id());
        let Some(bound) = Bound::over(&target.file(&first, name), &memory) else { return };
        for which in [Dropping::BeyondUse, Dropping::Any] {
            let judged = target.judge(which, false).await;
            assert_eq!(judged.len(), 2);
            for point in judged {
                assert!(point.keep && point.damage.is_some(), "{point:?}");
                let why = point.kept_because.as_ref().unwrap();
                assert!(why.contains("cannot be read") && why.contains(name), "{point:?}");
            }
        }
        drop(bound);
        assert_eq!(target.dropped(Dropping::BeyondUse).await, []);
        assert_eq!(target.dropped(Dropping::Any).await, ids(&[&first, &second]));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_is_respected_and_a_crash_leaves_what_the_next_call_removes() {
    let mut target = Target::new();
    let first = target.full(1).await;
    let second = target.full(2).await;
    for disk in ["vda", "vdb"] {
        fs::remove_file(target.file(&first, &format!("{disk}.raw"))).unwrap();
    }
    target.provider.job_init().await.unwrap();
    let id = target.vm.next_id();
    let backup = target.provider.backup_init(&target.vm.name, &id).await.unwrap();
    let progress = Arc::new(common::Counted::default());
    let locked = target.provider.drop_damaged(None, Dropping::BeyondUse, false, progress).await;
    assert_eq!(locked.unwrap_err().kind(), ErrorKind::Locked);
    drop(backup);
    assert_eq!(target.listed().await, ids(&[&first, &second]));
    // After the rename, before the files are gone.
    let half = target.scratch.path().join("web01").join(format!(".partial-{}", first.id));
    fs::rename(target.file(&first, ""), &half).unwrap();
    assert_eq!(target.listed().await, ids(&[&second]));
    let third = target.full(3).await;
    assert!(!half.exists());
    assert_eq!(target.listed().await, ids(&[&second, &third]));
}
