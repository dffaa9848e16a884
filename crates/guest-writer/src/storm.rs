//! The threads that write.

use crate::{
    disk::{self, Aligned},
    number,
};
use guest_writer::{BLOCK, Histogram, Layout, Recorder, STREAMS_MOST, Stamp};
use rustix::fs::fdatasync;
use std::{
    fs::File,
    os::unix::fs::FileExt as _,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// Largest operation, in blocks.
const LARGEST: usize = 32;

/// A storm, running or over.
pub(crate) struct Storm {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    run: u64,
    layout: Layout,
    disks: Vec<Disk>,
    rate: AtomicU64,
    stop: AtomicBool,
    writes: AtomicU64,
    errors: AtomicU64,
    first_error: OnceLock<String>,
    longest: AtomicU64,
    latency: Recorder,
    read_latency: Recorder,
    acked: [AtomicU64; STREAMS_MOST],
}

/// One disk, as streams that wait for stable storage see it, and as the others do.
struct Disk {
    plain: File,
    durable: File,
}

/// Which streams wait for stable storage.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sync {
    None,
    Ordering,
    All,
}

impl Storm {
    pub(crate) fn start(plan: &[&str]) -> Result<Self, String> {
        let [run, seed, per_disk, span, rate, sync, from, sizes @ ..] = plan else {
            return Err("too few words".into());
        };
        let sizes = sizes.iter().map(|size| number(size)).collect::<Result<Vec<_>, _>>()?;
        let layout = Layout {
            seed: number(seed)?,
            per_disk: u32::try_from(number(per_disk)?).map_err(|error| error.to_string())?,
            disk_blocks: sizes.iter().map(|size| size / BLOCK as u64).collect(),
            span: number(span)?,
        };
        let sync = match *sync {
            "none" => Sync::None,
            "ordering" => Sync::Ordering,
            "all" => Sync::All,
            other => return Err(format!("{other}: none, ordering or all")),
        };
        let streams = layout.streams();
        if streams as usize > STREAMS_MOST {
            return Err("too many streams".into());
        }
        let ordering = layout.ordering_stream();
        let acked = [const { AtomicU64::new(0) }; STREAMS_MOST];
        for (acked, from) in acked.iter().zip(from.split(',').filter(|from| *from != "-")) {
            acked.store(number(from)?, Ordering::SeqCst);
        }
        let disks = sizes.iter().map(|size| {
            Ok::<_, String>(Disk { plain: disk::open(*size, false)?, durable: disk::open(*size, true)? })
        });
        let shared = Arc::new(Shared {
            run: number(run)?,
            disks: disks.collect::<Result<_, _>>()?,
            layout,
            rate: AtomicU64::new(number(rate)?),
            stop: AtomicBool::new(false),
            writes: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            first_error: OnceLock::new(),
            longest: AtomicU64::new(0),
            latency: Recorder::default(),
            read_latency: Recorder::default(),
            acked,
        });
        let threads = (0..streams).map(|stream| {
            let durable = sync == Sync::All || sync == Sync::Ordering && stream == ordering;
            let writer = Writer { shared: Arc::clone(&shared), stream, durable };
            std::thread::spawn(move || writer.write_on())
        });
        Ok(Self { threads: threads.collect(), shared })
    }

    pub(crate) fn is_running(&self) -> bool {
        !self.threads.is_empty()
    }

    pub(crate) fn counts(&self) -> String {
        let load = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
        let Shared { writes, errors, longest, .. } = &*self.shared;
        format!("{} {} {}", load(writes), load(errors), load(longest))
    }

    pub(crate) fn mark(&self) -> String {
        join(&self.shared.acknowledged())
    }

    pub(crate) fn latency(&self) -> Histogram {
        self.shared.latency.take()
    }

    pub(crate) fn read_latency(&self) -> Histogram {
        self.shared.read_latency.take()
    }

    /// Starts a reader on each disk.
    pub(crate) fn read(&mut self, rate: u64) {
        for disk in 0..self.shared.disks.len() {
            let shared = Arc::clone(&self.shared);
            self.threads.push(std::thread::spawn(move || shared.read_on(disk, rate)));
        }
    }

    pub(crate) fn error(&self) -> &str {
        self.shared.first_error.get().map_or("", String::as_str)
    }

    pub(crate) fn set_rate(&self, rate: u64) {
        self.shared.rate.store(rate, Ordering::SeqCst);
    }

    pub(crate) fn sync(&self) -> Result<(), String> {
        self.shared
            .disks
            .iter()
            .try_for_each(|disk| fdatasync(&disk.plain).map_err(|error| error.to_string()))
    }

    /// Lets every stream finish the operation that it is at.
    pub(crate) fn stop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                self.shared.fail("a stream panicked".into());
            }
        }
    }
}

fn join(numbers: &[u64]) -> String {
    numbers.iter().map(u64::to_string).collect::<Vec<_>>().join(" ")
}

impl Shared {
    fn read_on(&self, disk: usize, rate: u64) {
        let mut buffer = Aligned::new(BLOCK);
        let mut due = Instant::now();
        let blocks = self.layout.disk_blocks[disk].max(1);
        let mut at = self.layout.seed;
        while !self.stop.load(Ordering::SeqCst) {
            // Knuth's multiplier: any walk will do that does not repeat soon.
            at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(disk as u64 | 1);
            let issued = Instant::now();
            let offset = (at >> 16) % blocks * BLOCK as u64;
            if let Err(error) = self.disks[disk].plain.read_exact_at(buffer.bytes(BLOCK), offset) {
                return self.fail(format!("reading disk {disk}: {error}"));
            }
            self.read_latency.record(u64::try_from(issued.elapsed().as_micros()).unwrap_or(u64::MAX));
            due = self.keep_rate(rate, due);
        }
    }

    /// Waits until the next operation is due, and returns when that was.
    fn keep_rate(&self, rate: u64, due: Instant) -> Instant {
        let Some(pause) = 1_000_000u64.checked_div(rate) else { return Instant::now() };
        let due = due + Duration::from_micros(pause);
        while !self.stop.load(Ordering::SeqCst) {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            std::thread::sleep(left.min(Duration::from_millis(50)));
        }
        // A stall is not made up for by a burst.
        due.max(Instant::now())
    }

    fn acknowledged(&self) -> Vec<u64> {
        self.acked
            .iter()
            .take(self.layout.streams() as usize)
            .map(|acked| acked.load(Ordering::SeqCst))
            .collect()
    }

    fn fail(&self, why: String) {
        eprintln!("guest-writer: {why}");
        // The first is what went wrong; the others may follow from it.
        let _ = self.first_error.set(why);
        self.errors.fetch_add(1, Ordering::SeqCst);
    }
}

/// One stream.
struct Writer {
    shared: Arc<Shared>,
    stream: u32,
    durable: bool,
}

impl Writer {
    fn write_on(&self) {
        let shared = &*self.shared;
        let mut buffer = Aligned::new(LARGEST * BLOCK);
        let mut due = Instant::now();
        let acked = &shared.acked[self.stream as usize];
        for sequence in acked.load(Ordering::SeqCst) + 1.. {
            if shared.stop.load(Ordering::SeqCst) {
                return;
            }
            let issued = Instant::now();
            if let Err(error) = self.operate(sequence, &mut buffer) {
                // The order of what would follow would prove nothing any more.
                return shared.fail(format!("stream {} operation {sequence}: {error}", self.stream));
            }
            let took = u64::try_from(issued.elapsed().as_micros()).unwrap_or(u64::MAX);
            shared.latency.record(took);
            shared.longest.fetch_max(took, Ordering::SeqCst);
            acked.store(sequence, Ordering::SeqCst);
            shared.writes.fetch_add(1, Ordering::SeqCst);
            due = shared.keep_rate(shared.rate.load(Ordering::SeqCst), due);
        }
    }

    fn operate(&self, sequence: u64, buffer: &mut Aligned) -> std::io::Result<()> {
        let shared = &*self.shared;
        let operation = shared.layout.operation(self.stream, sequence);
        let bytes = buffer.bytes(operation.count as usize * BLOCK);
        let offset = operation.block * BLOCK as u64;
        let disk = &shared.disks[operation.disk];
        if operation.zero {
            bytes.fill(0);
            disk::zero(&disk.plain, offset, bytes, sequence.is_multiple_of(2))?;
            return if self.durable { Ok(fdatasync(&disk.plain)?) } else { Ok(()) };
        }
        let mut stamp = Stamp {
            run: shared.run,
            disk: operation.disk as u32,
            stream: self.stream,
            sequence,
            block: operation.block,
            // Read before the operation is issued: all of these are before it.
            acked: shared.acknowledged(),
        };
        for block in bytes.chunks_exact_mut(BLOCK) {
            stamp.write(block);
            stamp.block += 1;
        }
        let file = if self.durable { &disk.durable } else { &disk.plain };
        file.write_all_at(bytes, offset)
    }
}
