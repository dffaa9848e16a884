//! As files: a FUSE file system with a file for each disk. Reads, `SEEK_DATA` and `SEEK_HOLE` (zeroes are holes), and
//! `fallocate(FALLOC_FL_PUNCH_HOLE)` to give a part back.
//!
//! Nothing goes through the page cache: it would drive out of it what guests and host need, and of a disk of which only parts
//! may be read the kernel would read ahead into what is clean, which is an error. For programs that read in small pieces we
//! read ahead.

use super::ahead::ReadAhead;
use crate::{protocol::Handle, volume::ServedVolume};
use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, Request,
};
use rustix::mount::{UnmountFlags, unmount};
use std::{
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};
use stillpoint_model::{ExtentKind, Length, Offset, Range};
use stillpoint_provider::{Error, ErrorKind, Result};
use tokio::runtime;

/// Nothing about the files ever changes.
const FOREVER: Duration = Duration::from_secs(86_400);
/// Requests that the kernel has on their way at once without waiting for each.
const BACKGROUND: u16 = 64;
/// `FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE`
const PUNCH_HOLE: i32 = 3;
const SEEK_DATA: i32 = 3;
const SEEK_HOLE: i32 = 4;

/// A mounted file system of disks.
pub(crate) struct FileHandover {
    mount: PathBuf,
    session: BackgroundSession,
}

impl FileHandover {
    pub(crate) fn start(directory: &Path, volumes: &[Arc<ServedVolume>]) -> Result<Self> {
        let mount = directory.join("disks");
        let failed = |error: io::Error| {
            let what =
                format!("mount the disks at {}; this host has no FUSE, or does not let us", mount.display());
            Error::new(ErrorKind::Io, what).because(error)
        };
        fs::create_dir(&mount).map_err(failed)?;
        let mut config = Config::default();
        config.mount_options = vec![
            MountOption::FSName("stillpoint".into()),
            MountOption::NoSuid,
            MountOption::NoDev,
            MountOption::NoExec,
        ];
        let volumes = volumes.iter().map(|volume| Arc::new(ReadAhead::new(Arc::clone(volume)))).collect();
        let disks = Disks { volumes, runtime: runtime::Handle::current() };
        let session = fuser::spawn_mount(disks, &mount, &config).map_err(failed)?;
        Ok(Self { mount, session })
    }

    pub(crate) fn path(&self, volume: &ServedVolume) -> PathBuf {
        self.mount.join(volume.name.as_str())
    }

    pub(crate) fn handle(&self, volume: &ServedVolume) -> Handle {
        Handle::FileHandle { path: self.path(volume) }
    }

    /// Takes the files away from whoever has them open: every call on them fails from now on.
    pub(crate) async fn end(self) {
        let ended = tokio::task::spawn_blocking(move || {
            let _ = unmount(&self.mount, UnmountFlags::FORCE | UnmountFlags::DETACH);
            let _ = self.session.join();
            let _ = fs::remove_dir(&self.mount);
        });
        let _ = ended.await;
    }
}

struct Disks {
    volumes: Vec<Arc<ReadAhead>>,
    runtime: runtime::Handle,
}

/// The number of the first disk's file; the root is 1.
const FIRST: u64 = 2;

impl Disks {
    fn disk(&self, file: INodeNo) -> Option<&Arc<ReadAhead>> {
        self.volumes.get(usize::try_from(file.0.checked_sub(FIRST)?).ok()?)
    }

    fn volume(&self, file: INodeNo) -> Option<&Arc<ServedVolume>> {
        self.disk(file).map(|disk| disk.volume())
    }

    fn attributes(&self, number: INodeNo) -> Option<FileAttr> {
        let volume = self.volume(number);
        if volume.is_none() && number != INodeNo::ROOT {
            return None;
        }
        let size = volume.map_or(0, |volume| volume.size().get());
        Some(FileAttr {
            ino: number,
            size,
            blocks: size.div_ceil(512),
            atime: SystemTime::UNIX_EPOCH,
            mtime: SystemTime::UNIX_EPOCH,
            ctime: SystemTime::UNIX_EPOCH,
            crtime: SystemTime::UNIX_EPOCH,
            kind: if volume.is_some() { FileType::RegularFile } else { FileType::Directory },
            // Written to by nobody, but punching a hole takes the right to write.
            perm: if volume.is_some() { 0o600 } else { 0o700 },
            nlink: 1,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            rdev: 0,
            blksize: 1 << 16,
            flags: 0,
        })
    }
}

impl Filesystem for Disks {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // A loop device has many reads on their way at once; without this the kernel waits for each.
        let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        let _ = config.set_max_background(BACKGROUND);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let index = self.volumes.iter().position(|disk| name == disk.volume().name.as_str());
        let number = index.filter(|_| parent == INodeNo::ROOT).map(|index| INodeNo(FIRST + index as u64));
        match number.and_then(|number| self.attributes(number)) {
            Some(attributes) => reply.entry(&FOREVER, &attributes, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _request: &Request, file: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(file) {
            Some(attributes) => reply.attr(&FOREVER, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _request: &Request, file: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.volume(file) {
            None => reply.error(Errno::EISDIR),
            Some(_) => reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO),
        }
    }

    fn read(
        &self,
        _request: &Request,
        file: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some(disk) = self.disk(file).cloned() else { return reply.error(Errno::EISDIR) };
        let length = u64::from(size).min(disk.volume().size().get().saturating_sub(offset));
        if length == 0 {
            return reply.data(&[]);
        }
        let Ok(range) = Range::new(Offset::new(offset), Length::new(length)) else {
            return reply.error(Errno::EINVAL);
        };
        self.runtime.spawn(async move {
            match disk.read(range).await {
                Ok(bytes) => reply.data(&bytes),
                Err(error) => {
                    tracing::debug!(error = crate::rpc::chain(&error), disk = %disk.volume().name, "a read failed");
                    reply.error(Errno::EIO);
                }
            }
        });
    }

    fn fallocate(
        &self,
        _request: &Request,
        file: INodeNo,
        _handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let Some(volume) = self.volume(file).cloned() else { return reply.error(Errno::EISDIR) };
        let length = length.min(volume.size().get().saturating_sub(offset));
        if mode != PUNCH_HOLE {
            return reply.error(Errno::EOPNOTSUPP);
        }
        let Ok(range) = Range::new(Offset::new(offset), Length::new(length)) else {
            return reply.error(Errno::EINVAL);
        };
        if length == 0 {
            return reply.ok();
        }
        self.runtime.spawn(async move {
            match volume.release(range).await {
                Ok(()) => reply.ok(),
                Err(_) => reply.error(Errno::EIO),
            }
        });
    }

    fn lseek(
        &self,
        _request: &Request,
        file: INodeNo,
        _handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let Some(volume) = self.volume(file) else { return reply.error(Errno::EISDIR) };
        let size = volume.size().get();
        let Some(from) = u64::try_from(offset).ok().filter(|from| *from < size) else {
            return reply.error(Errno::ENXIO);
        };
        let hole = match whence {
            SEEK_DATA => false,
            SEEK_HOLE => true,
            _ => return reply.error(Errno::EINVAL),
        };
        // What is clean is no hole: it does not read as zeroes, it does not read at all.
        let found =
            volume.all_regions(Offset::new(from)).find(|extent| (extent.kind == ExtentKind::Zero) == hole);
        match found {
            Some(extent) => reply.offset(extent.range.start().get().cast_signed()),
            // The end of a file counts as a hole.
            None if hole => reply.offset(size.cast_signed()),
            None => reply.error(Errno::ENXIO),
        }
    }

    fn readdir(
        &self,
        _request: &Request,
        directory: INodeNo,
        _handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        if directory != INodeNo::ROOT {
            return reply.error(Errno::ENOTDIR);
        }
        let dots = [(INodeNo::ROOT, FileType::Directory, "."), (INodeNo::ROOT, FileType::Directory, "..")];
        let disks = self.volumes.iter().zip(FIRST..);
        let disks =
            disks.map(|(disk, number)| (INodeNo(number), FileType::RegularFile, disk.volume().name.as_str()));
        for (index, (number, kind, name)) in (1..).zip(dots.into_iter().chain(disks)) {
            if index > offset && reply.add(number, index, kind, name) {
                break;
            }
        }
        reply.ok();
    }
}
