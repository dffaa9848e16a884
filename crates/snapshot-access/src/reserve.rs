//! The reserve: space of the host that old data never takes, so that the guest's own writes find room (I5, ADR 0020).
//!
//! Old data that is kept aside takes space wherever the fleecing directory is, and a thin image takes space when its guest
//! writes. Where both are on one file system, old data could take the last block, and QEMU stops a guest whose write finds
//! none (`io-error`). So the free space is watched, and when less is left than the reserve, the *snapshot* is given up:
//!
//! ```text
//!   free space    watcher (a process of its own)            run                      QEMU
//!
//!   > reserve     looks again, the sooner the less there is
//!   < reserve     1 marks all images as given up            reads fail from here on
//!                 2 takes their space back, at once                                  keeps on copying into them
//!                 3 again and again, until it is told to end  takes the filters out
//! ```
//!
//! Nothing here waits for QEMU, nor for the run, which may be stopped or dead: while the watcher lives, old data takes no more
//! than what is written between two looks.

mod child;
mod layers;

pub use child::run as run_watcher;

use crate::{
    error::{Error, ErrorKind, Result},
    fleecing::FleecingImage,
};
use rustix::{
    fs::{Mode, OFlags, fstatvfs, open},
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
};
use std::{
    ffi::OsString,
    io::{IoSlice, Write as _},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};
use stillpoint_model::Length;

/// The reserve is this part of a file system ...
const PART: u64 = 8;
/// ... but no more than this, ...
const MOST: u64 = 2 << 30;
/// ... and no less than this, ...
const LEAST: u64 = 64 << 20;
/// ... unless that were more than this part of it.
const LARGEST_PART: u64 = 4;

/// Faster than any guest writes: how soon space is looked at again depends on what is left.
const FASTEST: u64 = 4 << 30;
const SOONEST: Duration = Duration::from_millis(2);
const LATEST: Duration = Duration::from_millis(50);

/// A process starts in some milliseconds; one that takes this long never will.
const START: Duration = Duration::from_secs(20);
/// The watcher has nothing to do in the end.
const END: Duration = Duration::from_secs(5);

/// A file system on which space is left alone.
#[derive(Debug)]
struct Space {
    /// Any directory in it.
    directory: OwnedFd,
    path: PathBuf,
    least: Length,
}

/// The file systems that old data takes space of, and how much of it is left alone.
#[derive(Debug)]
pub struct Reserve {
    spaces: Vec<Space>,
    unseen: Vec<String>,
}

/// A file system that old data takes space of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpaceState {
    /// A directory in it.
    pub directory: PathBuf,
    /// What is free.
    pub free: Length,
    /// What is left alone.
    pub reserve: Length,
}

/// The reserve of a file system of `size` bytes unless one is set.
fn computed(size: u64) -> Length {
    Length::new((size / PART).clamp(LEAST, MOST).min(size / LARGEST_PART))
}

impl SpaceState {
    /// Why no point is made with so little space.
    pub(crate) fn refusal(&self) -> Error {
        let context = format!(
            "the file system of {} has {} bytes free, and {} are to be left to the guest's own writes while old data is kept aside \
             there",
            self.directory.display(),
            self.free,
            self.reserve
        );
        Error::new(ErrorKind::NoSpace, context)
    }
}

impl Reserve {
    /// For where no old data is kept aside.
    pub(crate) fn nothing() -> Self {
        Self { spaces: Vec::new(), unseen: Vec::new() }
    }

    /// That of a fleecing directory: of its file system, and of those that hold this one as a file (loop devices).
    /// Whether the VM's images are there too is not asked. Their paths do not tell: a bind mount, a subvolume, an overlay
    /// or a loop device shares space under another name; and another VM's guest, or the host itself, is hurt just the same.
    ///
    /// # Errors
    /// [`ErrorKind::Host`] if there is no such directory.
    pub fn of(directory: &Path, setting: Option<Length>) -> Result<Self> {
        let layers = layers::below(directory);
        let mut spaces = Vec::new();
        for path in std::iter::once(directory).chain(layers.directories.iter().map(PathBuf::as_path)) {
            match Space::at(path, setting) {
                Ok(space) => spaces.push(space),
                Err(error) if path == directory => {
                    let context = format!("look at the space of {}", path.display());
                    return Err(Error::new(ErrorKind::Host, context).because(error));
                }
                Err(error) => {
                    tracing::debug!(path = %path.display(), %error, "a file system below is not looked at")
                }
            }
        }
        Ok(Self { spaces, unseen: layers.pools })
    }

    /// The first that has less than its reserve.
    pub fn low(&self) -> Option<SpaceState> {
        self.states().into_iter().find(|state| state.free < state.reserve)
    }

    /// The one that is nearest to its reserve.
    pub(crate) fn tightest(&self) -> Option<SpaceState> {
        let states = self.states().into_iter().filter(|state| state.reserve > Length::ZERO);
        states.min_by_key(|state| state.free.get().saturating_sub(state.reserve.get()))
    }

    /// How it stands. A file system that does not tell counts as having nothing to watch.
    pub fn states(&self) -> Vec<SpaceState> {
        let state = |space: &Space| {
            let free = free(space.directory.as_fd())?;
            Some(SpaceState { directory: space.path.clone(), free, reserve: space.least })
        };
        self.spaces.iter().filter_map(state).collect()
    }

    /// Thin pools that old data takes space of, whose fill nobody tells here.
    pub fn unseen(&self) -> &[String] {
        &self.unseen
    }

    /// Whether nothing is left alone.
    fn is_nothing(&self) -> bool {
        self.spaces.iter().all(|space| space.least == Length::ZERO)
    }
}

impl Space {
    fn at(path: &Path, setting: Option<Length>) -> rustix::io::Result<Self> {
        // Not `O_PATH`: an automount has to be there.
        let directory = open(path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let system = fstatvfs(&directory)?;
        let size = system.f_blocks.saturating_mul(system.f_frsize);
        Ok(Self { directory, path: path.to_owned(), least: setting.unwrap_or_else(|| computed(size)) })
    }
}

/// What a process without privileges could still take of a file system: QEMU may be one.
fn free(directory: BorrowedFd<'_>) -> Option<Length> {
    let system = fstatvfs(directory).ok()?;
    Some(Length::new(system.f_bavail.saturating_mul(system.f_frsize)))
}

/// When to look again, with so much left above the reserve.
fn look_again_in(left: Length) -> Duration {
    Duration::from_nanos(left.get().saturating_mul(1_000_000_000 / FASTEST.isqrt()) / FASTEST.isqrt())
        .clamp(SOONEST, LATEST)
}

/// The process that watches over a run's reserve, also while the run is stopped, and after it died until its filters are
/// taken out.
pub(crate) struct Watcher {
    control: UnixStream,
    child: Child,
}

/// What the watcher is told, each with a number and some with a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Word {
    /// A file system, with its reserve.
    Space = b'S',
    /// A fleecing image, with its size.
    Image = b'I',
    /// QEMU's process.
    Qemu = b'Q',
    /// Watch.
    Begin = b'B',
    /// End.
    End = b'E',
}

/// A word and its number, on the wire.
const MESSAGE: usize = 9;

impl Watcher {
    /// Starts it; `program` is the command that calls [`run_watcher`]. `None` if there is nothing to watch. It has to be
    /// there before QEMU keeps the first old data aside.
    ///
    /// # Errors
    /// If it does not start.
    pub(crate) fn start(
        program: &[OsString],
        reserve: &Reserve,
        images: &[Arc<FleecingImage>],
        qemu: Option<u32>,
    ) -> Result<Option<Self>> {
        let shared: Vec<_> = images.iter().filter(|image| image.size_and_shared().1).cloned().collect();
        if reserve.is_nothing() || shared.is_empty() {
            return Ok(None);
        }
        let failed = |error: std::io::Error| {
            Error::new(ErrorKind::Host, "start the watcher of the host's space").because(error)
        };
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let (first, rest) = program
            .split_first()
            .ok_or_else(|| Error::new(ErrorKind::Inconsistent, "no watcher is given"))?;
        let child = Command::new(first)
            .args(rest)
            .env_clear()
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // No signal to the run's process group reaches it.
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        let mut watcher = Self { control: ours, child };
        match watcher.brief(reserve, &shared, qemu) {
            Ok(()) => Ok(Some(watcher)),
            Err(error) => {
                watcher.end();
                Err(failed(error))
            }
        }
    }

    /// Tells it everything, and waits until it watches. Some milliseconds, so not worth a task of its own.
    fn brief(
        &mut self,
        reserve: &Reserve,
        images: &[Arc<FleecingImage>],
        qemu: Option<u32>,
    ) -> std::io::Result<()> {
        self.control.set_read_timeout(Some(START))?;
        self.control.set_write_timeout(Some(START))?;
        for space in &reserve.spaces {
            self.say(Word::Space, space.least.get(), Some(space.directory.as_fd()))?;
        }
        for image in images {
            self.say(Word::Image, image.size_and_shared().0, Some(image.descriptor()))?;
        }
        if let Some(qemu) = qemu {
            self.say(Word::Qemu, qemu.into(), None)?;
        }
        self.say(Word::Begin, 0, None)?;
        let mut ready = [0u8];
        std::io::Read::read_exact(&mut self.control, &mut ready)
    }

    fn say(&mut self, word: Word, number: u64, descriptor: Option<BorrowedFd<'_>>) -> std::io::Result<()> {
        let mut message = [0u8; MESSAGE];
        if let Some((first, rest)) = message.split_first_mut() {
            *first = word as u8;
            rest.copy_from_slice(&number.to_le_bytes());
        }
        let Some(descriptor) = descriptor else { return self.control.write_all(&message) };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors = [descriptor];
        if !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
            return Err(std::io::Error::other("no room for a descriptor"));
        }
        let sent = sendmsg(&self.control, &[IoSlice::new(&message)], &mut ancillary, SendFlags::NOSIGNAL)?;
        // The descriptor went with the first byte.
        self.control.write_all(message.get(sent..).unwrap_or_default())
    }

    /// Ends it, and waits until it is gone.
    pub(crate) fn end(mut self) {
        // If it is gone already, so much the better.
        let _ = self.say(Word::End, 0, None);
        let deadline = Instant::now() + END;
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                tracing::warn!("the watcher of the host's space does not end; it is killed");
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(SOONEST);
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_reserve_follows_the_file_system() {
        for (size, reserve) in
            [(16 << 20, 4 << 20), (420 << 20, 64 << 20), (4 << 30, 512 << 20), (100 << 30, 2 << 30), (0, 0)]
        {
            assert_eq!(computed(size), Length::new(reserve), "{size}");
        }
    }

    #[test]
    fn the_less_is_left_the_sooner_it_is_looked_at_again() {
        assert_eq!(look_again_in(Length::ZERO), SOONEST);
        assert_eq!(look_again_in(Length::new(u64::MAX)), LATEST);
        let some = look_again_in(Length::new(64 << 20));
        assert!(some > SOONEST && some < LATEST, "{some:?}");
        // At the fastest, no look comes later than the space is gone.
        assert!(some.as_secs_f64() * 4.0 * f64::from(1 << 30) <= f64::from(64 << 20) * 1.01);
    }

    #[test]
    fn space_is_low_when_less_is_left_than_the_reserve() {
        let directory = tempfile::tempdir().unwrap();
        let reserve = Reserve::of(directory.path(), Some(Length::new(1 << 62))).unwrap();
        let low = reserve.low().unwrap();
        assert_eq!((low.directory.as_path(), low.reserve), (directory.path(), Length::new(1 << 62)));
        let nothing = Reserve::of(directory.path(), Some(Length::ZERO)).unwrap();
        assert_eq!(nothing.low(), None);
        assert!(nothing.is_nothing() && !reserve.is_nothing());
        assert_eq!(Reserve::of(Path::new("/nonexistent"), None).unwrap_err().kind(), ErrorKind::Host);
    }
}
