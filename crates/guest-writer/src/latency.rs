//! How long operations took, counted by several threads at once.

use std::sync::atomic::{AtomicU64, Ordering};

/// Four a power of two: a reading is at most a quarter too high.
const BUCKETS: usize = 64 * 4;

/// Counts of operations by the time that they took.
pub(crate) struct Latency {
    buckets: [AtomicU64; BUCKETS],
    longest: AtomicU64,
}

impl Latency {
    pub(crate) fn new() -> Self {
        Self { buckets: [const { AtomicU64::new(0) }; BUCKETS], longest: AtomicU64::new(0) }
    }

    pub(crate) fn record(&self, microseconds: u64) {
        self.buckets[bucket(microseconds)].fetch_add(1, Ordering::Relaxed);
        self.longest.fetch_max(microseconds, Ordering::Relaxed);
    }

    /// Number, median, 99th percentile and longest; counting begins anew.
    pub(crate) fn take(&self) -> [u64; 4] {
        let counts: Vec<u64> = self.buckets.iter().map(|bucket| bucket.swap(0, Ordering::Relaxed)).collect();
        let longest = self.longest.swap(0, Ordering::Relaxed);
        let total: u64 = counts.iter().sum();
        let quantile = |percent: u64| {
            let mut rest = (total * percent).div_ceil(100);
            for (index, count) in counts.iter().enumerate() {
                if rest <= *count {
                    return upper(index).min(longest);
                }
                rest -= count;
            }
            longest
        };
        [total, quantile(50), quantile(99), longest]
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
    fn quantiles_are_of_what_was_recorded_since() {
        let latency = Latency::new();
        for value in 1..=100 {
            latency.record(value * 1000);
        }
        let [total, median, most, longest] = latency.take();
        assert_eq!((total, longest), (100, 100_000));
        assert!((50_000..=62_500).contains(&median) && (99_000..=100_000).contains(&most), "{median} {most}");
        assert_eq!(latency.take(), [0; 4]);
    }
}
