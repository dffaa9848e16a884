//! What a person is told when something failed: what is wrong, whether the guest was affected, whether earlier points
//! are still good, and what to type next.

use crate::provider_failure::TypedTarget;
use std::{fmt, process::ExitCode};

/// Exit statuses; scripts depend on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Done,
    /// It failed, and was cleaned up.
    Failed,
    /// The command line or the configuration is wrong.
    Usage,
    /// Something is left that `recover` must undo.
    LeftBehind,
    /// Another run works on it.
    Locked,
    /// Interrupted by a signal.
    Interrupted,
}

impl Exit {
    /// The status as a number.
    pub fn number(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::LeftBehind => 3,
            Self::Locked => 4,
            Self::Interrupted => 130,
        }
    }

    /// Of several VMs in one run: the status that asks most of its reader.
    pub fn worst(self, other: Self) -> Self {
        let order =
            [Self::Done, Self::Locked, Self::Usage, Self::Failed, Self::LeftBehind, Self::Interrupted];
        let rank = |exit: Self| order.iter().position(|one| *one == exit);
        if rank(self) >= rank(other) { self } else { other }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.number())
    }
}

/// What became of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guest {
    /// The command has nothing to do with a running guest.
    NotConcerned,
    /// Nothing was done to the VM.
    Untouched,
    /// A point was begun and undone; the guest ran on.
    Unharmed,
    /// The guest runs, but something of ours is still in its VM.
    LeftBehind,
    /// Its QEMU has ended while the run went on.
    Ended,
    /// The VM is off, and its images were read without it.
    Off,
}

/// A failure, told to a person.
#[derive(Debug)]
pub struct Failure {
    /// The exit status.
    pub exit: Exit,
    what: String,
    guest: Guest,
    points: Option<&'static str>,
    next: Option<String>,
    /// Whether the VM was changed by somebody else meanwhile, so that a new look is worth another try.
    pub(crate) vm_changed: bool,
}

impl Failure {
    /// A failure of this status; `what` is the whole story in one line, causes included.
    pub fn new(exit: Exit, what: impl Into<String>) -> Self {
        Self {
            exit,
            what: what.into(),
            guest: Guest::NotConcerned,
            points: None,
            next: None,
            vm_changed: false,
        }
    }

    /// The command line or the configuration is wrong.
    pub fn usage(what: impl Into<String>) -> Self {
        Self::new(Exit::Usage, what)
    }

    /// A failure that `error` tells of, with its causes.
    pub fn because(exit: Exit, what: impl fmt::Display, error: &dyn std::error::Error) -> Self {
        Self::new(exit, format!("{what}: {}", chain(error)))
    }

    /// Says what became of the guest, and that earlier points are good.
    #[must_use]
    pub fn guest(mut self, guest: Guest) -> Self {
        self.guest = guest;
        self.points = Some("earlier points are as good as before");
        self
    }

    /// Says that the guest was not touched, unless something else is said already.
    #[must_use]
    pub fn before_the_guest(self) -> Self {
        if self.guest == Guest::NotConcerned { self.guest(Guest::Untouched) } else { self }
    }

    /// Says that the VM was off all the time.
    #[must_use]
    pub(crate) fn of_a_vm_that_is_off(mut self) -> Self {
        self.guest = Guest::Off;
        if self.exit == Exit::LeftBehind {
            // Images that are closed hold nothing but bitmaps, which the next run sees to.
            self.exit = Exit::Failed;
        }
        self
    }

    /// Says what to type or do next.
    #[must_use]
    pub fn next(mut self, next: impl Into<String>) -> Self {
        self.next = Some(next.into());
        self
    }

    /// Says which target it is about, so that what to type next names it.
    #[must_use]
    pub(crate) fn at(mut self, target: &TypedTarget) -> Self {
        self.next = self.next.map(|next| target.named(&next));
        self
    }

    /// What is wrong, on one line.
    pub fn what(&self) -> &str {
        &self.what
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.what)?;
        let guest = match self.guest {
            Guest::NotConcerned => None,
            Guest::Untouched => Some("was not touched"),
            Guest::Unharmed => Some("runs on as before; nothing of this run is left in it"),
            Guest::LeftBehind => Some("runs, but parts of this run are still in its VM"),
            Guest::Off => Some("is off, and its images are as they were"),
            Guest::Ended => Some("has ended with its QEMU, not by this run; nothing is left of this run"),
        };
        if let Some(guest) = guest {
            write!(f, "\n  guest:  {guest}")?;
        }
        if let Some(points) = self.points {
            write!(f, "\n  points: {points}")?;
        }
        if let Some(next) = &self.next {
            write!(f, "\n  next:   {next}")?;
        }
        Ok(())
    }
}

/// An error and its causes on one line, each cause once.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let next_text = next.to_string();
        if !text.ends_with(&next_text) {
            text.push_str(": ");
            text.push_str(&next_text);
        }
        cause = next.source();
    }
    text
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn of_several_vms_the_status_that_asks_most_counts() {
        assert_eq!(Exit::Done.worst(Exit::Locked), Exit::Locked);
        assert_eq!(Exit::Failed.worst(Exit::LeftBehind), Exit::LeftBehind);
        assert_eq!(Exit::LeftBehind.worst(Exit::Failed), Exit::LeftBehind);
        assert_eq!(Exit::Interrupted.worst(Exit::LeftBehind), Exit::Interrupted);
    }

    #[test]
    fn a_failure_tells_guest_points_and_what_to_type() {
        let failure = Failure::new(Exit::Failed, "disk vda: gone")
            .guest(Guest::Unharmed)
            .next("stillpoint doctor web01");
        let text = failure.to_string();
        assert_eq!(text.lines().count(), 4, "{text}");
        assert!(text.contains("next:   stillpoint doctor web01"), "{text}");
    }
}
