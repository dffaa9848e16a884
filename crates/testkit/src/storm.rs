//! The guest's writer: what it is told, and what it counted.

use crate::{Guest, guest::ANSWER};
use anyhow::{Context as _, Result, bail, ensure};
use guest_writer::{BLOCK, Histogram, Layout};
use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// Which streams wait until the disk has what they wrote on stable storage (`O_DSYNC`), so that a loss of everything
/// volatile loses nothing of theirs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durable {
    /// None: all are as fast as they can be.
    #[default]
    None,
    /// The one that goes round the disks.
    Ordering,
    /// All.
    All,
}

/// A write storm to start: at full speed on all disks, unless told otherwise.
#[derive(Debug, Clone, Copy)]
pub struct StormSpec {
    seed: u64,
    rate: u64,
    span: u64,
    streams: u32,
    durable: Durable,
}

impl StormSpec {
    /// All positions and lengths follow from the seed.
    pub fn new(seed: u64) -> Self {
        Self { seed, rate: 0, span: 1024, streams: 2, durable: Durable::None }
    }

    /// Operations a second of each stream; 0 for as many as there can be.
    #[must_use]
    pub fn rate(mut self, rate: u64) -> Self {
        self.rate = rate;
        self
    }

    /// Blocks of 4 KiB that a stream writes to on each disk of its own; the fewer, the more often each is overwritten.
    #[must_use]
    pub fn span(mut self, span: u64) -> Self {
        self.span = span;
        self
    }

    /// Streams that each disk has to itself, besides the one that goes round all disks.
    #[must_use]
    pub fn streams(mut self, streams: u32) -> Self {
        self.streams = streams;
        self
    }

    /// Streams that wait for stable storage.
    #[must_use]
    pub fn durable(mut self, durable: Durable) -> Self {
        self.durable = durable;
        self
    }
}

/// A write storm that was started.
#[derive(Debug, Clone)]
pub struct Storm {
    /// Its plan.
    pub layout: Layout,
    /// Its name.
    pub run: u64,
    spec: StormSpec,
}

/// What the guest counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StormCounts {
    /// Operations done.
    pub writes: u64,
    /// I/O errors that the guest saw.
    pub errors: u64,
    /// The longest that one operation took.
    pub longest: Duration,
}

impl Guest {
    /// Starts to write on all disks; `rate` operations a second and stream, 0 for full speed.
    ///
    /// # Errors
    /// If the guest has no such disks, or a storm runs.
    pub fn start_storm(&mut self, seed: u64, rate: u64) -> Result<Storm> {
        self.start_storm_with(StormSpec::new(seed).rate(rate))
    }

    /// The same, each stream within `span` blocks of each disk.
    ///
    /// # Errors
    /// If the guest has no such disks, or a storm runs.
    pub fn start_storm_within(&mut self, seed: u64, rate: u64, span: u64) -> Result<Storm> {
        self.start_storm_with(StormSpec::new(seed).rate(rate).span(span))
    }

    /// Starts a storm as `spec` says.
    ///
    /// # Errors
    /// If the guest has no such disks, or a storm runs.
    pub fn start_storm_with(&mut self, spec: StormSpec) -> Result<Storm> {
        static RUN: AtomicU64 = AtomicU64::new(1);
        let run = RUN.fetch_add(1, Ordering::Relaxed) + u64::from(std::process::id()) * 1_000_000;
        let layout = Layout {
            seed: spec.seed,
            per_disk: spec.streams,
            disk_blocks: self.stamped_disks().map(|disk| disk.size / BLOCK as u64).collect(),
            span: spec.span,
        };
        let storm = Storm { layout, run, spec };
        self.tell_start(&storm, &[])?;
        Ok(storm)
    }

    /// Goes on with a storm after QEMU was started again, from what was acknowledged when it ended: the mark of a storm
    /// that was stopped, or the cut that the oracle found in the images of a QEMU that was killed.
    ///
    /// # Errors
    /// If a storm runs.
    pub fn resume_storm(&mut self, storm: &Storm, acked: &[u64]) -> Result<()> {
        ensure!(acked.len() == storm.layout.streams() as usize, "one number a stream");
        self.tell_start(storm, acked)
    }

    fn tell_start(&mut self, storm: &Storm, acked: &[u64]) -> Result<()> {
        let StormSpec { seed, rate, span, streams, durable } = storm.spec;
        let durable = match durable {
            Durable::None => "none",
            Durable::Ordering => "ordering",
            Durable::All => "all",
        };
        let from = if acked.is_empty() { "-".to_owned() } else { join(acked, ",") };
        let sizes: Vec<u64> = self.stamped_disks().map(|disk| disk.size / 512 * 512).collect();
        let (run, sizes) = (storm.run, join(&sizes, " "));
        self.ask(&format!("start {run} {seed} {streams} {span} {rate} {durable} {from} {sizes}")).map(|_| ())
    }

    /// What the storm counted so far, or until it ended.
    ///
    /// # Errors
    /// If the guest does not answer.
    pub fn counts(&mut self) -> Result<StormCounts> {
        let answer = self.ask("status")?;
        counts(&numbers(&answer, "status")?)
    }

    /// For each stream the last operation that was acknowledged: a bound for points made before or after.
    ///
    /// # Errors
    /// If no storm was started.
    pub fn mark(&mut self) -> Result<Vec<u64>> {
        let answer = self.ask("mark")?;
        numbers(&answer, "marked")
    }

    /// Lets a thread on each disk read 4 KiB anywhere in it, `rate` times a second, until the storm is stopped.
    ///
    /// # Errors
    /// If no storm was started.
    pub fn start_reading(&mut self, rate: u64) -> Result<()> {
        self.ask(&format!("read {rate}")).map(|_| ())
    }

    /// How long writes took since this was last asked.
    ///
    /// # Errors
    /// If no storm was started.
    pub fn latency(&mut self) -> Result<Histogram> {
        self.histogram("latency")
    }

    /// How long reads took since this was last asked.
    ///
    /// # Errors
    /// If no storm was started.
    pub fn read_latency(&mut self) -> Result<Histogram> {
        self.histogram("read-latency")
    }

    fn histogram(&mut self, of: &str) -> Result<Histogram> {
        let answer = self.ask(of)?;
        let told = answer.strip_prefix(of).and_then(Histogram::parse);
        told.with_context(|| format!("the guest answers {answer:?}"))
    }

    /// The first I/O error that the storm met.
    ///
    /// # Errors
    /// If no storm was started.
    pub fn first_error(&mut self) -> Result<Option<String>> {
        let answer = self.ask("error")?;
        let error = answer.strip_prefix("error").context("the guest's answer")?.trim();
        Ok((!error.is_empty()).then(|| error.to_owned()))
    }

    /// Changes how many operations a second each stream does; 0 for as many as there can be.
    ///
    /// # Errors
    /// If no storm was started.
    pub fn set_rate(&mut self, rate: u64) -> Result<()> {
        self.ask(&format!("rate {rate}")).map(|_| ())
    }

    /// Flushes all disks from inside.
    ///
    /// # Errors
    /// If the guest cannot, or no storm was started.
    pub fn sync(&mut self) -> Result<()> {
        self.ask("sync").map(|_| ())
    }

    /// Waits until the storm has done `more` operations more: a guest that does not run on fails here.
    ///
    /// # Errors
    /// If it does not within 60 s.
    pub fn await_writes(&mut self, more: u64) -> Result<StormCounts> {
        let goal = self.counts()?.writes + more;
        let deadline = Instant::now() + ANSWER;
        loop {
            let counts = self.counts()?;
            if counts.writes >= goal || counts.errors > 0 {
                return Ok(counts);
            }
            ensure!(Instant::now() < deadline, "the guest writes no more: {counts:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends the storm, with everything acknowledged; [`Guest::mark`] then tells what that is.
    ///
    /// # Errors
    /// If the guest does not answer, or no storm was started.
    pub fn stop_storm(&mut self) -> Result<StormCounts> {
        let answer = self.ask("stop")?;
        counts(&numbers(&answer, "stopped")?)
    }

    /// Writes `length` bytes at `offset` of a disk, once. What a storm writes is found by `Layout::region`: the oracle takes
    /// anything else there for damage.
    ///
    /// # Errors
    /// If the guest cannot.
    pub fn fill(&mut self, disk: usize, offset: u64, length: u64) -> Result<()> {
        let size = self.disks.get(disk).context("no such disk")?.size / 512 * 512;
        self.ask(&format!("fill {size} {offset} {length}")).map(|_| ())
    }
}

fn join(numbers: &[u64], between: &str) -> String {
    numbers.iter().map(u64::to_string).collect::<Vec<_>>().join(between)
}

fn numbers(answer: &str, word: &str) -> Result<Vec<u64>> {
    let mut words = answer.split_whitespace();
    ensure!(words.next() == Some(word), "the guest answers {answer:?}");
    words.map(|number| number.parse().with_context(|| format!("the guest answers {answer:?}"))).collect()
}

fn counts(numbers: &[u64]) -> Result<StormCounts> {
    let [writes, errors, longest] = *numbers else { bail!("the guest counts {numbers:?}") };
    Ok(StormCounts { writes, errors, longest: Duration::from_micros(longest) })
}
