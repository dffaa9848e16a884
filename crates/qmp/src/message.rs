//! What a peer's line means.

use crate::{error::PeerError, event::Event};
use serde_json::{Map, Value};
use std::time::Duration;

/// A message of a peer, after the greeting.
#[derive(Debug, PartialEq)]
pub(crate) enum Message {
    Event(Event),
    Reply { id: Id, result: Result<Value, PeerError> },
}

/// Whose reply it is.
#[derive(Debug, PartialEq)]
pub(crate) enum Id {
    /// Of a command with this id.
    Known(u64),
    /// Of a command with an id that we cannot have sent.
    Foreign,
    /// Of no command: QEMU could not read far enough to see one.
    Absent,
}

/// Why a line is no message.
#[derive(Debug)]
pub(crate) enum Malformed {
    Json(serde_json::Error),
    Form,
}

/// Takes a line apart: sections "Success", "Error" and "Asynchronous events" of QEMU's `docs/interop/qmp-spec`.
pub(crate) fn parse(line: &[u8]) -> Result<Message, Malformed> {
    let mut object: Map<String, Value> = serde_json::from_slice(line).map_err(Malformed::Json)?;
    if let Some(name) = object.remove("event") {
        let Value::String(name) = name else { return Err(Malformed::Form) };
        let timestamp = timestamp(object.get("timestamp"));
        let data = object.remove("data").unwrap_or(Value::Null);
        return Ok(Message::Event(Event { name, data, timestamp }));
    }
    let id = match object.get("id") {
        Some(id) => id.as_u64().map_or(Id::Foreign, Id::Known),
        None => Id::Absent,
    };
    let result = match (object.remove("return"), object.remove("error")) {
        (Some(value), None) => Ok(value),
        (None, Some(Value::Object(mut error))) => match (error.remove("class"), error.remove("desc")) {
            (Some(Value::String(class)), Some(Value::String(desc))) => Err(PeerError { class, desc }),
            _ => return Err(Malformed::Form),
        },
        _ => return Err(Malformed::Form),
    };
    Ok(Message::Reply { id, result })
}

/// Zero where QEMU says -1, which it does if the host's clock failed it, and where there is none: an event is worth
/// more than its time.
fn timestamp(value: Option<&Value>) -> Duration {
    let part = |name| value.and_then(|value| value.get(name)).and_then(Value::as_u64);
    match (part("seconds"), part("microseconds")) {
        (Some(seconds), Some(micros)) => {
            Duration::from_secs(seconds).saturating_add(Duration::from_micros(micros))
        }
        _ => Duration::ZERO,
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn message(value: &Value) -> Message {
        parse(value.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn replies_and_events_are_told_apart() {
        assert_eq!(
            message(&json!({"return": {"a": 1}, "id": 5})),
            Message::Reply { id: Id::Known(5), result: Ok(json!({"a": 1})) }
        );
        let error = PeerError { class: "GenericError".into(), desc: "no".into() };
        assert_eq!(
            message(&json!({"error": {"class": "GenericError", "desc": "no"}})),
            Message::Reply { id: Id::Absent, result: Err(error) }
        );
        assert_eq!(
            message(&json!({"return": 1, "id": "x"})),
            Message::Reply { id: Id::Foreign, result: Ok(json!(1)) }
        );
        assert_eq!(
            message(&json!({"event": "NEVER_SEEN", "data": {"x": []},
                            "timestamp": {"seconds": 1_700_000_000, "microseconds": 123_456}})),
            Message::Event(Event {
                name: "NEVER_SEEN".into(),
                data: json!({"x": []}),
                timestamp: Duration::from_micros(1_700_000_000_123_456),
            })
        );
    }

    #[test]
    fn an_event_without_a_usable_time_is_kept() {
        for time in
            [json!({"seconds": -1, "microseconds": -1}), json!(null), json!([]), json!({"seconds": 1})]
        {
            let Message::Event(event) = message(&json!({"event": "STOP", "timestamp": time})) else {
                panic!()
            };
            assert_eq!((event.timestamp, event.data), (Duration::ZERO, Value::Null));
        }
        let most = json!({"seconds": u64::MAX, "microseconds": u64::MAX});
        let Message::Event(event) = message(&json!({"event": "STOP", "timestamp": most})) else { panic!() };
        assert_eq!(event.timestamp, Duration::MAX);
    }

    #[test]
    fn anything_else_is_malformed() {
        for line in [
            "{}",
            "[]",
            "1",
            r#"{"return": 1, "error": {"class": "a", "desc": "b"}}"#,
            r#"{"error": "no", "id": 1}"#,
            r#"{"error": {"class": "a"}, "id": 1}"#,
            r#"{"event": 1}"#,
            r#"{"return": 1, "id": 1} {"return": 1, "id": 2}"#,
        ] {
            assert!(parse(line.as_bytes()).is_err(), "{line}");
        }
        assert!(parse(b"{\"return\": \"\xff\", \"id\": 1}").is_err());
        assert!(parse("[".repeat(100_000).as_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }
    }
}
