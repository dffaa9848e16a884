//! Block devices by the kernel's NBD client, in a guest whose kernel has it.

#![allow(clippy::unwrap_used, reason = "tests: a panic is a failed test")]

use std::{
    fs,
    process::{Command, Stdio},
    time::{Duration, Instant},
};
use stillpoint_testkit::boot_probe;

#[test]
fn each_disk_gets_a_device_of_its_own_and_nothing_is_left() {
    let boot = boot_probe("stillpoint-provider-program", "device-probe").unwrap();
    let work = tempfile::tempdir().unwrap();
    let console = work.path().join("console");
    let mut command = Command::new("qemu-system-x86_64");
    command.args([
        "-machine",
        "pc",
        "-accel",
        "tcg",
        "-smp",
        "2",
        "-m",
        "512",
        "-nodefaults",
        "-display",
        "none",
    ]);
    command.args(["-no-reboot", "-append", "console=ttyS0 quiet panic=-1 mitigations=off"]);
    command.arg("-kernel").arg(boot.kernel).arg("-initrd").arg(boot.initramfs);
    command.arg("-serial").arg(format!("file:{}", console.display()));
    let mut qemu = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(180);
    while qemu.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            let _ = qemu.kill();
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let said = fs::read_to_string(console).unwrap();
    println!("{said}");
    assert!(said.contains("device-probe: passed"), "{said}");
}
