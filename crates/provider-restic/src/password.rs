//! The repository's password, and where it comes from.

use crate::child::{self, Outcome};
use std::{
    borrow::Cow,
    fmt, fs,
    io::{self, Read as _},
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};
use stillpoint_provider::{Error, ErrorKind, Result};

/// Longest password, in bytes.
const LONGEST: u64 = 1 << 20;
/// What a command may take to print it. It may ask a vault, but nobody who would have to type something.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where a password is. Each is read byte for byte as restic reads it, so that both open the same repositories.
#[derive(Debug, Clone)]
pub enum PasswordSource {
    /// A file that nobody but its owner may read: all of it, but for white space at its start and end, and decoded as
    /// its byte-order mark says if it has one.
    File(PathBuf),
    /// What a command prints, but for white space at its start and end: a program and its arguments.
    Command(Vec<String>),
    /// A variable of the environment, as it stands.
    Environment(String),
}

/// A password: any bytes. It shows itself to nobody.
#[derive(Clone)]
pub(crate) struct Password(Vec<u8>);

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password")
    }
}

impl Password {
    pub(crate) fn expose(&self) -> &[u8] {
        &self.0
    }

    fn new(bytes: &[u8], place: &str) -> Result<Self> {
        if bytes.is_empty() {
            return Err(wrong(format!("the password in {place} is empty"))
                .next("put the password of the repository there; an empty one protects nothing, and restic takes none"));
        }
        Ok(Self(bytes.to_owned()))
    }
}

/// Without white space at its start and end. Bytes that are not UTF-8 are no white space.
fn trimmed(bytes: &[u8]) -> &[u8] {
    let mut start = 0usize;
    for chunk in bytes.utf8_chunks() {
        let rest = chunk.valid().trim_start();
        start = start.saturating_add(chunk.valid().len().saturating_sub(rest.len()));
        if !rest.is_empty() || !chunk.invalid().is_empty() {
            break;
        }
    }
    let bytes = bytes.get(start..).unwrap_or_default();
    let last = bytes.utf8_chunks().last().filter(|chunk| chunk.invalid().is_empty());
    let spaces = last.map_or(0, |chunk| chunk.valid().len().saturating_sub(chunk.valid().trim_end().len()));
    bytes.get(..bytes.len().saturating_sub(spaces)).unwrap_or_default()
}

/// What stands behind a byte-order mark, as UTF-8; all of it as it is if there is none.
fn decoded(bytes: &[u8]) -> Cow<'_, [u8]> {
    let unit: fn([u8; 2]) -> u16 = match bytes {
        [0xef, 0xbb, 0xbf, rest @ ..] => return Cow::Borrowed(rest),
        [0xfe, 0xff, ..] => u16::from_be_bytes,
        [0xff, 0xfe, ..] => u16::from_le_bytes,
        _ => return Cow::Borrowed(bytes),
    };
    let (units, odd) = bytes.get(2..).unwrap_or_default().as_chunks();
    let mut text: String = char::decode_utf16(units.iter().copied().map(unit))
        .map(|decoded| decoded.unwrap_or(char::REPLACEMENT_CHARACTER))
        .collect();
    if !odd.is_empty() {
        text.push(char::REPLACEMENT_CHARACTER);
    }
    Cow::Owned(text.into_bytes())
}

fn wrong(what: String) -> Error {
    Error::new(ErrorKind::InvalidInput, what)
}

impl PasswordSource {
    /// Reads the password.
    ///
    /// # Errors
    /// If it is not there, is empty, or lies open to other users.
    pub(crate) fn read(&self) -> Result<Password> {
        match self {
            Self::File(path) => from_file(path),
            Self::Command(command) => from_command(command, PATIENCE),
            Self::Environment(name) => {
                let value = std::env::var_os(name).ok_or_else(|| {
                    wrong(format!("the environment has no variable {name}, which should hold the password"))
                        .next(format!("set {name} where stillpoint runs, or use `password-file`"))
                })?;
                Password::new(value.as_bytes(), &format!("environment variable {name}"))
            }
        }
    }
}

fn from_file(path: &Path) -> Result<Password> {
    let shown = path.display();
    let unreadable = |error: io::Error| {
        let (kind, next) = match error.kind() {
            io::ErrorKind::PermissionDenied => {
                (ErrorKind::Unauthorized, format!("run as the owner of {shown}, or as root"))
            }
            _ => (
                ErrorKind::InvalidInput,
                format!(
                    "correct the path of the password file, or write the password of the repository to {shown}"
                ),
            ),
        };
        Error::new(kind, format!("cannot read password file {shown}")).next(next).because(error)
    };
    let file = fs::File::open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if metadata.mode() & 0o077 != 0 {
        return Err(wrong(format!(
            "password file {shown} is open to other users (mode {:03o})",
            metadata.mode() & 0o777
        ))
        .next(format!("chmod 600 {shown}")));
    }
    let mut bytes = Vec::new();
    file.take(LONGEST.saturating_add(1)).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > LONGEST {
        return Err(wrong(format!("password file {shown} is larger than {} KiB", LONGEST >> 10))
            .next("name the file that holds the password"));
    }
    Password::new(trimmed(&decoded(&bytes)), &format!("file {shown}"))
}

fn from_command(command: &[String], patience: Duration) -> Result<Password> {
    let Some((program, arguments)) = command.split_first() else {
        return Err(wrong("the password command is empty".to_owned())
            .next("name a program and its arguments: password-command = [\"PROGRAM\", \"ARGUMENT\"]"));
    };
    let what = || format!("password command {program:?}");
    let mut child =
        Command::new(program).args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().map_err(
            |error| {
                wrong(format!("{} cannot be started", what()))
                    .next("correct `password-command`: the program's path, and that it may be executed")
                    .because(error)
            },
        )?;
    let by_hand =
        "run it by hand as the user that makes the backups: it has to print the password and to ask nothing";
    let refused =
        |why: String| Error::new(ErrorKind::Unauthorized, format!("{} {why}", what())).next(by_hand);
    let failed = || refused("failed".to_owned());
    let output = child.stdout.take();
    let outcome =
        child::outcome(child, output, LONGEST, patience).map_err(|error| failed().because(error))?;
    let bytes = match outcome {
        Outcome::Ended(status, bytes) if status.success() => bytes,
        Outcome::Ended(status, _) => return Err(failed().because(status.to_string())),
        Outcome::TooMuch => {
            return Err(failed().because(format!("it prints more than {} KiB", LONGEST >> 10)));
        }
        Outcome::Late => {
            let seconds = patience.as_secs();
            return Err(refused(format!("has not printed a password and ended within {seconds} s")));
        }
    };
    Password::new(trimmed(&bytes), &format!("what {program:?} printed"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]
mod like_restic;

#[cfg(test)]
mod test {
    use super::*;
    use std::{os::unix::fs::PermissionsExt as _, time::Instant};

    fn command(words: &[&str]) -> Result<Password> {
        PasswordSource::Command(words.iter().map(|&word| word.into()).collect()).read()
    }

    #[test]
    fn a_password_comes_from_a_private_file_a_command_or_the_environment() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("password");
        fs::write(&path, "canary\n").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let file = PasswordSource::File(path.clone());
        assert_eq!(file.read().unwrap().expose(), b"canary");
        assert!(!format!("{:?}", file.read().unwrap()).contains("canary"));
        for open in [0o640, 0o604, 0o660] {
            fs::set_permissions(&path, fs::Permissions::from_mode(open)).unwrap();
            assert!(file.read().unwrap_err().what_next().unwrap().contains("chmod 600"), "{open:o}");
        }
        assert_eq!(command(&["printf", " canary\\r\\n"]).unwrap().expose(), b"canary");
        let bad: [(&[&str], ErrorKind); 5] = [
            (&["false"], ErrorKind::Unauthorized),
            (&["true"], ErrorKind::InvalidInput),
            (&[], ErrorKind::InvalidInput),
            (&["/nowhere"], ErrorKind::InvalidInput),
            (&["sh", "-c", "echo canary; exit 3"], ErrorKind::Unauthorized),
        ];
        for (words, kind) in bad {
            let error = command(words).unwrap_err();
            assert_eq!(error.kind(), kind, "{words:?}");
            assert!(!crate::error::in_one_line(&error).contains("canary") && error.what_next().is_some());
        }
        let error = PasswordSource::Environment("STILLPOINT_NO_SUCH".into()).read().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }

    #[test]
    fn a_command_that_hangs_or_prints_for_ever_is_ended() {
        let started = Instant::now();
        let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
        for hangs in ["sleep 60", "echo canary; exec >&-; sleep 60"] {
            let error = from_command(&words(&["sh", "-c", hangs]), Duration::from_millis(100)).unwrap_err();
            assert!(error.to_string().contains("has not printed a password"), "{error}");
        }
        assert_eq!(command(&["yes"]).unwrap_err().kind(), ErrorKind::Unauthorized);
        assert!(started.elapsed() < Duration::from_secs(20));
    }

    /// What restic 0.14 makes of them: `like_restic.rs` asks it.
    #[test]
    fn white_space_is_trimmed_and_marks_are_read_as_restic_does() {
        let read = |bytes: &[u8]| trimmed(&decoded(bytes)).to_vec();
        for same in [
            &b"x"[..],
            b"x\r\n",
            b" x\t\n",
            b"\xef\xbb\xbfx\n",
            b"\xff\xfe \0x\0\n\0",
            "\u{a0}x\u{2028}".as_bytes(),
        ] {
            assert_eq!(read(same), b"x", "{same:?}");
        }
        for kept in [&b"x\ny"[..], b"x\x1c", b"\x85x", b"x\xe2\x80", "\u{200b}x".as_bytes(), b"\xff\xff"] {
            assert_eq!(read(kept), kept, "{kept:?}");
        }
        assert_eq!(read(b" \x85 "), b"\x85");
        assert_eq!(read(b"\xff\xfex\0y"), "x\u{fffd}".as_bytes());
        assert_eq!(read(b"\xff\xfe\0\xd8x\0"), "\u{fffd}x".as_bytes());
        assert_eq!(read(b""), b"");
        assert_eq!(read(b"\xef\xbb\xbf \n"), b"");
    }
}
