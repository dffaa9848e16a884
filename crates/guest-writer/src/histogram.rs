//! How long operations took: counted in the guest by several threads at once, told on one line, read by the host.

use std::{
    collections::BTreeMap,
    fmt,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// Four a power of two: a reading is at most a quarter too high.
const BUCKETS: usize = 64 * 4;

/// Counts operations by the microseconds that they took.
#[derive(Debug)]
pub struct Recorder {
    buckets: [AtomicU64; BUCKETS],
    longest: AtomicU64,
}

impl Default for Recorder {
    fn default() -> Self {
        Self { buckets: [const { AtomicU64::new(0) }; BUCKETS], longest: AtomicU64::new(0) }
    }
}

impl Recorder {
    /// Counts an operation.
    pub fn record(&self, microseconds: u64) {
        self.buckets[bucket(microseconds)].fetch_add(1, Ordering::Relaxed);
        self.longest.fetch_max(microseconds, Ordering::Relaxed);
    }

    /// What was counted; counting begins anew.
    pub fn take(&self) -> Histogram {
        let taken = self.buckets.iter().map(|bucket| bucket.swap(0, Ordering::Relaxed)).enumerate();
        let counts = taken.filter(|(_, count)| *count > 0).collect();
        Histogram { counts, longest: self.longest.swap(0, Ordering::Relaxed) }
    }
}

/// How long operations took within a while. As text: the longest in microseconds, then `BUCKET:COUNT` with blanks between.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Histogram {
    counts: BTreeMap<usize, u64>,
    longest: u64,
}

impl Histogram {
    /// Takes apart what [`fmt::Display`] writes; `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let mut words = text.split_whitespace();
        let longest = words.next()?.parse().ok()?;
        let count = |word: &str| {
            let (bucket, count) = word.split_once(':')?;
            Some((bucket.parse().ok().filter(|bucket| *bucket < BUCKETS)?, count.parse().ok()?))
        };
        Some(Self { counts: words.map(count).collect::<Option<_>>()?, longest })
    }

    /// Adds what was counted in another while.
    pub fn add(&mut self, other: &Self) {
        for (bucket, count) in &other.counts {
            *self.counts.entry(*bucket).or_default() += count;
        }
        self.longest = self.longest.max(other.longest);
    }

    /// Operations.
    pub fn operations(&self) -> u64 {
        self.counts.values().sum()
    }

    /// So many in a thousand took no longer; up to a quarter too high. Zero if there was none.
    pub fn quantile(&self, per_mille: u64) -> Duration {
        let mut rest = (self.operations() * per_mille).div_ceil(1000);
        for (bucket, count) in &self.counts {
            if rest <= *count {
                return Duration::from_micros(upper(*bucket).min(self.longest));
            }
            rest -= count;
        }
        self.longest()
    }

    /// The longest.
    pub fn longest(&self) -> Duration {
        Duration::from_micros(self.longest)
    }
}

impl fmt::Display for Histogram {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.longest)?;
        self.counts.iter().try_for_each(|(bucket, count)| write!(formatter, " {bucket}:{count}"))
    }
}

fn bucket(value: u64) -> usize {
    if value < 4 {
        return value as usize;
    }
    let power = value.ilog2();
    power as usize * 4 + (value >> (power - 2) & 3) as usize
}

/// The largest value that is counted in a bucket.
fn upper(bucket: usize) -> u64 {
    if bucket < 8 {
        return bucket as u64;
    }
    let power = (bucket / 4) as u32;
    ((4 + bucket as u64 % 4 + 1) << (power - 2)) - 1
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_value_is_within_a_quarter_of_what_is_read() {
        for value in (0..5000).chain([1 << 20, (1 << 30) + 12_345, 1 << 40]) {
            let read = upper(bucket(value));
            assert!(read >= value && read <= value + value / 4 + 1, "{value}: {read}");
        }
    }

    #[test]
    fn quantiles_are_of_what_was_recorded_since_and_survive_the_way_to_the_host() {
        let recorder = Recorder::default();
        for value in 1..=100 {
            recorder.record(value * 1000);
        }
        let taken = recorder.take();
        let told = Histogram::parse(&taken.to_string()).unwrap();
        assert_eq!(told, taken);
        let microseconds = |per_mille| told.quantile(per_mille).as_micros();
        assert_eq!((told.operations(), told.longest().as_micros()), (100, 100_000));
        assert!((50_000..=62_500).contains(&microseconds(500)), "{told}");
        assert!((99_000..=100_000).contains(&microseconds(990)), "{told}");
        assert_eq!(recorder.take(), Histogram::default());
        let mut twice = told.clone();
        twice.add(&told);
        assert_eq!((twice.operations(), twice.quantile(500)), (200, told.quantile(500)));
        assert_eq!(Histogram::default().quantile(990), Duration::ZERO);
    }

    #[test]
    fn what_is_no_histogram_is_not_taken_for_one() {
        for text in ["", "x", "1 2", "1 2:x", "1 256:1"] {
            assert_eq!(Histogram::parse(text), None, "{text}");
        }
    }
}
