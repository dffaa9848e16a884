//! Whether KVM can be used.
//!
//! `/dev/kvm` may be there and its guests still hang, so that a guest which does not reach its `init` in a few seconds
//! decides it. Once known, it is known until the host is booted anew.

use crate::{
    kernel::{Boot, cache},
    qemu::Qemu,
};
use anyhow::{Context as _, Result};
use rustix::fs::{FlockOperation, flock};
use std::{
    fs::{self, File},
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

/// What KVM may take to get to `init`; it takes half a second where it works.
const PATIENCE: Duration = Duration::from_secs(5);

/// QEMU's `-accel`; `STILLPOINT_ACCEL` overrides it.
pub(crate) fn accelerator(qemu: &Qemu, boot: &Boot) -> Result<&'static str> {
    const TCG: &str = "tcg,thread=multi";
    match std::env::var("STILLPOINT_ACCEL").as_deref() {
        Ok("kvm") => return Ok("kvm"),
        Ok(_) => return Ok(TCG),
        Err(_) => {}
    }
    // In a `chroot` there is no device.
    if qemu.is_elsewhere() || !Path::new("/dev/kvm").exists() {
        return Ok(TCG);
    }
    let lock = File::create(cache().join("kvm.lock"))?;
    flock(&lock, FlockOperation::LockExclusive)?;
    let answer = cache().join("kvm");
    let host = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let known = fs::read_to_string(&answer).unwrap_or_default();
    let works = match known.strip_prefix(&format!("{} {} ", host.trim(), qemu.version)) {
        Some(works) => works == "works",
        None => {
            let works = probe(qemu, boot)?;
            let word = if works { "works" } else { "hangs" };
            fs::write(&answer, format!("{} {} {word}", host.trim(), qemu.version))?;
            works
        }
    };
    Ok(if works { "kvm" } else { TCG })
}

fn probe(qemu: &Qemu, boot: &Boot) -> Result<bool> {
    let place = tempfile::tempdir()?;
    let console = place.path().join("console");
    let (mut command, _mount) = qemu.command("qemu-system-x86_64", place.path())?;
    command.args([
        "-machine",
        "pc",
        "-accel",
        "kvm",
        "-m",
        "256",
        "-nodefaults",
        "-display",
        "none",
        "-no-reboot",
    ]);
    command.arg("-kernel").arg(&boot.kernel).arg("-initrd").arg(&boot.initramfs);
    command.args(["-append", "console=ttyS0 panic=-1", "-serial", &format!("file:{}", console.display())]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().context("start QEMU")?;
    let deadline = Instant::now() + PATIENCE;
    let works = loop {
        if fs::read_to_string(&console).is_ok_and(|text| text.contains("Run /init")) {
            break true;
        }
        if Instant::now() > deadline || child.try_wait()?.is_some() {
            break false;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let _ = child.kill();
    child.wait()?;
    Ok(works)
}
