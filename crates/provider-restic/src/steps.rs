//! What care for a repository is doing, for whoever watches: rustic's progress bars, handed on.

use rustic_core::{Progress, ProgressBars, ProgressType, RusticProgress};
use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

/// Hears of the steps of long work, which come one after the other.
pub trait Steps: Send + Sync {
    /// A step begins, which counts bytes or things.
    fn begin(&self, what: &str, bytes: bool);
    /// How much the step has to do. Not every step knows.
    fn total(&self, count: u64);
    /// So much more of it is done.
    fn advanced(&self, count: u64);
}

/// Who watches a repository at the moment.
#[derive(Clone, Default)]
pub(crate) struct Watcher(Arc<Mutex<Option<Arc<dyn Steps>>>>);

impl Watcher {
    /// Lets `steps` hear of what rustic does in `work`.
    pub(crate) fn hears<T>(&self, steps: Arc<dyn Steps>, work: impl FnOnce() -> T) -> T {
        self.set(Some(steps));
        let done = work();
        self.set(None);
        done
    }

    fn set(&self, steps: Option<Arc<dyn Steps>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = steps;
    }
}

impl fmt::Debug for Watcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watcher")
    }
}

impl ProgressBars for Watcher {
    fn progress(&self, progress_type: ProgressType, prefix: &str) -> Progress {
        let steps = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let what = prefix.trim_end_matches('.');
        let Some(steps) = steps.filter(|_| !what.is_empty()) else { return Progress::hidden() };
        steps.begin(what, matches!(progress_type, ProgressType::Bytes));
        Progress::new(Step(steps))
    }
}

struct Step(Arc<dyn Steps>);

impl fmt::Debug for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Step")
    }
}

impl RusticProgress for Step {
    fn is_hidden(&self) -> bool {
        false
    }

    fn set_length(&self, length: u64) {
        self.0.total(length);
    }

    fn set_title(&self, _title: &str) {}

    fn inc(&self, count: u64) {
        self.0.advanced(count);
    }

    fn finish(&self) {}
}

#[cfg(test)]
mod test {
    use super::*;

    #[derive(Default)]
    struct Heard(Mutex<Vec<String>>);

    impl Steps for Heard {
        fn begin(&self, what: &str, bytes: bool) {
            self.0.lock().unwrap().push(format!("{what}, bytes: {bytes}"));
        }

        fn total(&self, count: u64) {
            self.0.lock().unwrap().push(format!("of {count}"));
        }

        fn advanced(&self, count: u64) {
            self.0.lock().unwrap().push(format!("+{count}"));
        }
    }

    #[test]
    fn who_watches_hears_of_each_step_and_nobody_else_does() {
        let (watcher, heard) = (Watcher::default(), Arc::new(Heard::default()));
        assert!(watcher.progress(ProgressType::Counter, "before...").is_hidden());
        watcher.hears(Arc::clone(&heard) as _, || {
            let step = watcher.progress(ProgressType::Bytes, "repacking...");
            step.set_length(5);
            step.inc(2);
            step.finish();
            assert!(watcher.progress(ProgressType::Counter, "").is_hidden());
        });
        assert!(watcher.progress(ProgressType::Spinner, "after").is_hidden());
        assert_eq!(*heard.0.lock().unwrap(), ["repacking, bytes: true", "of 5", "+2"]);
    }
}
