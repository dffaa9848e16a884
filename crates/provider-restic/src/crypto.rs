//! Encryption and compression as restic's design document has them: AES-256-CTR with Poly1305-AES, and zstd.

use crate::error::damaged;
use aes256ctr_poly1305aes::{
    Aes256CtrPoly1305Aes, Key as RawKey, Nonce, Tag,
    aead::{AeadInPlace as _, generic_array::GenericArray},
};
use bytes::{Bytes, BytesMut};
use std::cell::RefCell;
use stillpoint_buffer as buffer;
use stillpoint_provider::{Error, ErrorKind, Result};

/// Bytes that encryption adds: a nonce in front and an authentication code behind.
pub(crate) const OVERHEAD: usize = 32;
const HALF: usize = 16;
/// Memory for a blob of the disks that are so large that their chunks are of more than a MiB.
const LARGE: usize = 2 << 20;
/// What a file may say of its own length and be believed, before it was read.
const TRUSTED: u64 = 64 << 20;
/// First byte of a compressed file (repository format 2).
const COMPRESSED: u8 = 2;
/// zstd's fastest ordinary level. See ADR 0016.
pub(crate) const LEVEL: i32 = 1;

/// The repository's key.
#[derive(Clone)]
pub(crate) struct Key(RawKey);

impl Key {
    /// The key from its parts: AES-256, and Poly1305's `k` and `r`.
    pub(crate) fn new(encrypt: &[u8], k: &[u8], r: &[u8]) -> Result<Self> {
        let whole = [encrypt, k, r].concat();
        let whole: [u8; 64] =
            whole.try_into().map_err(|_| damaged("the repository's key is not of the right length"))?;
        Ok(Self(GenericArray::from(whole)))
    }

    /// Encrypts what stands between the first 16 bytes of `sealed`, which become the nonce, and the last 16, which become
    /// the authentication code.
    fn seal(&self, sealed: &mut [u8]) -> Result<()> {
        let failed = || Error::new(ErrorKind::Io, "encrypting failed");
        let (nonce, text, tag) = parts(sealed).ok_or_else(failed)?;
        random(nonce)?;
        let cipher = Aes256CtrPoly1305Aes::new(&self.0);
        let made =
            cipher.encrypt_in_place_detached(Nonce::from_slice(nonce), &[], text).map_err(|_| failed())?;
        tag.copy_from_slice(&made);
        Ok(())
    }

    /// Encrypts `text`.
    pub(crate) fn encrypt(&self, text: &[u8]) -> Result<Vec<u8>> {
        let mut sealed = Vec::with_capacity(text.len().saturating_add(OVERHEAD));
        sealed.resize(HALF, 0);
        sealed.extend_from_slice(text);
        sealed.extend_from_slice(&[0; HALF]);
        self.seal(&mut sealed)?;
        Ok(sealed)
    }

    /// Decrypts and authenticates where it stands; what comes out is a part of `sealed`.
    fn open<'a>(&self, sealed: &'a mut [u8]) -> Result<&'a [u8]> {
        let wrong = || damaged("does not authenticate");
        let (nonce, text, tag) = parts(sealed).ok_or_else(wrong)?;
        let cipher = Aes256CtrPoly1305Aes::new(&self.0);
        cipher
            .decrypt_in_place_detached(Nonce::from_slice(nonce), &[], text, Tag::from_slice(tag))
            .map_err(|_| wrong())?;
        Ok(text)
    }

    /// Decrypts and authenticates.
    pub(crate) fn decrypt(&self, sealed: &[u8]) -> Result<Vec<u8>> {
        let mut sealed = sealed.to_vec();
        let length = self.open(&mut sealed)?.len();
        sealed.truncate(HALF.saturating_add(length));
        sealed.drain(..HALF);
        Ok(sealed)
    }
}

/// Nonce, text and authentication code.
fn parts(sealed: &mut [u8]) -> Option<(&mut [u8], &mut [u8], &mut [u8])> {
    let (nonce, rest) = sealed.split_at_mut_checked(HALF)?;
    let (text, tag) = rest.split_at_mut_checked(rest.len().checked_sub(HALF)?)?;
    Some((nonce, text, tag))
}

/// Fills `bytes` from the kernel.
pub(crate) fn random(bytes: &mut [u8]) -> Result<()> {
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        let got = rustix::rand::getrandom(rest, rustix::rand::GetRandomFlags::empty()).map_err(|error| {
            Error::new(ErrorKind::Io, "the kernel gives no random bytes").because(std::io::Error::from(error))
        })?;
        filled = filled.saturating_add(got);
    }
    Ok(())
}

/// A blob as it goes into a pack: encrypted, and compressed where that makes it smaller.
pub(crate) struct SealedBlob {
    /// Nonce, text, authentication code.
    pub bytes: Bytes,
    /// Length before compression; `None` if it is not compressed.
    pub uncompressed: Option<u32>,
}

thread_local! {
    /// Each has some hundred kilobytes that are better made once.
    static COMPRESSOR: RefCell<Option<zstd::bulk::Compressor<'static>>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Runs `work` with this thread's `place`, which is made if it is not there.
fn with<T, R>(
    place: &'static std::thread::LocalKey<RefCell<Option<T>>>,
    make: impl FnOnce() -> std::io::Result<T>,
    work: impl FnOnce(&mut T) -> std::io::Result<R>,
) -> std::io::Result<R> {
    place.with_borrow_mut(|place| match place {
        Some(there) => work(there),
        None => work(place.insert(make()?)),
    })
}

/// Seals a blob. It is not compressed in a repository whose format has no compression, and where that would not make it
/// smaller.
pub(crate) fn seal_blob(key: &Key, compress: bool, content: &[u8]) -> Result<SealedBlob> {
    let bound = zstd::zstd_safe::compress_bound(content.len()).max(content.len());
    let mut room = buffer::initialized(bound.saturating_add(OVERHEAD));
    let text = room.get_mut(HALF..).unwrap_or_default();
    let packed = if compress {
        let packed = with(
            &COMPRESSOR,
            || zstd::bulk::Compressor::new(LEVEL),
            |zstd| zstd.compress_to_buffer(content, text),
        );
        let packed =
            packed.map_err(|error| Error::new(ErrorKind::Io, "compressing failed").because(error))?;
        Some(packed).filter(|packed| *packed < content.len())
    } else {
        None
    };
    if packed.is_none() {
        text.get_mut(..content.len()).unwrap_or_default().copy_from_slice(content);
    }
    let length = packed.unwrap_or(content.len()).saturating_add(OVERHEAD);
    key.seal(room.get_mut(..length).unwrap_or_default())?;
    let whole = buffer::freeze(room);
    // A large room that is mostly empty is for the next blob, rather than to wait with this one for its turn.
    let bytes = if whole.len() > LARGE && length < whole.len() / 2 {
        Bytes::copy_from_slice(whole.get(..length).unwrap_or_default())
    } else {
        whole.slice(..length)
    };
    Ok(SealedBlob { bytes, uncompressed: packed.and_then(|_| u32::try_from(content.len()).ok()) })
}

/// Undoes [`seal_blob`]; never more than `uncompressed` bytes come out. They begin on a page if they are many.
pub(crate) fn open_blob(key: &Key, mut sealed: BytesMut, uncompressed: Option<u32>) -> Result<Bytes> {
    let text = key.open(&mut sealed)?;
    let content = match uncompressed {
        None => {
            let mut content = buffer::initialized(text.len());
            content.copy_from_slice(text);
            content
        }
        Some(length) => {
            let length = usize::try_from(length).map_err(|_| damaged("is too large"))?;
            let mut content = buffer::initialized(length);
            let unpacked = with(&DECOMPRESSOR, zstd::bulk::Decompressor::new, |zstd| {
                zstd.decompress_to_buffer(text, &mut *content)
            });
            let unpacked = unpacked.map_err(|error| damaged("cannot be decompressed").because(error))?;
            if unpacked != length {
                return Err(damaged("has not the length that the index tells"));
            }
            content
        }
    };
    // Its memory is used again.
    drop(buffer::freeze(sealed));
    Ok(buffer::freeze(content))
}

/// A file other than a pack (index, snapshot, lock), ready to be written.
pub(crate) fn seal_file(key: &Key, compress: bool, json: &[u8]) -> Result<Vec<u8>> {
    if !compress {
        return key.encrypt(json);
    }
    let packed = zstd::bulk::compress(json, LEVEL)
        .map_err(|error| Error::new(ErrorKind::Io, "compressing failed").because(error))?;
    let mut text = Vec::with_capacity(packed.len().saturating_add(1));
    text.push(COMPRESSED);
    text.extend_from_slice(&packed);
    key.encrypt(&text)
}

/// Undoes [`seal_file`] for files of either kind, up to `most` bytes.
pub(crate) fn open_file(key: &Key, sealed: &[u8], most: u64) -> Result<Vec<u8>> {
    use std::io::Read as _;
    let text = key.decrypt(sealed)?;
    match text.split_first() {
        Some((&COMPRESSED, packed)) => {
            // Most frames tell: an index has some megabytes, and the growth of a vector would want twice as many.
            let told = zstd::zstd_safe::get_frame_content_size(packed).ok().flatten().unwrap_or(0);
            let mut json = Vec::with_capacity(usize::try_from(told.min(most).min(TRUSTED)).unwrap_or(0));
            let unpacked = zstd::stream::read::Decoder::new(packed)
                .and_then(|decoder| decoder.take(most).read_to_end(&mut json));
            unpacked.map_err(|error| damaged("cannot be decompressed").because(error))?;
            Ok(json)
        }
        Some((b'{' | b'[', _)) => Ok(text),
        _ => Err(damaged("is of an unknown format")),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn key() -> Key {
        Key::new(&[1; 32], &[2; 16], &[3; 16]).unwrap()
    }

    #[test]
    fn what_is_sealed_opens_again_and_a_flipped_bit_does_not() {
        let content: Vec<u8> = (0..100_000u32).flat_map(|i| (i / 7).to_le_bytes()).collect();
        for compress in [false, true] {
            let sealed = seal_blob(&key(), compress, &content).unwrap();
            assert_eq!(sealed.uncompressed.is_some(), compress);
            let bytes = BytesMut::from(&sealed.bytes[..]);
            assert_eq!(open_blob(&key(), bytes.clone(), sealed.uncompressed).unwrap(), content);
            let mut flipped = bytes.clone();
            flipped[20] ^= 1;
            assert!(open_blob(&key(), flipped, sealed.uncompressed).is_err());
            assert!(open_blob(&key(), BytesMut::from(&bytes[..31]), sealed.uncompressed).is_err());
            for told in [1, 99_999, 400_001] {
                let wrong = open_blob(&key(), bytes.clone(), Some(told));
                assert!(wrong.is_err(), "{told}");
            }
        }
        for compress in [false, true] {
            let sealed = seal_file(&key(), compress, b"{\"a\":1}").unwrap();
            assert_eq!(open_file(&key(), &sealed, 100).unwrap(), b"{\"a\":1}");
        }
    }

    #[test]
    fn noise_is_not_made_larger_by_compression() {
        let mut noise = vec![0; 1 << 16];
        random(&mut noise).unwrap();
        let sealed = seal_blob(&key(), true, &noise).unwrap();
        assert_eq!((sealed.uncompressed, sealed.bytes.len()), (None, noise.len() + OVERHEAD));
    }
}
