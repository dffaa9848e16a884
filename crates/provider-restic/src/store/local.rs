//! A repository in a directory.

use super::{Folder, Store, is_file_name, not_found};
use crate::error::Fault;
use bytes::{Bytes, BytesMut};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, openat};
use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder, File},
    io::{self, IoSlice, Read as _, Write as _},
    os::{
        fd::AsRawFd as _,
        unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
    sync::Mutex,
};
use stillpoint_buffer as buffer;
use stillpoint_provider::{Error, ErrorKind};

/// Files of a directory. Each file is complete and durable before it gets its name, so a loss of power or a kill
/// leaves no half of one.
pub(super) struct LocalStore {
    path: PathBuf,
    /// Directories with names that may not be durable yet.
    unsynced: Mutex<BTreeSet<PathBuf>>,
}

impl LocalStore {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, unsynced: Mutex::default() }
    }

    fn file(&self, folder: Folder, name: &str) -> PathBuf {
        self.path.join(folder.path(name))
    }

    fn touched(&self, directory: &Path) {
        if let Ok(mut unsynced) = self.unsynced.lock() {
            unsynced.insert(directory.to_owned());
        }
    }

    /// Makes a directory that is not there, and sees that it lasts.
    fn make(&self, directory: &Path) -> io::Result<()> {
        match DirBuilder::new().mode(0o700).create(directory) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            made => {
                if let Some(parent) = directory.parent() {
                    self.touched(parent);
                }
                made
            }
        }
    }

    fn list_directory(directory: &Path, found: &mut Vec<(String, u64)>) -> io::Result<()> {
        let entries = match fs::read_dir(directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(|error| unreadable(directory, error))?,
        };
        for entry in entries {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            if !is_file_name(&name) {
                continue;
            }
            match entry.metadata() {
                Ok(metadata) => found.push((name, metadata.len())),
                // Somebody else removes files, too.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(at(&entry.path(), error)),
            }
        }
        Ok(())
    }
}

fn at(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Memory and file offsets of direct I/O are multiples of this on every common device.
const ALIGNMENT: usize = 4096;
/// Bytes written at once.
const PIECE: usize = 4 << 20;
/// From this size on a file is written past the page cache: copying into it costs as much as compressing, and a
/// hypervisor's memory is its guests'.
const LARGE: usize = 1 << 20;

/// The first `filled` bytes and what makes whole blocks of them. The file is cut to its length afterwards, but this stays on
/// the storage, so it must not be what an earlier use of this memory left there: that may be a disk's plain text.
fn whole_blocks(piece: &mut [u8], filled: usize) -> &[u8] {
    let end = filled.next_multiple_of(ALIGNMENT).min(piece.len());
    piece.get_mut(filled..end).unwrap_or_default().fill(0);
    piece.get(..end).unwrap_or_default()
}

/// Writes `content` past the page cache, and makes it durable.
fn write_direct(file: &File, content: &[Bytes]) -> io::Result<()> {
    let length: usize = content.iter().map(Bytes::len).sum();
    let mut at = 0;
    let mut rest = content.to_vec();
    // What begins on a page goes as it is.
    if let [whole] = rest.as_mut_slice()
        && whole.as_ptr().align_offset(ALIGNMENT) == 0
    {
        let blocks = whole.split_to(whole.len() / ALIGNMENT * ALIGNMENT);
        file.write_all_at(&blocks, 0)?;
        at = blocks.len() as u64;
    }
    let left: usize = rest.iter().map(Bytes::len).sum();
    let mut piece = buffer::initialized(left.next_multiple_of(ALIGNMENT).min(PIECE));
    let mut filled = 0usize;
    for part in &rest {
        let mut part: &[u8] = part;
        while !part.is_empty() {
            let free = piece.get_mut(filled..).unwrap_or_default();
            let (now, later) = part.split_at(part.len().min(free.len()));
            free.get_mut(..now.len()).unwrap_or_default().copy_from_slice(now);
            filled = filled.saturating_add(now.len());
            part = later;
            if filled == piece.len() {
                file.write_all_at(&piece, at)?;
                at = at.saturating_add(filled as u64);
                filled = 0;
            }
        }
    }
    if filled > 0 {
        file.write_all_at(whole_blocks(&mut piece, filled), at)?;
        file.set_len(length as u64)?;
    }
    file.sync_data()
}

fn write_all(file: &mut File, content: &[Bytes]) -> io::Result<()> {
    let mut slices: Vec<_> = content.iter().map(|part| IoSlice::new(part)).collect();
    let mut slices = slices.as_mut_slice();
    while !slices.is_empty() {
        match file.write_vectored(slices) {
            Ok(0) if slices.iter().all(|slice| slice.is_empty()) => break,
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut slices, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    file.sync_data()
}

/// A file without a name, with this in it.
fn unnamed(directory: &Path, content: &[Bytes]) -> io::Result<File> {
    let open = |more| {
        let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC | more;
        openat(CWD, directory, flags, Mode::from_raw_mode(0o600)).map(File::from)
    };
    let length: usize = content.iter().map(Bytes::len).sum();
    if length >= LARGE
        && let Ok(file) = open(OFlags::DIRECT)
    {
        match write_direct(&file, content) {
            // Not on this device, or not with this alignment.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) => {}
            written => return written.map(|()| file),
        }
    }
    let mut file = open(OFlags::empty())?;
    write_all(&mut file, content)?;
    Ok(file)
}

fn has_no_unnamed_files(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let none = [Errno::OPNOTSUPP, Errno::ISDIR, Errno::INVAL];
    none.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// Whether the file at `path` is as long as `content`. Names are made from what is in them, so then it is the same,
/// or damaged in a way that only reading it would show.
fn is_there(path: &Path, content: &[Bytes]) -> bool {
    let length: usize = content.iter().map(Bytes::len).sum();
    fs::metadata(path).is_ok_and(|metadata| metadata.len() == length as u64)
}

/// Opens a file of the repository. Whoever can write there could have put a FIFO in its place, which would hang whoever
/// opens it, or a link to a file that is no business of theirs.
fn open_file(path: &Path) -> io::Result<File> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let flags = i32::try_from(flags.bits()).map_err(io::Error::other)?;
    let file = fs::OpenOptions::new().read(true).custom_flags(flags).open(path);
    let not_a_file = || io::Error::new(io::ErrorKind::InvalidData, "it is no regular file");
    let file = file.map_err(|error| match error.raw_os_error() {
        Some(errno) if errno == rustix::io::Errno::LOOP.raw_os_error() => not_a_file(),
        _ => error,
    })?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(not_a_file()) }
}

/// What stands where a repository should be.
fn absent(path: &Path) -> Error {
    let shown = path.display();
    let error = |kind, what: &str| Error::new(kind, format!("there is no repository at {shown}{what}"));
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            return Error::new(ErrorKind::TargetForeign, format!("{shown} is a file, and no repository"))
                .next("name the repository's directory in `repository`; the file was not changed");
        }
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
            return error(ErrorKind::TargetMissing, ": there is no such directory");
        }
        Err(cause) => {
            return crate::error::stored(format!("cannot open repository {shown}"), unreadable(path, cause));
        }
    };
    let names: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.file_name())).collect();
    if names.is_empty() {
        return error(ErrorKind::TargetMissing, ": the directory is empty");
    }
    if ["keys", "data"].iter().all(|name| names.iter().any(|found| found == name)) {
        return error(ErrorKind::Damaged, ", only parts of one: its file `config` is missing")
            .next("put `config` back from a copy of the repository; without it nothing there can be read");
    }
    error(ErrorKind::TargetForeign, ": the directory holds something else")
        .next("name the repository's directory in `repository`; nothing there was changed")
}

/// An error of reading: other than for writing, no right means that this user is not the one.
fn unreadable(path: &Path, error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::PermissionDenied {
        let fault = Fault::new(ErrorKind::Unauthorized, format!("{}: {error}", path.display()));
        return fault.next("run as the user that owns the repository, or as root").into();
    }
    at(path, error)
}

impl Store for LocalStore {
    fn location(&self) -> String {
        self.path.display().to_string()
    }

    fn absent(&self) -> Error {
        absent(&self.path)
    }

    fn create(&self) -> io::Result<()> {
        self.make(&self.path).map_err(|error| at(&self.path, error))?;
        for folder in Folder::ALL {
            self.make(&self.path.join(folder.name()))?;
        }
        for first in 0..=u8::MAX {
            self.make(&self.path.join("data").join(format!("{first:02x}")))?;
        }
        self.sync()
    }

    fn list(&self, folder: Folder) -> io::Result<Vec<(String, u64)>> {
        let mut found = Vec::new();
        let path = self.path.join(folder.name());
        match folder {
            Folder::Config => match fs::metadata(&path) {
                Ok(metadata) if metadata.is_file() => found.push(("config".to_owned(), metadata.len())),
                Ok(_) => {}
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
                Err(error) => return Err(unreadable(&path, error)),
            },
            Folder::Data => {
                for first in 0..=u8::MAX {
                    Self::list_directory(&path.join(format!("{first:02x}")), &mut found)?;
                }
            }
            _ => Self::list_directory(&path, &mut found)?,
        }
        Ok(found)
    }

    fn read_into(&self, folder: Folder, name: &str, content: &mut Vec<u8>) -> io::Result<()> {
        let path = self.file(folder, name);
        content.clear();
        let most = folder.most();
        let read = open_file(&path).and_then(|file| {
            let read = file.take(most.saturating_add(1)).read_to_end(content)?;
            if read as u64 <= most {
                return Ok(());
            }
            *content = Vec::new();
            Err(io::Error::new(io::ErrorKind::InvalidData, format!("it is larger than {most} bytes")))
        });
        read.map_err(|error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => not_found(&path.display().to_string()),
            _ => unreadable(&path, error),
        })
    }

    fn read_part(&self, folder: Folder, name: &str, offset: u64, length: u64) -> io::Result<BytesMut> {
        let path = self.file(folder, name);
        let read = || {
            let file = open_file(&path)?;
            let length = usize::try_from(length).map_err(|_| io::ErrorKind::InvalidInput)?;
            let mut content = buffer::initialized(length);
            file.read_exact_at(&mut content, offset)?;
            Ok(content)
        };
        read().map_err(|error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => not_found(&path.display().to_string()),
            _ => unreadable(&path, error),
        })
    }

    fn write(&self, folder: Folder, name: &str, content: &[Bytes]) -> io::Result<()> {
        let path = self.file(folder, name);
        let directory = path.parent().unwrap_or(&self.path);
        let write = || -> io::Result<()> {
            if is_there(&path, content) {
                return Ok(());
            }
            // A repository that was copied without its empty folders, or made by an older restic.
            if !directory.is_dir() {
                self.make(directory)?;
            }
            match unnamed(directory, content) {
                Ok(file) => {
                    let descriptor = format!("/proc/self/fd/{}", file.as_raw_fd());
                    match linkat(CWD, &*descriptor, CWD, &path, AtFlags::SYMLINK_FOLLOW) {
                        // Of another length, so damaged: it makes room.
                        Err(rustix::io::Errno::EXIST) if !is_there(&path, content) => {
                            fs::remove_file(&path)?;
                            linkat(CWD, &*descriptor, CWD, &path, AtFlags::SYMLINK_FOLLOW)?;
                        }
                        Err(rustix::io::Errno::EXIST) => {}
                        linked => linked?,
                    }
                }
                // Network file systems have none. The name is none that restic would take for a file of its own.
                Err(error) if has_no_unnamed_files(&error) => {
                    let partial = directory.join(format!("{name}-tmp-{}", std::process::id()));
                    let written = fs::OpenOptions::new()
                        .write(true)
                        .create(true)
                        .truncate(true)
                        .mode(0o600)
                        .open(&partial)
                        .and_then(|mut file| write_all(&mut file, content))
                        .and_then(|()| fs::rename(&partial, &path));
                    if let Err(error) = written {
                        let _ = fs::remove_file(&partial);
                        return Err(error);
                    }
                }
                Err(error) => return Err(error),
            }
            self.touched(directory);
            Ok(())
        };
        write().map_err(|error| at(&path, error))
    }

    fn remove(&self, folder: Folder, name: &str) -> io::Result<()> {
        let path = self.file(folder, name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(&path, error)),
            _ => {
                if let Some(directory) = path.parent() {
                    self.touched(directory);
                }
                Ok(())
            }
        }
    }

    fn sync(&self) -> io::Result<()> {
        let directories = self.unsynced.lock().map(|mut set| std::mem::take(&mut *set)).unwrap_or_default();
        for directory in directories {
            let synced = File::open(&directory).and_then(|directory| directory.sync_all());
            if let Err(error) = synced {
                self.touched(&directory);
                return Err(at(&directory, error));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_large_file_is_written_past_the_cache_byte_by_byte() {
        let directory = tempfile::tempdir().unwrap();
        let store = LocalStore::new(directory.path().join("repository"));
        store.create().unwrap();
        for length in [LARGE, LARGE + 1, PIECE - 1, PIECE, PIECE + 4097, 2 * PIECE + 12345] {
            let content: Vec<u8> = (0..length).map(|at| u8::try_from(at % 251).unwrap()).collect();
            let name = crate::blob::Id::of(&content).to_string();
            let parts: Vec<_> = content.chunks(99_991).map(Bytes::copy_from_slice).collect();
            store.write(Folder::Data, &name, &parts).unwrap();
            assert_eq!(store.read(Folder::Data, &name).unwrap(), content, "{length}");
        }
    }

    #[test]
    fn what_memory_held_before_is_not_written() {
        let mut piece = vec![b'x'; 3 * ALIGNMENT];
        let whole = whole_blocks(&mut piece, ALIGNMENT + 1);
        assert_eq!(whole.len(), 2 * ALIGNMENT);
        assert!(whole[ALIGNMENT] == b'x' && whole[ALIGNMENT + 1..].iter().all(|byte| *byte == 0));
        assert_eq!(whole_blocks(&mut piece, ALIGNMENT).len(), ALIGNMENT);
    }

    #[test]
    fn what_is_no_file_or_too_large_is_an_error_and_neither_hangs_nor_fills_the_memory() {
        let directory = tempfile::tempdir().unwrap();
        let store = LocalStore::new(directory.path().join("repository"));
        store.create().unwrap();
        let name = crate::blob::Id::of(b"x").to_string();
        for folder in [Folder::Keys, Folder::Locks, Folder::Snapshots, Folder::Index] {
            let path = store.file(folder, &name);
            let fails = || {
                let (whole, part) = (store.read(folder, &name), store.read_part(folder, &name, 0, 1));
                for error in [whole.err(), part.err()].into_iter().flatten() {
                    assert_eq!(crate::error::stored("read", error).kind(), ErrorKind::Damaged);
                }
            };
            let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
            assert!(made.success());
            fails();
            fs::remove_file(&path).unwrap();
            std::os::unix::fs::symlink("/etc/hostname", &path).unwrap();
            fails();
            fs::remove_file(&path).unwrap();
            let file = File::create(&path).unwrap();
            file.set_len(64 << 30).unwrap();
            assert_eq!(store.read(folder, &name).unwrap_err().kind(), io::ErrorKind::InvalidData);
            file.set_len(3).unwrap();
            assert_eq!(store.read(folder, &name).unwrap().len(), 3);
            fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn a_file_is_written_whole_listed_read_and_removed() {
        let directory = tempfile::tempdir().unwrap();
        let store = LocalStore::new(directory.path().join("repository"));
        store.create().unwrap();
        let name = crate::blob::Id::of(b"x").to_string();
        for folder in Folder::ALL {
            store
                .write(folder, &name, &[Bytes::from_static(b"ab"), Bytes::new(), Bytes::from_static(b"c")])
                .unwrap();
            assert_eq!(store.list(folder).unwrap(), [(name.clone(), 3)]);
            assert_eq!(&store.read(folder, &name).unwrap()[..], b"abc");
            assert_eq!(&store.read_part(folder, &name, 1, 2).unwrap()[..], b"bc");
            assert!(store.read_part(folder, &name, 2, 2).is_err());
            // The same again is fine, and one that was cut short is replaced.
            fs::write(store.file(folder, &name), b"a").unwrap();
            store.write(folder, &name, &[Bytes::from_static(b"abc")]).unwrap();
            assert_eq!(&store.read(folder, &name).unwrap()[..], b"abc");
            store.sync().unwrap();
            store.remove(folder, &name).unwrap();
            store.remove(folder, &name).unwrap();
            assert_eq!(store.list(folder).unwrap(), []);
        }
        assert_eq!(store.list(Folder::Config).unwrap(), []);
    }
}
