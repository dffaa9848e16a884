//! What a machine needs so that no test has to be skipped, and how it gets that.
//!
//! On Debian, as root or where `sudo` asks nothing, it is installed; elsewhere the commands to type are told.

use crate::kernel::{kernel_is_cached, run};
use anyhow::{Context as _, Result, bail};
use std::{fs, path::Path, process::Command};

/// A program, or a file by its path, that some test needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Requirement {
    /// Its name.
    pub program: &'static str,
    /// The Debian package that has it.
    pub package: &'static str,
    /// What it is for.
    pub purpose: &'static str,
}

const fn needs(program: &'static str, package: &'static str, purpose: &'static str) -> Requirement {
    Requirement { program, package, purpose }
}

/// All of them.
pub const REQUIREMENTS: &[Requirement] = &[
    needs("qemu-system-x86_64", QEMU, "runs the guests"),
    needs("qemu-img", QEMU_UTILS, "makes and compares images"),
    needs("qemu-nbd", QEMU_UTILS, "a server that the NBD client is tested with"),
    needs("nbdkit", "nbdkit", "a server that the NBD client is tested with"),
    needs("nbdcopy", "libnbd-bin", "reads an export as others do"),
    needs("nbdinfo", "libnbd-bin", "reads a bitmap as others do"),
    needs("bindfs", "bindfs", "storage that can be made slow or stuck"),
    needs("/usr/share/OVMF/OVMF_VARS_4M.fd", "ovmf", "firmware that writes UEFI variables"),
    needs("borg", "borgbackup", "an example provider keeps points with it"),
    needs("restic", "restic", "reads repositories as others do"),
    needs("rclone", "rclone", "a server that a repository is behind"),
    needs("ssh", "openssh-client", "reaches a repository on another host"),
    needs("sshd", "openssh-server", "a host that a repository is on"),
    needs("openssl", "openssl", "makes a certificate that nobody trusts"),
    needs("python3", "python3", "the example providers"),
    needs("losetup", "mount", "block devices for providers"),
    needs("mkfs.ext4", "e2fsprogs", "a file system in a guest, and its check"),
    needs("busybox", "busybox-static", "the guest's user land"),
    needs("dpkg-deb", "dpkg", "unpacks the guest's kernel"),
    needs("xz", "xz-utils", "unpacks the guest's drivers"),
    needs("cc", "gcc", "links"),
];

const QEMU: &str = "qemu-system-x86";
const QEMU_UTILS: &str = "qemu-utils";
const KERNEL: &str = "linux-image-cloud-amd64";

/// What is not there.
pub fn missing() -> Vec<Requirement> {
    REQUIREMENTS.iter().copied().filter(|requirement| !is_there(requirement)).collect()
}

fn is_there(requirement: &Requirement) -> bool {
    let Some(path) = find_program(requirement.program) else { return false };
    // The guest has no loader, so a busybox with shared libraries is no use.
    requirement.package != "busybox-static" || fs::read(path).is_ok_and(|program| is_static(&program))
}

fn find_program(name: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(Into::into));
    places.map(|place| place.join(name)).find(|program| program.is_file())
}

fn is_static(program: &[u8]) -> bool {
    let loader = b"/lib64/ld-linux";
    !program.windows(loader.len()).any(|window| window == loader)
}

/// Installs what is missing.
///
/// # Errors
/// If it cannot; the error has the commands to type.
pub fn ensure() -> Result<()> {
    let missing = missing();
    let names =
        missing.iter().map(|requirement| format!("{} ({})", requirement.program, requirement.purpose));
    let names: Vec<_> = names.collect();
    if missing.is_empty() && (kernel_is_cached() || knows_package(KERNEL)) {
        return Ok(());
    }
    if !names.is_empty() {
        println!("missing: {}", names.join(", "));
    }
    apt(&["update", "-q"])?;
    if missing.is_empty() {
        return Ok(());
    }
    let mut install = vec!["install".to_owned(), "-y".into(), "-q".into(), "--no-install-recommends".into()];
    install.extend(packages(&missing, candidate)?);
    apt(&install.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Installs Debian packages, without a question.
///
/// # Errors
/// If that is not allowed here; the error has the command to type.
pub fn install(packages: &[&str]) -> Result<()> {
    apt(&["update", "-q"])?;
    apt(&[&["install", "-y", "-q", "--no-install-recommends"], packages].concat())
}

fn apt(arguments: &[&str]) -> Result<()> {
    let line = format!("apt-get {}", arguments.join(" "));
    if find_program("apt-get").is_none() {
        bail!("this is no Debian; install what is missing by its own means, then try again");
    }
    let mut command = if rustix::process::geteuid().is_root() {
        Command::new("apt-get")
    } else if run(Command::new("sudo").args(["-n", "true"])).is_ok() {
        let mut command = Command::new("sudo");
        command.args(["-n", "DEBIAN_FRONTEND=noninteractive", "apt-get"]);
        command
    } else {
        bail!("this needs root; type: sudo {line}");
    };
    let status =
        command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive").status().context("run apt-get")?;
    if !status.success() {
        bail!("{line}: {status}");
    }
    Ok(())
}

/// The arguments for `apt-get install`. QEMU and its tools are built together and conflict in other versions, and a
/// machine may have tools from backports, newer than the QEMU that it can install: both get that QEMU's version.
fn packages(missing: &[Requirement], candidate: impl Fn(&str) -> Result<String>) -> Result<Vec<String>> {
    let mut packages: Vec<String> =
        missing.iter().map(|requirement| requirement.package.to_owned()).collect();
    packages.sort();
    packages.dedup();
    if packages.iter().any(|package| package == QEMU) {
        let version = candidate(QEMU)?;
        packages.retain(|package| package != QEMU && package != QEMU_UTILS);
        packages.extend([
            format!("{QEMU}={version}"),
            format!("{QEMU_UTILS}={version}"),
            "--allow-downgrades".into(),
        ]);
    }
    Ok(packages)
}

fn candidate(package: &str) -> Result<String> {
    let policy = run(Command::new("apt-cache").args(["policy", package]))?;
    let version = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "));
    let version = version.filter(|version| *version != "(none)");
    Ok(version.with_context(|| format!("apt knows no {package}"))?.to_owned())
}

fn knows_package(package: &str) -> bool {
    run(Command::new("apt-cache").args(["show", package])).is_ok_and(|text| !text.is_empty())
}

/// Puts a Debian 13, which has QEMU 10, into `root`.
///
/// # Errors
/// If it cannot be had, or not be run by `chroot` without being root.
pub fn ensure_trixie(root: &Path) -> Result<()> {
    if root.join("usr/bin/qemu-system-x86_64").exists() {
        return Ok(());
    }
    let arguments = ["--variant=minbase", "--include=qemu-system-x86,qemu-utils", "trixie"];
    if !rustix::process::geteuid().is_root() {
        bail!("this needs root; type: sudo debootstrap {} {}", arguments.join(" "), root.display());
    }
    if find_program("debootstrap").is_none() {
        install(&["debootstrap", "debian-archive-keyring"])?;
    }
    // A half-made one has no QEMU where it is looked for until it is nearly done, and is not gone on with.
    let partial = root.with_extension("partial");
    if partial.exists() {
        fs::remove_dir_all(&partial).with_context(|| format!("remove {}", partial.display()))?;
    }
    let status =
        Command::new("debootstrap").args(arguments).arg(&partial).status().context("run debootstrap")?;
    if !status.success() {
        bail!("debootstrap: {status}; its log is {}", partial.join("debootstrap/debootstrap.log").display());
    }
    fs::rename(&partial, root).with_context(|| format!("rename {} to {}", partial.display(), root.display()))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn qemu_and_its_tools_get_one_version() {
        let of = |names: &[&str]| {
            let missing =
                REQUIREMENTS.iter().copied().filter(|one| names.contains(&one.program)).collect::<Vec<_>>();
            packages(&missing, |_| Ok("7.2".into())).unwrap()
        };
        assert_eq!(of(&["nbdkit"]), ["nbdkit"]);
        assert_eq!(
            of(&["qemu-system-x86_64", "nbdkit"]),
            ["nbdkit", "qemu-system-x86=7.2", "qemu-utils=7.2", "--allow-downgrades"]
        );
        // Tools alone go with a QEMU that is there.
        assert_eq!(of(&["qemu-img", "qemu-nbd"]), ["qemu-utils"]);
    }

    #[test]
    fn a_program_with_a_loader_is_not_static() {
        assert!(is_static(b"\x7fELF nothing"));
        assert!(!is_static(b"\x7fELF /lib64/ld-linux-x86-64.so.2"));
    }
}
