//! How fast this machine's cores can hash, compress and encrypt an image's data, with nothing else to do: the limit
//! that a full backup into a repository is held against.
//!
//! It prints a name and a number a line: bytes of data, bytes packed, seconds, and bytes a second of each kind of work.
//!
//! `cargo run --release -p stillpoint-provider-restic --example limit IMAGE`

use aes256ctr_poly1305aes::{
    Aes256CtrPoly1305Aes, Key, Nonce,
    aead::{AeadInPlace as _, generic_array::GenericArray},
};
use sha2::{Digest as _, Sha256};
use std::{
    collections::HashSet,
    fs::File,
    os::unix::fs::FileExt as _,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Instant,
};

const CHUNK: u64 = 1 << 20;

fn main() -> std::io::Result<()> {
    let Some(path) = std::env::args_os().nth(1) else {
        return Err(std::io::Error::other("which image?"));
    };
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    let mut chunks = Vec::new();
    for at in (0..size).step_by(1 << 20) {
        let mut chunk = vec![0; usize::try_from(CHUNK.min(size - at)).unwrap_or(0)];
        file.read_exact_at(&mut chunk, at)?;
        if chunk.iter().any(|&byte| byte != 0) {
            chunks.push(chunk);
        }
    }
    let threads = thread::available_parallelism()?.get();
    let bytes: usize = chunks.iter().map(Vec::len).sum();
    let (next, packed) = (AtomicU64::new(0), AtomicU64::new(0));
    let seen = Mutex::new(HashSet::new());
    let key: Key = GenericArray::from([7; 64]);
    let work = || {
        let mut compressor = zstd::bulk::Compressor::new(1).ok();
        let mut room = vec![0; zstd::zstd_safe::compress_bound(1 << 20)];
        let cipher = Aes256CtrPoly1305Aes::new(&key);
        loop {
            let index = usize::try_from(next.fetch_add(1, Ordering::Relaxed)).unwrap_or(usize::MAX);
            let Some(chunk) = chunks.get(index) else { return };
            let id = Sha256::digest(chunk);
            if !seen.lock().is_ok_and(|mut seen| seen.insert(id)) {
                continue;
            }
            let length = compressor
                .as_mut()
                .and_then(|compressor| compressor.compress_to_buffer(chunk, room.as_mut_slice()).ok())
                .unwrap_or(0);
            let sealed = room.get_mut(..length).unwrap_or_default();
            let _ = cipher.encrypt_in_place_detached(Nonce::from_slice(&[1; 16]), &[], sealed);
            // A pack is hashed, too.
            std::hint::black_box(Sha256::digest(sealed));
            packed.fetch_add(length as u64, Ordering::Relaxed);
        }
    };
    let started = Instant::now();
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(work);
        }
    });
    let seconds = started.elapsed().as_secs_f64();
    println!(
        "threads {threads}\nbytes {bytes}\npacked {}\nseconds {seconds}",
        packed.load(Ordering::Relaxed)
    );
    alone(&chunks, &key);
    Ok(())
}

/// Each kind of work by itself, on one core: bytes a second.
fn alone(chunks: &[Vec<u8>], key: &Key) {
    rate("hash", chunks, |chunk| {
        let _ = std::hint::black_box(Sha256::digest(chunk));
    });
    let mut compressor = zstd::bulk::Compressor::new(1).ok();
    let mut room = vec![0; zstd::zstd_safe::compress_bound(1 << 20)];
    rate("compress", chunks, |chunk| {
        if let Some(compressor) = compressor.as_mut() {
            let _ = std::hint::black_box(compressor.compress_to_buffer(chunk, room.as_mut_slice()));
        }
    });
    let cipher = Aes256CtrPoly1305Aes::new(key);
    let mut sealed = vec![0; 1 << 20];
    rate("encrypt", chunks, |chunk| {
        let sealed = sealed.get_mut(..chunk.len()).unwrap_or_default();
        let nonce = Nonce::from_slice(&[1; 16]);
        let _ = std::hint::black_box(cipher.encrypt_in_place_detached(nonce, &[], sealed));
    });
}

fn rate(name: &str, chunks: &[Vec<u8>], mut work: impl FnMut(&[u8])) {
    let bytes: usize = chunks.iter().map(Vec::len).sum();
    let started = Instant::now();
    chunks.iter().for_each(|chunk| work(chunk));
    println!("{name} {}", bytes as f64 / started.elapsed().as_secs_f64());
}
