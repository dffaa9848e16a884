//! Backup after backup of one VM: nothing grows.
//!
//! `STILLPOINT_SOAK=300` makes that many.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]

mod common;

use common::Cuts;
use std::time::{Duration, Instant};
use stillpoint_testkit::{DiskSpec, Guest, GuestBuilder, Qemu, StormSpec};

const MIB: u64 = 1 << 20;
const DISKS: [&str; 2] = ["vda", "vdb"];
/// QEMU's worker threads end when they have been idle for 10 s.
const IDLE: Duration = Duration::from_secs(60);

/// What QEMU has of everything.
#[derive(Debug)]
struct Size {
    descriptors: usize,
    threads: u64,
    resident: u64,
}

fn size(guest: &Guest) -> Size {
    let process = format!("/proc/{}", guest.pid().unwrap());
    let status = std::fs::read_to_string(format!("{process}/status")).unwrap();
    let number = |key: &str| {
        let line = status.lines().find(|line| line.starts_with(key)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    Size {
        descriptors: std::fs::read_dir(format!("{process}/fd")).unwrap().count(),
        threads: number("Threads:"),
        resident: number("VmRSS:") << 10,
    }
}

/// Its size when nothing goes on.
fn size_at_rest(guest: &mut Guest, threads: u64) -> Size {
    guest.set_rate(1).unwrap();
    let deadline = Instant::now() + IDLE;
    loop {
        let size = size(guest);
        if size.threads <= threads || Instant::now() > deadline {
            return size;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn backups_in_a_row_leave_nothing_to_grow() {
    let runs: usize = std::env::var("STILLPOINT_SOAK").map_or(25, |runs| runs.parse().unwrap());
    let warm = runs / 5;
    let mut guest = GuestBuilder::new(Qemu::installed().unwrap())
        .disk(DiskSpec::new("vda", 96 * MIB))
        .disk(DiskSpec::new("vdb", 64 * MIB).raw())
        .boot()
        .unwrap();
    let mut cuts = Cuts::start_with(&mut guest, DISKS.to_vec(), StormSpec::new(61).rate(50));
    let mut points = Vec::new();
    for _ in 0..warm {
        points.push(cuts.cut(&[]));
    }
    let before = size_at_rest(cuts.guest, u64::MAX);
    let graph = cuts.guest.block_graph().unwrap().without_bitmaps();
    cuts.guest.set_rate(50).unwrap();
    for _ in warm..runs {
        // Each compares nodes, exports, descriptor sets and bitmaps.
        points.push(cuts.cut(&[]));
    }
    let after = size_at_rest(cuts.guest, before.threads);
    println!("after {warm} runs {before:?}, after {runs} runs {after:?}");
    assert_eq!(cuts.guest.block_graph().unwrap().without_bitmaps(), graph);
    assert_eq!(after.descriptors, before.descriptors);
    assert!(after.threads <= before.threads, "{before:?} {after:?}");
    assert!(after.resident < before.resident + 24 * MIB, "{before:?} {after:?}");
    let last = points.split_off(points.len() - 3);
    cuts.judge_all(&last);
    cuts.end();
}
