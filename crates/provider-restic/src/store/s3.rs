//! A repository in an object store that speaks S3.

use super::{
    Opening, network,
    object::{Act, Kind, ObjectStore, Place},
};
use crate::error::Fault;
use opendal::{ErrorKind as ObjectError, Operator, services};
use std::error::Error as _;
use stillpoint_provider::{Error, ErrorKind, Result};

/// `rest` is what follows `s3:` in restic's notation. Credentials come from where AWS' own tools take them
/// (environment, `~/.aws`), and never from the location.
pub(super) fn open(rest: &str) -> Result<ObjectStore> {
    let location = format!("s3:{}", super::without_credentials(rest));
    let wrong = |why: &str| {
        Error::new(ErrorKind::InvalidInput, format!("repository {location:?} {why}"))
            .next("write it as s3:https://HOST/BUCKET[/PATH]")
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
    let bucket = parts.next().filter(|bucket| !bucket.is_empty()).ok_or_else(|| wrong("names no bucket"))?;
    let prefix = parts.next().unwrap_or("");
    let region = ["AWS_REGION", "AWS_DEFAULT_REGION"].iter().find_map(|name| std::env::var(name).ok());
    let service = services::S3::default()
        .endpoint(&format!("{scheme}://{host}"))
        .bucket(bucket)
        .root(&format!("/{prefix}"))
        .region(region.as_deref().unwrap_or("us-east-1"))
        .disable_ec2_metadata();
    let operator =
        Operator::new(service).map_err(|error| wrong("cannot be used").because(error.to_string()))?;
    let place = Place {
        location: location.clone(),
        host: host.to_owned(),
        prefix: String::new(),
        kind: Kind::S3 { bucket: bucket.to_owned() },
    };
    ObjectStore::over(operator, place, Opening::new())
}

/// A field of an answer of S3, as `opendal` prints it.
fn field<'a>(message: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = message.split_once(&format!("{name}: \""))?;
    rest.split_once('"').map(|(value, _)| value).filter(|value| !value.is_empty())
}

/// What an error of the store at `host` means.
pub(super) fn fault(host: &str, bucket: &str, error: &opendal::Error, act: Act) -> Fault {
    let message = error.message();
    match message {
        "signing http request" | "loading credential to sign http request" => {
            return Fault::new(ErrorKind::Unauthorized, format!("there are no credentials for {host}")).next(
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY where stillpoint runs, or write them to ~/.aws/credentials of its user",
            );
        }
        "send http request" => {
            return match error.source() {
                Some(cause) => network::unanswered(host, cause),
                None => network::late(host, None),
            };
        }
        _ => {}
    }
    let code = field(message, "code");
    let said: String = match (code, field(message, "message")) {
        (Some(code), Some(words)) => format!("{code}, {words}"),
        (Some(code), None) => code.to_owned(),
        // Its own text ends with the whole request; kind and message are what tells.
        (None, _) if message.trim().is_empty() => error.kind().to_string(),
        (None, _) => format!("{}, {}", error.kind(), message.trim()),
    };
    let said: String = said.chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect();
    let says = format!("{host} answers: {said}");
    let told = |kind, next: &str| Fault::new(kind, says.as_str()).next(next);
    match code.unwrap_or_default() {
        "NoSuchBucket" => {
            Fault::new(ErrorKind::TargetMissing, format!("there is no bucket {bucket:?} at {host}"))
                .next("correct the bucket's name in `repository`, or make the bucket; stillpoint makes none")
        }
        "InvalidAccessKeyId" | "InvalidClientTokenId" | "NotSignedUp" => told(
            ErrorKind::Unauthorized,
            "check AWS_ACCESS_KEY_ID (or ~/.aws/credentials): the store does not know this access key",
        ),
        "SignatureDoesNotMatch" => told(
            ErrorKind::Unauthorized,
            "check AWS_SECRET_ACCESS_KEY (or ~/.aws/credentials): it does not belong to the access key",
        ),
        "ExpiredToken" | "TokenRefreshRequired" | "InvalidToken" | "ExpiredTokenException" => told(
            ErrorKind::Unauthorized,
            "get a new session token (AWS_SESSION_TOKEN): the store does not take this one, or no longer",
        ),
        "RequestTimeTooSkewed" | "RequestExpired" => told(
            ErrorKind::Unauthorized,
            "set the clock of this host: it differs from the store's (timedatectl)",
        ),
        "AuthorizationHeaderMalformed"
        | "PermanentRedirect"
        | "TemporaryRedirect"
        | "InvalidRegion"
        | "IllegalLocationConstraintException" => told(
            ErrorKind::InvalidInput,
            "set AWS_REGION to the bucket's region, and name that region's host in `repository`",
        ),
        "QuotaExceeded"
        | "XMinioStorageFull"
        | "XMinioAdminBucketQuotaExceeded"
        | "InsufficientStorage"
        | "StorageQuotaExceeded"
        | "InsufficientCapacity" => {
            told(ErrorKind::TargetFull, "make room in the bucket, or raise its quota")
        }
        _ => match (error.kind(), act) {
            (ObjectError::PermissionDenied, Act::Read) => told(
                ErrorKind::Unauthorized,
                "give the access key the rights to list the bucket and to read and write in it; where it may not list, a repository that is not there looks like this, too",
            ),
            (ObjectError::PermissionDenied, Act::Write) => told(
                ErrorKind::TargetReadOnly,
                "give the access key the right to write there (or to delete, if that is what was asked for)",
            ),
            (ObjectError::ConfigInvalid, _) => told(ErrorKind::InvalidInput, "correct `repository`"),
            _ => told(ErrorKind::Io, "see what the store's own log says, and try again later"),
        },
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_location_that_cannot_be_one_is_refused_without_showing_a_password() {
        for bad in ["", "https://", "https://host", "ftp://host/bucket", "https://key:canary@host/bucket"] {
            let error = open(bad).err().unwrap();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{bad}");
            assert!(!error.to_string().contains("canary"), "{error}");
        }
    }

    #[test]
    fn each_answer_has_its_kind_and_says_what_to_check() {
        let told = |kind, code: &str, act| {
            let message = format!("S3Error {{ code: \"{code}\", message: \"words\", resource: \"\" }}");
            fault("host", "bucket", &opendal::Error::new(kind, message), act)
        };
        let denied = ObjectError::PermissionDenied;
        for (kind, code, act, expected, word) in [
            (denied, "InvalidAccessKeyId", Act::Read, ErrorKind::Unauthorized, "AWS_ACCESS_KEY_ID"),
            (denied, "SignatureDoesNotMatch", Act::Write, ErrorKind::Unauthorized, "AWS_SECRET_ACCESS_KEY"),
            (denied, "RequestTimeTooSkewed", Act::Read, ErrorKind::Unauthorized, "clock"),
            (ObjectError::Unexpected, "ExpiredToken", Act::Read, ErrorKind::Unauthorized, "token"),
            (denied, "AccessDenied", Act::Read, ErrorKind::Unauthorized, "rights"),
            (denied, "AccessDenied", Act::Write, ErrorKind::TargetReadOnly, "write"),
            (ObjectError::ConfigInvalid, "NoSuchBucket", Act::Read, ErrorKind::TargetMissing, "bucket"),
            (ObjectError::Unexpected, "XMinioStorageFull", Act::Write, ErrorKind::TargetFull, "room"),
            (
                ObjectError::Unexpected,
                "AuthorizationHeaderMalformed",
                Act::Read,
                ErrorKind::InvalidInput,
                "AWS_REGION",
            ),
            (ObjectError::Unexpected, "InternalError", Act::Read, ErrorKind::Io, "log"),
        ] {
            let error = told(kind, code, act).while_doing("open");
            assert_eq!(error.kind(), expected, "{code}");
            assert!(error.what_next().unwrap().contains(word), "{code}: {:?}", error.what_next());
        }
    }
}
