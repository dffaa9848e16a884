//! Watches over a held instant: how full the fleecing images are, and whether somebody moves the VM away.

use crate::{
    command,
    fleecing::FleecingImage,
    inspect::{ask, migration_under_way},
    reserve::Reserve,
    volume::Stop,
};
use serde_json::Value;
use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use stillpoint_model::Length;
use stillpoint_qmp::Qmp;
use tokio::{sync::watch, task::JoinHandle};

/// Nothing tells when a file grows, so it is looked at this often; a fast guest writes some 50 MiB in between. What must not be
/// missed is watched by a process of its own: see the `reserve` module.
const INTERVAL: Duration = Duration::from_millis(50);
/// A migration tells of itself only to a client that switched that on, which is the migrating client's business.
const MIGRATION_INTERVAL: Duration = Duration::from_secs(1);

/// Ends with its owner.
pub(crate) struct FleecingWatch {
    images: Arc<Vec<Arc<FleecingImage>>>,
    used: Arc<Used>,
}

#[derive(Default)]
struct Used {
    now: AtomicU64,
    peak: AtomicU64,
}

impl FleecingWatch {
    /// In a thread of its own, since looking at storage that hangs hangs too.
    pub(crate) fn start(
        images: Vec<Arc<FleecingImage>>,
        budget: Option<Length>,
        reserve: Reserve,
        stop: watch::Sender<Option<Stop>>,
    ) -> Self {
        let (images, used) = (Arc::new(images), Arc::new(Used::default()));
        let (watched, counts) = (Arc::downgrade(&images), Arc::clone(&used));
        std::thread::spawn(move || watch_images(&watched, &counts, budget, &reserve, &stop));
        Self { images, used }
    }

    /// The images.
    pub(crate) fn images(&self) -> &[Arc<FleecingImage>] {
        &self.images
    }

    /// Gives all their space back; for when no node uses them any more.
    pub(crate) fn empty(&self) {
        for image in self.images.iter() {
            image.empty();
        }
    }

    /// Counts once more, for storage that is known to answer.
    pub(crate) fn count(&self) {
        self.used.count(&self.images);
    }

    pub(crate) fn now_and_peak(&self) -> (Length, Length) {
        let number = |of: &AtomicU64| Length::new(of.load(Ordering::Relaxed));
        (number(&self.used.now), number(&self.used.peak))
    }
}

impl Used {
    fn count(&self, images: &[Arc<FleecingImage>]) -> Length {
        let used: Length = images.iter().map(|image| image.used()).sum();
        self.now.store(used.get(), Ordering::Relaxed);
        self.peak.fetch_max(used.get(), Ordering::Relaxed);
        used
    }
}

fn watch_images(
    images: &Weak<Vec<Arc<FleecingImage>>>,
    counts: &Used,
    budget: Option<Length>,
    reserve: &Reserve,
    stop: &watch::Sender<Option<Stop>>,
) {
    let mut given_up = false;
    while let Some(images) = images.upgrade() {
        if given_up {
            // The filters are there until the run takes them out, and copy on.
            images.iter().for_each(|image| image.take_back());
        } else {
            let used = counts.count(&images);
            let reason = why_to_give_up(&images, used, counts, budget, reserve);
            if let Some(reason) = reason {
                given_up = true;
                images.iter().for_each(|image| image.mark_given_up());
                end(stop, reason);
                continue;
            }
        }
        drop(images);
        std::thread::sleep(INTERVAL);
    }
}

fn why_to_give_up(
    images: &[Arc<FleecingImage>],
    used: Length,
    counts: &Used,
    budget: Option<Length>,
    reserve: &Reserve,
) -> Option<Stop> {
    // The watcher looks more often, and was first as a rule: by now there may be space again.
    if images.iter().any(|image| !image.is_whole()) {
        let used = Length::new(counts.peak.load(Ordering::Relaxed));
        return Some(Stop::LowSpace { space: reserve.tightest(), used });
    }
    if let Some(low) = reserve.low() {
        return Some(Stop::LowSpace { space: Some(low), used });
    }
    let budget = budget.filter(|budget| used > *budget)?;
    Some(Stop::OverBudget { used, budget })
}

/// Ends all reading for this reason, unless there is one already.
pub(crate) fn end(stop: &watch::Sender<Option<Stop>>, reason: Stop) {
    stop.send_if_modified(|stop| {
        let first = stop.is_none();
        stop.get_or_insert(reason);
        first
    });
}

/// Ends the run when somebody begins to migrate the VM: the guest moves on, and our nodes would be in its way.
pub(crate) fn watch_migration(qmp: Qmp, stop: watch::Sender<Option<Stop>>) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(MIGRATION_INTERVAL);
        loop {
            ticks.tick().await;
            let Ok(migration) = ask::<Value>(&qmp, command::query_migrate()).await else { continue };
            if let Some(state) = migration_under_way(&migration) {
                return end(&stop, Stop::Migration { state: state.to_owned() });
            }
        }
    })
}
