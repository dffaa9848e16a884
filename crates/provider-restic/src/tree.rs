//! Directories, as a repository has them: a JSON list of nodes, which is a blob itself.

use crate::{blob::Id, error::damaged};
use serde::Deserialize;
use stillpoint_provider::{Error, ErrorKind, Result};

/// A directory, as far as it matters here.
#[derive(Debug, Deserialize)]
pub(crate) struct Tree {
    pub nodes: Vec<Node>,
}

/// A file or a directory in it. Times, owners and modes are written for restic, and not read.
#[derive(Debug, Deserialize)]
pub(crate) struct Node {
    pub name: String,
    #[serde(default)]
    pub size: u64,
    /// Chunks of a file, in order.
    #[serde(default)]
    pub content: Option<Vec<Id>>,
    /// Of a directory.
    #[serde(default)]
    pub subtree: Option<Id>,
}

impl Tree {
    pub(crate) fn parse(json: &[u8]) -> Result<Self> {
        serde_json::from_slice(json).map_err(|error| damaged("a directory cannot be read").because(error))
    }

    /// The node of that name.
    pub(crate) fn take(self, name: &str) -> Option<Node> {
        self.nodes.into_iter().find(|node| node.name == name)
    }
}

/// Writes a directory. restic wants its nodes sorted by name.
pub(crate) struct TreeWriter<'a> {
    json: Vec<u8>,
    /// RFC 3339.
    time: &'a str,
    last: Option<String>,
}

impl<'a> TreeWriter<'a> {
    /// A directory all of whose nodes were last changed at `time` (RFC 3339).
    pub(crate) fn new(time: &'a str) -> Self {
        Self { json: b"{\"nodes\":[".to_vec(), time, last: None }
    }

    fn begin(&mut self, name: &str, kind: &str, mode: u32) -> Result<()> {
        if self.last.as_deref().is_some_and(|last| last >= name) {
            return Err(Error::new(ErrorKind::Io, format!("{name:?} is out of order, or there twice")));
        }
        if self.last.is_some() {
            self.json.push(b',');
        }
        let node = serde_json::json!({
            "name": name, "type": kind, "mode": mode, "mtime": self.time, "atime": self.time, "ctime": self.time,
            "uid": 0, "gid": 0, "user": "root", "group": "root",
        });
        let node = node.to_string();
        self.json.extend_from_slice(node.strip_suffix('}').unwrap_or(&node).as_bytes());
        self.last = Some(name.to_owned());
        Ok(())
    }

    /// Adds a file.
    pub(crate) fn file(&mut self, name: &str, size: u64, content: &[Id]) -> Result<()> {
        self.begin(name, "file", 0o600)?;
        self.json.extend_from_slice(format!(",\"links\":1,\"size\":{size},\"content\":[").as_bytes());
        // An id is 64 digits, two quotes and a comma.
        self.json.reserve(content.len().saturating_mul(67));
        for (index, id) in content.iter().enumerate() {
            self.json.extend_from_slice(if index == 0 { b"\"" } else { b",\"" });
            id.write(&mut self.json);
            self.json.push(b'"');
        }
        self.json.extend_from_slice(b"]}");
        Ok(())
    }

    /// Adds a directory.
    pub(crate) fn directory(&mut self, name: &str, subtree: &Id) -> Result<()> {
        // Go's mark of a directory, which restic stores as it is.
        self.begin(name, "dir", 0o700 | 1 << 31)?;
        self.json.extend_from_slice(format!(",\"subtree\":\"{subtree}\"}}").as_bytes());
        Ok(())
    }

    /// The blob. restic's trees end with a newline, which is part of what is hashed.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.json.extend_from_slice(b"]}\n");
        self.json
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_directory_is_read_as_it_was_written() {
        let mut writer = TreeWriter::new("2026-11-24T00:00:00Z");
        let ids = [Id::of(b"1"), Id::of(b"2"), Id::of(b"1")];
        writer.directory("disks", &ids[1]).unwrap();
        writer.file("point.json", 12, &ids).unwrap();
        assert!(writer.file("a", 0, &[]).is_err());
        assert!(writer.file("point.json", 0, &[]).is_err());
        let tree = Tree::parse(&writer.finish()).unwrap();
        assert_eq!(tree.nodes[0].subtree, Some(ids[1]));
        let node = tree.take("point.json").unwrap();
        assert_eq!(node.size, 12);
        assert_eq!(node.content.unwrap(), ids);
    }
}
