//! Which QEMU it is, as its greeting says.

use crate::error::{Error, ErrorKind, Result, shown};
use serde::Deserialize;
use serde_json::Value;
use std::{cmp::Ordering, fmt};

/// The version of a QEMU. Versions are equal and ordered by their [`number`](Version::number) alone.
///
/// ```
/// use stillpoint_qmp::Version;
/// let debian = Version { major: 7, minor: 2, micro: 22, package: "Debian 1:7.2+dfsg-7".into() };
/// assert_eq!(debian.to_string(), "7.2.22");
/// assert!(debian.number() < (9, 1, 0));
/// ```
#[derive(Debug, Clone)]
pub struct Version {
    /// The first number.
    pub major: u32,
    /// The second number.
    pub minor: u32,
    /// The third number; 50 and above on a development version.
    pub micro: u32,
    /// Who built it, as the builder put it; often empty. Untrusted text.
    pub package: String,
}

impl Version {
    /// What versions are compared by.
    pub fn number(&self) -> (u32, u32, u32) {
        (self.major, self.minor, self.micro)
    }
}

impl PartialEq for Version {
    fn eq(&self, other: &Self) -> bool {
        self.number() == other.number()
    }
}

impl Eq for Version {}

impl PartialOrd for Version {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Version {
    fn cmp(&self, other: &Self) -> Ordering {
        self.number().cmp(&other.number())
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// `{"QMP": {"version": {"qemu": {…}, "package": "…"}, "capabilities": […]}}`, section "Server Greeting" of
/// QEMU's `docs/interop/qmp-spec`.
#[derive(Deserialize)]
struct Greeting {
    #[serde(rename = "QMP")]
    qmp: Hello,
}

#[derive(Deserialize)]
struct Hello {
    version: Build,
    #[serde(rename = "capabilities")]
    _capabilities: Vec<Value>,
}

#[derive(Deserialize)]
struct Build {
    qemu: Number,
    #[serde(default)]
    package: String,
}

#[derive(Deserialize)]
struct Number {
    major: u32,
    minor: u32,
    micro: u32,
}

/// Takes a greeting apart.
pub(crate) fn greeting(line: &[u8]) -> Result<Version> {
    let Greeting { qmp: Hello { version: Build { qemu, package }, .. } } = serde_json::from_slice(line)
        .map_err(|error| {
            Error::new(
                ErrorKind::NotQmp,
                format!("what answers is not a QMP monitor; it says {}", shown(line)),
            )
            .because(error)
        })?;
    Ok(Version { major: qemu.major, minor: qemu.minor, micro: qemu.micro, package })
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_greeting_gives_the_version() {
        let line =
            br#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"},
                        "capabilities": ["oob"]}}"#;
        let version = greeting(line).unwrap();
        assert_eq!((version.to_string().as_str(), version.package.as_str()), ("7.2.22", "Debian"));
        assert_eq!(version.number(), (7, 2, 22));
    }

    #[test]
    fn anything_else_is_not_qmp() {
        for line in [
            r#"{"return": {}}"#,
            r#"{"QMP": {}}"#,
            r#"{"QMP": {"version": {"qemu": {"micro": -1, "minor": 2, "major": 7}}, "capabilities": []}}"#,
            r#"{"QMP": {"version": {"qemu": {"micro": 1, "minor": 2, "major": 7}}}}"#,
            "{",
            "",
        ] {
            assert_eq!(greeting(line.as_bytes()).unwrap_err().kind(), ErrorKind::NotQmp, "{line}");
        }
    }

    #[test]
    fn versions_are_ordered_by_number() {
        let version = |major, minor, micro| Version { major, minor, micro, package: micro.to_string() };
        assert!(version(7, 2, 22) < version(9, 1, 0));
        assert!(version(9, 1, 0) < version(10, 0, 0));
        assert!(version(8, 2, 1) > version(8, 2, 0));
        assert_eq!(version(8, 2, 1), Version { package: "other".into(), ..version(8, 2, 1) });
    }
}
