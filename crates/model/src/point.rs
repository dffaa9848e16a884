//! Identities: of a point, of the generation a bitmap is relative to, and of the place where points are kept.

use crate::NameError;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// Names one point: `YYYYMMDDTHHMMSSZ-xxxxxxxx`, the UTC second it was begun and eight random hex digits. It is the
/// same length everywhere, has no character that a path, a URL or a QEMU file name treats specially, and is unique
/// without any counter to keep. Order among points is told by the provider's sequence, never by this text: clocks
/// step back.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub struct PointId(String);

/// A dirty bitmap's generation is the id of the point that it is relative to.
pub type Generation = PointId;

impl PointId {
    /// The id of a point begun at `time`, made unique by `random`.
    pub fn new(time: jiff::Timestamp, random: u32) -> Self {
        Self(format!("{}-{random:08x}", time.strftime("%Y%m%dT%H%M%SZ")))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Names one target for good, wherever it is mounted: eight hex digits drawn when the target was first used. It is
/// part of each bitmap's name, so that two targets of one VM never take each other's bitmap for their own.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub struct TargetId(String);

impl TargetId {
    /// The id made from `random`.
    pub fn new(random: u32) -> Self {
        Self(format!("{random:08x}"))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn hex8(text: &[u8]) -> bool {
    text.len() == 8 && text.iter().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'))
}

impl TryFrom<String> for PointId {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        let shape = |text: &str| -> Option<bool> {
            let (time, random) = text.split_once('-')?;
            let digits = time.strip_suffix('Z')?.split_once('T')?;
            let all_digits = |part: &str| part.bytes().all(|c| c.is_ascii_digit());
            let (date, clock) = digits;
            Some(
                date.len() == 8
                    && clock.len() == 6
                    && all_digits(date)
                    && all_digits(clock)
                    && hex8(random.as_bytes()),
            )
        };
        if shape(&text) == Some(true) {
            Ok(Self(text))
        } else {
            Err(NameError::new("point", &text, "is not of the form YYYYMMDDTHHMMSSZ-xxxxxxxx"))
        }
    }
}

impl TryFrom<String> for TargetId {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        if hex8(text.as_bytes()) {
            Ok(Self(text))
        } else {
            Err(NameError::new("target id", &text, "is not eight hex digits"))
        }
    }
}

macro_rules! id_as_text {
    ($($type:ident),*) => {$(
        impl FromStr for $type {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::try_from(text.to_owned())
            }
        }
        impl From<$type> for String {
            fn from(id: $type) -> Self {
                id.0
            }
        }
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    )*};
}
id_as_text!(PointId, TargetId);

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_point_id_round_trips_and_nothing_else_parses() {
        let time = jiff::Timestamp::from_second(1_795_000_000).unwrap();
        let id = PointId::new(time, 0xbeef);
        assert_eq!(id.as_str().parse::<PointId>().unwrap(), id);
        assert!(id.as_str().ends_with("Z-0000beef"), "{id}");
        for bad in [
            "",
            "latest",
            "../x",
            "20261123T162855Z",
            "20261123T162855Z-XXXXXXXX",
            "2026112T3162855Z-00000000",
        ] {
            assert!(bad.parse::<PointId>().is_err(), "{bad}");
        }
    }
}
