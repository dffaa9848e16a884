//! Against images that QEMU's own tools made.

use super::*;
use std::{path::Path, process::Command};
use stillpoint_model::Offset;

const MIB: u64 = 1 << 20;

fn tool(program: &str, arguments: &[&str], directory: &Path) {
    let output = Command::new(program).args(arguments).current_dir(directory).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn image(options: &str, size: u64) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let size = size.to_string();
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, "i.qcow2", &size], directory.path());
    directory
}

fn write(directory: &tempfile::TempDir, commands: &[&str]) {
    for command in commands {
        tool("qemu-io", &["-f", "qcow2", "-c", command, "i.qcow2"], directory.path());
    }
}

fn open(directory: &tempfile::TempDir, size: u64) -> (File, Option<Tables>) {
    let file = File::open(directory.path().join("i.qcow2")).unwrap();
    let tables = Tables::open(&file, Length::new(size));
    (file, tables)
}

fn range(start: u64, length: u64) -> Range {
    Range::new(Offset::new(start), Length::new(length)).unwrap()
}

/// Whatever `places` finds is what `qemu-img convert` says that the disk holds; returns the bytes found.
fn compare(directory: &tempfile::TempDir, size: u64) -> u64 {
    tool("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", "i.qcow2", "o.raw"], directory.path());
    let raw = std::fs::read(directory.path().join("o.raw")).unwrap();
    let (file, tables) = open(directory, size);
    let tables = tables.unwrap();
    let mut found = 0;
    // Pieces that begin and end within clusters.
    for piece in range(0, size).chunks(Length::new(300_000)) {
        let places = tables.places(Some(&file), piece).unwrap();
        for place in &places {
            let length = usize::try_from(place.range.length().get()).unwrap();
            let start = usize::try_from(place.range.start().get()).unwrap();
            let held = read(&file, place.at, length).unwrap();
            assert_eq!(held, raw[start..start + length], "{place:?}");
            found += place.range.length().get();
        }
        let rest: u64 = elsewhere(piece, &places).iter().map(|part| part.length().get()).sum();
        assert_eq!(
            rest + places.iter().map(|place| place.range.length().get()).sum::<u64>(),
            piece.length().get()
        );
        // Tables that are there are kept.
        if let Ok(again) = tables.places(None, piece) {
            assert_eq!(again, places);
        }
    }
    found
}

#[test]
fn allocated_clusters_are_found_where_qemu_has_them() {
    for options in [
        "cluster_size=65536",
        "cluster_size=4096",
        "cluster_size=2097152",
        "compat=0.10",
        "lazy_refcounts=on",
    ] {
        // A second table of level 2 at least with small clusters, and an end within a cluster.
        let size = 24 * MIB + 512;
        let directory = image(options, size);
        write(
            &directory,
            &["write -P 1 1M 3M", "write -P 2 9M 64k", "write -P 3 5000k 100k", "write -P 4 24M 512"],
        );
        assert!(compare(&directory, size) >= 3 * MIB, "{options}");
    }
}

#[test]
fn zero_compressed_and_absent_clusters_are_left_to_qemu() {
    let size = 8 * MIB;
    let directory = image("cluster_size=65536", size);
    write(&directory, &["write -P 1 0 1M", "write -z 64k 64k", "write -c -P 7 2M 64k", "discard 512k 64k"]);
    assert_eq!(compare(&directory, size), MIB - 2 * 65_536);
}

#[test]
fn an_image_with_snapshots_inside_is_read_as_it_is_now() {
    let size = 4 * MIB;
    let directory = image("cluster_size=65536", size);
    write(&directory, &["write -P 1 0 2M"]);
    tool("qemu-img", &["snapshot", "-c", "then", "i.qcow2"], directory.path());
    write(&directory, &["write -P 2 1M 64k"]);
    assert_eq!(compare(&directory, size), 2 * MIB);
}

#[test]
fn what_is_not_in_the_file_as_it_is_or_of_another_size_is_refused() {
    for options in ["extended_l2=on", "data_file=d.raw,data_file_raw=on"] {
        assert!(open(&image(options, MIB), MIB).1.is_none(), "{options}");
    }
    let plain = image("cluster_size=65536", MIB);
    assert!(open(&plain, MIB).1.is_some());
    assert!(open(&plain, 2 * MIB).1.is_none());
    std::fs::write(plain.path().join("i.qcow2"), b"QFI").unwrap();
    assert!(open(&plain, MIB).1.is_none());
}

#[test]
fn a_table_that_was_given_up_meanwhile_is_not_believed() {
    let directory = image("cluster_size=65536", MIB);
    write(&directory, &["write -P 1 0 1M"]);
    let (file, tables) = open(&directory, MIB);
    let tables = tables.unwrap();
    // The header points elsewhere now.
    let path = directory.path().join("i.qcow2");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[47] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(tables.places(Some(&file), range(0, MIB)).unwrap(), []);
}

#[test]
fn tables_full_of_nonsense_are_an_error_or_lead_nowhere() {
    let directory = image("cluster_size=65536", MIB);
    write(&directory, &["write -P 1 0 1M"]);
    let path = directory.path().join("i.qcow2");
    let good = std::fs::read(&path).unwrap();
    for at in (0..112).chain(3 * 65_536..3 * 65_536 + 16) {
        for byte in [0, 0x7f, 0xff] {
            let mut bytes = good.clone();
            bytes[at] = byte;
            std::fs::write(&path, &bytes).unwrap();
            let (file, tables) = open(&directory, MIB);
            if let Some(tables) = tables {
                // No panic, and no more memory than a table's.
                let _ = tables.places(Some(&file), range(0, MIB));
            }
        }
    }
}
