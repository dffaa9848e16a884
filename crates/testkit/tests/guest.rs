//! The guest and the oracle agree before anything is backed up.

use std::process::Command;
use stillpoint_testkit::{DiskSpec, FrontEnd, GuestBuilder, Qemu, oracle, run};

const MIB: u64 = 1 << 20;

/// A host's page cache survives QEMU, so the images of a QEMU that was killed are all from one instant.
#[test]
fn the_images_of_a_killed_qemu_are_from_one_instant() {
    let mut guest = GuestBuilder::new(Qemu::installed().unwrap())
        .disk(DiskSpec::new("vda", 64 * MIB).raw())
        .disk(DiskSpec::new("sda", 48 * MIB + 512).raw().front_end(FrontEnd::ScsiHd))
        .disk(DiskSpec::new("hda", 40 * MIB + 4096).raw().front_end(FrontEnd::IdeHd))
        .boot()
        .unwrap();
    let storm = guest.start_storm(5, 0).unwrap();
    guest.await_writes(2000).unwrap();
    guest.kill().unwrap();
    let verdict = oracle::check(&guest.images(), &storm.layout, storm.run).unwrap();
    assert!(
        verdict.is_valid(),
        "{} violations: {:#?}",
        verdict.violations.len(),
        verdict.violations.iter().take(5).collect::<Vec<_>>()
    );
}

/// Everything that was acknowledged is in the images of a guest that stopped writing.
#[test]
fn the_images_of_a_guest_at_rest_hold_all_that_was_acknowledged() {
    let mut guest = GuestBuilder::new(Qemu::installed().unwrap())
        .disk(DiskSpec::new("vda", 64 * MIB))
        .disk(DiskSpec::new("vdb", 48 * MIB + 512))
        .boot()
        .unwrap();
    let storm = guest.start_storm(6, 0).unwrap();
    guest.await_writes(2000).unwrap();
    let counts = guest.stop_storm().unwrap();
    assert_eq!(counts.errors, 0);
    guest.quit().unwrap();
    let mut images = Vec::new();
    for image in guest.images() {
        let raw = image.with_extension("raw");
        run(Command::new("qemu-img").args(["convert", "-f", "qcow2", "-O", "raw"]).arg(&image).arg(&raw))
            .unwrap();
        images.push(raw);
    }
    let verdict = oracle::check(&images, &storm.layout, storm.run).unwrap();
    assert!(
        verdict.is_valid(),
        "{} violations: {:#?}",
        verdict.violations.len(),
        verdict.violations.iter().take(5).collect::<Vec<_>>()
    );
    assert!(
        verdict.operations() <= counts.writes && verdict.operations() + 32 > counts.writes,
        "{verdict:?} {counts:?}"
    );
}
