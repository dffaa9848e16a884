//! The watcher's own process. It does one thing at a time, so it needs no runtime, and nobody is there to be told of errors.
//!
//! It outlives a run that dies: the filters are still in the VM then, and go on copying into images that nobody will read,
//! until `recover`. It gives these images up at once, keeps them empty, and ends when QEMU has closed them.

use super::{LATEST, MESSAGE, SOONEST, free, look_again_in};
use crate::{
    fleecing::{mark_given_up, take_back, used},
    process::descriptors_of,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{FileType, fstat},
    io::{Errno, write},
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg},
    stdio::stdin,
};
use std::{
    io::IoSliceMut,
    mem::MaybeUninit,
    os::fd::{AsFd as _, OwnedFd},
    time::{Duration, Instant},
};
use stillpoint_model::Length;

/// How often it is looked whether QEMU has closed the images of a run that died.
const STILL_OPEN: Duration = Duration::from_secs(1);

#[derive(Default)]
struct Watch {
    spaces: Vec<(OwnedFd, Length)>,
    images: Vec<(OwnedFd, u64)>,
    qemu: Option<u32>,
    begun: bool,
    given_up: bool,
}

/// Watches until the run is done, or dead and its images closed. Standard input is the control socket; `None` if it is not.
pub fn run() -> Option<()> {
    if !fstat(stdin()).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode).is_socket()) {
        return None;
    }
    // Fails only for the leader of a process group, which is as far from the run's signals as can be.
    let _ = rustix::process::setsid();
    let mut watch = Watch::default();
    let mut wait = None;
    loop {
        if readable(wait) {
            match watch.hear() {
                Heard::Word => {}
                Heard::End => return Some(()),
                Heard::Nobody => break,
            }
        }
        wait = watch.begun.then(|| watch.look());
    }
    if watch.begun {
        watch.keep_empty();
    }
    Some(())
}

enum Heard {
    Word,
    End,
    Nobody,
}

impl Watch {
    fn hear(&mut self) -> Heard {
        let mut message = [0u8; MESSAGE];
        let mut descriptor = None;
        let mut have = 0;
        while have < MESSAGE {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let rest = message.get_mut(have..).unwrap_or_default();
            let got = recvmsg(stdin(), &mut [IoSliceMut::new(rest)], &mut ancillary, RecvFlags::CMSG_CLOEXEC);
            match got {
                Ok(got) if got.bytes > 0 => have = have.saturating_add(got.bytes),
                Err(Errno::INTR) => {}
                _ => return Heard::Nobody,
            }
            for part in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(passed) = part {
                    descriptor = descriptor.or(passed.last());
                }
            }
        }
        let [word, number @ ..] = message;
        let number = u64::from_le_bytes(number);
        match (word, descriptor) {
            (b'S', Some(directory)) => self.spaces.push((directory, Length::new(number))),
            (b'I', Some(image)) => self.images.push((image, number)),
            (b'Q', _) => self.qemu = u32::try_from(number).ok(),
            (b'B', _) => {
                self.begun = true;
                let _ = write(stdin(), b"r");
            }
            (b'E', _) => return Heard::End,
            _ => {}
        }
        Heard::Word
    }

    /// Gives up if there is less space than there is to be. Returns when to look again.
    fn look(&mut self) -> Duration {
        if !self.given_up {
            let left = |(directory, least): &(OwnedFd, Length)| {
                Some((*least, free(directory.as_fd())?.get().checked_sub(least.get())))
            };
            let left = self.spaces.iter().filter_map(left).filter(|(least, _)| *least > Length::ZERO);
            match left.map(|(_, left)| left).min() {
                Some(None) => self.give_up(),
                Some(Some(left)) => return look_again_in(Length::new(left)),
                None => return LATEST,
            }
        }
        self.take_back();
        SOONEST
    }

    fn give_up(&mut self) {
        let marked = self.images.iter().all(|(image, _)| mark_given_up(image).is_ok());
        // Unmarked, it would be read for what it was. A file that is ours can always be marked, so this is for the unheard of.
        self.given_up = marked;
    }

    fn take_back(&self) {
        for (image, size) in self.images.iter().filter(|_| self.given_up) {
            if used(image) > Length::ZERO {
                let _ = take_back(image, *size);
            }
        }
    }

    /// For a run that is dead.
    fn keep_empty(&mut self) {
        self.give_up();
        if !self.given_up {
            return;
        }
        let mut looked: Option<Instant> = None;
        loop {
            self.take_back();
            if looked.is_none_or(|looked| looked.elapsed() > STILL_OPEN) {
                looked = Some(Instant::now());
                if !self.are_open_in_qemu() {
                    return;
                }
            }
            std::thread::sleep(LATEST);
        }
    }

    /// Where that cannot be seen, they count as closed: nobody would tell otherwise when to end.
    fn are_open_in_qemu(&self) -> bool {
        let Some(qemu) = self.qemu else { return false };
        self.images.iter().any(|(image, _)| !descriptors_of(qemu, image).is_empty())
    }
}

fn readable(wait: Option<Duration>) -> bool {
    let wait = wait.map(|wait| Timespec {
        tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(wait.subsec_nanos()),
    });
    // An interrupted wait is only a look too many.
    poll(&mut [PollFd::new(&stdin(), PollFlags::IN)], wait.as_ref()).is_ok_and(|ready| ready > 0)
}
