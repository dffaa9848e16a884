//! JSON that knows whether it is still what was written.

use crate::error::{damaged, stored};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::value::RawValue;
use stillpoint_image::Directory;
use stillpoint_model::Length;
use stillpoint_provider::{Error, ErrorKind, Result};

/// The layout that this version writes, and the only one it reads.
const FORMAT: u32 = 1;

/// More than any manifest has (a configuration file is not in it), less than hurts.
const MOST: Length = Length::new(16 << 20);

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope {
    format: u32,
    /// Of the record's bytes, as they stand in the file.
    blake3: String,
    record: Box<RawValue>,
}

/// A blake3 sum in hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

/// The file's content for `record`.
pub(crate) fn seal(record: &impl Serialize) -> Result<Vec<u8>> {
    let cannot = |source| Error::new(ErrorKind::Io, "cannot write a record as JSON").because(source);
    let record = serde_json::value::to_raw_value(record).map_err(cannot)?;
    render(&Envelope { format: FORMAT, blake3: hex(record.get().as_bytes()), record }).map_err(cannot)
}

fn render(envelope: &Envelope) -> serde_json::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec(envelope)?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// Reads the record in the file `name`; any changed byte is an error.
pub(crate) fn read<T: DeserializeOwned>(directory: &Directory, name: &str) -> Result<T> {
    let bytes = directory.read_file(name, MOST).map_err(stored)?;
    open(&bytes).map_err(|why| {
        let path = directory.path().join(name);
        match why {
            Why::Format(format) => damaged(format!(
                "{} has format {format}, and this version reads format {FORMAT} only",
                path.display()
            )),
            Why::Changed => damaged(format!("{} is not what was written", path.display())),
            Why::Json(source) => damaged(format!("{} is not readable", path.display())).because(source),
        }
    })
}

enum Why {
    Format(u32),
    Changed,
    Json(serde_json::Error),
}

fn open<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Why> {
    #[derive(Deserialize)]
    struct Format {
        format: u32,
    }
    let Format { format } = serde_json::from_slice(bytes).map_err(Why::Json)?;
    if format != FORMAT {
        return Err(Why::Format(format));
    }
    let envelope: Envelope = serde_json::from_slice(bytes).map_err(Why::Json)?;
    let sum = hex(envelope.record.get().as_bytes());
    // Writing it again finds what a sum over the record cannot: other white space, or another case in the sum itself.
    if sum != envelope.blake3 || render(&envelope).map_err(Why::Json)? != bytes {
        return Err(Why::Changed);
    }
    serde_json::from_str(envelope.record.get()).map_err(Why::Json)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn every_changed_bit_is_found() {
        let sealed =
            seal(&serde_json::json!({"id": "0000beef", "text": "a b", "numbers": [1, 2.5]})).unwrap();
        assert!(open::<serde_json::Value>(&sealed).is_ok());
        for at in 0..sealed.len() {
            for bit in 0..8 {
                let mut changed = sealed.clone();
                *changed.get_mut(at).unwrap() ^= 1 << bit;
                assert!(open::<serde_json::Value>(&changed).is_err(), "byte {at}, bit {bit}");
            }
            assert!(open::<serde_json::Value>(sealed.get(..at).unwrap()).is_err(), "cut at {at}");
        }
    }
}
