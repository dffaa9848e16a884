//! The program in the guest: takes commands on a virtio-serial port, one a line, and answers each with one line.
//!
//! | command                                          | answer                                  |
//! |--------------------------------------------------|-----------------------------------------|
//! | `start RUN SEED PER_DISK SPAN RATE SIZE...`      | `started`                               |
//! | `status`                                         | `status WRITES ERRORS LONGEST_US`       |
//! | `stop`                                           | `stopped WRITES ERRORS LONGEST_US`      |
//! | `fill SIZE OFFSET LENGTH`                        | `filled` or `failed WHY`                |
//! | `poweroff`                                       | none                                    |
//!
//! A disk is named by its size in bytes: how a front end shows a serial number differs, sizes do not. `RATE` is
//! operations a second and stream, 0 for as fast as they go.

#![allow(
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    reason = "a test's own program: its numbers are the test's, and a panic in it is a failed test"
)]

use guest_writer::{BLOCK, Layout, STREAMS_MOST, Stamp};
use std::{
    fs::{self, File, OpenOptions},
    io::{BufRead as _, BufReader, Write as _},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// Largest operation, in blocks.
const LARGEST: usize = 32;

fn main() {
    let path = std::env::args().nth(1).unwrap_or_default();
    let port = match OpenOptions::new().read(true).write(true).open(&path) {
        Ok(port) => port,
        Err(error) => {
            eprintln!("guest-writer: {path}: {error}");
            return;
        }
    };
    let Ok(mut answers) = port.try_clone() else { return };
    let mut answer = |text: &str| {
        if let Err(error) = answers.write_all(format!("{text}\n").as_bytes()) {
            eprintln!("guest-writer: answer: {error}");
        }
    };
    answer("ready");
    let mut storm = None;
    let mut lines = BufReader::new(port);
    loop {
        let mut line = String::new();
        match lines.read_line(&mut line) {
            // Nobody is at the other end: a port without a client reads as ended.
            Ok(0) => {
                std::thread::sleep(Duration::from_millis(20));
                continue;
            }
            Ok(_) => {}
            Err(error) => {
                eprintln!("guest-writer: {error}");
                return;
            }
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["start", numbers @ ..] => match Storm::start(numbers) {
                Ok(started) => {
                    storm = Some(started);
                    answer("started");
                }
                Err(why) => answer(&format!("failed {why}")),
            },
            ["status"] => answer(&format!("status {}", storm.as_ref().map_or_else(none, |storm| storm.counts()))),
            ["stop"] => answer(&format!("stopped {}", storm.take().map_or_else(none, Storm::stop))),
            ["fill", numbers @ ..] => match fill(numbers) {
                Ok(()) => answer("filled"),
                Err(why) => answer(&format!("failed {why}")),
            },
            ["poweroff"] => {
                drop(storm.take().map(Storm::stop));
                let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
            }
            [] => {}
            _ => answer("failed unknown command"),
        }
    }
}

fn none() -> String {
    "0 0 0".to_owned()
}

struct Counters {
    stop: AtomicBool,
    writes: AtomicU64,
    errors: AtomicU64,
    longest: AtomicU64,
    acked: [AtomicU64; STREAMS_MOST],
}

struct Storm {
    counters: Arc<Counters>,
    threads: Vec<JoinHandle<()>>,
}

impl Storm {
    fn start(numbers: &[&str]) -> Result<Self, String> {
        let parsed = numbers.iter().map(|number| number.parse::<u64>()).collect::<Result<Vec<_>, _>>();
        let parsed = parsed.map_err(|error| error.to_string())?;
        let [run, seed, per_disk, span, rate, sizes @ ..] = parsed.as_slice() else { return Err("too few numbers".into()) };
        let layout = Layout {
            seed: *seed,
            per_disk: u32::try_from(*per_disk).map_err(|error| error.to_string())?,
            disk_blocks: sizes.iter().map(|size| size / BLOCK as u64).collect(),
            span: *span,
        };
        if usize::try_from(layout.streams()).unwrap_or(usize::MAX) > STREAMS_MOST {
            return Err("too many streams".into());
        }
        let disks = sizes.iter().map(|size| open_disk(*size)).collect::<Result<Vec<_>, _>>()?;
        let (layout, disks) = (Arc::new(layout), Arc::new(disks));
        let counters = Arc::new(Counters {
            stop: AtomicBool::new(false),
            writes: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            longest: AtomicU64::new(0),
            acked: [const { AtomicU64::new(0) }; STREAMS_MOST],
        });
        let threads = (0..layout.streams()).map(|stream| {
            let writer = Writer {
                run: *run,
                stream,
                rate: *rate,
                layout: Arc::clone(&layout),
                disks: Arc::clone(&disks),
                counters: Arc::clone(&counters),
            };
            std::thread::spawn(move || writer.write_on())
        });
        Ok(Self { threads: threads.collect(), counters })
    }

    fn counts(&self) -> String {
        let load = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
        let counters = &self.counters;
        format!("{} {} {}", load(&counters.writes), load(&counters.errors), load(&counters.longest))
    }

    fn stop(mut self) -> String {
        self.counters.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                self.counters.errors.fetch_add(1, Ordering::SeqCst);
            }
        }
        self.counts()
    }
}

struct Writer {
    run: u64,
    stream: u32,
    rate: u64,
    layout: Arc<Layout>,
    disks: Arc<Vec<File>>,
    counters: Arc<Counters>,
}

impl Writer {
    fn write_on(&self) {
        let streams = usize::try_from(self.layout.streams()).unwrap_or(0);
        let mut buffer = Aligned::new(LARGEST * BLOCK);
        let mut sequence = 0u64;
        let begun = Instant::now();
        while !self.counters.stop.load(Ordering::SeqCst) {
            sequence += 1;
            let operation = self.layout.operation(self.stream, sequence);
            // Read before the operation is issued: all of these are before it.
            let acked: Vec<u64> =
                self.counters.acked.iter().take(streams).map(|acked| acked.load(Ordering::SeqCst)).collect();
            let length = usize::try_from(operation.count).unwrap_or(1) * BLOCK;
            let Some(disk) = self.disks.get(operation.disk) else { return };
            let bytes = buffer.bytes(length);
            for (index, block) in bytes.chunks_exact_mut(BLOCK).enumerate() {
                let stamp = Stamp {
                    run: self.run,
                    disk: u32::try_from(operation.disk).unwrap_or(0),
                    stream: self.stream,
                    sequence,
                    block: operation.block + index as u64,
                    acked: acked.clone(),
                };
                if operation.zero { block.fill(0) } else { stamp.write(block) }
            }
            let issued = Instant::now();
            let offset = operation.block * BLOCK as u64;
            let done = if operation.zero { zero(disk, offset, bytes) } else { disk.write_all_at(bytes, offset) };
            let took = u64::try_from(issued.elapsed().as_micros()).unwrap_or(u64::MAX);
            self.counters.longest.fetch_max(took, Ordering::SeqCst);
            if let Err(error) = done {
                eprintln!("guest-writer: stream {} operation {sequence}: {error}", self.stream);
                self.counters.errors.fetch_add(1, Ordering::SeqCst);
                // The order of what follows would prove nothing any more.
                return;
            }
            if let Some(acked) = self.counters.acked.get(self.stream as usize) {
                acked.store(sequence, Ordering::SeqCst);
            }
            self.counters.writes.fetch_add(1, Ordering::SeqCst);
            if let Some(due) = (sequence * 1_000_000).checked_div(self.rate) {
                std::thread::sleep(Duration::from_micros(due).saturating_sub(begun.elapsed()));
            }
        }
    }
}

/// Zeroes with the disk's own command where it has one (discard or write-zeroes), else by writing zeroes.
fn zero(disk: &File, offset: u64, zeroes: &[u8]) -> std::io::Result<()> {
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(disk, flags, offset, zeroes.len() as u64) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::OPNOTSUPP) => disk.write_all_at(zeroes, offset),
        Err(error) => Err(error.into()),
    }
}

/// A buffer that starts on a block, as `O_DIRECT` wants it.
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
}

impl Aligned {
    fn new(length: usize) -> Self {
        let bytes = vec![0; length + BLOCK];
        let start = bytes.as_ptr().align_offset(BLOCK);
        Self { bytes, start }
    }

    fn bytes(&mut self, length: usize) -> &mut [u8] {
        self.bytes.get_mut(self.start..self.start + length).unwrap_or_default()
    }
}

fn open_disk(size: u64) -> Result<File, String> {
    let disks = fs::read_dir("/sys/block").map_err(|error| error.to_string())?;
    for disk in disks.flatten() {
        let sectors = fs::read_to_string(disk.path().join("size")).unwrap_or_default();
        if sectors.trim().parse::<u64>().ok().map(|sectors| sectors * 512) == Some(size) {
            let path = PathBuf::from("/dev").join(disk.file_name());
            /// `O_DIRECT` on x86-64: past the guest's page cache, so that acknowledged means done.
            const O_DIRECT: i32 = 0o40000;
            let file = OpenOptions::new().read(true).write(true).custom_flags(O_DIRECT).open(&path);
            return file.map_err(|error| format!("{}: {error}", path.display()));
        }
    }
    Err(format!("no disk of {size} bytes"))
}

fn fill(numbers: &[&str]) -> Result<(), String> {
    let parsed = numbers.iter().map(|number| number.parse::<u64>()).collect::<Result<Vec<_>, _>>();
    let parsed = parsed.map_err(|error| error.to_string())?;
    let [size, offset, length] = parsed.as_slice() else { return Err("wants three numbers".into()) };
    let disk = open_disk(*size)?;
    let mut buffer = Aligned::new(1 << 20);
    let mut at = *offset;
    let end = offset + length;
    while at < end {
        let piece = usize::try_from((end - at).min(1 << 20)).unwrap_or(BLOCK);
        let bytes = buffer.bytes(piece);
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = (index as u8).wrapping_mul(31).wrapping_add((at >> 20) as u8) | 1;
        }
        disk.write_all_at(bytes, at).map_err(|error| error.to_string())?;
        at += piece as u64;
    }
    Ok(())
}
