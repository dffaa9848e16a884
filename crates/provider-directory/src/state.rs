//! What there is at the path of a target, and what may be done with it.
//!
//! ```text
//!  there is              and no target was there before     and one was
//!  nothing, or an        backup makes a target              refused: is it mounted?
//!  empty directory       all else: there is no target       refused: is it mounted?
//!  a target              used                               used, whichever it is
//!  other things          refused: this is no target         refused: is it mounted?
//! ```
//! An identity that is lost or damaged takes nobody's points away: they are read without it, with a warning, and nothing is written
//! until [`create`](crate::DirectoryProvider::create) gives the target another.

use crate::{
    error::{from_image, in_one_line, may_pass, system_error},
    identity, layout,
    manifest::Manifest,
    target,
};
use rustix::io::Errno;
use std::path::Path;
use stillpoint_image::{self as image, Directory};
use stillpoint_model::{PointId, TargetId};
use stillpoint_provider::{Error, ErrorKind, Result};

/// Other things that are named when something is refused for them.
const MOST_NAMES: usize = 3;

/// What this host knows of a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Before {
    /// The targets that were seen there, none if it is new.
    Targets(Vec<TargetId>),
    /// It cannot be told, and why.
    Unknown(String),
}

impl Default for Before {
    fn default() -> Self {
        Self::Targets(Vec::new())
    }
}

impl Before {
    /// Those that were there, as a sentence says it.
    fn named(&self) -> Option<String> {
        match self {
            Self::Targets(ids) if ids.is_empty() => None,
            Self::Targets(ids) => {
                let ids: Vec<_> = ids.iter().map(TargetId::as_str).collect();
                let word = if ids.len() == 1 { "target" } else { "one of the targets" };
                Some(format!("{word} {}", ids.join(", ")))
            }
            Self::Unknown(_) => None,
        }
    }
}

/// What there is at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetState {
    /// Nothing, and its parent is there.
    New,
    /// A directory with nothing in it.
    Empty,
    /// A target.
    Target(TargetId),
    /// Something else, or a target that does not say any more which one it is.
    NoTarget {
        /// What is wrong with it.
        what: String,
        /// Whether there is a point in it all the same.
        points: bool,
    },
}

/// A path, looked at.
pub(crate) struct Site {
    pub(crate) state: TargetState,
    /// Open, unless there is none.
    directory: Option<Directory>,
}

impl Site {
    /// Looks at `path`.
    pub(crate) fn look(path: &Path, before: &Before) -> Result<Self> {
        let directory = match Directory::open(path) {
            Ok(directory) => directory,
            Err(error) if error.kind() == image::ErrorKind::Missing && parent_is_there(path) => {
                return Ok(Self { state: TargetState::New, directory: None });
            }
            Err(error) => return Err(cannot_open(path, before, error)),
        };
        let state = state(&directory).map_err(|error| match may_pass(&error) {
            true => unreadable(path, before, error),
            false => error,
        })?;
        Ok(Self { state, directory: Some(directory) })
    }

    /// Why no backup would be kept here, as far as looking tells.
    pub(crate) fn obstacle(&self, path: &Path, before: &Before) -> Option<Error> {
        match &self.state {
            TargetState::Target(_) => None,
            TargetState::New | TargetState::Empty if *before == Before::default() => None,
            state => Some(refusal(path, before, state)),
        }
    }

    /// For reading what is there.
    pub(crate) fn read(path: &Path, before: &Before) -> Result<Directory> {
        let site = Self::look(path, before)?;
        match (site.state, site.directory) {
            (TargetState::Target(_), Some(directory)) => Ok(directory),
            (TargetState::NoTarget { what, points: true }, Some(directory)) => {
                tracing::warn!("{what}; its points are read all the same, and no point can be added to them");
                Ok(directory)
            }
            (state, _) => Err(refusal(path, before, &state)),
        }
    }

    /// For writing to the target that is there.
    pub(crate) fn write(path: &Path, before: &Before) -> Result<(Directory, TargetId)> {
        let site = Self::look(path, before)?;
        match (site.state, site.directory) {
            (TargetState::Target(id), Some(directory)) => Ok((directory, id)),
            (state, _) => Err(refusal(path, before, &state)),
        }
    }

    /// For making points: where no target ever was, one is made.
    pub(crate) fn write_or_make(path: &Path, before: &Before) -> Result<(Directory, TargetId)> {
        let site = Self::look(path, before)?;
        match (site.state, site.directory) {
            (TargetState::Target(id), Some(directory)) => {
                target::check_writable(&directory)?;
                Ok((directory, id))
            }
            (TargetState::New | TargetState::Empty, _) if *before == Before::default() => make(path),
            (state, _) => Err(refusal(path, before, &state)),
        }
    }

    /// Makes a target on purpose; one that is there stays. Tells whether it is new.
    pub(crate) fn create(path: &Path) -> Result<(TargetId, bool)> {
        let before = Before::default();
        let site = Self::look(path, &before)?;
        match site.state {
            TargetState::Target(id) => Ok((id, false)),
            TargetState::New | TargetState::Empty | TargetState::NoTarget { points: true, .. } => {
                Ok((make(path)?.1, true))
            }
            // Nothing in it but an identity that is none.
            TargetState::NoTarget { .. } if only_an_identity(site.directory.as_ref())? => {
                Ok((make(path)?.1, true))
            }
            state => Err(refusal(path, &before, &state)),
        }
    }
}

fn make(path: &Path) -> Result<(Directory, TargetId)> {
    let before = Before::default();
    let directory = Directory::open_or_create(path).map_err(|error| cannot_open(path, &before, error))?;
    target::check_writable(&directory)?;
    let id = identity::draw(&directory)?;
    Ok((directory, id))
}

fn parent_is_there(path: &Path) -> bool {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => path.file_name().is_some(),
        Some(parent) => path.file_name().is_some() && parent.is_dir(),
        None => false,
    }
}

fn only_an_identity(directory: Option<&Directory>) -> Result<bool> {
    let Some(directory) = directory else { return Ok(false) };
    let known = |name: &str| name == layout::IDENTITY || layout::is_nothing(name);
    Ok(directory.names_but(1, known).map_err(from_image)?.is_empty())
}

fn state(directory: &Directory) -> Result<TargetState> {
    let path = directory.path().display();
    if directory.contains(layout::IDENTITY).map_err(from_image)? {
        return match identity::read(directory) {
            Ok(id) => Ok(TargetState::Target(id)),
            Err(error) if may_pass(&error) => Err(error),
            Err(error) => {
                let what = format!("{path} does not say which target it is: {}", in_one_line(&error));
                Ok(TargetState::NoTarget { what, points: has_points(directory)? })
            }
        };
    }
    let names = directory.names_but(usize::MAX, layout::is_nothing).map_err(from_image)?;
    if names.is_empty() {
        return Ok(TargetState::Empty);
    }
    let some = names.iter().take(MOST_NAMES).map(String::as_str).collect::<Vec<_>>().join(", ");
    let more = if names.len() > MOST_NAMES { ", ..." } else { "" };
    let what = format!("{path} has other things in it ({some}{more}) and no {}", layout::IDENTITY);
    Ok(TargetState::NoTarget { what, points: has_points(directory)? })
}

/// Whether there is a point whose record can be read.
fn has_points(directory: &Directory) -> Result<bool> {
    for vm in target::vms(directory)? {
        let Ok(Some(vm_directory)) = target::vm(directory, &vm) else { continue };
        let Ok(names) = vm_directory.names() else { continue };
        for id in names.iter().filter_map(|name| name.parse::<PointId>().ok()) {
            let own = vm_directory.directory(id.as_str());
            if own.is_ok_and(|own| Manifest::read(&own, &vm, &id).is_ok()) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// Why what is there is not used.
pub(crate) fn refusal(path: &Path, before: &Before, state: &TargetState) -> Error {
    let at = path.display();
    let there = match state {
        TargetState::New => format!("there is no directory {at}"),
        TargetState::Empty => format!("there is no target in {at}: the directory is empty"),
        TargetState::NoTarget { what, .. } => format!("there is no target here: {what}"),
        TargetState::Target(id) => format!("{at} is target {id}"),
    };
    match (before, before.named(), state) {
        (_, Some(ids), _) => Error::new(
            ErrorKind::TargetMissing,
            format!("{ids} was here before and is not now: {there} (is it mounted?)"),
        ),
        (Before::Unknown(why), _, TargetState::New | TargetState::Empty) => Error::new(
            ErrorKind::TargetMissing,
            format!("{there}, and whether a target was here before cannot be told: {why}"),
        ),
        (_, _, TargetState::NoTarget { .. } | TargetState::Target(_)) => {
            Error::new(ErrorKind::TargetForeign, there)
        }
        (_, _, TargetState::New | TargetState::Empty) => {
            Error::new(ErrorKind::TargetMissing, format!("{there} (is it mounted?)"))
        }
    }
}

fn cannot_open(path: &Path, before: &Before, error: image::Error) -> Error {
    let (at, was) = (path.display(), was_here(before));
    match error.kind() {
        image::ErrorKind::Missing => {
            let what = format!("there is no target directory {at} (is it mounted?){was}");
            Error::new(ErrorKind::TargetMissing, what).because(error)
        }
        image::ErrorKind::Damaged => {
            Error::new(ErrorKind::TargetForeign, format!("target {at} is not a directory{was}"))
                .because(error)
        }
        _ => unreadable(path, before, from_image(error)),
    }
}

/// Something is there, and the system does not let us see what.
fn unreadable(path: &Path, before: &Before, error: Error) -> Error {
    let number = system_error(&error);
    if [Errno::ACCESS, Errno::PERM].iter().any(|errno| number == Some(errno.raw_os_error())) {
        let what = format!("target {} cannot be read by this user", path.display());
        return Error::new(ErrorKind::Unauthorized, what).because(error);
    }
    // A file system whose server or program has gone, or a medium that gives errors.
    let what = format!("target directory {} does not answer{}", path.display(), was_here(before));
    Error::new(ErrorKind::TargetMissing, what).because(error)
}

fn was_here(before: &Before) -> String {
    before.named().map(|ids| format!("; {ids} was here before")).unwrap_or_default()
}
