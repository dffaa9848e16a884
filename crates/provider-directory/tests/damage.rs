//! Every kind of file, damaged in every way: an examination finds it, and a restore never passes wrong bytes for right.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation)]

mod common;

use common::{Disk, Random, Taken, Vm, findings, read_all};
use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};
use stillpoint_provider::{ErrorKind, Incremental, Provider};
use stillpoint_provider_directory::DirectoryProvider;

struct Stored {
    scratch: tempfile::TempDir,
    provider: DirectoryProvider,
    vm: Vm,
    taken: Vec<Taken>,
}

/// A full and two increments of two disks.
async fn stored() -> Stored {
    let scratch = tempfile::tempdir().unwrap();
    let provider = DirectoryProvider::new(scratch.path().to_owned());
    let mut random = Random(42);
    let mut vm =
        Vm::new("web01", vec![Disk::new("vda", 1_500_001, 65_536), Disk::new("vdb", 1_500_001, 4096)]);
    let mut taken = Vec::new();
    for _ in 0..3 {
        for disk in &mut vm.disks {
            // A stretch that stays zero, so that there are holes to damage.
            disk.bytes.truncate(1_400_000);
            disk.scribble(&mut random, 4);
            disk.bytes.resize(1_500_001, 0);
        }
        taken.push(vm.back_up(&provider).await);
    }
    Stored { scratch, provider, vm, taken }
}

impl Stored {
    fn path(&self, point: usize, name: &str) -> PathBuf {
        self.scratch.path().join("web01").join(self.taken[point].id.as_str()).join(name)
    }

    fn files(&self, point: usize) -> Vec<String> {
        let kind = if point == 0 { "raw" } else { "qcow2" };
        let mut files =
            vec!["point.json".to_owned(), "config/web01.conf".to_owned(), "config/web01.fw".to_owned()];
        for disk in ["vda", "vdb"] {
            files.extend([format!("{disk}.{kind}"), format!("{disk}.sums")]);
        }
        files
    }

    /// Whether an examination of the last point finds something; and that a restore gives right bytes or none.
    async fn check(&self, what: &str, must_find: bool) {
        let last = &self.taken[2];
        let found = findings(&self.provider, &self.vm.name, &last.id).await;
        assert!(!must_find || !found.is_empty(), "{what} was not found");
        self.restore(what).await;
        // No damage to one point may keep the others from being listed.
        assert_eq!(self.provider.points(None).await.unwrap().len(), 3, "{what}");
    }

    async fn restore(&self, what: &str) {
        for taken in &self.taken {
            let restore = match self.provider.restore_vm_init(&self.vm.name, &taken.id).await {
                Ok(restore) => restore,
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Damaged, "{what}: {error}");
                    continue;
                }
            };
            if let Ok(config) = restore.config().await {
                assert_eq!(config, common::config(), "{what}");
            }
            for (name, bytes) in &taken.disks {
                let read = match restore.volume(name).await {
                    Ok(source) => read_all(source.as_ref()).await,
                    Err(error) => Err(error),
                };
                match read {
                    Ok(read) => assert!(read == *bytes, "{what}: wrong bytes of {name} at {}", taken.id),
                    Err(error) => assert_eq!(error.kind(), ErrorKind::Damaged, "{what}: {error}"),
                }
            }
        }
    }
}

fn mutate(path: &Path, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let was = fs::read(path).unwrap();
    let mut now = was.clone();
    change(&mut now);
    assert!(now != was, "{} was not changed", path.display());
    fs::write(path, now).unwrap();
    was
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flips_truncations_zeroes_and_missing_files() {
    let stored = stored().await;
    let mut random = Random(1);
    let mut cases = 0;
    for point in 0..3 {
        for name in stored.files(point) {
            // The last point depends on the images and manifests below it, not on their configuration.
            let must_find = point == 2 || !name.starts_with("config");
            let path = stored.path(point, &name);
            let length = fs::metadata(&path).unwrap().len();
            let mut flips = vec![0, 1, 7, 8, 23, 24, 100, 111, 4095, length / 2, length - 2, length - 1];
            flips.extend((0..25).map(|_| random.below(length)));
            if name.ends_with("qcow2") {
                // Within each of the tables at the head of the file, and past the last cluster's data.
                flips.extend((0..40).map(|_| random.below(length.min(6 * 65_536))));
            }
            for at in flips.into_iter().filter(|at| *at < length) {
                let bit = 1 << random.below(8);
                let was = mutate(&path, |bytes| bytes[at as usize] ^= bit);
                stored.check(&format!("flip of {bit:#x} at {at} of point {point} {name}"), must_find).await;
                fs::write(&path, was).unwrap();
                cases += 1;
            }
            for cut in [0, 1, length / 2, length - 1] {
                let was = mutate(&path, |bytes| bytes.truncate(cut as usize));
                stored.check(&format!("cut to {cut} of point {point} {name}"), must_find).await;
                fs::write(&path, was).unwrap();
                cases += 1;
            }
            let was = mutate(&path, |bytes| bytes.fill(0));
            stored.check(&format!("zeroed point {point} {name}"), must_find).await;
            fs::write(&path, &was).unwrap();
            let block = was.len().saturating_sub(1).min(4096);
            let data =
                was.chunks(block.max(1)).position(|chunk| chunk.iter().any(|byte| *byte != 0)).unwrap();
            mutate(&path, |bytes| {
                let end = ((data + 1) * block).min(bytes.len());
                bytes[data * block..end].fill(0);
            });
            stored.check(&format!("zeroed block of point {point} {name}"), must_find).await;
            fs::write(&path, &was).unwrap();
            mutate(&path, |bytes| bytes.push(0));
            stored.check(&format!("a byte more in point {point} {name}"), must_find).await;
            fs::write(&path, &was).unwrap();
            fs::remove_file(&path).unwrap();
            stored.check(&format!("missing point {point} {name}"), must_find).await;
            symlink("/etc/passwd", &path).unwrap();
            stored.check(&format!("link as point {point} {name}"), must_find).await;
            fs::remove_file(&path).unwrap();
            fs::create_dir(&path).unwrap();
            stored.check(&format!("directory as point {point} {name}"), must_find).await;
            fs::remove_dir(&path).unwrap();
            fs::write(&path, &was).unwrap();
            cases += 6;
        }
    }
    stored.check("nothing", false).await;
    assert_eq!(findings(&stored.provider, &stored.vm.name, &stored.taken[2].id).await, Vec::<String>::new());
    eprintln!("{cases} cases of damage");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn swapped_files_and_points() {
    let stored = stored().await;
    let swap = |a: &Path, b: &Path| {
        let aside = stored.scratch.path().join("aside");
        fs::rename(a, &aside).unwrap();
        fs::rename(b, a).unwrap();
        fs::rename(&aside, b).unwrap();
    };
    let mut pairs = Vec::new();
    for point in 0..3 {
        let kind = if point == 0 { "raw" } else { "qcow2" };
        for (a, b) in
            [(format!("vda.{kind}"), format!("vdb.{kind}")), ("vda.sums".to_owned(), "vdb.sums".to_owned())]
        {
            pairs.push((stored.path(point, &a), stored.path(point, &b)));
        }
    }
    pairs.push((stored.path(2, "config/web01.conf"), stored.path(2, "config/web01.fw")));
    for name in ["point.json", "vda.qcow2", "vda.sums"] {
        pairs.push((stored.path(1, name), stored.path(2, name)));
    }
    pairs.push((stored.path(0, "point.json"), stored.path(1, "point.json")));
    let point = |index: usize| stored.path(index, "").parent().unwrap().join(stored.taken[index].id.as_str());
    pairs.push((point(0), point(1)));
    pairs.push((point(1), point(2)));
    for (a, b) in pairs {
        swap(&a, &b);
        stored.check(&format!("{} and {} swapped", a.display(), b.display()), true).await;
        swap(&a, &b);
    }
    assert_eq!(findings(&stored.provider, &stored.vm.name, &stored.taken[2].id).await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_point_is_listed_as_such_and_never_built_on() {
    let mut stored = stored().await;
    let was = mutate(&stored.path(2, "point.json"), |bytes| bytes[40] ^= 1);
    let listed = stored.provider.points(Some(&stored.vm.name)).await.unwrap();
    assert_eq!(listed.iter().filter(|point| point.damage.is_some()).count(), 1);
    assert!(listed.iter().any(|point| point.record.is_none() && point.id == stored.taken[2].id));
    let next = stored.vm.back_up(&stored.provider).await;
    for answer in &next.answers {
        let Incremental::Full { reason, .. } = answer else { panic!("an increment to a damaged point") };
        assert!(reason.contains("damaged"), "{reason}");
    }
    fs::write(stored.path(2, "point.json"), was).unwrap();
    common::assert_restores(&stored.provider, &stored.vm.name, &next).await;

    // Without the full below, all that stands on it is of no use, and the listing says so.
    fs::remove_file(stored.path(0, "vda.raw")).unwrap();
    let listed = stored.provider.points(None).await.unwrap();
    let damaged: Vec<bool> = listed.iter().map(|point| point.damage.is_some()).collect();
    assert_eq!(damaged, [true, true, true, false]);
}
