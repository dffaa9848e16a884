//! Files and directories that survive a power cut, and that nobody can redirect.
//!
//! # Consistency
//! A file's bytes are durable after its own fsync, its name after an fsync of the directory that holds it. Neither
//! implies the other. So: write the file, sync it, sync its directory; and to publish a directory, sync everything in
//! it, then rename it, then sync its parent.
//!
//! # Links
//! Everything happens relative to an open [`Directory`], one component at a time, and no link is followed below the
//! directory that was opened by path. Whoever may write in a target can thus break it, but not make us write or read
//! elsewhere.
//!
//! # Crash
//! Each function says what is there after a crash in it. None of them leaves a half-made thing under its final name.

use crate::{Error, ErrorKind, Result};
use rustix::{
    fd::OwnedFd,
    fs::{AtFlags, CWD, Dir, FileType, FlockOperation, Mode, OFlags, RenameFlags, Stat},
    io::Errno,
};
use std::{
    fs::File,
    io::{Read, Write},
    path::{Path, PathBuf},
};
use stillpoint_model::Length;

const FILE_MODE: Mode = Mode::RUSR.union(Mode::WUSR);
const DIRECTORY_MODE: Mode = Mode::RWXU;
const DIRECTORY_FLAGS: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// How deep a tree may be that is removed; ours are two deep.
const MAX_DEPTH: u32 = 16;

/// An open directory. Its path is only for messages; the descriptor is what counts.
#[derive(Debug)]
pub struct Directory {
    fd: OwnedFd,
    path: PathBuf,
}

/// What a file system has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Bytes.
    pub free: Length,
    /// Files.
    pub files: Option<u64>,
}

impl Directory {
    /// Opens the directory at `path`. This path is the caller's: links in it are followed.
    ///
    /// # Errors
    /// If it is not there, not a directory, or not accessible.
    pub fn open(path: &Path) -> Result<Self> {
        let fd = rustix::fs::openat(CWD, path, DIRECTORY_FLAGS, Mode::empty())
            .map_err(|source| Error::at("open the directory", path, source))?;
        Ok(Self { fd, path: path.to_owned() })
    }

    /// Opens the directory at `path`, and creates its last component if that alone is missing: a path that is
    /// mistyped or not mounted does not silently become a tree on another file system.
    ///
    /// # Errors
    /// If it is not there and its parent neither, or it is not a directory.
    pub fn open_or_create(path: &Path) -> Result<Self> {
        match Self::open(path) {
            Err(error) if error.kind() == ErrorKind::Missing => {}
            other => return other,
        }
        let missing = || Error::at("create the directory", path, Errno::NOENT);
        let name = path.file_name().ok_or_else(missing)?;
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let parent = Self::open(parent)?;
        match rustix::fs::mkdirat(&parent.fd, name, DIRECTORY_MODE) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(source) => return Err(Error::at("create the directory", path, source)),
        }
        parent.sync()?;
        Self::open(path)
    }

    /// Where it is, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn error(&self, what: &str, name: &str, source: Errno) -> Error {
        Error::at(what, &self.path.join(name), source)
    }

    /// Opens the directory `name` in this one.
    ///
    /// # Errors
    /// If it is missing, a link, or anything else than a directory.
    pub fn directory(&self, name: &str) -> Result<Self> {
        let fd = rustix::fs::openat(&self.fd, name, DIRECTORY_FLAGS | OFlags::NOFOLLOW, Mode::empty())
            .map_err(|source| self.error("open the directory", name, source))?;
        Ok(Self { fd, path: self.path.join(name) })
    }

    /// Creates the directory `name`, for its owner alone, and makes its name durable. After a crash it is there,
    /// empty, or not.
    ///
    /// # Errors
    /// If it is there already, or cannot be made.
    pub fn create_directory(&self, name: &str) -> Result<Self> {
        rustix::fs::mkdirat(&self.fd, name, DIRECTORY_MODE)
            .map_err(|source| self.error("create the directory", name, source))?;
        self.sync()?;
        self.directory(name)
    }

    /// Opens the directory `name`, and creates it if it is missing.
    ///
    /// # Errors
    /// If it is there as something else, or cannot be made.
    pub fn directory_or_create(&self, name: &str) -> Result<Self> {
        match self.directory(name) {
            Err(error) if error.kind() == ErrorKind::Missing => {}
            other => return other,
        }
        match self.create_directory(name) {
            Err(error) if error.kind() == ErrorKind::Exists => self.directory(name),
            other => other,
        }
    }

    /// Creates the file `name`, for its owner alone, open for reading and writing. Neither it nor its name is durable
    /// yet.
    ///
    /// # Errors
    /// If there is such a name already, even a dangling link.
    pub fn create_file(&self, name: &str) -> Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(&self.fd, name, flags, FILE_MODE)
            .map(File::from)
            .map_err(|source| self.error("create", name, source))
    }

    /// Opens a file that was just created once more, for writing past the page cache; `None` where that cannot be.
    pub(crate) fn open_direct(&self, name: &str) -> Option<File> {
        let flags = OFlags::WRONLY | OFlags::DIRECT | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(&self.fd, name, flags, Mode::empty()).map(File::from).ok()
    }

    /// Opens the regular file `name` for reading.
    ///
    /// # Errors
    /// If it is missing, a link, or not a regular file.
    pub fn open_file(&self, name: &str) -> Result<File> {
        // Without NONBLOCK a FIFO of that name would hold us for ever; on a regular file it does nothing.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.fd, name, flags, Mode::empty())
            .map_err(|source| self.error("open", name, source))?;
        self.check_regular(&fd, name)?;
        Ok(File::from(fd))
    }

    fn check_regular(&self, fd: &OwnedFd, name: &str) -> Result<Stat> {
        let stat = rustix::fs::fstat(fd).map_err(|source| self.error("examine", name, source))?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
            return Ok(stat);
        }
        Err(Error::new(
            ErrorKind::Damaged,
            format!("{} is not a regular file", self.path.join(name).display()),
        ))
    }

    /// Creates the file `name` with `bytes`, and makes them durable, not yet the name. After a crash the file may be
    /// there with any part of them: write where nobody looks, then [rename](Self::rename).
    ///
    /// # Errors
    /// If it is there already, or cannot be written.
    pub fn write_file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let mut file = self.create_file(name)?;
        file.write_all(bytes)
            .and_then(|()| file.sync_all())
            .map_err(|source| Error::at("write", &self.path.join(name), source))
    }

    /// All of the regular file `name`, if it has at most `most` bytes.
    ///
    /// # Errors
    /// If it is missing, larger, not a regular file, or cannot be read.
    pub fn read_file(&self, name: &str, most: Length) -> Result<Vec<u8>> {
        let file = self.open_file(name)?;
        let mut bytes = Vec::new();
        let read = file.take(most.get().saturating_add(1)).read_to_end(&mut bytes);
        read.map_err(|source| Error::at("read", &self.path.join(name), source))?;
        if bytes.len() as u64 > most.get() {
            let what = format!("{} has more than {most} bytes", self.path.join(name).display());
            return Err(Error::new(ErrorKind::Damaged, what));
        }
        Ok(bytes)
    }

    /// Opens the file `name` for reading and writing, creates it if it is missing, and locks it for as long as it is
    /// open. The kernel gives the lock back when the holder dies, however it dies.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] if somebody else holds it; [`ErrorKind::Damaged`] if it is not a regular file, or has a second name: what
    /// is written to it would then be written elsewhere too.
    pub fn lock_file(&self, name: &str) -> Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.fd, name, flags, FILE_MODE)
            .map_err(|source| self.error("open", name, source))?;
        let stat = self.check_regular(&fd, name)?;
        if stat.st_nlink > 1 {
            let path = self.path.join(name);
            return Err(Error::new(
                ErrorKind::Damaged,
                format!("{} has a second name (a hard link)", path.display()),
            ));
        }
        rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive)
            .map_err(|source| self.error("lock", name, source))?;
        Ok(File::from(fd))
    }

    /// The length of the regular file `name`.
    ///
    /// # Errors
    /// If it is missing or not a regular file.
    pub fn file_length(&self, name: &str) -> Result<Length> {
        let stat = rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|source| self.error("examine", name, source))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            let what = format!("{} is not a regular file", self.path.join(name).display());
            return Err(Error::new(ErrorKind::Damaged, what));
        }
        Ok(Length::new(u64::try_from(stat.st_size).unwrap_or_default()))
    }

    /// Whether there is anything of that name.
    ///
    /// # Errors
    /// If the system does not tell.
    pub fn contains(&self, name: &str) -> Result<bool> {
        match rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(source) => Err(self.error("examine", name, source)),
        }
    }

    /// The names in it, sorted; those that are not UTF-8 are none of ours and are left out.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn names(&self) -> Result<Vec<String>> {
        let cannot = |source: Errno| Error::at("list the directory", &self.path, source);
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.fd).map_err(cannot)? {
            let entry = entry.map_err(cannot)?;
            match entry.file_name().to_str() {
                Ok("." | "..") | Err(_) => {}
                Ok(name) => names.push(name.to_owned()),
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// At most `most` of the names in it that `known` does not know, as far as they can be shown. Names that are not UTF-8 count too,
    /// so that a directory is taken for empty only if it is.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn names_but(&self, most: usize, known: impl Fn(&str) -> bool) -> Result<Vec<String>> {
        let cannot = |source: Errno| Error::at("list the directory", &self.path, source);
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.fd).map_err(cannot)? {
            let entry = entry.map_err(cannot)?;
            let name = entry.file_name().to_string_lossy();
            if names.len() < most && !matches!(&*name, "." | "..") && !known(&name) {
                names.push(name.escape_debug().to_string());
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// What its file system has left for this user; `None` for files if it does not count them.
    ///
    /// # Errors
    /// If the system does not tell.
    pub fn space(&self) -> Result<Space> {
        let system = rustix::fs::fstatvfs(&self.fd)
            .map_err(|source| Error::at("ask for the space in", &self.path, source))?;
        let files = (system.f_files > 0).then_some(system.f_favail);
        Ok(Space { free: Length::new(system.f_bavail.saturating_mul(system.f_frsize)), files })
    }

    /// Gives `from` the name `to`, which must be free. After a crash it has one of the two names; which, is only sure
    /// after [`sync`](Self::sync).
    ///
    /// # Errors
    /// If `to` is taken, or the file system refuses.
    pub fn rename(&self, from: &str, to: &str) -> Result<()> {
        let renamed = match rustix::fs::renameat_with(&self.fd, from, &self.fd, to, RenameFlags::NOREPLACE) {
            // A file system that does not know the flag; our own lock keeps others of us away meanwhile.
            Err(Errno::INVAL | Errno::NOSYS) if !self.contains(to)? => {
                rustix::fs::renameat(&self.fd, from, &self.fd, to)
            }
            other => other,
        };
        renamed.map_err(|source| self.error("rename to", to, source))
    }

    /// Makes the names in it durable.
    ///
    /// # Errors
    /// If the file system does not; then it is unknown which of them are.
    pub fn sync(&self) -> Result<()> {
        rustix::fs::fsync(&self.fd)
            .map_err(|source| Error::at("make durable the directory", &self.path, source))
    }

    /// Removes `name` and, if it is a directory, all that is in it. Links are removed, not followed. Nothing that is
    /// missing is an error. After a crash any part of it may still be there.
    ///
    /// # Errors
    /// If something cannot be removed.
    pub fn remove_tree(&self, name: &str) -> Result<()> {
        self.remove(name, MAX_DEPTH)
    }

    fn remove(&self, name: &str, depth: u32) -> Result<()> {
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::ISDIR | Errno::PERM) if depth > 0 => {}
            Err(source) => return Err(self.error("remove", name, source)),
        }
        let inner = self.directory(name)?;
        for entry in inner.names()? {
            inner.remove(&entry, depth - 1)?;
        }
        rustix::fs::unlinkat(&self.fd, name, AtFlags::REMOVEDIR)
            .map_err(|source| self.error("remove", name, source))
    }
}
