//! A repository in an object store or on another host, by `opendal`.

use super::{Folder, LONGEST_PAUSE, Store, TIMEOUT, TRIES, is_file_name};
use bytes::{Buf as _, Bytes, BytesMut};
use opendal::{
    ErrorKind as ObjectError, Operator, blocking,
    layers::{RetryLayer, TimeoutLayer},
    options::{ListOptions, ReadOptions},
    services,
};
use std::{
    io::{self, Read as _},
    time::Duration,
};
use stillpoint_buffer as buffer;
use stillpoint_provider::{Error, ErrorKind, Result};

/// Between two pieces of an answer.
const QUIET: Duration = Duration::from_secs(90);

/// Files of an object store. A file appears there whole or not at all, and is durable once it was accepted.
pub(super) struct ObjectStore {
    operator: blocking::Operator,
    location: String,
}

impl ObjectStore {
    /// `rest` is what follows `s3:` in restic's notation. Credentials come from where AWS' own tools take them
    /// (environment, `~/.aws`), and never from the location.
    pub(super) fn s3(rest: &str) -> Result<Self> {
        let wrong = |why: &str| {
            Error::new(
                ErrorKind::TargetMissing,
                format!(
                    "repository {:?} {why}; it is s3:https://HOST/BUCKET[/PATH]",
                    format!("s3:{}", without_credentials(rest))
                ),
            )
        };
        let (scheme, path) = match rest.split_once("://") {
            Some((scheme @ ("http" | "https"), path)) => (scheme, path),
            Some(_) => return Err(wrong("is reached neither by https nor by http")),
            None => ("https", rest),
        };
        let mut parts = path.trim_matches('/').splitn(3, '/');
        let host = parts.next().filter(|host| !host.is_empty()).ok_or_else(|| wrong("names no host"))?;
        if host.contains('@') {
            return Err(wrong("has credentials in it, which belong into the environment or a file"));
        }
        let bucket =
            parts.next().filter(|bucket| !bucket.is_empty()).ok_or_else(|| wrong("names no bucket"))?;
        let prefix = parts.next().unwrap_or("");
        let region = ["AWS_REGION", "AWS_DEFAULT_REGION"].iter().find_map(|name| std::env::var(name).ok());
        let service = services::S3::default()
            .endpoint(&format!("{scheme}://{host}"))
            .bucket(bucket)
            .root(&format!("/{prefix}"))
            .region(region.as_deref().unwrap_or("us-east-1"))
            .disable_ec2_metadata();
        let operator = Operator::new(service).map_err(|error| opening(rest, &error))?;
        Self::over(operator, format!("s3:{rest}"))
    }

    /// `rest` is what follows `sftp:`, either `user@host:/path` or `//user@host[:port]/path`. Keys and known hosts are
    /// OpenSSH's, whose client is used.
    pub(super) fn sftp(rest: &str) -> Result<Self> {
        let wrong = || {
            Error::new(
                ErrorKind::TargetMissing,
                format!("repository {:?} is not of the form sftp:[USER@]HOST:/PATH", format!("sftp:{rest}")),
            )
        };
        let (address, path) = match rest.strip_prefix("//") {
            Some(rest) => rest.split_once('/').map(|(address, path)| (address, format!("/{path}"))),
            None => rest.split_once(':').map(|(address, path)| (address, path.to_owned())),
        }
        .filter(|(address, path)| !address.is_empty() && path.starts_with('/'))
        .ok_or_else(wrong)?;
        let (user, host) = address.split_once('@').map_or((None, address), |(user, host)| (Some(user), host));
        let mut service = services::Sftp::default().endpoint(&format!("ssh://{host}")).root(&path);
        if let Some(user) = user {
            service = service.user(user);
        }
        let operator = Operator::new(service).map_err(|error| opening(rest, &error))?;
        Self::over(operator, format!("sftp:{rest}"))
    }

    fn over(operator: Operator, location: String) -> Result<Self> {
        opendal::install_default();
        let operator = operator
            .layer(TimeoutLayer::new().with_timeout(TIMEOUT).with_io_timeout(QUIET))
            .layer(RetryLayer::new().with_max_times(TRIES).with_max_delay(LONGEST_PAUSE).with_jitter());
        let operator = blocking::Operator::new(operator).map_err(|error| opening(&location, &error))?;
        Ok(Self { operator, location })
    }
}

fn opening(location: &str, error: &opendal::Error) -> Error {
    Error::new(ErrorKind::TargetMissing, format!("cannot open repository {}", without_credentials(location)))
        .because(error.to_string())
}

/// A location to show: what stands in front of an `@` might be a password.
pub(super) fn without_credentials(location: &str) -> String {
    match location.rsplit_once('@') {
        Some((before, host)) => {
            let scheme = before.split_once("://").map_or("", |(scheme, _)| scheme);
            if scheme.is_empty() { format!("...@{host}") } else { format!("{scheme}://...@{host}") }
        }
        None => location.to_owned(),
    }
}

fn failed(path: &str, error: &opendal::Error) -> io::Error {
    let kind = match error.kind() {
        ObjectError::NotFound => io::ErrorKind::NotFound,
        ObjectError::PermissionDenied => io::ErrorKind::PermissionDenied,
        ObjectError::RateLimited => io::ErrorKind::ResourceBusy,
        _ => io::ErrorKind::Other,
    };
    // Its own text ends with the whole request; kind and message are what tells.
    let message: String = error.message().chars().take(300).collect();
    io::Error::new(kind, format!("{path}: {} ({message})", error.kind()))
}

impl Store for ObjectStore {
    fn location(&self) -> String {
        without_credentials(&self.location)
    }

    fn create(&self) -> io::Result<()> {
        // An object store has no folders; a file server makes them with the first file.
        Ok(())
    }

    fn list(&self, folder: Folder) -> io::Result<Vec<(String, u64)>> {
        let path = folder.name();
        if folder == Folder::Config {
            return match self.operator.stat(path) {
                Ok(metadata) => Ok(vec![("config".to_owned(), metadata.content_length())]),
                Err(error) if error.kind() == ObjectError::NotFound => Ok(Vec::new()),
                Err(error) => Err(failed(path, &error)),
            };
        }
        let options = ListOptions { recursive: true, ..ListOptions::default() };
        let entries = match self.operator.list_options(&format!("{path}/"), options) {
            Err(error) if error.kind() == ObjectError::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(|error| failed(path, &error))?,
        };
        let files =
            entries.into_iter().filter(|entry| entry.metadata().is_file() && is_file_name(entry.name()));
        Ok(files.map(|entry| (entry.name().to_owned(), entry.metadata().content_length())).collect())
    }

    fn read_into(&self, folder: Folder, name: &str, content: &mut Vec<u8>) -> io::Result<()> {
        let path = folder.path(name);
        content.clear();
        let read = self.operator.read(&path).map_err(|error| failed(&path, &error))?;
        read.reader().read_to_end(content).map(drop)
    }

    fn read_part(&self, folder: Folder, name: &str, offset: u64, length: u64) -> io::Result<BytesMut> {
        let path = folder.path(name);
        let options =
            ReadOptions { range: (offset..offset.saturating_add(length)).into(), ..ReadOptions::default() };
        let mut read = self.operator.read_options(&path, options).map_err(|error| failed(&path, &error))?;
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
        let path = folder.path(name);
        let content: opendal::Buffer = content.iter().cloned().collect();
        self.operator.write(&path, content).map_err(|error| failed(&path, &error))?;
        Ok(())
    }

    fn remove(&self, folder: Folder, name: &str) -> io::Result<()> {
        let path = folder.path(name);
        match self.operator.delete(&path) {
            Err(error) if error.kind() != ObjectError::NotFound => Err(failed(&path, &error)),
            _ => Ok(()),
        }
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_location_that_cannot_be_one_is_refused_without_showing_a_password() {
        for bad in ["", "https://", "https://host", "ftp://host/bucket", "https://key:canary@host/bucket"] {
            let error = ObjectStore::s3(bad).err().unwrap().to_string();
            assert!(!error.contains("canary"), "{error}");
        }
        for bad in ["", "host", "user@host", "host:relative"] {
            assert!(ObjectStore::sftp(bad).is_err(), "{bad}");
        }
    }
}
