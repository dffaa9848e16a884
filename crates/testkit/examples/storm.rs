//! How fast the guest writes, and whether it and the oracle agree, cut after cut: `storm [CUTS]`, no backup involved.
//!
//! A cut is a QEMU that is killed as it writes. The storm goes on from there in the next.

use anyhow::{Result, bail};
use std::time::{Duration, Instant};
use stillpoint_testkit::{DiskSpec, FrontEnd, GuestBuilder, Qemu, oracle};

const MIB: u64 = 1 << 20;

fn main() -> Result<()> {
    let cuts = std::env::args().nth(1).map_or(Ok(3), |cuts| cuts.parse())?;
    let front_ends = [FrontEnd::VirtioBlk, FrontEnd::ScsiHd, FrontEnd::Nvme, FrontEnd::IdeHd];
    storm("3 virtio-blk, raw", three(Qemu::installed()?, DiskSpec::raw), cuts)?;
    storm("3 virtio-blk, qcow2", three(Qemu::installed()?, |disk| disk), 0)?;
    let mixed = front_ends.iter().enumerate().fold(
        GuestBuilder::new(Qemu::installed()?),
        |guest, (index, front_end)| {
            let size = (64 + 8 * index as u64) * MIB;
            guest.disk(DiskSpec::new(&format!("disk{index}"), size).raw().front_end(*front_end))
        },
    );
    storm("virtio-blk, scsi-hd, nvme, ide-hd, raw", mixed, cuts)?;
    if let Some(qemu) = Qemu::trixie() {
        storm("3 virtio-blk with iothreads, raw, QEMU 10", three(qemu, |disk| disk.raw().iothread()), cuts)?;
    }
    Ok(())
}

fn three(qemu: Qemu, change: impl Fn(DiskSpec) -> DiskSpec) -> GuestBuilder {
    let disks = [("vda", 1024 * MIB), ("vdb", 768 * MIB + 4096), ("vdc", 512 * MIB + 512)];
    disks
        .iter()
        .fold(GuestBuilder::new(qemu), |guest, (id, size)| guest.disk(change(DiskSpec::new(id, *size))))
}

fn storm(what: &str, guest: GuestBuilder, cuts: u32) -> Result<()> {
    let mut guest = guest.boot()?;
    let storm = guest.start_storm(1, 0)?;
    guest.await_writes(500)?;
    guest.latency()?;
    let begun = Instant::now();
    std::thread::sleep(Duration::from_secs(5));
    let latency = guest.latency()?;
    let rate = latency.operations() as f64 / begun.elapsed().as_secs_f64();
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    let (median, p99, longest) =
        (ms(latency.quantile(500)), ms(latency.quantile(990)), ms(latency.longest()));
    println!("{what}: {rate:.0} writes/s; {median:.2} ms median, {p99:.1} ms p99, {longest:.1} ms longest");
    let mut violations = 0;
    let mut operations = 0;
    for cut in 0..cuts {
        guest.await_writes(300)?;
        guest.kill()?;
        let verdict = oracle::check(&guest.images(), &storm.layout, storm.run)?;
        for violation in verdict.violations.iter().take(5) {
            println!("  cut {cut}: {violation}");
        }
        violations += verdict.violations.len();
        operations = verdict.operations();
        if cut + 1 < cuts {
            guest.start()?;
            guest.resume_storm(&storm, &verdict.cut)?;
        }
    }
    if cuts > 0 {
        println!("  {cuts} cuts, {operations} operations, {violations} violations");
    }
    if violations > 0 {
        bail!("{what}: the oracle and the guest disagree");
    }
    Ok(())
}
