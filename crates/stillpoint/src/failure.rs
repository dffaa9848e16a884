//! What a person is told when something failed: what is wrong, whether the guest was affected, whether earlier points
//! are still good, and what to type next.

use crate::provider_failure::TypedTarget;
use std::{fmt, process::ExitCode};
use stillpoint_model::VmName;
use stillpoint_snapshot_access::GuestState;

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

/// How a run left the guest's VM. Whether the guest runs is another question, which QEMU answers at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guest {
    /// The command has nothing to do with a running guest.
    NotConcerned,
    /// Nothing was done to the VM.
    Untouched,
    /// A point was begun and undone.
    Unharmed,
    /// Something of ours is still in its VM.
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
    vm: Option<VmName>,
    guest: Guest,
    state: Option<Box<StateAtTheEnd>>,
    points: Option<&'static str>,
    next: Option<String>,
    /// Whether the VM was changed by somebody else meanwhile, so that a new look is worth another try.
    pub(crate) vm_changed: bool,
}

impl Failure {
    /// A failure of this status; `what` is the whole story in one line, causes included.
    pub fn new(exit: Exit, what: impl Into<String>) -> Self {
        let guest = Guest::NotConcerned;
        Self {
            exit,
            what: what.into(),
            vm: None,
            guest,
            state: None,
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

    /// Says which VM it is about, unless that is said already.
    #[must_use]
    pub(crate) fn of_vm(mut self, name: &VmName) -> Self {
        if self.vm.is_none() {
            let named = format!("VM {name}");
            let rest = self.what.split_once(&named).map(|(_, rest)| rest);
            // `VM web1` does not name `VM web`.
            if rest.is_none_or(|rest| rest.starts_with(|c: char| c.is_alphanumeric() || "-_.".contains(c))) {
                self.what = format!("{named}: {}", self.what);
            }
            self.vm = Some(name.clone());
        }
        self
    }

    /// The VM that it is about, if that is known.
    pub(crate) fn vm(&self) -> Option<&VmName> {
        self.vm.as_ref()
    }

    /// Says what QEMU said of the guest at the end.
    #[must_use]
    pub(crate) fn state(mut self, state: StateAtTheEnd) -> Self {
        self.next = state.next(self.next.take());
        self.state = Some(Box::new(state));
        self
    }

    /// The word for it in `--json`.
    pub(crate) fn guest_word(&self) -> &str {
        match (&self.state, self.guest) {
            (Some(state), _) => state.now.word(),
            (None, Guest::Off) => "off",
            (None, Guest::Ended) => "ended",
            (None, _) => "unknown",
        }
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
        let guest = describe(self.guest, self.state.as_deref());
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

/// How the run left the guest, and what the guest does.
fn describe(guest: Guest, state: Option<&StateAtTheEnd>) -> Option<String> {
    let left = match guest {
        Guest::NotConcerned => return None,
        Guest::Off => return Some("is off, and its images are as they were".into()),
        Guest::Ended => {
            return Some("has ended with its QEMU, not by this run; nothing is left of this run".into());
        }
        Guest::Untouched => "it was not touched",
        Guest::Unharmed => "nothing of this run is left in it",
        Guest::LeftBehind => "parts of this run are still in its VM",
    };
    let ran = state.is_none_or(|state| state.ran);
    Some(match (state.map(|state| &state.now), guest) {
        (None, Guest::Untouched) => "was not touched".into(),
        (Some(now), Guest::Untouched) if now.is_running() => "was not touched".into(),
        (Some(now), Guest::Unharmed) if now.is_running() && ran => format!("runs on as before; {left}"),
        (Some(now), _) if now.is_running() => format!("runs; {left}"),
        (Some(GuestState::Ended), _) => "has ended with its QEMU".into(),
        (Some(now), _) => format!("{}; {left}", words(now, ran)),
        // Nobody asked, so nothing is said of it.
        (None, _) => left.into(),
    })
}

/// What the guest does, for a guest that does not run.
fn words(now: &GuestState, ran: bool) -> String {
    match now {
        GuestState::Unknown { stopped: Some(pid) } => {
            format!("stands still: QEMU's process {pid} is stopped (SIGSTOP) and does not answer")
        }
        GuestState::Unknown { stopped: None } => "unknown: QEMU does not answer".into(),
        GuestState::Off => "is off".into(),
        GuestState::Ended => "has ended with its QEMU".into(),
        now if now.is_io_error() => "stands still: the host's storage failed its I/O (io-error)".into(),
        GuestState::Reported(word) if ran => format!("does not run ({word}), though it ran before"),
        GuestState::Reported(word) => format!("does not run ({word}), as before"),
    }
}

/// What the guest did at the end of a run, next to what it did before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StateAtTheEnd {
    /// At the end.
    pub now: GuestState,
    /// Whether it ran at the beginning.
    pub ran: bool,
}

impl StateAtTheEnd {
    /// A line for the summary; `None` for a VM that is off, which is said already.
    pub(crate) fn line(&self) -> Option<String> {
        match &self.now {
            GuestState::Off => None,
            GuestState::Reported(word) if self.now.is_running() => Some(word.clone()),
            now => Some(words(now, self.ran)),
        }
    }

    /// What has to be known of it, with what to do: nothing for a guest that runs, or that stood still before.
    pub(crate) fn warning(&self) -> Option<String> {
        let words = words(&self.now, self.ran);
        let alarm = self.now.is_io_error() || (self.ran && !self.now.is_running());
        let next = self.next(None);
        match &self.now {
            GuestState::Off | GuestState::Ended => None,
            GuestState::Unknown { .. } => Some(format!("the guest's state is unknown: {words}")),
            _ if !alarm => None,
            _ => Some(format!("the guest {words}")),
        }
        .map(|warning| next.map_or_else(|| warning.clone(), |next| format!("{warning}; next: {next}")))
    }

    /// What to do next, before what else there is to do.
    fn next(&self, next: Option<String>) -> Option<String> {
        const GO_ON: &str = "let the guest go on: `cont` on its monitor, or `virsh resume`";
        let first = match &self.now {
            GuestState::Unknown { stopped: Some(pid) } => {
                format!("find out who stopped QEMU, and let it go on: kill -CONT {pid}")
            }
            GuestState::Unknown { stopped: None } if next.is_some() => "wait until QEMU answers again".into(),
            now if now.is_io_error() => {
                format!("make room on the host's storage, or repair it; then {GO_ON}")
            }
            GuestState::Reported(word) if word == "paused" && self.ran => GO_ON.into(),
            _ => return next,
        };
        Some(next.map_or_else(|| first.clone(), |next| format!("{first}; then: {next}")))
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

    fn state(word: &str, ran: bool) -> StateAtTheEnd {
        StateAtTheEnd { now: GuestState::Reported(word.to_owned()), ran }
    }

    #[test]
    fn the_guests_line_is_what_qemu_said() {
        let failure = |guest| Failure::new(Exit::Failed, "no room").guest(guest).next("stillpoint recover");
        let line = |guest, state: StateAtTheEnd| {
            let text = failure(guest).state(state).to_string();
            let lines = text.lines().map(str::to_owned).collect::<Vec<_>>();
            (lines[1].replace("  guest:  ", ""), lines.last().unwrap().replace("  next:   ", ""))
        };
        let (guest, next) = line(Guest::Unharmed, state("running", true));
        assert_eq!(
            (&guest[..], &next[..]),
            ("runs on as before; nothing of this run is left in it", "stillpoint recover")
        );
        let (guest, next) = line(Guest::Unharmed, state("paused", false));
        assert_eq!(guest, "does not run (paused), as before; nothing of this run is left in it");
        assert_eq!(next, "stillpoint recover", "no alarm");
        let (guest, next) = line(Guest::LeftBehind, state("paused", true));
        assert!(
            guest.starts_with("does not run (paused), though it ran before; parts of this run"),
            "{guest}"
        );
        assert!(next.contains("`cont`") && next.ends_with("then: stillpoint recover"), "{next}");
        let (guest, next) = line(Guest::Unharmed, state("io-error", true));
        assert!(guest.contains("io-error") && next.contains("room"), "{guest} {next}");
        for stopped in [None, Some(17)] {
            let unknown = StateAtTheEnd { now: GuestState::Unknown { stopped }, ran: true };
            for guest in [Guest::Untouched, Guest::Unharmed, Guest::LeftBehind] {
                let (line, next) = line(guest, unknown.clone());
                assert!(!line.contains("runs") && line.contains("does not answer"), "{line}");
                assert_eq!(next.contains("kill -CONT 17"), stopped.is_some(), "{next}");
                assert!(next.ends_with("; then: stillpoint recover"), "{next}");
            }
        }
        // Whoever did not ask says nothing of it.
        assert!(!failure(Guest::LeftBehind).to_string().contains("runs"));
    }

    #[test]
    fn a_warning_is_for_what_somebody_has_to_see_to() {
        assert_eq!(state("running", true).warning(), None);
        assert_eq!(state("paused", false).warning(), None);
        assert_eq!(StateAtTheEnd { now: GuestState::Off, ran: false }.warning(), None);
        assert!(state("paused", true).warning().unwrap().contains("`cont`"));
        assert!(
            state("io-error", false).warning().unwrap().contains("room"),
            "also one that was there before"
        );
        let silent = StateAtTheEnd { now: GuestState::Unknown { stopped: None }, ran: true };
        assert!(silent.warning().unwrap().contains("does not answer"));
    }

    #[test]
    fn a_failure_names_its_vm_once() {
        let name: VmName = "web".parse().unwrap();
        let what = |text: &str| Failure::new(Exit::Failed, text).of_vm(&name).of_vm(&name).what().to_owned();
        assert_eq!(what("no monitor at /run/qmp"), "VM web: no monitor at /run/qmp");
        assert_eq!(what("no point of VM web was made"), "no point of VM web was made");
        assert_eq!(what("VM web2 is in the way"), "VM web: VM web2 is in the way");
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
