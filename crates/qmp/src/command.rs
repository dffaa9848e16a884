//! What is sent, and what comes back of several commands sent as one.

use crate::Result;
use serde_json::{Map, Value};
use std::{fmt, time::Instant};

/// A command and its arguments. Its name is fixed in the program's text, so that nothing from outside can choose it.
///
/// `Debug` shows the name alone: arguments may hold secrets.
#[derive(Clone, PartialEq)]
pub struct Command {
    name: &'static str,
    arguments: Value,
}

impl Command {
    /// A command without arguments.
    pub fn new(name: &'static str) -> Self {
        Self { name, arguments: Value::Null }
    }

    /// A command with `arguments`, which are a JSON object.
    pub fn with(name: &'static str, arguments: Value) -> Self {
        Self { name, arguments }
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Its arguments; `Null` if it has none.
    pub fn arguments(&self) -> &Value {
        &self.arguments
    }

    /// Appends the command as one line.
    pub(crate) fn encode(self, id: u64, out: &mut Vec<u8>) {
        let mut line = Map::new();
        line.insert("execute".into(), self.name.into());
        if !self.arguments.is_null() {
            line.insert("arguments".into(), self.arguments);
        }
        line.insert("id".into(), id.into());
        out.extend_from_slice(Value::Object(line).to_string().as_bytes());
        out.push(b'\n');
    }
}

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Command").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What came of [`Qmp::pipeline`](crate::Qmp::pipeline). `replies` and `done` have one entry per command, in the
/// order of the commands.
#[derive(Debug)]
pub struct Pipelined {
    /// Each command's reply. QEMU runs a command also if one before it failed.
    pub replies: Vec<Result<Value>>,
    /// Just before the first byte was handed to the kernel.
    pub sent: Instant,
    /// When each reply was read from the socket; for one that never came, when it was given up.
    pub done: Vec<Instant>,
}

#[cfg(test)]
mod test {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_command_is_one_line() {
        let mut out = Vec::new();
        Command::new("stop").encode(7, &mut out);
        Command::with("qom-get", json!({"path": "a\nb", "property": "type"})).encode(u64::MAX, &mut out);
        let lines: Vec<Value> = out
            .split_inclusive(|byte| *byte == b'\n')
            .map(|line| serde_json::from_slice(line).unwrap())
            .collect();
        assert_eq!(
            lines,
            [
                json!({"execute": "stop", "id": 7}),
                json!({"execute": "qom-get", "arguments": {"path": "a\nb", "property": "type"}, "id": u64::MAX}),
            ]
        );
    }

    #[test]
    fn debug_keeps_arguments_to_itself() {
        let command = Command::with("object-add", json!({"data": "hunter2"}));
        assert!(!format!("{command:?}").contains("hunter2"));
    }
}
