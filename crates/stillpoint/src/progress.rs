//! What a person sees while work goes on: how far, how fast, how long still.

use crate::text;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};
use stillpoint_model::{Length, VmName};
use stillpoint_provider::Progress;
use stillpoint_provider_restic::Steps;
use stillpoint_snapshot_access::SnapshotAccess;

/// How often the line is drawn.
const REDRAW: Duration = Duration::from_millis(200);

fn bar(shown: bool, template: &str) -> ProgressBar {
    let target = if shown { ProgressDrawTarget::stderr_with_hz(5) } else { ProgressDrawTarget::hidden() };
    ProgressBar::with_draw_target(None, target).with_style(style(template))
}

fn style(template: &str) -> ProgressStyle {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    style.progress_chars("=> ")
}

/// The progress of a backup.
pub(crate) struct BackupProgress(ProgressBar);

impl BackupProgress {
    /// A line for this backup; nothing is drawn if nobody watches.
    pub(crate) fn start(shown: bool, vm: &VmName, access: &SnapshotAccess) -> Self {
        let bar = bar(shown, "{prefix} [{bar:28}] {percent:>3} %  {msg}, {eta} left");
        bar.set_prefix(vm.to_string());
        bar.set_message("reading");
        bar.set_length(access.disks().iter().map(|disk| disk.size).sum::<Length>().get());
        Self(bar)
    }

    /// Draws until `work` is done.
    pub(crate) async fn watch<T>(&self, access: &SnapshotAccess, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        let mut ticks = tokio::time::interval(REDRAW);
        let started = std::time::Instant::now();
        loop {
            tokio::select! {
                done = &mut work => {
                    self.0.finish_and_clear();
                    return done;
                }
                _ = ticks.tick() => self.draw(access, started.elapsed()),
            }
        }
    }

    fn draw(&self, access: &SnapshotAccess, elapsed: Duration) {
        let disks = access.disks();
        let read: Length = disks.iter().map(|disk| disk.read).sum();
        self.0.set_position(disks.iter().map(|disk| disk.passed).sum::<Length>().get());
        self.0.set_message(format!(
            "read {}, {}/s, fleecing {}",
            text::bytes(read),
            text::bytes(rate(read, elapsed)),
            text::bytes(access.fleecing().0)
        ));
    }
}

/// Bytes a second.
pub(crate) fn rate(done: Length, elapsed: Duration) -> Length {
    let millis = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX).max(1);
    Length::new(u64::try_from(u128::from(done.get()) * 1000 / u128::from(millis)).unwrap_or(u64::MAX))
}

/// The progress of a restore or of verifying.
pub(crate) struct BytesProgress(ProgressBar);

impl BytesProgress {
    /// A line that begins with `what`.
    pub(crate) fn start(shown: bool, what: impl Into<String>) -> Self {
        let bar = bar(
            shown,
            "{prefix} [{bar:28}] {percent:>3} %  {binary_bytes}, {binary_bytes_per_sec}, {eta} left",
        );
        bar.set_prefix(what.into());
        Self(bar)
    }

    /// Takes the line away.
    pub(crate) fn finish(&self) {
        self.0.finish_and_clear();
    }
}

impl Progress for BytesProgress {
    fn total(&self, bytes: Length) {
        self.0.set_length(bytes.get());
    }

    fn advanced(&self, bytes: Length) {
        self.0.inc(bytes.get());
    }
}

const STEP: &str = "{prefix} [{bar:28}]  {msg}";
const STEP_OF_THINGS: &str = "{prefix} [{bar:28}] {percent:>3} %  {msg}, {pos} of {len}, {eta} left";
const STEP_OF_BYTES: &str =
    "{prefix} [{bar:28}] {percent:>3} %  {msg}, {binary_bytes}, {binary_bytes_per_sec}, {eta} left";

/// The progress of work in steps, each of which begins anew.
pub(crate) struct StepsProgress {
    bar: ProgressBar,
    bytes: AtomicBool,
}

impl StepsProgress {
    /// A line that begins with `what`.
    pub(crate) fn start(shown: bool, what: impl Into<String>) -> Self {
        let bar = bar(shown, STEP);
        bar.set_prefix(what.into());
        Self { bar, bytes: AtomicBool::new(false) }
    }

    /// Takes the line away.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl Steps for StepsProgress {
    fn begin(&self, what: &str, bytes: bool) {
        self.bytes.store(bytes, Ordering::Relaxed);
        self.bar.unset_length();
        self.bar.set_style(style(STEP));
        self.bar.set_message(what.to_owned());
        self.bar.reset();
    }

    fn total(&self, count: u64) {
        let template = if self.bytes.load(Ordering::Relaxed) { STEP_OF_BYTES } else { STEP_OF_THINGS };
        self.bar.set_style(style(template));
        self.bar.set_length(count);
    }

    fn advanced(&self, count: u64) {
        self.bar.inc(count);
    }
}
