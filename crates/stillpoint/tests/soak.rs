//! Backup after backup of one VM: nothing grows.
//!
//! `STILLPOINT_SOAK=300` makes that many.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]

mod common;

use common::Cuts;
use stillpoint_testkit::{DiskSpec, Guest, GuestBuilder, Qemu, StormSpec};

const MIB: u64 = 1 << 20;
const DISKS: [&str; 2] = ["vda", "vdb"];

/// What QEMU has of everything.
#[derive(Debug)]
struct Size {
    descriptors: usize,
    /// By their names, without the pool's workers: those come with the load, and end when they have been idle for 10 s.
    threads: Vec<String>,
    resident: u64,
}

fn size(guest: &Guest) -> Size {
    let process = format!("/proc/{}", guest.pid().unwrap());
    let status = std::fs::read_to_string(format!("{process}/status")).unwrap();
    let number = |key: &str| {
        let line = status.lines().find(|line| line.starts_with(key)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    let tasks = std::fs::read_dir(format!("{process}/task")).unwrap();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    let mut threads: Vec<_> =
        names.map(|name| name.trim().to_owned()).filter(|name| name != "worker").collect();
    threads.sort_unstable();
    Size {
        descriptors: std::fs::read_dir(format!("{process}/fd")).unwrap().count(),
        threads,
        resident: number("VmRSS:") << 10,
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
    let before = size(cuts.guest);
    let graph = cuts.guest.block_graph().unwrap().without_bitmaps();
    for _ in warm..runs {
        // Each compares nodes, exports, descriptor sets and bitmaps.
        points.push(cuts.cut(&[]));
    }
    let after = size(cuts.guest);
    println!("after {warm} runs {before:?}, after {runs} runs {after:?}");
    assert_eq!(cuts.guest.block_graph().unwrap().without_bitmaps(), graph);
    assert_eq!(after.descriptors, before.descriptors);
    assert_eq!(after.threads, before.threads);
    assert!(after.resident < before.resident + 24 * MIB, "{before:?} {after:?}");
    let last = points.split_off(points.len() - 3);
    cuts.judge_all(&last);
    cuts.end();
}
