//! What every byte of an image should be.
//!
//! One file a disk and point, so that a full check and a restore need no other knowledge than the manifest's one sum
//! over it. All numbers are little-endian.
//!
//! ```text
//!   header   "STILLSUM"  version u32  0 u32  disk size u64                      24 bytes
//!   record   offset u64  length u56  kind u8 (1 data, 2 zero)  blake3 [16]      32 bytes, sorted, disjoint
//! ```
//!
//! A data record is within one cell of 1 MiB; a zero record may be of any length and has no sum. What no record covers
//! is not in the image: a hole in a raw image, and in an overlay a cluster that reads from below.
//!
//! Sixteen bytes of blake3 are kept of thirty-two. They are there to find damage, and one chance in 2^128 is enough
//! for that; whoever may write in a target can replace any sum of any length along with the data. A disk of 64 GiB has
//! 2 MiB of records.

use crate::{
    error::{damaged, from_image, stored},
    manifest::StoredDisk,
    plan::CELL,
};
use std::{
    fs::File,
    io::{BufWriter, Write},
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};
use stillpoint_image::{self as image, Directory};
use stillpoint_model::{Length, Offset, Range};
use stillpoint_provider::Result;

const MAGIC: &[u8; 8] = b"STILLSUM";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 24;
const HEADER: u64 = HEADER_BYTES as u64;
const RECORD: u64 = 32;

/// Records that are read, checked and kept at once.
const PAGE: u64 = 512;

/// A blake3 sum, cut to 16 bytes.
pub(crate) type Sum = [u8; 16];

/// The sum of a part's bytes.
pub(crate) fn sum(bytes: &[u8]) -> Sum {
    cut(&blake3::hash(bytes))
}

fn cut(hash: &blake3::Hash) -> Sum {
    let mut sum = [0; 16];
    sum.iter_mut().zip(hash.as_bytes()).for_each(|(to, from)| *to = *from);
    sum
}

/// What is said of one part of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) range: Range,
    /// `None` for zeroes.
    pub(crate) sum: Option<Sum>,
}

impl Record {
    fn encode(self) -> [u8; 32] {
        let kind: u64 = if self.sum.is_some() { 1 } else { 2 };
        let mut bytes = [0; 32];
        let length_and_kind = self.range.length().get() | kind << 56;
        let fields = [self.range.start().get().to_le_bytes(), length_and_kind.to_le_bytes()];
        let source = fields.iter().flatten().chain(self.sum.iter().flatten());
        bytes.iter_mut().zip(source).for_each(|(to, from)| *to = *from);
        bytes
    }

    fn decode(bytes: &[u8; 32]) -> Option<Self> {
        let (offset, rest) = bytes.split_first_chunk::<8>()?;
        let (length, rest) = rest.split_first_chunk::<8>()?;
        let (sum, _) = rest.split_first_chunk::<16>()?;
        let length = u64::from_le_bytes(*length);
        let range =
            Range::new(Offset::new(u64::from_le_bytes(*offset)), Length::new(length & ((1 << 56) - 1)))
                .ok()?;
        let cell = |offset: u64| offset / CELL.get();
        match length >> 56 {
            1 if cell(range.start().get()) == cell(range.end().get().checked_sub(1)?) => {
                Some(Self { range, sum: Some(*sum) })
            }
            2 if *sum == [0; 16] => Some(Self { range, sum: None }),
            _ => None,
        }
        .filter(|record| !record.range.is_empty())
    }
}

/// Writes the sums of one disk; records come in order.
#[derive(Debug)]
pub(crate) struct SumsWriter {
    file: BufWriter<File>,
    path: PathBuf,
    hasher: blake3::Hasher,
    length: u64,
}

impl SumsWriter {
    pub(crate) fn create(directory: &Directory, name: &str, size: Length) -> Result<Self> {
        let file = BufWriter::with_capacity(64 << 10, directory.create_file(name).map_err(from_image)?);
        let path = directory.path().join(name);
        let mut writer = Self { file, path, hasher: blake3::Hasher::new(), length: 0 };
        writer.append(MAGIC)?;
        writer.append(&VERSION.to_le_bytes())?;
        writer.append(&[0; 4])?;
        writer.append(&size.get().to_le_bytes())?;
        Ok(writer)
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.hasher.update(bytes);
        self.length += bytes.len() as u64;
        self.file.write_all(bytes).map_err(|source| from_image(image::Error::at("write", &self.path, source)))
    }

    pub(crate) fn push(&mut self, record: Record) -> Result<()> {
        self.append(&record.encode())
    }

    /// Makes the file durable, not its name. Its length, and its sum in hex.
    pub(crate) fn finish(mut self) -> Result<(Length, String)> {
        let cannot = |source| from_image(image::Error::at("make durable", &self.path, source));
        self.file.flush().map_err(cannot)?;
        self.file.get_ref().sync_all().map_err(cannot)?;
        Ok((Length::new(self.length), self.hasher.finalize().to_hex().to_string()))
    }
}

/// Where a page starts on the disk, and what its bytes were when the whole file was checked. What is read again later
/// is checked against this, so that no record is believed that was not covered by the manifest's sum.
#[derive(Debug)]
struct Page {
    first: u64,
    end: u64,
    sum: Sum,
}

/// The sums of one disk, open for reading: pages are read when they are needed, so a disk of any size takes little.
#[derive(Debug)]
pub(crate) struct Sums {
    file: File,
    path: PathBuf,
    length: u64,
    pages: Vec<Page>,
    data: Length,
    last: Mutex<Option<(usize, Arc<Vec<Record>>)>>,
}

impl Sums {
    /// Opens and checks the sums of `disk`, all of them, against the manifest.
    pub(crate) fn open(directory: &Directory, disk: &StoredDisk) -> Result<Self> {
        let path = directory.path().join(&disk.sums);
        let file = directory.open_file(&disk.sums).map_err(stored)?;
        let cannot = |source| stored(image::Error::at("read", &path, source));
        let length = file.metadata().map_err(cannot)?.len();
        let changed = || damaged(format!("{} is not what was written", path.display()));
        if length != disk.sums_length.get() || length < HEADER || !(length - HEADER).is_multiple_of(RECORD) {
            return Err(changed());
        }
        let mut hasher = blake3::Hasher::new();
        let mut header = [0; HEADER_BYTES];
        file.read_exact_at(&mut header, 0).map_err(cannot)?;
        hasher.update(&header);
        let mut sums = Self {
            file,
            path: path.clone(),
            length,
            pages: Vec::new(),
            data: Length::ZERO,
            last: Mutex::default(),
        };
        let (mut at, mut data) = (0, 0u64);
        for index in 0..sums.page_count() {
            let bytes = sums.page_bytes(index)?;
            hasher.update(&bytes);
            let records = decode(&bytes).ok_or_else(changed)?;
            for record in &records {
                if record.range.start().get() < at || record.range.end().get() > disk.size.get() {
                    return Err(changed());
                }
                at = record.range.end().get();
                data += record.sum.map_or(0, |_| record.range.length().get());
            }
            let first = records.first().map_or(at, |record| record.range.start().get());
            sums.pages.push(Page { first, end: at, sum: sum(&bytes) });
        }
        let mut expected = [0; HEADER_BYTES];
        let fields = MAGIC
            .iter()
            .copied()
            .chain(VERSION.to_le_bytes())
            .chain([0; 4])
            .chain(disk.size.get().to_le_bytes());
        expected.iter_mut().zip(fields).for_each(|(to, from)| *to = from);
        if header != expected || hasher.finalize().to_hex().as_str() != disk.sums_blake3 {
            return Err(changed());
        }
        sums.data = Length::new(data);
        Ok(sums)
    }

    /// Bytes that the data records cover.
    pub(crate) fn data(&self) -> Length {
        self.data
    }

    /// How many pages there are.
    pub(crate) fn page_count(&self) -> usize {
        usize::try_from((self.length - HEADER).div_ceil(RECORD * PAGE)).unwrap_or(usize::MAX)
    }

    fn page_bytes(&self, index: usize) -> Result<Vec<u8>> {
        let start = HEADER + index as u64 * PAGE * RECORD;
        let length = (self.length - start).min(PAGE * RECORD);
        let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
        self.file
            .read_exact_at(&mut bytes, start)
            .map_err(|source| stored(image::Error::at("read", &self.path, source)))?;
        Ok(bytes)
    }

    /// The records of one page.
    pub(crate) fn page(&self, index: usize) -> Result<Arc<Vec<Record>>> {
        let last = || self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((held, records)) = last().as_ref()
            && *held == index
        {
            return Ok(Arc::clone(records));
        }
        let bytes = self.page_bytes(index)?;
        let known = self.pages.get(index).is_some_and(|page| page.sum == sum(&bytes));
        let records = if known { decode(&bytes) } else { None };
        let records = Arc::new(
            records.ok_or_else(|| damaged(format!("{} changed while it was open", self.path.display())))?,
        );
        *last() = Some((index, Arc::clone(&records)));
        Ok(records)
    }

    /// The records that touch `range`, in order.
    pub(crate) fn records_in(&self, range: Range) -> Result<Vec<Record>> {
        let mut found = Vec::new();
        let first = self.pages.partition_point(|page| page.end <= range.start().get());
        for (index, page) in self.pages.iter().enumerate().skip(first) {
            if page.first >= range.end().get() {
                break;
            }
            let records = self.page(index)?;
            let from = records.partition_point(|record| record.range.end() <= range.start());
            let touching = records.iter().skip(from).take_while(|record| record.range.start() < range.end());
            found.extend(touching.copied());
        }
        Ok(found)
    }
}

fn decode(bytes: &[u8]) -> Option<Vec<Record>> {
    let (records, rest) = bytes.as_chunks::<32>();
    if rest.is_empty() { records.iter().map(Record::decode).collect() } else { None }
}
