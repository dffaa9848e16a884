//! Points of a real guest that writes without pause, on the machine's QEMU: each is from one instant, none lost a write.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]

mod common;

use common::{Cuts, backup_arguments};
use stillpoint_testkit::{Cache, DiskSpec, FrontEnd, Guest, GuestBuilder, Qemu, skip};

const MIB: u64 = 1 << 20;

fn three_disks(qemu: Qemu) -> Guest {
    // The sizes are multiples of neither 64 KiB nor 1 MiB, and the raw disk has holes at odd places.
    GuestBuilder::new(qemu)
        .disk(DiskSpec::new("vda", 192 * MIB + 512))
        .disk(DiskSpec::new("vdb", 128 * MIB + 4096).raw())
        .disk(DiskSpec::new("vdc", 160 * MIB + 37 * 512))
        .boot()
        .unwrap()
}

/// Full and incremental points under full-speed writes.
fn storm(mut guest: Guest, disks: Vec<&'static str>, points: usize, seed: u64) {
    let mut cuts = Cuts::start(&mut guest, disks, seed);
    let mut made = vec![cuts.cut(&[])];
    for disk in made[0]["disks"].as_array().unwrap() {
        assert_eq!(disk["bitmap_mode"], "new", "{disk}");
    }
    while made.len() < points {
        let summary = cuts.cut(&[]);
        for disk in summary["disks"].as_array().unwrap() {
            assert_eq!(disk["bitmap_mode"], "reuse", "{disk}");
            assert!(disk["read_bytes"].as_u64() < disk["size"].as_u64(), "{disk}");
        }
        made.push(summary);
    }
    let operations = cuts.judge_all(&made);
    // Each point is later than the one before: an oracle that looked at one image for all would see it here.
    assert!(operations.is_sorted_by(|earlier, later| earlier < later), "{operations:?}");
    let mut pauses = cuts.pauses.clone();
    pauses.sort_by(f64::total_cmp);
    println!(
        "{points} points, pause median {} ms, most {} ms",
        pauses[pauses.len() / 2],
        pauses[pauses.len() - 1]
    );
    cuts.end();
}

/// `STILLPOINT_CUTS` makes more points than the few that every run of the tests makes.
fn cuts_wanted() -> usize {
    std::env::var("STILLPOINT_CUTS").ok().and_then(|cuts| cuts.parse().ok()).unwrap_or(6)
}

#[test]
fn every_point_under_full_speed_writes_is_one_instant() {
    storm(three_disks(Qemu::installed().unwrap()), vec!["vda", "vdb", "vdc"], cuts_wanted(), 1);
}

#[test]
fn the_same_with_all_four_kinds_of_front_end_and_both_kinds_of_drive() {
    let guest = GuestBuilder::new(Qemu::installed().unwrap())
        .disk(DiskSpec::new("vda", 64 * MIB))
        .disk(DiskSpec::new("sda", 48 * MIB + 512).front_end(FrontEnd::ScsiHd).legacy())
        .disk(DiskSpec::new("nvme0", 56 * MIB).front_end(FrontEnd::Nvme).raw())
        .disk(DiskSpec::new("hda", 40 * MIB + 512).front_end(FrontEnd::IdeHd).legacy().raw())
        .boot()
        .unwrap();
    storm(guest, vec!["vda", "sda", "nvme0", "hda"], 3, 2);
}

#[test]
fn the_same_on_qemu_10_with_iothreads() {
    let Some(qemu) = Qemu::trixie() else {
        return skip("the_same_on_qemu_10_with_iothreads", "no QEMU 10; `cargo xtask qemu10` installs it");
    };
    let guest = GuestBuilder::new(qemu)
        .disk(DiskSpec::new("vda", 192 * MIB + 512).iothread())
        .disk(DiskSpec::new("vdb", 128 * MIB + 4096).raw().iothread())
        .disk(DiskSpec::new("sda", 160 * MIB + 37 * 512).front_end(FrontEnd::ScsiHd).iothread())
        .boot()
        .unwrap();
    storm(guest, vec!["vda", "vdb", "sda"], cuts_wanted(), 3);
}

/// Images are read past QEMU (ADR 0018), whatever QEMU does with the page cache, and no write is lost by it.
fn past_qemu(qemu: Qemu, seed: u64) {
    let mut guest = GuestBuilder::new(qemu)
        .disk(DiskSpec::new("vda", 96 * MIB + 512).raw())
        .disk(DiskSpec::new("vdb", 64 * MIB + 4096).raw().cache(Cache::None))
        .disk(DiskSpec::new("vdc", 80 * MIB).raw().cache(Cache::Unsafe).legacy())
        .disk(DiskSpec::new("vdd", 112 * MIB + 512))
        .disk(DiskSpec::new("vde", 72 * MIB).cache(Cache::None))
        .boot()
        .unwrap();
    let disks = vec!["vda", "vdb", "vdc", "vdd", "vde"];
    let mut cuts = Cuts::start(&mut guest, disks.clone(), seed);
    cuts.tool = common::tool(cuts.guest.work()).env("STILLPOINT_LOG", "stillpoint_snapshot_access=debug");
    let mut made = Vec::new();
    while made.len() < cuts_wanted() {
        cuts.guest.await_writes(200).unwrap();
        let arguments = backup_arguments(&cuts.guest.qmp(), &cuts.target, &[]);
        let outcome = cuts.tool.run(&arguments).unwrap();
        assert_eq!(outcome.status, 0, "{}", outcome.stderr);
        let summary = outcome.json().unwrap();
        for disk in &disks {
            let told = format!("disk={disk} ");
            let line =
                outcome.stderr.lines().find(|line| line.contains(&told) && line.contains("past_qemu="));
            let line = line.unwrap_or_else(|| panic!("{disk}: {}", outcome.stderr));
            let bytes = line.split("past_qemu=").nth(1).unwrap().split_whitespace().next().unwrap();
            let bytes: u64 = bytes.parse().unwrap();
            let read = summary["disks"].as_array().unwrap().iter().find(|found| found["name"] == **disk);
            let read = read.unwrap()["read_bytes"].as_u64().unwrap();
            println!("{disk}: {bytes} of {read} bytes past QEMU");
            assert!(bytes > 0 && bytes <= read, "{line}");
        }
        made.push(summary);
    }
    cuts.judge_all(&made);
    cuts.end();
}

#[test]
fn images_read_past_qemu_are_one_instant_too() {
    past_qemu(Qemu::installed().unwrap(), 4);
}

#[test]
fn images_read_past_qemu_10_are_one_instant_too() {
    let Some(qemu) = Qemu::trixie() else {
        return skip(
            "images_read_past_qemu_10_are_one_instant_too",
            "no QEMU 10; `cargo xtask qemu10` installs it",
        );
    };
    past_qemu(qemu, 5);
}
