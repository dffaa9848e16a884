//! A second monitor on the guest's QEMU, for the test itself: small, blocking, and not the client under test.

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

/// A blocking QMP client.
#[derive(Debug)]
pub struct Monitor {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Monitor {
    /// Connects.
    ///
    /// # Errors
    /// If nobody answers within 20 s.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).with_context(|| format!("connect to {}", path.display()))?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut monitor = Self { lines: BufReader::new(stream.try_clone()?), stream };
        monitor.line()?;
        monitor.execute("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.lines.read_line(&mut line)? == 0 {
            bail!("QEMU is gone");
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// Runs a command; events on the way are passed over.
    ///
    /// # Errors
    /// If QEMU answers with an error, or not.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let message = json!({"execute": command, "arguments": arguments});
        self.stream.write_all(format!("{message}\n").as_bytes())?;
        loop {
            let answer = self.line()?;
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = answer.get("error") {
                bail!("{command}: {error}");
            }
        }
    }

    /// Waits for an event.
    ///
    /// # Errors
    /// If QEMU ends, or is silent for 20 s.
    pub fn wait_for(&mut self, event: &str) -> Result<Value> {
        loop {
            let message = self.line()?;
            if message.get("event").and_then(Value::as_str) == Some(event) {
                return Ok(message);
            }
        }
    }
}
