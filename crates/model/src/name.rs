//! Names. Each is checked when it is made, so that code that holds one need not think of `..`, NUL or 300 bytes.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{borrow::Borrow, fmt, str::FromStr};

/// Why a name was refused. The name is shown escaped, since it may come from a peer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {} {why}", shorten(name))]
pub struct NameError {
    what: &'static str,
    name: String,
    why: &'static str,
}

impl NameError {
    pub(crate) fn new(what: &'static str, name: &str, why: &'static str) -> Self {
        Self { what, name: name.to_owned(), why }
    }
}

fn shorten(name: &str) -> String {
    let escaped: String = name.chars().take(60).flat_map(char::escape_debug).collect();
    let more = if name.chars().nth(60).is_some() { "..." } else { "" };
    format!("\"{escaped}{more}\"")
}

/// Rules for a name that becomes one component of a path: at most 100 bytes of `A-Z a-z 0-9 . _ + -`, not starting
/// with a dot or a dash. ASCII only, so there are no unicode twins, nothing to escape on a terminal or in a URL, and
/// no name that reads as an option.
fn check_component(name: &str) -> Result<(), &'static str> {
    let plain = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'+' | b'-');
    match name.as_bytes() {
        [] => Err("is empty"),
        bytes if bytes.len() > 100 => Err("is longer than 100 bytes"),
        [b'.' | b'-', ..] => Err("starts with a dot or a dash"),
        bytes if !bytes.iter().copied().all(plain) => Err("has a character other than A-Z a-z 0-9 . _ + -"),
        _ => Ok(()),
    }
}

/// Rules for a name inside QEMU that we make or were told by QEMU.
fn check_qemu(name: &str, most: usize) -> Result<(), &'static str> {
    if name.is_empty() {
        Err("is empty")
    } else if name.len() > most {
        Err("is longer than QEMU takes")
    } else if name.chars().any(char::is_control) {
        Err("has a control character")
    } else {
        Ok(())
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $what:literal, $check:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(String);

        impl $type {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $type {
            type Error = NameError;

            fn try_from(name: String) -> Result<Self, NameError> {
                let check: fn(&str) -> Result<(), &'static str> = $check;
                match check(&name) {
                    Ok(()) => Ok(Self(name)),
                    Err(why) => Err(NameError::new($what, &name, why)),
                }
            }
        }

        impl FromStr for $type {
            type Err = NameError;

            fn from_str(name: &str) -> Result<Self, NameError> {
                Self::try_from(name.to_owned())
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> Self {
                name.0
            }
        }

        impl AsRef<str> for $type {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl Borrow<str> for $type {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

name! {
    /// A disk of a VM, named by its front end's qdev id; safe as a file's name.
    DiskName, "disk name", check_component
}

name! {
    /// A VM, as its administrator names it; safe as a file's name.
    VmName, "VM name", check_component
}

name! {
    /// A node of QEMU's block graph: at most 31 bytes (`BlockDriverState.node_name`).
    NodeName, "node name", |name| check_qemu(name, 31)
}

name! {
    /// A dirty bitmap: at most 1023 bytes (`BDRV_BITMAP_MAX_NAME_SIZE`, the qcow2 bitmap directory's limit).
    BitmapName, "bitmap name", |name| check_qemu(name, 1023)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_name_that_could_leave_its_directory_or_fool_a_terminal_is_refused() {
        let long = "x".repeat(300);
        for bad in [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            "a\0b",
            "a\nb",
            "\u{1b}[31mred",
            "-rf",
            ".hidden",
            "caf\u{e9}",
            &long,
        ] {
            assert!(bad.parse::<DiskName>().is_err(), "{bad:?}");
            assert!(bad.parse::<VmName>().is_err(), "{bad:?}");
        }
        for good in ["vda", "drive-scsi0", "web01.example.org", "disk_0+1"] {
            assert_eq!(good.parse::<DiskName>().unwrap().as_str(), good);
        }
    }

    #[test]
    fn the_message_never_carries_a_raw_control_character() {
        let error = "\u{1b}[31m\n".parse::<VmName>().unwrap_err().to_string();
        assert!(error.chars().all(|c| !c.is_control()), "{error:?}");
        let error = "y".repeat(300).parse::<VmName>().unwrap_err().to_string();
        assert!(error.len() < 120, "{error}");
    }

    #[test]
    fn a_node_name_has_at_most_31_bytes() {
        assert!("#block123".parse::<NodeName>().is_ok());
        assert!("n".repeat(31).parse::<NodeName>().is_ok());
        assert!("n".repeat(32).parse::<NodeName>().is_err());
    }

    #[test]
    fn deserializing_checks_too() {
        assert!(serde_json::from_str::<DiskName>("\"../etc/shadow\"").is_err());
        assert_eq!(serde_json::from_str::<DiskName>("\"vda\"").unwrap().as_str(), "vda");
    }
}
