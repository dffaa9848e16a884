//! Sources that break, targets that refuse, and two runs at once.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation)]

mod common;

use common::{Disk, Random, Vm, assert_restores};
use std::{fs, os::unix::fs::symlink, path::Path, process::Command};
use stillpoint_model::{Length, PointId};
use stillpoint_provider::{ErrorKind, Incremental, Provider};
use stillpoint_provider_directory::DirectoryProvider;

fn vm(size: usize) -> Vm {
    let mut disk = Disk::new("vda", size, 65_536);
    let bytes = Random(3).bytes(size);
    disk.bytes.copy_from_slice(&bytes);
    Vm::new("web01", vec![disk])
}

fn names(path: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_breaks_leaves_nothing() {
    let scratch = tempfile::tempdir().unwrap();
    let provider = DirectoryProvider::new(scratch.path().to_owned());
    let mut vm = vm(20 << 20);
    vm.disks.push(Disk::new("vdb", 3 << 20, 512));
    vm.disks[1].scribble(&mut Random(5), 10);
    for reads in [0, 1, 9, 15] {
        let (mut backup, _, _, _, reports) = vm.store(&provider, reads).await;
        let error = reports.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Source);
        assert_eq!(error.to_string(), "the snapshot broke");
        backup.backup_cleanup().await.unwrap();
        assert_eq!(names(&scratch.path().join("web01")), ["lock"]);
        assert!(provider.points(None).await.unwrap().is_empty());
    }
    // The same once there is a point, for an increment.
    let first = vm.back_up(&provider).await;
    vm.disks[0].scribble(&mut Random(6), 30);
    let (mut backup, _, _, _, reports) = vm.store(&provider, 2).await;
    assert_eq!(reports.unwrap_err().kind(), ErrorKind::Source);
    backup.backup_cleanup().await.unwrap();
    assert_eq!(names(&scratch.path().join("web01")), [first.id.as_str(), "lock"]);
    let second = vm.back_up(&provider).await;
    assert!(matches!(second.answers[0], Incremental::Since(_)));
    assert_restores(&provider, &vm.name, &second).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropping_a_run_leaves_nothing_once_it_is_cleaned_up() {
    let scratch = tempfile::tempdir().unwrap();
    let provider = DirectoryProvider::new(scratch.path().to_owned());
    provider.job_init().await.unwrap();
    for wait in 0..20 {
        let mut vm = vm(8 << 20);
        vm.count = wait;
        let id = vm.next_id();
        let mut backup = provider.backup_init(&vm.name, &id).await.unwrap();
        let volume = stillpoint_provider::Volume {
            name: vm.disks[0].name.clone(),
            bitmap_mode: stillpoint_provider::BitmapMode::New,
            base: None,
            source: std::sync::Arc::new(vm.disks[0].freeze(false)),
        };
        let run = backup.backup_vm(&[], vec![volume]);
        let _cut_short =
            tokio::time::timeout(std::time::Duration::from_micros(u64::from(wait) * 700), run).await;
        backup.backup_cleanup().await.unwrap();
        assert_eq!(names(&scratch.path().join("web01")), ["lock"]);
    }
}

#[tokio::test]
async fn a_second_run_is_told_who_holds_the_lock() {
    let scratch = tempfile::tempdir().unwrap();
    let provider = DirectoryProvider::new(scratch.path().to_owned());
    let mut vm = vm(100);
    provider.job_init().await.unwrap();
    let first = provider.backup_init(&vm.name.clone(), &vm.next_id()).await.unwrap();
    let other = vm.next_id();
    let error = provider.backup_init(&vm.name, &other).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Locked);
    assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
    // Another VM is not concerned, and the lock goes with its holder.
    let elsewhere = provider.backup_init(&"web02".parse().unwrap(), &other).await;
    assert!(elsewhere.is_ok());
    drop(first);
    assert!(provider.backup_init(&vm.name, &other).await.is_ok());
}

#[tokio::test]
async fn a_lock_that_is_another_file_too_is_not_written() {
    let scratch = tempfile::tempdir().unwrap();
    let provider = DirectoryProvider::new(scratch.path().join("target"));
    provider.job_init().await.unwrap();
    let (mine, mut vm) = (scratch.path().join("mine"), vm(100));
    fs::write(&mine, "mine").unwrap();
    fs::create_dir(scratch.path().join("target/web01")).unwrap();
    fs::hard_link(&mine, scratch.path().join("target/web01/lock")).unwrap();
    let id = vm.next_id();
    assert_eq!(provider.backup_init(&vm.name, &id).await.err().unwrap().kind(), ErrorKind::Damaged);
    assert_eq!(fs::read(&mine).unwrap(), b"mine");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn configuration_beyond_measure_is_neither_stored_nor_read() {
    let scratch = tempfile::tempdir().unwrap();
    let provider = DirectoryProvider::new(scratch.path().to_owned());
    let mut vm = vm(100);
    provider.job_init().await.unwrap();
    let id = vm.next_id();
    let mut backup = provider.backup_init(&vm.name, &id).await.unwrap();
    let file = |name: &str, length| stillpoint_provider::ConfigFile {
        name: name.parse().unwrap(),
        role: stillpoint_provider::ConfigRole::Guest,
        content: vec![0; length],
    };
    let error = backup.backup_vm(&[file("large", (64 << 20) + 1)], Vec::new()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    backup.backup_cleanup().await.unwrap();
    // A target may tell of any length, with a file that is as long: it costs its writer nothing.
    let taken = vm.back_up(&provider).await;
    let point = scratch.path().join("web01").join(taken.id.as_str());
    let manifest = fs::read_to_string(point.join("point.json")).unwrap();
    let start = manifest.find("\"record\":").unwrap() + 9;
    let record = &manifest[start..manifest.trim_end().len() - 1];
    let length = u64::try_from(common::config()[0].content.len()).unwrap();
    let forged =
        record.replacen(&format!("\"length\":{length},"), &format!("\"length\":{},", 64u64 << 30), 1);
    assert!(forged != *record, "{record}");
    let sum = blake3::hash(forged.as_bytes()).to_hex();
    fs::write(
        point.join("point.json"),
        format!("{{\"format\":1,\"blake3\":\"{sum}\",\"record\":{forged}}}\n"),
    )
    .unwrap();
    fs::File::options().write(true).open(point.join("config/web01.conf")).unwrap().set_len(64 << 30).unwrap();
    let restore = provider.restore_vm_init(&vm.name, &taken.id).await.unwrap();
    let error = restore.config().await.unwrap_err();
    assert!(error.kind() == ErrorKind::Damaged && error.to_string().contains("256 MiB"), "{error}");
}

#[tokio::test]
async fn only_the_last_component_of_a_target_is_made() {
    let scratch = tempfile::tempdir().unwrap();
    let missing = DirectoryProvider::new(scratch.path().join("not/mounted"));
    assert_eq!(missing.job_init().await.unwrap_err().kind(), ErrorKind::TargetMissing);
    assert_eq!(missing.points(None).await.unwrap_err().kind(), ErrorKind::TargetMissing);
    assert!(names(scratch.path()).is_empty());
    let new = DirectoryProvider::new(scratch.path().join("backups"));
    let id = new.job_init().await.unwrap();
    assert_eq!(new.job_init().await.unwrap(), id);
    assert_eq!(names(&scratch.path().join("backups")), ["stillpoint-target.json"]);
    fs::write(scratch.path().join("file"), "").unwrap();
    let file = DirectoryProvider::new(scratch.path().join("file"));
    assert_eq!(file.job_init().await.unwrap_err().kind(), ErrorKind::TargetForeign);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn links_and_foreign_names_in_a_target_are_not_followed() {
    let scratch = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let provider = DirectoryProvider::new(scratch.path().to_owned());
    let mut vm = vm(70_000);
    let first = vm.back_up(&provider).await;
    symlink(elsewhere.path(), scratch.path().join("web02")).unwrap();
    assert!(provider.backup_init(&"web02".parse().unwrap(), &vm.next_id()).await.is_err());
    assert!(names(elsewhere.path()).is_empty());
    // A partial that is a link is removed, and what it points to stays.
    fs::write(elsewhere.path().join("keep"), "").unwrap();
    let partial = format!(".partial-{}", vm.next_id());
    symlink(elsewhere.path(), scratch.path().join("web01").join(&partial)).unwrap();
    for foreign in ["lost+found", "web01/notes.txt", "web01/.snapshot", "-x"] {
        fs::create_dir(scratch.path().join(foreign)).unwrap();
    }
    let second = vm.back_up(&provider).await;
    assert!(!scratch.path().join("web01").join(&partial).exists());
    assert_eq!(names(elsewhere.path()), ["keep"]);
    let listed = provider.points(None).await.unwrap();
    assert_eq!(listed.iter().map(|point| &point.id).collect::<Vec<_>>(), [&first.id, &second.id]);
    let nowhere: PointId = "20200101T000000Z-00000000".parse().unwrap();
    let error = provider.restore_vm_init(&vm.name, &nowhere).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn why_a_full_is_wanted() {
    let scratch = tempfile::tempdir().unwrap();
    let provider = DirectoryProvider::new(scratch.path().to_owned());
    let mut vm = vm(200_000);
    let reason = |answer: &Incremental| match answer {
        Incremental::Full { reason, .. } => reason.clone(),
        Incremental::Since(point) => panic!("since {point}"),
    };
    let first = vm.back_up(&provider).await;
    assert_eq!(reason(&first.answers[0]), "no earlier point in this target");
    vm.disks[0].generation = None;
    let second = vm.back_up(&provider).await;
    assert_eq!(reason(&second.answers[0]), format!("no bitmap for the latest point {}", first.id));
    // A bitmap relative to an older point is as good as long as that point is whole.
    vm.disks[0].generation = Some(first.id.clone());
    vm.disks[0].dirty.fill(true);
    let third = vm.back_up(&provider).await;
    assert_eq!(third.answers, [Incremental::Since(first.id.clone())]);
    assert_restores(&provider, &vm.name, &third).await;
    // A disk that grew.
    vm.disks[0].bytes.resize(300_000, 1);
    vm.disks[0].dirty.resize(5, true);
    let fourth = vm.back_up(&provider).await;
    assert_eq!(reason(&fourth.answers[0]), "size changed from 200000 to 300000 bytes");
    vm.disks.push(Disk::new("vdb", 1000, 512));
    let fifth = vm.back_up(&provider).await;
    assert!(matches!(fifth.answers[0], Incremental::Since(_)));
    assert_eq!(reason(&fifth.answers[1]), format!("latest point {} does not have this disk", fourth.id));
    assert_restores(&provider, &vm.name, &fifth).await;
}

/// A file system of its own, unmounted at the end.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn tmpfs(options: &str) -> Option<Self> {
        let scratch = tempfile::tempdir().unwrap();
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(scratch.path()).output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self(scratch)),
            Ok(output) => {
                eprintln!("SKIP: cannot mount a tmpfs: {}", String::from_utf8_lossy(&output.stderr).trim());
                None
            }
            Err(error) => {
                eprintln!("SKIP: cannot mount a tmpfs: {error}");
                None
            }
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ended = Command::new("umount").arg(self.0.path()).output();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_target_says_so_at_every_size() {
    for kib in [4, 64, 512, 1024, 2048, 5000] {
        let Some(mounted) = Mounted::tmpfs(&format!("size={kib}k")) else { return };
        let provider = DirectoryProvider::new(mounted.0.path().join("target"));
        let mut vm = vm(8 << 20);
        let error = async {
            provider.job_init().await?;
            let mut backup = provider.backup_init(&vm.name.clone(), &vm.next_id()).await?;
            let volume = stillpoint_provider::Volume {
                name: vm.disks[0].name.clone(),
                bitmap_mode: stillpoint_provider::BitmapMode::New,
                base: None,
                source: std::sync::Arc::new(vm.disks[0].freeze(false)),
            };
            let stored = backup.backup_vm(&common::config(), vec![volume]).await;
            backup.backup_cleanup().await?;
            stored
        }
        .await
        .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TargetFull, "{kib}: {error}");
        let vm_directory = mounted.0.path().join("target/web01");
        if vm_directory.exists() {
            assert_eq!(names(&vm_directory), ["lock"]);
        }
        assert!(provider.points(None).await.map_or(true, |points| points.is_empty()));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_only_target_still_restores() {
    let Some(mounted) = Mounted::tmpfs("size=50m") else { return };
    let provider = DirectoryProvider::new(mounted.0.path().to_owned());
    let mut vm = vm(1_000_001);
    let taken = vm.back_up(&provider).await;
    let remount = Command::new("mount").args(["-o", "remount,ro"]).arg(mounted.0.path()).status().unwrap();
    assert!(remount.success());
    assert_eq!(provider.job_init().await.unwrap_err().kind(), ErrorKind::TargetReadOnly);
    assert_restores(&provider, &vm.name, &taken).await;
    assert!(common::findings(&provider, &vm.name, &taken.id).await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zeroes_cost_nothing_and_huge_disks_take_no_time() {
    use async_trait::async_trait;
    use stillpoint_model::{Extent, ExtentKind, Offset, Range};
    struct Empty(u64);
    #[async_trait]
    impl stillpoint_provider::VolumeSource for Empty {
        fn size(&self) -> Length {
            Length::new(self.0)
        }
        async fn regions(&self, from: Offset) -> stillpoint_provider::Result<Vec<Extent>> {
            let range = Range::between(from, Offset::new(self.0)).unwrap();
            Ok(vec![Extent { range, kind: ExtentKind::Zero }])
        }
        async fn read(&self, _: Range) -> stillpoint_provider::Result<bytes::Bytes> {
            panic!("nothing is to be read");
        }
        async fn release(&self, _: Range) -> stillpoint_provider::Result<()> {
            Ok(())
        }
    }
    let scratch = tempfile::tempdir().unwrap();
    let provider = DirectoryProvider::new(scratch.path().to_owned());
    provider.job_init().await.unwrap();
    let mut vm = vm(0);
    let mut backup = provider.backup_init(&vm.name.clone(), &vm.next_id()).await.unwrap();
    let volume = stillpoint_provider::Volume {
        name: "vda".parse().unwrap(),
        bitmap_mode: stillpoint_provider::BitmapMode::None,
        base: None,
        source: std::sync::Arc::new(Empty(4 << 40)),
    };
    let reports = backup.backup_vm(&[], vec![volume]).await.unwrap();
    assert!(reports[0].stored.get() < 4096, "{:?}", reports[0]);
    backup.backup_cleanup().await.unwrap();
}
