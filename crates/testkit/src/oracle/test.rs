//! A simulated guest: its images pass at any instant, and no image that was tampered with does.

use super::*;
use guest_writer::Stamp;
use proptest::prelude::*;
use std::collections::HashMap;

const RUN: u64 = 42;

/// Disks in memory and a storm on them, one operation at a time, in an order that the seed decides.
#[derive(Clone)]
struct Simulation {
    layout: Layout,
    disks: Vec<Vec<u8>>,
    acked: Vec<u64>,
    /// What each block held before it was last changed.
    before: HashMap<(usize, u64), Vec<u8>>,
    random: u64,
}

impl Simulation {
    fn new(seed: u64) -> Self {
        let layout = Layout { seed, per_disk: 2, disk_blocks: vec![240, 300, 270], span: 60 };
        let disks = layout.disk_blocks.iter().map(|blocks| vec![0; *blocks as usize * BLOCK]).collect();
        let acked = vec![0; layout.streams() as usize];
        Self { layout, disks, acked, before: HashMap::new(), random: seed }
    }

    fn random(&mut self, below: u64) -> u64 {
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % below
    }

    fn block(&mut self, disk: usize, block: u64) -> &mut [u8] {
        let at = block as usize * BLOCK;
        &mut self.disks[disk][at..at + BLOCK]
    }

    /// Does those blocks of an operation whose bit in `mask` is set.
    fn apply(&mut self, stream: u32, sequence: u64, mask: u64) {
        let operation = self.layout.operation(stream, sequence);
        for index in (0..operation.count).filter(|index| mask >> index & 1 == 1) {
            let block = operation.block + index;
            let disk = operation.disk;
            let stamp =
                Stamp { run: RUN, disk: disk as u32, stream, sequence, block, acked: self.acked.clone() };
            let bytes = self.block(disk, block);
            let old = bytes.to_vec();
            if operation.zero {
                bytes.fill(0)
            } else {
                stamp.write(bytes)
            }
            self.before.insert((disk, block), old);
        }
    }

    fn step(&mut self, stream: u32) {
        let sequence = self.acked[stream as usize] + 1;
        self.apply(stream, sequence, u64::MAX);
        self.acked[stream as usize] = sequence;
    }

    fn run(&mut self, operations: usize) {
        for _ in 0..operations {
            let stream = self.random(u64::from(self.layout.streams())) as u32;
            self.step(stream);
        }
    }

    fn contents(&self) -> Contents<'_> {
        let mut contents = Contents::new(&self.layout, RUN);
        for (disk, bytes) in self.disks.iter().enumerate() {
            for (block, bytes) in bytes.chunks_exact(BLOCK).enumerate() {
                contents.put(disk, block as u64, bytes);
            }
        }
        contents
    }

    fn verdict(&self) -> Verdict {
        self.contents().judge(Known::default())
    }

    /// With an instant that is known to be this one; operations may be on their way.
    fn marked_verdict(&self) -> Verdict {
        self.contents().judge(Known { earlier: Some(&self.acked), later: Some(&self.acked), at_rest: false })
    }

    fn verdict_at_rest(&self) -> Verdict {
        self.contents().judge(Known { earlier: Some(&self.acked), later: Some(&self.acked), at_rest: true })
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Every stream may have an operation on its way, with any of its blocks in the image.
    #[test]
    fn images_of_one_instant_are_valid(seed in any::<u64>(), operations in 30usize..1500, masks in any::<[u32; 7]>()) {
        let mut simulation = Simulation::new(seed);
        simulation.run(operations);
        for stream in 0..simulation.layout.streams() {
            let next = simulation.acked[stream as usize] + 1;
            simulation.apply(stream, next, u64::from(masks[stream as usize]));
        }
        for verdict in [simulation.verdict(), simulation.marked_verdict()] {
            prop_assert!(verdict.is_valid(), "{:?}", &verdict.violations[..verdict.violations.len().min(3)]);
        }
        prop_assert_eq!(simulation.marked_verdict().cut, simulation.acked);
    }

    /// One disk is later than the others, or two are.
    #[test]
    fn a_disk_from_another_instant_is_caught(seed in any::<u64>(), operations in 300usize..1000, disk in 0usize..3) {
        let mut simulation = Simulation::new(seed);
        simulation.run(operations);
        let early = simulation.disks.clone();
        simulation.run(60);
        let late = simulation.clone();
        for (other, bytes) in early.iter().enumerate().filter(|(other, _)| *other != disk) {
            simulation.disks[other].clone_from(bytes);
        }
        prop_assert!(!simulation.verdict().is_valid(), "disk {disk} is later");
        let mut simulation = late;
        simulation.disks[disk].clone_from(&early[disk]);
        prop_assert!(!simulation.verdict().is_valid(), "disk {disk} is earlier");
    }

    /// One operation's blocks are as they were before it.
    #[test]
    fn a_lost_operation_is_caught(seed in any::<u64>(), operations in 200usize..900, which in any::<u64>()) {
        let mut simulation = Simulation::new(seed);
        simulation.run(operations);
        let stream = (which % u64::from(simulation.layout.streams())) as u32;
        let lost = 1 + (which >> 8) % simulation.acked[stream as usize].max(1);
        let operation = simulation.layout.operation(stream, lost);
        let mut changed = false;
        for block in operation.block..operation.block + operation.count {
            let old = simulation.before.get(&(operation.disk, block)).cloned();
            let now = simulation.block(operation.disk, block);
            // Only where nothing wrote since: there the operation is visible, and missing it must be too.
            if Stamp::read(now).is_some_and(|stamp| stamp.sequence == lost) {
                now.copy_from_slice(&old.unwrap());
                changed = true;
            }
        }
        prop_assume!(changed);
        prop_assert!(!simulation.verdict_at_rest().is_valid(), "operation {lost} of stream {stream}");
    }
}

#[test]
fn every_block_put_back_or_torn_is_caught() {
    for seed in 0..2 {
        let mut simulation = Simulation::new(seed);
        simulation.run(500);
        assert!(simulation.verdict_at_rest().is_valid());
        let changed: Vec<_> = simulation.before.clone().into_iter().collect();
        for ((disk, block), old) in changed {
            let now = simulation.block(disk, block).to_vec();
            if now == old {
                continue;
            }
            simulation.block(disk, block).copy_from_slice(&old);
            assert!(
                !simulation.verdict_at_rest().is_valid(),
                "seed {seed}: disk {disk} block {block} put back"
            );
            for sector in [1, 4, 7] {
                let torn = [&now[..sector * 512], &old[sector * 512..]].concat();
                simulation.block(disk, block).copy_from_slice(&torn);
                assert!(
                    !simulation.verdict_at_rest().is_valid(),
                    "seed {seed}: disk {disk} block {block} torn"
                );
            }
            simulation.block(disk, block).copy_from_slice(&now);
        }
    }
}

/// Without the guest's own count, what nothing proves may go unseen, but no more than that.
#[test]
fn a_granule_put_back_is_caught_without_a_mark_too() {
    for seed in 0..20 {
        let mut simulation = Simulation::new(seed);
        simulation.run(400);
        let before = simulation.disks.clone();
        simulation.run(300);
        let (mut missed, mut caught) = (0, 0);
        for (disk, before) in before.iter().enumerate() {
            for (granule, old) in before.chunks(65_536).enumerate() {
                let range = granule * 65_536..granule * 65_536 + old.len();
                let now = simulation.disks[disk][range.clone()].to_vec();
                if now == old {
                    continue;
                }
                missed += 1;
                simulation.disks[disk][range.clone()].copy_from_slice(old);
                caught += u32::from(!simulation.verdict().is_valid());
                simulation.disks[disk][range].copy_from_slice(&now);
            }
        }
        assert!(missed > 20 && caught + 3 >= missed, "seed {seed}: {caught} of {missed}");
    }
}

/// A write that was wholly zeroed right after leaves nothing to prove that it ever was.
#[test]
fn a_write_hidden_by_zeroing_is_no_violation() {
    let mut found = 0;
    for seed in 0..40 {
        let mut simulation = Simulation::new(seed);
        for sequence in 1..400 {
            simulation.step(0);
            let (hidden, zeroing) =
                (simulation.layout.operation(0, sequence), simulation.layout.operation(0, sequence + 1));
            let covers =
                zeroing.block <= hidden.block && hidden.block + hidden.count <= zeroing.block + zeroing.count;
            if zeroing.zero && covers && !hidden.zero {
                let mut cut = simulation.clone();
                cut.step(0);
                let verdict = cut.verdict();
                assert!(verdict.is_valid(), "seed {seed}: {:?}", verdict.violations);
                found += 1;
            }
        }
    }
    assert!(found > 5, "{found}");
}

#[test]
fn an_image_older_than_the_mark_is_caught() {
    let mut simulation = Simulation::new(9);
    simulation.run(300);
    assert!(simulation.marked_verdict().is_valid());
    let earlier: Vec<_> = simulation.acked.iter().map(|acked| acked + 3).collect();
    assert!(!simulation.contents().judge(Known { earlier: Some(&earlier), ..Known::default() }).is_valid());
    let later: Vec<_> = simulation.acked.iter().map(|acked| acked - 3).collect();
    assert!(!simulation.contents().judge(Known { later: Some(&later), ..Known::default() }).is_valid());
}

#[test]
fn an_empty_image_proves_nothing() {
    assert!(!Simulation::new(1).verdict().is_valid());
}

#[test]
fn sparse_files_are_read_as_they_are_and_strays_are_found() {
    let mut simulation = Simulation::new(3);
    simulation.run(400);
    let place = tempfile::tempdir().unwrap();
    let images: Vec<_> = (0..3).map(|disk| place.path().join(format!("{disk}.raw"))).collect();
    for (image, disk) in images.iter().zip(&simulation.disks) {
        use std::os::unix::fs::FileExt as _;
        let file = std::fs::File::create(image).unwrap();
        // A tail that is not a whole block.
        file.set_len(disk.len() as u64 + 512).unwrap();
        for (index, bytes) in disk.chunks_exact(BLOCK).enumerate().filter(|(_, bytes)| !is_zero(bytes)) {
            file.write_all_at(bytes, (index * BLOCK) as u64).unwrap();
        }
    }
    let verdict = check_at_rest(&images, &simulation.layout, RUN, &simulation.acked).unwrap();
    assert!(verdict.is_valid(), "{:?}", verdict.violations);
    assert_eq!(verdict.stamps, simulation.verdict().stamps);
    assert_eq!(strays(&images, &simulation.layout).unwrap(), []);
    let (first, count) = simulation.layout.region(0, 0).unwrap();
    let file = std::fs::File::options().write(true).open(&images[0]).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[1; BLOCK], (first + count) * BLOCK as u64).unwrap();
    assert_eq!(strays(&images, &simulation.layout).unwrap().len(), 1);
}
