//! Encryption and compression as restic's design document has them: AES-256-CTR with Poly1305-AES, and zstd.

use crate::error::damaged;
use aes256ctr_poly1305aes::{
    Aes256CtrPoly1305Aes, Key as RawKey, Nonce, Tag,
    aead::{AeadInPlace as _, generic_array::GenericArray},
};
use stillpoint_provider::{Error, ErrorKind, Result};

/// Bytes that encryption adds: a nonce in front and an authentication code behind.
pub(crate) const OVERHEAD: usize = 32;
const HALF: usize = 16;
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

    /// Encrypts what stands in `buffer` after its first 16 bytes, which become the nonce.
    fn seal(&self, buffer: &mut Vec<u8>) -> Result<()> {
        let failed = || Error::new(ErrorKind::Io, "encrypting failed");
        let (nonce, text) = buffer.split_at_mut_checked(HALF).ok_or_else(failed)?;
        random(nonce)?;
        let nonce = *Nonce::from_slice(nonce);
        let cipher = Aes256CtrPoly1305Aes::new(&self.0);
        let tag = cipher.encrypt_in_place_detached(&nonce, &[], text).map_err(|_| failed())?;
        buffer.extend_from_slice(&tag);
        Ok(())
    }

    /// Encrypts `text`.
    pub(crate) fn encrypt(&self, text: &[u8]) -> Result<Vec<u8>> {
        let mut buffer = Vec::with_capacity(text.len().saturating_add(OVERHEAD));
        buffer.resize(HALF, 0);
        buffer.extend_from_slice(text);
        self.seal(&mut buffer)?;
        Ok(buffer)
    }

    /// Decrypts and authenticates.
    pub(crate) fn decrypt(&self, sealed: &[u8]) -> Result<Vec<u8>> {
        let wrong = || damaged("does not authenticate");
        let (nonce, rest) = sealed.split_at_checked(HALF).ok_or_else(wrong)?;
        let split = rest.len().checked_sub(HALF).ok_or_else(wrong)?;
        let (text, tag) = rest.split_at_checked(split).ok_or_else(wrong)?;
        let mut text = text.to_vec();
        let cipher = Aes256CtrPoly1305Aes::new(&self.0);
        cipher
            .decrypt_in_place_detached(Nonce::from_slice(nonce), &[], &mut text, Tag::from_slice(tag))
            .map_err(|_| wrong())?;
        Ok(text)
    }
}

fn random(bytes: &mut [u8]) -> Result<()> {
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
    pub bytes: Vec<u8>,
    /// Length before compression; `None` if it is not compressed.
    pub uncompressed: Option<u32>,
}

/// What a thread needs to compress one blob after the other.
pub(crate) struct Compressor {
    zstd: zstd::bulk::Compressor<'static>,
    /// Room for what comes out, which is used again: fresh memory costs more than compressing fast.
    room: Vec<u8>,
}

impl Compressor {
    /// A compressor of our level.
    pub(crate) fn new() -> Result<Self> {
        let zstd = zstd::bulk::Compressor::new(LEVEL)
            .map_err(|error| Error::new(ErrorKind::Io, "zstd cannot be used").because(error))?;
        Ok(Self { zstd, room: Vec::new() })
    }

    /// `content` compressed, if that makes it smaller.
    fn compress(&mut self, content: &[u8]) -> Result<Option<&[u8]>> {
        let bound = zstd::zstd_safe::compress_bound(content.len());
        if self.room.len() < bound {
            self.room.resize(bound, 0);
        }
        let failed = |error| Error::new(ErrorKind::Io, "compressing failed").because(error);
        let length = self.zstd.compress_to_buffer(content, self.room.as_mut_slice()).map_err(failed)?;
        Ok(self.room.get(..length).filter(|packed| packed.len() < content.len()))
    }
}

/// Seals a blob. `compressor` is `None` for a repository whose format has no compression.
pub(crate) fn seal_blob(
    key: &Key,
    compressor: Option<&mut Compressor>,
    content: &[u8],
) -> Result<SealedBlob> {
    let packed = match compressor {
        Some(compressor) => compressor.compress(content)?,
        None => None,
    };
    let uncompressed = packed.and_then(|_| u32::try_from(content.len()).ok());
    Ok(SealedBlob { bytes: key.encrypt(packed.unwrap_or(content))?, uncompressed })
}

/// Undoes [`seal_blob`]; never more than `uncompressed` bytes come out.
pub(crate) fn open_blob(key: &Key, sealed: &[u8], uncompressed: Option<u32>) -> Result<Vec<u8>> {
    let text = key.decrypt(sealed)?;
    let Some(length) = uncompressed else { return Ok(text) };
    let length = usize::try_from(length).map_err(|_| damaged("is too large"))?;
    let content = zstd::bulk::decompress(&text, length)
        .map_err(|error| damaged("cannot be decompressed").because(error))?;
    if content.len() == length {
        Ok(content)
    } else {
        Err(damaged("has not the length that the index tells"))
    }
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
            let mut json = Vec::new();
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
        let mut compressor = Compressor::new().unwrap();
        for compressor in [None, Some(&mut compressor)] {
            let sealed = seal_blob(&key(), compressor, &content).unwrap();
            assert_eq!(open_blob(&key(), &sealed.bytes, sealed.uncompressed).unwrap(), content);
            let mut flipped = sealed.bytes.clone();
            flipped[20] ^= 1;
            assert!(open_blob(&key(), &flipped, sealed.uncompressed).is_err());
            assert!(open_blob(&key(), &sealed.bytes[..31], sealed.uncompressed).is_err());
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
        let sealed = seal_blob(&key(), Some(&mut Compressor::new().unwrap()), &noise).unwrap();
        assert_eq!((sealed.uncompressed, sealed.bytes.len()), (None, noise.len() + OVERHEAD));
    }
}
