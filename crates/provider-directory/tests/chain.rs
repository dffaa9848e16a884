//! Fulls and increments of disks of every awkward size, against the bytes that they had.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation)]

mod common;

use common::{Disk, Random, Taken, Vm, assert_restores, findings, qemu_img, snapshot};
use std::{os::unix::fs::PermissionsExt, path::Path};
use stillpoint_provider::{Incremental, Provider};
use stillpoint_provider_directory::DirectoryProvider;

/// QEMU reads each image by itself, chain and all, to the same bytes (and zeroes up to a whole sector).
fn assert_qemu_reads(target: &Path, vm: &str, taken: &Taken) {
    for (name, bytes) in &taken.disks {
        let point = target.join(vm).join(taken.id.as_str());
        let (raw, overlay) = (point.join(format!("{name}.raw")), point.join(format!("{name}.qcow2")));
        let (image, format) = if raw.exists() { (raw, "raw") } else { (overlay, "qcow2") };
        let image = image.to_str().unwrap();
        if format == "qcow2" && qemu_img(&["check", "-f", "qcow2", image]).is_none() {
            return;
        }
        let out = tempfile::NamedTempFile::new().unwrap();
        let to = out.path().to_str().unwrap();
        if qemu_img(&["convert", "-f", format, "-O", "raw", image, to]).is_none() {
            return;
        }
        let mut wanted = bytes.to_vec();
        let mut read = std::fs::read(to).unwrap();
        wanted.resize(wanted.len().next_multiple_of(512), 0);
        read.resize(wanted.len(), 0);
        assert!(read == wanted, "qemu-img reads {image} differently");
    }
}

async fn run(sizes: &[usize], granularities: &[u64], points: usize, seed: u64) {
    let scratch = tempfile::tempdir().unwrap();
    let target = scratch.path().join("target");
    let provider = DirectoryProvider::new(target.clone());
    let mut random = Random(seed);
    let disks = sizes.iter().zip(granularities).enumerate();
    let disks =
        disks.map(|(index, (size, granularity))| Disk::new(&format!("vd{index}"), *size, *granularity));
    let mut vm = Vm::new("web01", disks.collect());
    let mut taken: Vec<Taken> = Vec::new();
    for point in 0..points {
        for disk in &mut vm.disks {
            disk.scribble(&mut random, 6);
        }
        let before = if target.exists() { snapshot(&target) } else { Default::default() };
        let new = vm.back_up(&provider).await;
        for answer in &new.answers {
            assert_eq!(matches!(answer, Incremental::Since(_)), point > 0, "{answer:?}");
        }
        let after = snapshot(&target);
        for (path, was) in before.iter().filter(|(path, _)| !path.ends_with("lock")) {
            assert!(after.get(path) == Some(was), "{} was touched", path.display());
        }
        taken.push(new);
    }
    for point in &taken {
        assert_restores(&provider, &vm.name, point).await;
        assert_qemu_reads(&target, "web01", point);
        assert_eq!(findings(&provider, &vm.name, &point.id).await, Vec::<String>::new());
    }
    let listed = provider.points(None).await.unwrap();
    let ids: Vec<_> = listed.iter().map(|point| point.id.clone()).collect();
    assert_eq!(ids, taken.iter().map(|point| point.id.clone()).collect::<Vec<_>>());
    for (index, point) in listed.iter().enumerate() {
        assert_eq!(point.sequence, index as u64 + 1);
        assert_eq!(point.damage, None);
    }
    for (path, _) in snapshot(&target) {
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{}", path.display());
        let mode = std::fs::metadata(path.parent().unwrap()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700, "{}", path.parent().unwrap().display());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_and_odd_sizes() {
    for granularity in [512, 4096, 65_536, 1 << 20] {
        run(&[0, 1, 511, 512, 65_537], &[granularity; 5], 4, granularity).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_size_that_is_no_multiple_of_a_sector() {
    run(&[1_000_001, 1_000_001, 1_000_001], &[512, 65_536, 1 << 20], 6, 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_cells_and_two_disks() {
    for seed in 0..3 {
        run(&[(4 << 20) + 3, 6 << 20], &[512 << (seed * 3), 65_536], 6, 100 + seed).await;
    }
}
