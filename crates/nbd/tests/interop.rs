//! The client against real servers: qemu-nbd, nbdkit and QEMU itself.
//!
//! `STILLPOINT_QEMU_NBD` names another qemu-nbd to test with, as a command line split at spaces. A server that is not
//! installed is skipped with a line on stderr.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking, also in its own helpers"
)]

use bytes::Bytes;
use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
};
use stillpoint_model::{Length, Offset, Range};
use stillpoint_nbd::{Client, ErrorKind, Framing, MapExtent, MetaContext, Options};
use tempfile::TempDir;

/// Not a multiple of 512, let alone of a cluster.
const ODD: usize = (5 << 20) + 12_345;

fn range(offset: u64, length: u64) -> Range {
    Range::new(Offset::new(offset), Length::new(length)).unwrap()
}

fn pattern(size: usize) -> Vec<u8> {
    (0..size).map(|at| (at / 7 % 255) as u8 + 1).collect()
}

/// A server that put itself into the background once it listened; ends with the test.
struct Server {
    place: TempDir,
}

impl Server {
    fn place() -> TempDir {
        tempfile::tempdir().unwrap()
    }

    /// Runs a command that returns when the server listens, having written its process id to `pid`.
    fn start(place: TempDir, command: &mut Command) -> Option<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let server = Self { place };
        match command.stdin(std::process::Stdio::null()).status() {
            Ok(status) => assert!(status.success(), "{name}: {status}"),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                eprintln!("skipped: {name} is not installed");
                return None;
            }
            Err(error) => panic!("{name}: {error}"),
        }
        Some(server)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    async fn connect(&self, options: Options) -> Client {
        Client::connect_unix(&self.path("sock"), options).await.unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Ok(pid) = std::fs::read_to_string(self.path("pid")) {
            let _ = Command::new("kill").arg(pid.trim()).stderr(std::process::Stdio::null()).status();
        }
    }
}

fn qemu_nbd_program() -> Command {
    let line = std::env::var("STILLPOINT_QEMU_NBD").unwrap_or_else(|_| "qemu-nbd".to_owned());
    let mut words = line.split(' ');
    let mut command = Command::new(words.next().unwrap());
    command.args(words);
    command
}

/// Extended headers came with QEMU 8.2.
fn qemu_nbd_is_extended() -> bool {
    let output = qemu_nbd_program().arg("--version").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.split(' ').nth(1).unwrap();
    let mut numbers = version.split('.').map(|number| number.trim().parse::<u32>().unwrap_or(0));
    (numbers.next(), numbers.next()) >= (Some(8), Some(2))
}

fn qemu_nbd(place: &Path) -> Command {
    let mut command = qemu_nbd_program();
    command.args(["--fork", "-t", "-x", "disk", "--discard=unmap"]);
    command.arg("--pid-file").arg(place.join("pid")).arg("-k").arg(place.join("sock"));
    command
}

fn qemu_img(arguments: &[&str], path: &Path, after: &[&str]) -> bool {
    match Command::new("qemu-img").args(arguments).arg(path).args(after).output() {
        Ok(output) => {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            true
        }
        Err(error) => {
            eprintln!("skipped: qemu-img: {error}");
            false
        }
    }
}

async fn read_all(client: &Client, step: u64) -> Vec<u8> {
    let mut data = Vec::new();
    for part in Range::whole(client.size()).unwrap().chunks(Length::new(step)) {
        let bytes = client.read(part).await.unwrap();
        assert_eq!(bytes.len() as u64, part.length().get());
        data.extend_from_slice(&bytes);
    }
    data
}

fn assert_whole(map: &[MapExtent], from: u64, end: u64) {
    let mut at = from;
    for extent in map {
        assert_eq!(extent.range.start().get(), at);
        assert!(!extent.range.is_empty());
        at = extent.range.end().get();
    }
    assert_eq!(at, end);
}

#[tokio::test]
async fn qemu_nbd_with_a_raw_file_of_odd_size() {
    let place = Server::place();
    let mut data = pattern(ODD);
    data[1 << 20..3 << 20].fill(0);
    std::fs::write(place.path().join("raw"), &data).unwrap();
    let mut command = qemu_nbd(place.path());
    command.args(["-f", "raw"]).arg(place.path().join("raw"));
    let Some(server) = Server::start(place, &mut command) else { return };

    let base = MetaContext::base_allocation();
    let depth = MetaContext::qemu_allocation_depth();
    let absent = MetaContext::qemu_dirty_bitmap(&"none".parse().unwrap());
    let options = Options::new("disk").context(absent.clone()).context(base.clone()).context(depth.clone());
    let client = server.connect(options).await;
    assert_eq!(
        client.framing(),
        if qemu_nbd_is_extended() { Framing::Extended } else { Framing::Structured }
    );
    assert!(client.has_context(&base) && !client.has_context(&absent));
    assert_eq!(
        client.map(&absent, Offset::ZERO, Length::new(1)).await.unwrap_err().kind(),
        ErrorKind::MissingContext
    );
    // QEMU rounds the size of a raw file up to 512 bytes, and the rest reads as zeroes.
    let size = client.size().get() as usize;
    assert!((ODD..ODD + 512).contains(&size));
    data.resize(size, 0);
    assert_eq!(read_all(&client, 777_777).await, data);

    let map = client.map(&base, Offset::ZERO, client.size()).await.unwrap();
    assert_whole(&map, 0, size as u64);
    assert_whole(&client.map(&base, Offset::new(100), Length::new(5)).await.unwrap(), 100, 105);
    let status = client.block_status(range(0, 65_536)).await.unwrap();
    assert!(!status.of(&base).unwrap().is_empty());
    assert_eq!(status.of(&absent).unwrap_err().kind(), ErrorKind::MissingContext);

    let flags = client.flags();
    assert!(flags.can_trim() && flags.can_flush() && flags.can_write_zeroes() && !flags.read_only());
    client.write(Offset::new(1_000_001), Bytes::from_static(b"stillpoint")).await.unwrap();
    client.trim(range(2 << 20, 1 << 20)).await.unwrap();
    client.write_zeroes(range(4 << 20, 65_536)).await.unwrap();
    client.flush().await.unwrap();
    data[1_000_001..1_000_011].copy_from_slice(b"stillpoint");
    data[4 << 20..(4 << 20) + 65_536].fill(0);
    assert_eq!(read_all(&client, 1 << 20).await, data);
    let trimmed = client.map(&base, Offset::new(2 << 20), Length::new(1 << 20)).await.unwrap();
    assert!(trimmed.iter().all(|extent| extent.is_zero(&base)), "{trimmed:?}");
    client.disconnect().await.unwrap();

    let error = Client::connect_unix(&server.path("sock"), Options::new("no such")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSuchExport, "{error}");
}

#[tokio::test]
async fn qemu_nbd_with_a_dirty_bitmap_of_a_qcow2_image() {
    let place = Server::place();
    let image = place.path().join("qcow2");
    if !qemu_img(&["create", "-q", "-f", "qcow2"], &image, &["6000000000"]) {
        return;
    }
    assert!(qemu_img(&["bitmap", "--add", "-f", "qcow2"], &image, &["b0"]));
    let mut command = qemu_nbd(place.path());
    let Some(server) = Server::start(place, command.args(["-f", "qcow2", "-e", "2"]).arg(&image)) else {
        return;
    };
    let plain = server.connect(Options::new("disk")).await;
    plain.write(Offset::new(70_000), Bytes::from(pattern(200_000))).await.unwrap();
    plain.write(Offset::new(5_900_000_000), Bytes::from(pattern(10))).await.unwrap();
    plain.disconnect().await.unwrap();
    let place = stop(server);

    let mut command = qemu_nbd(place.path());
    command.args(["-f", "qcow2", "-r", "-B", "b0"]).arg(&image);
    let server = Server::start(place, &mut command).unwrap();
    let base = MetaContext::base_allocation();
    let bitmap = MetaContext::qemu_dirty_bitmap(&"b0".parse().unwrap());
    let client = server.connect(Options::new("disk").context(base.clone()).context(bitmap.clone())).await;
    assert!(client.flags().read_only());
    let size = client.size();
    assert_eq!(size.get(), 6_000_000_000);
    let dirty: Vec<Range> = client
        .map(&bitmap, Offset::ZERO, size)
        .await
        .unwrap()
        .into_iter()
        .filter(|extent| extent.is_dirty(&bitmap))
        .map(|extent| extent.range)
        .collect();
    let far = 5_900_000_000 / 65_536 * 65_536;
    assert_eq!(dirty, [range(65_536, 262_144), range(far, 65_536)]);
    let map = client.map(&base, Offset::ZERO, size).await.unwrap();
    assert_whole(&map, 0, size.get());
    let data: Length =
        map.iter().filter(|extent| !extent.is_zero(&base)).map(|extent| extent.range.length()).sum();
    assert!((200_010..1 << 20).contains(&data.get()), "{data}");
    assert_eq!(client.read(range(70_000, 200_000)).await.unwrap(), pattern(200_000));
    // A hole comes as a hole chunk.
    assert!(client.read(range(1 << 30, 32 << 20)).await.unwrap().iter().all(|byte| *byte == 0));
    assert_eq!(client.trim(range(0, 65_536)).await.unwrap_err().kind(), ErrorKind::Limits);
    client.disconnect().await.unwrap();
}

/// Ends a server and waits until it has let go of its image.
fn stop(mut server: Server) -> TempDir {
    let pid = std::fs::read_to_string(server.path("pid")).unwrap();
    let held = format!("kill {pid}; tail --pid={pid} -f /dev/null", pid = pid.trim());
    Command::new("sh").args(["-c", &held]).status().unwrap();
    std::fs::remove_file(server.path("pid")).ok();
    std::fs::remove_file(server.path("sock")).ok();
    // What is dropped below has no process id to end.
    std::mem::replace(&mut server.place, tempfile::tempdir().unwrap())
}

fn nbdkit(place: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("nbdkit");
    command.arg("-U").arg(place.join("sock")).arg("-P").arg(place.join("pid")).args(arguments);
    command
}

#[tokio::test]
async fn nbdkit_with_and_without_structured_replies() {
    for (extra, framing) in [(None, Framing::Structured), (Some("--no-sr"), Framing::Simple)] {
        let place = Server::place();
        let mut command = nbdkit(place.path(), &["-r"]);
        let Some(server) = Server::start(place, command.args(extra).args(["pattern", "1000003"])) else {
            return;
        };
        let base = MetaContext::base_allocation();
        let client = server.connect(Options::new("").context(base.clone())).await;
        assert_eq!(client.framing(), framing);
        // The pattern plugin: each 8 bytes are their own offset, big-endian.
        let expected: Vec<u8> =
            (0..125_001u64).flat_map(|index| (index * 8).to_be_bytes()).take(1_000_003).collect();
        assert_eq!(read_all(&client, 65_537).await, expected);
        let map = client.map(&base, Offset::ZERO, client.size()).await;
        if framing == Framing::Simple {
            assert_eq!(map.unwrap_err().kind(), ErrorKind::MissingContext);
        } else {
            assert_whole(&map.unwrap(), 0, 1_000_003);
        }
        client.disconnect().await.unwrap();
    }
}

#[tokio::test]
async fn nbdkit_with_a_sparse_disk_of_8_tib() {
    let place = Server::place();
    let mut command = nbdkit(place.path(), &["memory", "8T"]);
    let Some(server) = Server::start(place, &mut command) else { return };
    let base = MetaContext::base_allocation();
    let client = server.connect(Options::new("").context(base.clone())).await;
    let size = client.size().get();
    assert_eq!(size, 8 << 40);
    client.write(Offset::new(7 << 40), Bytes::from(pattern(40_000_000))).await.unwrap();
    let map = client.map(&base, Offset::ZERO, client.size()).await.unwrap();
    assert_whole(&map, 0, size);
    let data: Length =
        map.iter().filter(|extent| !extent.is_zero(&base)).map(|extent| extent.range.length()).sum();
    assert!((40_000_000..41_000_000).contains(&data.get()), "{data}");
    // Longer than one request can be, and across a multiple of 1 GiB.
    client.trim(range((7 << 40) - (3 << 30) - 5, 6 << 30)).await.unwrap();
    let map = client.map(&base, Offset::ZERO, client.size()).await.unwrap();
    assert!(map.iter().all(|extent| extent.is_zero(&base)), "{map:?}");
    client.disconnect().await.unwrap();
}

#[tokio::test]
async fn nbdkit_failing_reads_fails_them_alone() {
    let place = Server::place();
    let mut command = nbdkit(place.path(), &["--filter=error", "memory", "1M"]);
    command.args(["error=EIO", "error-pread-rate=100%"]);
    let Some(server) = Server::start(place, &mut command) else { return };
    let client = server.connect(Options::new("")).await;
    let error = client.read(range(0, 4096)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Server { errno: stillpoint_nbd::Errno::EIO }, "{error}");
    client.write(Offset::ZERO, Bytes::from_static(b"still works")).await.unwrap();
    client.disconnect().await.unwrap();
}

/// One line to QEMU's monitor, and its answer with events left out.
fn qmp(monitor: &mut BufReader<UnixStream>, line: &str) {
    monitor.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
    loop {
        let mut answer = String::new();
        assert_ne!(monitor.read_line(&mut answer).unwrap(), 0, "QEMU is gone after {line}");
        if !answer.contains("\"event\"") {
            assert!(answer.contains("\"return\""), "{line}: {answer}");
            return;
        }
    }
}

#[tokio::test]
async fn qemu_itself_with_a_bitmap_of_a_running_vm() {
    let place = Server::place();
    let data = pattern(3 << 20);
    std::fs::write(place.path().join("raw"), &data).unwrap();
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-M", "none", "-display", "none", "-nodefaults", "-daemonize", "-pidfile"]);
    command.arg(place.path().join("pid")).arg("-qmp");
    command.arg(format!("unix:{},server=on,wait=off", place.path().join("qmp").display()));
    let Some(server) = Server::start(place, &mut command) else { return };

    let mut monitor = BufReader::new(UnixStream::connect(server.path("qmp")).unwrap());
    let mut greeting = String::new();
    monitor.read_line(&mut greeting).unwrap();
    let (raw, sock) = (server.path("raw"), server.path("sock"));
    let (raw, sock) = (raw.display(), sock.display());
    for line in [
        r#"{"execute":"qmp_capabilities"}"#.to_owned(),
        format!(r#"{{"execute":"blockdev-add","arguments":{{"driver":"file","node-name":"n0","filename":"{raw}","discard":"unmap"}}}}"#),
        r#"{"execute":"block-dirty-bitmap-add","arguments":{"node":"n0","name":"b0","granularity":65536}}"#.to_owned(),
        format!(r#"{{"execute":"nbd-server-start","arguments":{{"addr":{{"type":"unix","data":{{"path":"{sock}"}}}}}}}}"#),
        r#"{"execute":"block-export-add","arguments":{"type":"nbd","id":"w","node-name":"n0","name":"w","writable":true}}"#.to_owned(),
    ] {
        qmp(&mut monitor, &line);
    }
    let writer = server.connect(Options::new("w")).await;
    writer.write(Offset::new(200_000), Bytes::from_static(b"dirty")).await.unwrap();
    writer.disconnect().await.unwrap();
    for line in [
        r#"{"execute":"block-dirty-bitmap-disable","arguments":{"node":"n0","name":"b0"}}"#,
        r#"{"execute":"block-export-add","arguments":{"type":"nbd","id":"r","node-name":"n0","name":"r","bitmaps":["b0"]}}"#,
    ] {
        qmp(&mut monitor, line);
    }
    let bitmap = MetaContext::qemu_dirty_bitmap(&"b0".parse().unwrap());
    let client = server.connect(Options::new("r").context(bitmap.clone())).await;
    let map = client.map(&bitmap, Offset::ZERO, client.size()).await.unwrap();
    assert_whole(&map, 0, 3 << 20);
    let dirty: Vec<Range> = map.iter().filter(|e| e.is_dirty(&bitmap)).map(|e| e.range).collect();
    assert_eq!(dirty, [range(196_608, 65_536)]);
    assert_eq!(&client.read(range(200_000, 5)).await.unwrap()[..], b"dirty");
    client.disconnect().await.unwrap();
    qmp(&mut monitor, r#"{"execute":"quit"}"#);
}
