//! The words for what a provider says: each kind of error with what to do next.

use crate::{
    cli::{Bitmaps, Command, Key, Target, Where},
    failure::{Exit, Failure, Guest},
};
use std::path::Path;
use stillpoint_provider::{Error, ErrorKind};

/// Stands for the options that name the target, with a blank before them, in what to type next.
const PLACE: &str = "{target}";
/// Stands for the target's name.
const NAME: &str = "{name}";

/// The failure of a command whose provider says `error`. What to type next names the target once
/// [`at`](Failure::at) has told which it is.
pub(crate) fn provider_failure(error: &Error, guest: Guest) -> Failure {
    let exit = match error.kind() {
        ErrorKind::Locked => Exit::Locked,
        ErrorKind::Cancelled => Exit::Interrupted,
        ErrorKind::InvalidInput => Exit::Usage,
        _ => Exit::Failed,
    };
    let failure = Failure::new(exit, crate::failure::chain(error));
    let failure = match guest {
        Guest::NotConcerned => failure,
        guest => failure.guest(guest),
    };
    match error.what_next().or_else(|| next(error.kind())) {
        Some(next) => failure.next(next),
        None => failure,
    }
}

/// What to do about an error of this kind, where the provider does not know better.
fn next(kind: ErrorKind) -> Option<&'static str> {
    Some(match kind {
        ErrorKind::TargetMissing => {
            "mount the target, or correct its path; only to make a new one there, type: stillpoint target init {name}"
        }
        ErrorKind::TargetForeign => "name the right target; nothing in this place was changed",
        ErrorKind::TargetReadOnly => "mount the target for writing, or run as a user that may write there",
        ErrorKind::TargetFull => "make room in the target, then try again",
        ErrorKind::Unauthorized => "check the password or the credentials of the target",
        ErrorKind::Unreachable => "check the host's name and port, and that it runs and is reached from here",
        ErrorKind::InvalidInput => "correct what was typed, or the target in the configuration file",
        ErrorKind::Unsupported => "use a newer version of the target's provider, or another target",
        ErrorKind::Locked => "wait for that run to end, then try again",
        ErrorKind::NotFound => "stillpoint points{target}, to see what there is",
        ErrorKind::Damaged => {
            "stillpoint verify{target}, to see what is damaged; stillpoint points{target}, for points before it"
        }
        ErrorKind::Source => "look for errors of the VM's storage (journalctl -k), then run the backup again",
        ErrorKind::CommitUnknown => "run the backup again; it finds out which point is there",
        _ => return None,
    })
}

/// Which target a command is about, as it was typed.
#[derive(Debug, Clone, Default)]
pub(crate) struct TypedTarget {
    options: String,
    name: Option<String>,
}

impl TypedTarget {
    pub(crate) fn of(place: &Where) -> Self {
        match (&place.target, &place.to) {
            (Some(name), _) => Self { options: format!(" --target {}", word(name)), name: Some(word(name)) },
            (None, Some(directory)) => {
                let to = format!("--to {}", path(directory));
                Self { options: format!(" {to}"), name: Some(to) }
            }
            (None, None) => Self::default(),
        }
    }

    /// That of a command; nothing for one that is about no target.
    pub(crate) fn of_command(command: &Command) -> Self {
        let target = match command {
            Command::Backup(backup) => return Self::of(&backup.place),
            Command::Points(points) => return Self::of(&points.place),
            Command::Restore(restore) => return Self::of(&restore.place),
            Command::Verify(verify) => return Self::of(&verify.place),
            Command::Doctor(doctor) => return Self::of(&doctor.place),
            Command::Forget(forget) => return Self::of(&forget.place),
            Command::Prune(prune) => prune.target.clone(),
            Command::Key(Key::List { target, .. } | Key::Add { target, .. } | Key::Remove { target, .. }) => {
                target.clone()
            }
            Command::Target(Target::Init { name, to }) => {
                return Self::of(&Where { target: name.clone(), to: to.clone() });
            }
            Command::Bitmaps(Bitmaps::Remove { place, .. }) => return Self::of(place),
            Command::Bitmaps(Bitmaps::List { .. }) | Command::Recover(_) | Command::Provider(_) => None,
        };
        Self::of(&Where { target, to: None })
    }

    /// The options that name it, with a blank before them.
    pub(crate) fn options(&self) -> &str {
        &self.options
    }

    /// `next` with the target in it.
    pub(crate) fn named(&self, next: &str) -> String {
        next.replace(PLACE, &self.options).replace(NAME, self.name.as_deref().unwrap_or("NAME"))
    }
}

fn path(path: &Path) -> String {
    word(&path.display().to_string())
}

/// As a shell takes it for one word.
fn word(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%,".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[cfg(test)]
mod test {
    use super::*;

    fn told(error: &Error, target: Option<&str>, to: Option<&str>) -> (Exit, String) {
        let place = Where { target: target.map(Into::into), to: to.map(Into::into) };
        let failure = provider_failure(error, Guest::Untouched).at(&TypedTarget::of(&place));
        (failure.exit, failure.to_string())
    }

    #[test]
    fn what_to_type_next_names_the_target() {
        let damaged = Error::new(ErrorKind::Damaged, "damaged");
        let line = |target, to| told(&damaged, target, to).1.lines().last().unwrap().trim().to_owned();
        assert!(line(Some("main"), None).starts_with("next:   stillpoint verify --target main, to see"));
        assert!(line(None, Some("/b/my points")).contains("stillpoint points --to '/b/my points', for"));
        assert!(line(None, None).starts_with("next:   stillpoint verify, to see"));
        let missing = Error::new(ErrorKind::TargetMissing, "missing");
        assert!(told(&missing, Some("main"), None).1.ends_with("stillpoint target init main"));
        assert!(told(&missing, None, None).1.ends_with("stillpoint target init NAME"));
    }

    #[test]
    fn each_kind_has_an_exit_status_and_something_to_do() {
        for (kind, exit) in [
            (ErrorKind::TargetMissing, Exit::Failed),
            (ErrorKind::TargetForeign, Exit::Failed),
            (ErrorKind::TargetReadOnly, Exit::Failed),
            (ErrorKind::TargetFull, Exit::Failed),
            (ErrorKind::Unauthorized, Exit::Failed),
            (ErrorKind::Unreachable, Exit::Failed),
            (ErrorKind::InvalidInput, Exit::Usage),
            (ErrorKind::Unsupported, Exit::Failed),
            (ErrorKind::Locked, Exit::Locked),
            (ErrorKind::NotFound, Exit::Failed),
            (ErrorKind::Damaged, Exit::Failed),
            (ErrorKind::Source, Exit::Failed),
            (ErrorKind::CommitUnknown, Exit::Failed),
        ] {
            let (told, text) = told(&Error::new(kind, "what"), None, None);
            assert_eq!(told, exit, "{kind:?}");
            assert!(text.contains("next:") && !text.contains('{'), "{text}");
        }
        // Only what is not there is to be mounted, and only a host is to be looked for on the network.
        for kind in [ErrorKind::Unauthorized, ErrorKind::InvalidInput, ErrorKind::Unreachable, ErrorKind::Io]
        {
            assert!(!next(kind).unwrap_or("").contains("mount"), "{kind:?}");
        }
    }

    #[test]
    fn a_provider_that_knows_better_is_heard() {
        let cause = Error::new(ErrorKind::Io, "inner").next("type this");
        let error = Error::new(ErrorKind::Damaged, "outer").because(cause);
        assert!(told(&error, None, None).1.ends_with("next:   type this"));
    }
}
