//! A disk whose content resembles a real one's.

use anyhow::Result;
use serde::Serialize;
use std::{fs::File, os::unix::fs::FileExt as _, path::Path};

const MIB: u64 = 1 << 20;

/// Shares of a disk's MiBs, in percent; what is left is text-like.
pub(super) struct Mix {
    /// Never written.
    pub(super) holes: u64,
    /// Repeats an earlier one.
    pub(super) duplicates: u64,
    /// As good as random: media, archives, encrypted files.
    pub(super) incompressible: u64,
}

impl Default for Mix {
    fn default() -> Self {
        Self { holes: 25, duplicates: 11, incompressible: 32 }
    }
}

/// What a disk was made of, MiB.
#[derive(Debug, Default, Clone, Serialize)]
pub(crate) struct Made {
    pub(super) size: u64,
    pub(super) holes: u64,
    pub(super) duplicates: u64,
    pub(super) incompressible: u64,
    pub(super) text: u64,
}

/// Always the same, for the same size and mix.
pub(super) fn make(path: &Path, size: u64, mix: &Mix) -> Result<Made> {
    let file = File::options().create_new(true).read(true).write(true).open(path)?;
    file.set_len(size)?;
    let mut random = Random(5);
    let words = words(&mut random);
    let mut made = Made { size: size / MIB, ..Made::default() };
    let mut written: Vec<u64> = Vec::new();
    let mut buffer = vec![0; usize::try_from(MIB)?];
    for at in (0..size / MIB).map(|index| index * MIB) {
        let dice = random.below(100);
        let earlier = usize::try_from(random.below(1 << 32))? % written.len().max(1);
        match written.get(earlier) {
            _ if dice < mix.holes => {
                made.holes += 1;
                continue;
            }
            Some(&earlier) if dice < mix.holes + mix.duplicates => {
                file.read_exact_at(&mut buffer, earlier)?;
                made.duplicates += 1;
            }
            _ if dice < mix.holes + mix.duplicates + mix.incompressible => {
                write_noise(&mut buffer, &mut random);
                made.incompressible += 1;
            }
            _ => {
                write_text(&mut buffer, &words, &mut random);
                made.text += 1;
            }
        }
        file.write_all_at(&buffer, at)?;
        written.push(at);
    }
    file.sync_all()?;
    Ok(made)
}

/// What is written to a disk between backups: text-like and incompressible MiBs in turns, no two of them the same.
pub(super) struct Changes {
    random: Random,
    templates: [Vec<u8>; 2],
    made: u64,
}

impl Changes {
    pub(super) fn new() -> Self {
        let mut random = Random(9);
        let [mut text, mut noise] = [(); 2].map(|()| vec![0; 1 << 20]);
        write_text(&mut text, &words(&mut random), &mut random);
        write_noise(&mut noise, &mut random);
        Self { random, templates: [text, noise], made: 0 }
    }

    /// The next one, at most a MiB.
    pub(super) fn next(&mut self, length: u64) -> &[u8] {
        let [text, noise] = &mut self.templates;
        let next = if self.made.is_multiple_of(2) { text } else { noise };
        self.made += 1;
        for (place, byte) in next.iter_mut().zip(self.made.to_le_bytes()) {
            *place = byte;
        }
        let length = usize::try_from(length).unwrap_or(usize::MAX).min(next.len());
        next.get(..length).unwrap_or_default()
    }

    /// Where it goes: one of so many places.
    pub(super) fn place(&mut self, places: u64) -> u64 {
        self.random.below(places)
    }
}

fn words(random: &mut Random) -> Vec<Vec<u8>> {
    (0..3000)
        .map(|_| {
            let length = 2 + random.below(8);
            (0..length).map(|_| b'a' + u8::try_from(random.below(26)).unwrap_or(0)).collect()
        })
        .collect()
}

fn write_noise(buffer: &mut [u8], random: &mut Random) {
    for piece in buffer.chunks_exact_mut(8) {
        piece.copy_from_slice(&random.next().to_le_bytes());
    }
}

fn write_text(buffer: &mut [u8], words: &[Vec<u8>], random: &mut Random) {
    let mut at = 0;
    while at < buffer.len() {
        let word = usize::try_from(random.below(words.len() as u64)).ok().and_then(|word| words.get(word));
        for &byte in word.into_iter().flatten().chain(b" ") {
            if let Some(place) = buffer.get_mut(at) {
                *place = byte;
            }
            at += 1;
        }
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }
}
