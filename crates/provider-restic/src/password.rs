//! The repository's password, and where it comes from.

use std::{
    fmt, fs,
    io::Read as _,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};
use stillpoint_provider::{Error, ErrorKind, Result};

/// Longest password, in bytes.
const LONGEST: u64 = 4096;

/// Where a password is.
#[derive(Debug, Clone)]
pub enum PasswordSource {
    /// The first line of a file that nobody but its owner may read.
    File(PathBuf),
    /// The first line that a command prints: a program and its arguments.
    Command(Vec<String>),
    /// A variable of the environment.
    Environment(String),
}

/// A password. It shows itself to nobody.
#[derive(Clone)]
pub(crate) struct Password(String);

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password")
    }
}

impl Password {
    pub(crate) fn expose(&self) -> &str {
        &self.0
    }

    fn from_line(text: &str, place: &str) -> Result<Self> {
        let line = text.lines().next().unwrap_or("");
        if line.is_empty() {
            return Err(missing(format!("the password in {place} is empty")));
        }
        Ok(Self(line.to_owned()))
    }
}

fn missing(what: String) -> Error {
    Error::new(ErrorKind::TargetMissing, what)
}

impl PasswordSource {
    /// Reads the password.
    ///
    /// # Errors
    /// If it is not there, is empty, or lies open to other users.
    pub(crate) fn read(&self) -> Result<Password> {
        match self {
            Self::File(path) => from_file(path),
            Self::Command(command) => from_command(command),
            Self::Environment(name) => {
                let value = std::env::var(name);
                let value =
                    value.map_err(|_| missing(format!("the environment has no password in {name}")))?;
                Password::from_line(&value, &format!("environment variable {name}"))
            }
        }
    }
}

fn from_file(path: &Path) -> Result<Password> {
    let shown = path.display();
    let unreadable = |error| missing(format!("cannot read password file {shown}")).because(error);
    let file = fs::File::open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if metadata.mode() & 0o077 != 0 {
        return Err(missing(format!(
            "password file {shown} is open to other users (mode {:03o}): chmod 600 {shown}",
            metadata.mode() & 0o777
        )));
    }
    let mut text = String::new();
    file.take(LONGEST).read_to_string(&mut text).map_err(unreadable)?;
    Password::from_line(&text, &format!("file {shown}"))
}

fn from_command(command: &[String]) -> Result<Password> {
    let Some((program, arguments)) = command.split_first() else {
        return Err(missing("the password command is empty".to_owned()));
    };
    let failed = || missing(format!("password command {program:?} failed"));
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| failed().because(error))?;
    let mut text = String::new();
    let read = child.stdout.take().map(|output| output.take(LONGEST).read_to_string(&mut text));
    let status = child.wait().map_err(|error| failed().because(error))?;
    if !status.success() {
        return Err(failed().because(status.to_string()));
    }
    if let Some(Err(error)) = read {
        return Err(failed().because(error));
    }
    Password::from_line(&text, &format!("what {program:?} printed"))
}

#[cfg(test)]
mod test {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_password_comes_from_a_private_file_a_command_or_the_environment() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("password");
        fs::write(&path, "canary\nsecond line\n").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let file = PasswordSource::File(path.clone());
        assert_eq!(file.read().unwrap().expose(), "canary");
        assert!(!format!("{:?}", file.read().unwrap()).contains("canary"));
        for open in [0o640, 0o604, 0o660] {
            fs::set_permissions(&path, fs::Permissions::from_mode(open)).unwrap();
            assert!(file.read().unwrap_err().to_string().contains("chmod 600"), "{open:o}");
        }
        let command =
            |words: &[&str]| PasswordSource::Command(words.iter().map(|&word| word.into()).collect()).read();
        assert_eq!(command(&["printf", "canary"]).unwrap().expose(), "canary");
        for bad in [&["false"][..], &["true"], &[], &["/nowhere"], &["sh", "-c", "echo canary; exit 3"]] {
            let error = command(bad).unwrap_err();
            assert!(!crate::error::in_one_line(&error).contains("canary"), "{error}");
        }
        assert!(PasswordSource::Environment("STILLPOINT_NO_SUCH".into()).read().is_err());
    }
}
