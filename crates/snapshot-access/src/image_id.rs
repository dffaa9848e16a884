//! Which image a bitmap was made on (ADR 0019).

use std::{
    fmt, fs, io,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::{Path, PathBuf},
    time::{Duration, UNIX_EPOCH},
};

/// Storage that does not answer for so long is not asked which file it has.
const DEADLINE: Duration = Duration::from_secs(5);

/// Tells one image from every other, also from a copy of it: 16 hex digits.
///
/// A file is known by its inode number and the time of its birth, which it keeps wherever it is moved in its file system and
/// whatever the host calls the device; a copy has others. Where a file system does not keep that time (NFS), the path takes its
/// place. What is no file here (a block device, an image on another host) is known by what QEMU calls it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ImageId(String);

impl ImageId {
    /// In the name of a bitmap whose image cannot be told: no image has it.
    pub(crate) const UNKNOWN: &str = "0000000000000000";

    /// The id in a bitmap's name, if it is one.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let digits = text.len() == 16 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        digits.then(|| Self(text.to_owned()))
    }

    /// The image that the protocol node of this driver reads and writes; `file` is what QEMU calls it. `None` if that tells
    /// nothing, as a descriptor's number.
    pub(crate) async fn of(qemu: Option<u32>, driver: &str, file: &str) -> Option<Self> {
        if file.is_empty() || file.starts_with("/dev/fdset/") {
            return None;
        }
        if driver == "file"
            && let Some(qemu) = qemu
            && let Some(found) = on_host(qemu, Path::new(file)).await
        {
            return Some(found);
        }
        Some(Self::hash(&[b"named", driver.as_bytes(), file.as_bytes()]))
    }

    /// What only lives in QEMU's graph, such as a filter: with the bitmaps on it, it ends with its QEMU.
    pub(crate) fn of_node(node: &str) -> Self {
        Self::hash(&[b"node", node.as_bytes()])
    }

    fn hash(parts: &[&[u8]]) -> Self {
        let mut hasher = blake3::Hasher::new();
        for part in parts {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        let hex = hasher.finalize().to_hex();
        Self(hex.as_str().chars().take(16).collect())
    }
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// What `path` is to the process `qemu`, in a thread that may be given up: the storage may hang.
async fn on_host(qemu: u32, path: &Path) -> Option<ImageId> {
    let (name, path) =
        (path.to_owned(), PathBuf::from(format!("/proc/{qemu}/root")).join(path.strip_prefix("/").ok()?));
    let look = tokio::task::spawn_blocking(move || of_file(&path, &name));
    tokio::time::timeout(DEADLINE, look).await.ok()?.ok()?.ok()?
}

fn of_file(path: &Path, name: &Path) -> io::Result<Option<ImageId>> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() {
        return Ok(None);
    }
    let inode = metadata.ino().to_le_bytes();
    // An inode number alone may be used again, by another file.
    let birth = metadata.created().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    Ok(Some(match birth {
        Some(birth) => ImageId::hash(&[b"file", &inode, &birth.as_nanos().to_le_bytes()]),
        None => ImageId::hash(&[b"path", &inode, name.as_os_str().as_bytes()]),
    }))
}

#[cfg(test)]
mod test {
    use super::*;

    #[tokio::test]
    async fn a_file_keeps_its_id_when_it_is_moved_and_a_copy_has_another() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let id = async |name: &str| {
            let file = path(name);
            ImageId::of(Some(std::process::id()), "file", file.to_str().unwrap()).await.unwrap()
        };
        fs::write(path("a"), "x").unwrap();
        let first = id("a").await;
        assert_eq!(id("a").await, first);
        fs::copy(path("a"), path("b")).unwrap();
        assert_ne!(id("b").await, first);
        fs::rename(path("a"), path("c")).unwrap();
        assert_eq!(id("c").await, first);
        // The name alone proves nothing.
        fs::rename(path("b"), path("a")).unwrap();
        assert_ne!(id("a").await, first);
        assert_eq!(ImageId::parse(&first.to_string()), Some(first));
    }

    #[tokio::test]
    async fn what_is_no_file_here_is_known_by_its_name_and_a_descriptor_by_nothing() {
        let of = async |driver: &str, file: &str| ImageId::of(None, driver, file).await;
        assert_eq!(of("host_device", "/dev/vg/a").await, of("host_device", "/dev/vg/a").await);
        assert_ne!(of("host_device", "/dev/vg/a").await, of("host_device", "/dev/vg/b").await);
        assert_ne!(of("rbd", "a").await, of("nbd", "a").await);
        assert_eq!(of("file", "/dev/fdset/3").await, None);
        assert_eq!(of("file", "").await, None);
        assert!(ImageId::parse("0123456789ABCDEF").is_none() && ImageId::parse("12").is_none());
    }
}
