//! Why a host does not answer, in words of its own.

use crate::error::Fault;
use std::{error::Error, io};
use stillpoint_provider::ErrorKind;

/// An error in one line, down to its cause, each cause once.
pub(super) fn chain(error: &dyn Error) -> String {
    let (mut text, mut cause) = (error.to_string(), error.source());
    while let Some(next) = cause {
        let more = next.to_string();
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        cause = next.source();
    }
    text
}

fn caused_by(error: &(dyn Error + 'static), kind: io::ErrorKind) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == kind) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// What it means that an HTTP request to `host` has no answer.
pub(super) fn unanswered(host: &str, error: &(dyn Error + 'static)) -> Fault {
    let text = chain(error);
    let says = |words: &[&str]| words.iter().any(|word| text.contains(word));
    // The cause of causes tells; what stands before it is the way there.
    let last = text.rsplit(": ").next().unwrap_or(&text);
    if says(&["CaUsedAsEndEntity"]) {
        let what = format!("the certificate of {host} is that of an authority, which none may serve with");
        return Fault::new(ErrorKind::TargetForeign, what).next(format!(
            "give {host} a certificate that is not marked as an authority's (CA:FALSE), and add it to this host's (update-ca-certificates)"
        ));
    }
    if says(&["certificate"]) {
        let why = text.split_once("certificate: ").map_or(last, |(_, why)| why);
        let what = format!("the certificate of {host} is not trusted here: {why}");
        return Fault::new(ErrorKind::TargetForeign, what).next(format!(
            "check that {host} is the right host; if its certificate is of an authority of your own, add that to this host's (update-ca-certificates)"
        ));
    }
    if says(&["InvalidContentType", "corrupt message"]) {
        let what = format!("{host} does not speak TLS on this port");
        return Fault::new(ErrorKind::InvalidInput, what)
            .next("name the server's port for https, or write http:// if it has none and the network is yours alone");
    }
    if says(&["dns error", "failed to lookup address"]) {
        return unknown_name(host);
    }
    if caused_by(error, io::ErrorKind::ConnectionRefused) {
        return refused(host);
    }
    Fault::new(ErrorKind::Unreachable, format!("{host} does not answer: {last}")).next(format!(
        "check that {host} is the right host and port, and that it runs and is reached from here"
    ))
}

pub(super) fn unknown_name(host: &str) -> Fault {
    Fault::new(ErrorKind::Unreachable, format!("the name of host {host} leads nowhere"))
        .next("check the host's name in `repository`, and this host's DNS")
}

pub(super) fn refused(host: &str) -> Fault {
    Fault::new(ErrorKind::Unreachable, format!("{host} refuses the connection: nothing listens there"))
        .next("check that the server runs, and its port in `repository`")
}

/// The first answer did not come in time; `last` is why an earlier try had none.
pub(super) fn late(host: &str, last: Option<&str>) -> Fault {
    let seconds = super::FIRST_ANSWER.as_secs();
    let last = last.map(|last| format!("; {last}")).unwrap_or_default();
    Fault::new(ErrorKind::Unreachable, format!("{host} has not answered within {seconds} s{last}")).next(
        format!("check that {host} is the right host and port, and that it runs and is reached from here"),
    )
}
