//! A repository in an object store or on another host, by `opendal`.

use super::{
    FIRST_TRIES, Folder, LONGEST_FIRST_PAUSE, LONGEST_PAUSE, Opening, Store, TIMEOUT, TRIES, is_file_name,
    network, s3, sftp,
};
use crate::error::stored;
use bytes::{Buf as _, Bytes, BytesMut};
use opendal::{
    ErrorKind as ObjectError, Operator,
    layers::{RetryLayer, TimeoutLayer},
    options::{ListOptions, ReadOptions},
};
use std::{
    io::{self, Read as _},
    time::Duration,
};
use stillpoint_buffer as buffer;
use stillpoint_provider::{Error, ErrorKind, Result};
use tokio::runtime::Handle;

/// Between two pieces of an answer.
const QUIET: Duration = Duration::from_secs(90);
/// Files of an object store. A file appears there whole or not at all, and is durable once it was accepted.
pub(super) struct ObjectStore {
    patient: Operator,
    /// Until there was an answer.
    first: Operator,
    opening: Opening,
    runtime: Handle,
    place: Place,
}

/// Which store it is, for messages and for what its errors mean.
pub(super) struct Place {
    /// As restic writes it, without credentials.
    pub location: String,
    /// Host and port.
    pub host: String,
    /// In front of the repository's paths: empty, or with a slash at its end.
    pub prefix: String,
    pub kind: Kind,
}

pub(super) enum Kind {
    S3 {
        bucket: String,
    },
    /// With what a person types to log in there.
    Sftp {
        login: String,
    },
}

/// What was being done when an error came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Act {
    Read,
    Write,
}

impl ObjectStore {
    pub(super) fn over(operator: Operator, place: Place, opening: Opening) -> Result<Self> {
        opendal::install_default();
        let runtime = Handle::try_current()
            .map_err(|error| Error::new(ErrorKind::Io, "there is no runtime").because(error))?;
        let operator = operator.layer(TimeoutLayer::new().with_timeout(TIMEOUT).with_io_timeout(QUIET));
        let tries =
            |times, longest| RetryLayer::new().with_max_times(times).with_max_delay(longest).with_jitter();
        let first = operator.clone().layer(tries(FIRST_TRIES, LONGEST_FIRST_PAUSE));
        let patient = operator.layer(tries(TRIES, LONGEST_PAUSE));
        Ok(Self { patient, first, opening, runtime, place })
    }

    /// Asks, and waits for the answer; for the first one not long.
    fn ask<T, F: Future<Output = opendal::Result<T>>>(
        &self,
        path: &str,
        act: Act,
        ask: impl FnOnce(Operator) -> F,
    ) -> io::Result<T> {
        let answer = match self.opening.left() {
            None => self.runtime.block_on(ask(self.patient.clone())),
            Some(left) => {
                let first = ask(self.first.clone());
                let answer = self.runtime.block_on(async { tokio::time::timeout(left, first).await });
                let answer = answer.map_err(|_| network::late(&self.place.host, None).at(path))?;
                if !matches!(&answer, Err(error) if error.kind() == ObjectError::Unexpected) {
                    self.opening.answered();
                }
                answer
            }
        };
        answer.map_err(|error| self.failed(path, &error, act))
    }

    fn failed(&self, path: &str, error: &opendal::Error, act: Act) -> io::Error {
        if error.kind() == ObjectError::NotFound {
            return super::not_found(path);
        }
        let fault = match &self.place.kind {
            Kind::S3 { bucket } => s3::fault(&self.place.host, bucket, error, act),
            Kind::Sftp { login } => sftp::fault(&self.place.host, login, error, act),
        };
        fault.at(path).into()
    }

    fn path(&self, folder: Folder, name: &str) -> String {
        format!("{}{}", self.place.prefix, folder.path(name))
    }

    /// The size of the configuration, if it is there.
    fn config(&self) -> io::Result<Option<u64>> {
        let path = format!("{}config", self.place.prefix);
        let s3 = matches!(self.place.kind, Kind::S3 { .. });
        match self.ask(&path, Act::Read, async |operator| operator.stat(&path).await) {
            Ok(metadata) => return Ok(Some(metadata.content_length())),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !s3 => return Ok(None),
            // An object store's answer to this has no words; to a read it has.
            Err(error) if s3 && error.kind() != io::ErrorKind::TimedOut => {}
            Err(error) => return Err(error),
        }
        match self.ask(&path, Act::Read, async |operator| operator.read(&path).await) {
            Ok(content) => Ok(Some(content.len() as u64)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Store for ObjectStore {
    fn location(&self) -> String {
        self.place.location.clone()
    }

    fn absent(&self) -> Error {
        let place = &self.place.location;
        let none = |what: &str| {
            Error::new(ErrorKind::TargetMissing, format!("there is no repository at {place}{what}"))
        };
        let place = &self.place.prefix;
        match self.place.kind {
            Kind::Sftp { .. } => {
                match self.ask(place, Act::Read, async |operator| operator.stat(place).await) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {
                        none(": there is no such directory")
                    }
                    _ => none(""),
                }
            }
            // Some stores answer a read in a bucket that is not there as if it were.
            Kind::S3 { .. } => {
                let one = || ListOptions { limit: Some(1), ..ListOptions::default() };
                match self
                    .ask("keys/", Act::Read, async |operator| operator.list_options("keys/", one()).await)
                {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        stored(format!("cannot open repository {}", self.place.location), error)
                    }
                    _ => none(""),
                }
            }
        }
    }

    fn create(&self) -> io::Result<()> {
        // An object store has no folders; a file server makes them with the first file.
        Ok(())
    }

    fn list(&self, folder: Folder) -> io::Result<Vec<(String, u64)>> {
        if folder == Folder::Config {
            return Ok(self.config()?.map(|size| ("config".to_owned(), size)).into_iter().collect());
        }
        let path = format!("{}{}/", self.place.prefix, folder.name());
        let options = || ListOptions { recursive: true, ..ListOptions::default() };
        let entries =
            self.ask(&path, Act::Read, async |operator| operator.list_options(&path, options()).await);
        let entries = match entries {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let files =
            entries.into_iter().filter(|entry| entry.metadata().is_file() && is_file_name(entry.name()));
        Ok(files.map(|entry| (entry.name().to_owned(), entry.metadata().content_length())).collect())
    }

    fn read_into(&self, folder: Folder, name: &str, content: &mut Vec<u8>) -> io::Result<()> {
        let path = self.path(folder, name);
        content.clear();
        let read = self.ask(&path, Act::Read, async |operator| operator.read(&path).await)?;
        read.reader().read_to_end(content).map(drop)
    }

    fn read_part(&self, folder: Folder, name: &str, offset: u64, length: u64) -> io::Result<BytesMut> {
        let path = self.path(folder, name);
        let options =
            ReadOptions { range: (offset..offset.saturating_add(length)).into(), ..ReadOptions::default() };
        let mut read =
            self.ask(&path, Act::Read, async |operator| operator.read_options(&path, options).await)?;
        if read.len() as u64 != length {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("{path} is shorter than it was"),
            ));
        }
        let mut content = buffer::initialized(read.len());
        read.copy_to_slice(&mut content);
        Ok(content)
    }

    fn write(&self, folder: Folder, name: &str, content: &[Bytes]) -> io::Result<()> {
        let path = self.path(folder, name);
        let content: opendal::Buffer = content.iter().cloned().collect();
        self.ask(&path, Act::Write, async |operator| operator.write(&path, content).await).map(drop)
    }

    fn remove(&self, folder: Folder, name: &str) -> io::Result<()> {
        let path = self.path(folder, name);
        match self.ask(&path, Act::Write, async |operator| operator.delete(&path).await) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            deleted => deleted,
        }
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}
