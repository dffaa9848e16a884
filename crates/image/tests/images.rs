//! Images against QEMU's own tool, and images that would have us open what is not theirs.
#![allow(clippy::unwrap_used)]

use std::{fs, path::Path, process::Command};
use stillpoint_image::{
    Backing, Directory, ErrorKind, Format, ImageWriter, Layer, Mapping, Qcow2Writer, RawWriter,
};
use stillpoint_model::{Granularity, Length, Offset, Range};

/// Runs `qemu-img` in `directory`; `false`, with the reason told, where it is not installed.
fn qemu_img(directory: &Path, arguments: &[&str]) -> bool {
    match Command::new("qemu-img").current_dir(directory).args(arguments).output() {
        Ok(output) => {
            assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
            true
        }
        Err(error) => {
            eprintln!("SKIP: qemu-img cannot be run: {error}");
            false
        }
    }
}

fn range(start: u64, length: u64) -> Range {
    Range::new(Offset::new(start), Length::new(length)).unwrap()
}

#[test]
fn both_formats_restore_the_same_disk_at_any_size() {
    for size in [0, 1, 511, 512, 65_536, 65_537, 1_000_001, (3 << 20) + 5] {
        let scratch = tempfile::tempdir().unwrap();
        let directory = Directory::open(scratch.path()).unwrap();
        let mut wanted = vec![0; usize::try_from(size).unwrap()];
        let data: Vec<u8> = (0..200_000u32).map(|n| (n % 251) as u8).collect();
        for (format, name) in [(Format::Raw, "disk.raw"), (Format::Qcow2, "disk.qcow2")] {
            let writer = ImageWriter::create(&directory, name, format, Length::new(size)).unwrap();
            for start in [0, 300_000, 2_900_000] {
                let length = data.len().min(wanted.len().saturating_sub(start));
                writer.write(Offset::new(start as u64), data.get(..length).unwrap()).ok();
                if let Some(place) = wanted.get_mut(start..start + length) {
                    place.copy_from_slice(data.get(..length).unwrap());
                }
            }
            let hole = range(70_000.min(size), 65_000.min(size.saturating_sub(70_000)));
            writer.zero(hole).unwrap();
            let hole =
                usize::try_from(hole.start().get()).unwrap()..usize::try_from(hole.end().get()).unwrap();
            wanted.get_mut(hole).unwrap().fill(0);
            assert!(writer.write(Offset::new(size), b"x").is_err());
            writer.finish().unwrap();
            let layer = Layer::open(&directory, name, format, Length::new(size)).unwrap();
            let mut read = vec![1; wanted.len()];
            layer.read(Offset::ZERO, &mut read).unwrap();
            assert!(read == wanted, "{format} of {size}");
            assert!(layer.read(Offset::new(size), &mut [0]).is_err());
        }
        if qemu_img(scratch.path(), &["check", "-f", "qcow2", "disk.qcow2"]) {
            qemu_img(scratch.path(), &["compare", "-f", "raw", "-F", "qcow2", "disk.raw", "disk.qcow2"]);
        }
    }
}

#[test]
fn an_overlay_hides_what_it_has_and_shows_the_rest() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = Directory::open(scratch.path()).unwrap();
    let size = Length::new(1_000_001);
    let base = RawWriter::create(&directory, "base.raw", size).unwrap();
    base.write(Offset::ZERO, &vec![7; 1_000_001]).unwrap();
    base.finish().unwrap();
    let backing = Backing { file: "base.raw".to_owned(), format: Format::Raw };
    let cluster = Some(Granularity::try_from(4096).unwrap());
    let overlay = Qcow2Writer::create(&directory, "top.qcow2", size, cluster, Some(&backing)).unwrap();
    overlay.write(Offset::new(8192), &[1; 4096]).unwrap();
    overlay.zero(range(16_384, 8192)).unwrap();
    overlay.zero(range(999_424, 577)).unwrap();
    assert!(overlay.write(Offset::new(100), &[1; 4096]).is_err(), "half a cluster would hide the rest of it");
    overlay.finish().unwrap();

    let layer = Layer::open(&directory, "top.qcow2", Format::Qcow2, size).unwrap();
    let (part, mapping) = layer.mapping(Offset::ZERO).unwrap().unwrap();
    assert_eq!((part, mapping), (range(0, 8192), Mapping::Absent));
    assert!(matches!(layer.mapping(Offset::new(8192)).unwrap(), Some((_, Mapping::Data(_)))));
    assert!(matches!(layer.mapping(Offset::new(16_384)).unwrap(), Some((_, Mapping::Zero))));
    assert!(matches!(layer.mapping(Offset::new(999_424)).unwrap(), Some((_, Mapping::Zero))));
    assert_eq!(layer.mapping(Offset::new(1_000_001)).unwrap(), None);

    if qemu_img(scratch.path(), &["check", "-f", "qcow2", "top.qcow2"]) {
        qemu_img(scratch.path(), &["convert", "-f", "qcow2", "-O", "raw", "top.qcow2", "out.raw"]);
        let mut wanted = vec![7; 1_000_001];
        wanted.get_mut(8192..12_288).unwrap().fill(1);
        wanted.get_mut(16_384..24_576).unwrap().fill(0);
        wanted.get_mut(999_424..).unwrap().fill(0);
        wanted.resize(1_000_448, 0);
        assert!(fs::read(scratch.path().join("out.raw")).unwrap() == wanted);
    }
}

#[test]
fn what_a_header_names_is_never_opened() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = Directory::open(scratch.path()).unwrap();
    let secret = scratch.path().join("secret");
    fs::write(&secret, vec![b's'; 1 << 20]).unwrap();
    let size = Length::new(1 << 20);
    // A backing file: the layer opens, and what it does not have itself is absent.
    let options = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "secret", "backed.qcow2", "1M"];
    if !qemu_img(scratch.path(), &options) {
        return;
    }
    let layer = Layer::open(&directory, "backed.qcow2", Format::Qcow2, size).unwrap();
    let mut bytes = vec![1; 512];
    layer.read(Offset::ZERO, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 512]);
    // A data file: there is nothing to read without it, so it does not open.
    let options =
        ["create", "-q", "-f", "qcow2", "-o", "data_file=other,data_file_raw=on", "outside.qcow2", "1M"];
    qemu_img(scratch.path(), &options);
    let error = Layer::open(&directory, "outside.qcow2", Format::Qcow2, size).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged);
    // A raw file that holds a qcow2 header is raw.
    fs::copy(scratch.path().join("backed.qcow2"), scratch.path().join("guest.raw")).unwrap();
    let length = Length::new(fs::metadata(scratch.path().join("guest.raw")).unwrap().len());
    let layer = Layer::open(&directory, "guest.raw", Format::Raw, length).unwrap();
    let mut magic = [0; 4];
    layer.read(Offset::ZERO, &mut magic).unwrap();
    assert_eq!(&magic, b"QFI\xfb");
}

#[test]
fn names_are_taken_once_and_links_are_not_followed() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = Directory::open(scratch.path()).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", scratch.path().join("link")).unwrap();
    std::os::unix::fs::symlink("nowhere", scratch.path().join("dangling")).unwrap();
    for name in ["link", "dangling"] {
        assert_eq!(directory.create_file(name).unwrap_err().kind(), ErrorKind::Exists);
        assert_eq!(directory.open_file(name).unwrap_err().kind(), ErrorKind::Damaged);
        assert!(directory.lock_file(name).is_err());
    }
    directory.write_file("a", b"1").unwrap();
    directory.write_file("b", b"2").unwrap();
    assert_eq!(directory.rename("a", "b").unwrap_err().kind(), ErrorKind::Exists);
    assert_eq!(directory.read_file("b", Length::new(1)).unwrap(), b"2");
    assert_eq!(directory.read_file("b", Length::ZERO).unwrap_err().kind(), ErrorKind::Damaged);
    directory.remove_tree("link").unwrap();
    assert!(Path::new("/etc/passwd").exists());
}

#[test]
fn a_lock_with_a_second_name_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = Directory::open(scratch.path()).unwrap();
    drop(directory.lock_file("lock").unwrap());
    drop(directory.lock_file("lock").unwrap());
    fs::write(scratch.path().join("mine"), "mine").unwrap();
    fs::hard_link(scratch.path().join("mine"), scratch.path().join("linked")).unwrap();
    let error = directory.lock_file("linked").unwrap_err();
    assert!(error.to_string().contains("second name"), "{error}");
}
