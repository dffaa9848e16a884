//! What the guest boots: Debian's cloud kernel, and an initramfs with busybox and our writer; or with QEMU's guest agent
//! and a file system besides.
//!
//! Made once and kept below `target/testkit`. Several processes may ask at once; a lock on the directory lets one work.

use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::{FlockOperation, flock};
use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

/// Drivers of all front ends, and the control port. What they need is found in the modules themselves.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_scsi",
    "virtio_console",
    "sd_mod",
    "ata_piix",
    "ata_generic",
    "nvme",
    "nbd",
];

/// For a file system that the guest has mounted.
const FILE_SYSTEM_MODULES: &[&str] = &["crc32c_generic", "libcrc32c", "ext4"];

const INIT: &str = "#!/bin/sh
/bin/busybox mkdir -p /proc /sys /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
while read module; do /bin/busybox insmod /modules/$module; done < /modules/order
if [ -x /probe ]; then
  /probe > /dev/ttyS0 2>&1
  /bin/busybox poweroff -f
fi
if [ -x /agent ]; then /agent & fi
while :; do
  for port in /sys/class/virtio-ports/*; do
    if [ \"$(/bin/busybox cat $port/name 2>/dev/null)\" = stillpoint.writer ]; then
      exec /guest-writer /dev/${port##*/}
    fi
  done
  /bin/busybox usleep 20000
done
";

/// Mounts the one disk that has a file system, starts the agent, and writes files without pause. The file `count` says how
/// many were written.
const AGENT: &str = "#!/bin/sh
/bin/busybox mkdir -p /files /run
for disk in /sys/block/vd*; do
  /bin/busybox mount -t ext4 /dev/${disk##*/} /files 2>/dev/null && break
done
for port in /sys/class/virtio-ports/*; do
  if [ \"$(/bin/busybox cat $port/name)\" = org.qemu.guest_agent.0 ]; then
    /lib64/ld-linux-x86-64.so.2 --library-path /lib64 /qemu-ga -m virtio-serial -p /dev/${port##*/} -t /run > /dev/ttyS0 2>&1 &
  fi
done
count=0
while :; do
  /bin/busybox dd if=/bin/busybox of=/files/$((count % 64)) bs=64k count=4 2>/dev/null
  count=$((count + 1))
  echo $count > /files/count.new
  /bin/busybox mv /files/count.new /files/count
done
";

/// Kernel and initramfs.
#[derive(Debug, Clone)]
pub struct Boot {
    /// The kernel's image.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
}

/// The workspace's root.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap_or(Path::new("."))
}

/// Where what was made once is kept.
pub fn cache() -> PathBuf {
    workspace().join("target/testkit")
}

/// Makes what is not there yet.
///
/// # Errors
/// If the package cannot be had, or the writer not be built.
pub fn boot() -> Result<Boot> {
    make("initramfs.cpio", "guest-writer", &["--package", "guest-writer"], "guest-writer", false)
}

/// The same with a file system that is written all the time, and QEMU's guest agent, which can freeze it.
///
/// # Errors
/// As [`boot`].
pub(crate) fn boot_with_agent() -> Result<Boot> {
    make("agent.cpio", "guest-writer", &["--package", "guest-writer"], "guest-writer", true)
}

/// The same for a guest that runs one program, which prints to its console, and powers off: an example of `package`.
///
/// # Errors
/// As [`boot`].
pub fn boot_probe(package: &str, example: &str) -> Result<Boot> {
    let build = ["--package", package, "--example", example];
    make(&format!("{example}.cpio"), "probe", &build, &format!("examples/{example}"), false)
}

fn make(
    initramfs_name: &str,
    program_name: &str,
    build: &[&str],
    built: &str,
    with_agent: bool,
) -> Result<Boot> {
    let cache = cache();
    fs::create_dir_all(&cache)?;
    let lock = File::create(cache.join("lock"))?;
    flock(&lock, FlockOperation::LockExclusive)?;
    let package = kernel_package(&cache)?;
    let version = only_entry(&package.join("lib/modules"))?;
    let kernel = package.join("boot").join(format!("vmlinuz-{version}"));
    ensure!(kernel.exists(), "the kernel package has no {}", kernel.display());
    let program = build_static(&cache, build, built)?;
    let initramfs = cache.join(format!("{initramfs_name}-{}", std::process::id()));
    let modules = package.join("lib/modules").join(&version);
    let agent = if with_agent { Some(agent_package(&cache)?.join("usr/sbin/qemu-ga")) } else { None };
    write_initramfs(&initramfs, &modules, program_name, &program, agent.as_deref())?;
    // Its own name only when whole: another process may be booting from it.
    let finished = cache.join(initramfs_name);
    fs::rename(&initramfs, &finished)?;
    Ok(Boot { kernel, initramfs: finished })
}

/// Whether booting needs no package.
pub(crate) fn kernel_is_cached() -> bool {
    cache().join("kernel/lib/modules").is_dir()
}

fn kernel_package(cache: &Path) -> Result<PathBuf> {
    let unpacked = cache.join("kernel");
    if unpacked.join("lib/modules").is_dir() {
        return Ok(unpacked);
    }
    let depends = run(Command::new("apt-cache").args(["depends", "linux-image-cloud-amd64"]))?;
    let name = depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"));
    let name = name.context("apt knows no linux-image-cloud-amd64; type: apt-get update")?.to_owned();
    unpack(cache, &name, &unpacked)?;
    Ok(unpacked)
}

/// Not installed: it would run on this machine, which may be a guest itself.
fn agent_package(cache: &Path) -> Result<PathBuf> {
    let unpacked = cache.join("agent");
    if !unpacked.is_dir() {
        unpack(cache, "qemu-guest-agent", &unpacked)?;
    }
    Ok(unpacked)
}

/// A Debian package's files, in a directory that is there only when they all are.
fn unpack(cache: &Path, package: &str, into: &Path) -> Result<()> {
    let download = cache.join("download");
    let _ = fs::remove_dir_all(&download);
    fs::create_dir_all(&download)?;
    run(Command::new("apt-get").args(["download", package]).current_dir(&download))?;
    let file = only_entry(&download)?;
    let partial = into.with_extension("partial");
    let _ = fs::remove_dir_all(&partial);
    run(Command::new("dpkg").arg("-x").arg(download.join(file)).arg(&partial))?;
    let _ = fs::remove_dir_all(&download);
    fs::rename(&partial, into)?;
    Ok(())
}

fn only_entry(directory: &Path) -> Result<String> {
    let entry = fs::read_dir(directory).with_context(|| format!("read {}", directory.display()))?.next();
    let entry = entry.with_context(|| format!("{} is empty", directory.display()))??;
    Ok(entry.file_name().to_string_lossy().into_owned())
}

/// A static program: the guest has no C library. It is built for its target by name, so that the flags do not reach the
/// build scripts of its dependencies.
fn build_static(cache: &Path, what: &[&str], built: &str) -> Result<PathBuf> {
    let target = "x86_64-unknown-linux-gnu";
    let directory = cache.join("writer");
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "--release"]).args(what).args(["--target", target, "--target-dir"]);
    build.arg(&directory).current_dir(workspace()).env("RUSTFLAGS", "-C target-feature=+crt-static");
    build.env_remove("CARGO_ENCODED_RUSTFLAGS");
    run(&mut build)?;
    Ok(directory.join(target).join("release").join(built))
}

fn write_initramfs(
    path: &Path,
    modules: &Path,
    name: &str,
    program: &Path,
    agent: Option<&Path>,
) -> Result<()> {
    let mut archive = Cpio { file: std::io::BufWriter::new(File::create(path)?), inode: 1 };
    for directory in ["bin", "modules", "dev", "proc", "sys", "tmp"] {
        archive.entry(directory, 0o040_755, &[])?;
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists());
    archive.entry(
        "bin/busybox",
        0o100_755,
        &fs::read(busybox.context("there is no busybox; type: apt-get install busybox-static")?)?,
    )?;
    archive.entry("bin/sh", 0o120_777, b"busybox")?;
    archive.entry("init", 0o100_755, INIT.as_bytes())?;
    archive.entry(name, 0o100_755, &fs::read(program)?)?;
    let mut order = String::new();
    let mut done = BTreeSet::new();
    let more = if agent.is_some() { FILE_SYSTEM_MODULES } else { &[] };
    for module in MODULES.iter().chain(more) {
        add_module(&mut archive, modules, module, &mut done, &mut order)?;
    }
    if let Some(agent) = agent {
        archive.entry("agent", 0o100_755, AGENT.as_bytes())?;
        archive.entry("qemu-ga", 0o100_755, &fs::read(agent)?)?;
        archive.entry("lib64", 0o040_755, &[])?;
        add_libraries(&mut archive, agent)?;
    }
    archive.entry("modules/order", 0o100_644, order.as_bytes())?;
    archive.finish()
}

/// This machine's libraries that a program needs, and their loader.
fn add_libraries(archive: &mut Cpio, program: &Path) -> Result<()> {
    let needed = run(Command::new("ldd").arg(program))?;
    let paths = needed.split_whitespace().filter(|word| word.starts_with('/'));
    for path in paths.map(Path::new) {
        let name = path.file_name().context("a library without a name")?.to_string_lossy();
        archive.entry(&format!("lib64/{name}"), 0o100_755, &fs::read(path)?)?;
    }
    ensure!(!needed.contains("not found"), "the guest agent needs libraries that are not here: {needed}");
    Ok(())
}

/// A module after those it needs, which it names itself (`depends=` in its `.modinfo`).
fn add_module(
    archive: &mut Cpio,
    modules: &Path,
    name: &str,
    done: &mut BTreeSet<String>,
    order: &mut String,
) -> Result<()> {
    let name = name.replace('-', "_");
    if !done.insert(name.clone()) {
        return Ok(());
    }
    // What is built in has no file.
    let Some(path) = find_module(&modules.join("kernel"), &name)? else { return Ok(()) };
    let bytes = if path.extension().is_some_and(|extension| extension == "xz") {
        let output = Command::new("xz").args(["-dc"]).arg(&path).output()?;
        ensure!(output.status.success(), "cannot unpack {}", path.display());
        output.stdout
    } else {
        fs::read(&path)?
    };
    let key = b"\0depends=";
    let depends = bytes.windows(key.len()).position(|window| window == key).map(|at| at + key.len());
    let depends = depends.map_or(String::new(), |at| {
        let text = bytes[at..].iter().take_while(|byte| **byte != 0).copied().collect();
        String::from_utf8(text).unwrap_or_default()
    });
    for needed in depends.split(',').filter(|needed| !needed.is_empty()) {
        add_module(archive, modules, needed, done, order)?;
    }
    archive.entry(&format!("modules/{name}.ko"), 0o100_644, &bytes)?;
    order.push_str(&name);
    order.push_str(".ko\n");
    Ok(())
}

fn find_module(directory: &Path, name: &str) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            if let Some(found) = find_module(&path, name)? {
                return Ok(Some(found));
            }
        } else {
            let file =
                path.file_name().map(|file| file.to_string_lossy().replace('-', "_")).unwrap_or_default();
            if file == format!("{name}.ko") || file == format!("{name}.ko.xz") {
                return Ok(Some(path));
            }
        }
    }
    Ok(None)
}

/// The `newc` archive that the kernel unpacks: a header of hex numbers, name and content, each padded to four bytes
/// (kernel documentation, `buffer-format.rst`).
struct Cpio {
    file: std::io::BufWriter<File>,
    inode: u32,
}

impl Cpio {
    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        let numbers = [
            self.inode,
            mode,
            0,
            0,
            1,
            0,
            u32::try_from(content.len())?,
            0,
            0,
            0,
            0,
            u32::try_from(name.len())? + 1,
            0,
        ];
        self.inode += 1;
        let mut header = String::from("070701");
        for number in numbers {
            header.push_str(&format!("{number:08X}"));
        }
        self.file.write_all(header.as_bytes())?;
        self.file.write_all(name.as_bytes())?;
        let pad = |length: usize| &b"\0\0\0"[..(4 - length % 4) % 4];
        self.file.write_all(b"\0")?;
        self.file.write_all(pad(header.len() + name.len() + 1))?;
        self.file.write_all(content)?;
        self.file.write_all(pad(content.len()))?;
        Ok(())
    }

    fn finish(mut self) -> Result<()> {
        self.entry("TRAILER!!!", 0, &[])?;
        self.file.flush()?;
        Ok(())
    }
}

/// Runs a program and returns what it printed.
///
/// # Errors
/// If it fails; the error has what it printed on stderr.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("run {:?}", command.get_program()))?;
    if !output.status.success() {
        bail!("{:?} failed: {}", command, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
