//! Watches how full the fleecing images are while the backup runs.

use crate::{fleecing::FleecingImage, volume::Stop};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use stillpoint_model::Length;
use tokio::{sync::watch, task::JoinHandle};

/// Nothing tells when a file grows, so it is looked at this often; a fast guest writes some 50 MiB in between.
const INTERVAL: Duration = Duration::from_millis(50);

/// Ends with its owner.
pub(crate) struct FleecingWatch {
    images: Vec<Arc<FleecingImage>>,
    peak: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl FleecingWatch {
    pub(crate) fn start(
        images: Vec<Arc<FleecingImage>>,
        budget: Option<Length>,
        stop: watch::Sender<Option<Stop>>,
    ) -> Self {
        let peak = Arc::new(AtomicU64::new(0));
        let task = tokio::spawn({
            let (images, peak) = (images.clone(), Arc::clone(&peak));
            async move {
                let mut ticks = tokio::time::interval(INTERVAL);
                loop {
                    ticks.tick().await;
                    let used = used(&images);
                    peak.fetch_max(used.get(), Ordering::Relaxed);
                    if let Some(budget) = budget.filter(|budget| used > *budget) {
                        stop.send_if_modified(|stop| {
                            let first = stop.is_none();
                            stop.get_or_insert(Stop::OverBudget { used, budget });
                            first
                        });
                    }
                }
            }
        });
        Self { images, peak, task }
    }

    /// Gives all their space back; for when no node uses them any more.
    pub(crate) fn empty(&self) {
        for image in &self.images {
            image.empty();
        }
    }

    pub(crate) fn now_and_peak(&self) -> (Length, Length) {
        let now = used(&self.images);
        let peak = self.peak.fetch_max(now.get(), Ordering::Relaxed).max(now.get());
        (now, Length::new(peak))
    }
}

fn used(images: &[Arc<FleecingImage>]) -> Length {
    images.iter().map(|image| image.used()).sum()
}

impl Drop for FleecingWatch {
    fn drop(&mut self) {
        self.task.abort();
    }
}
