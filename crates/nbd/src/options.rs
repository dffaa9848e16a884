//! What a connection is to be.

use crate::context::MetaContext;
use std::time::Duration;

/// How long a server may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    /// For connecting and the whole handshake; 10 s unless set.
    pub connect: Duration,
    /// For one request, from the call to its last byte, waiting for a free slot included; 60 s unless set.
    /// It is also the time [`Client::disconnect`](crate::Client::disconnect) waits for what is in flight.
    pub request: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self { connect: Duration::from_secs(10), request: Duration::from_secs(60) }
    }
}

/// What a connection is to be.
#[derive(Debug, Clone)]
pub struct Options {
    /// The export's name: at most 4096 bytes; empty is the server's default export.
    pub export: String,
    /// The maps to negotiate, each at most once.
    pub contexts: Vec<MetaContext>,
    /// How long the server may take.
    pub deadlines: Deadlines,
    /// How many requests may be unanswered at a time, by all clones of the client together; 16 unless set, zero
    /// counts as one.
    pub in_flight: usize,
}

impl Options {
    /// A connection to the export of that name, without maps.
    pub fn new(export: impl Into<String>) -> Self {
        Self { export: export.into(), contexts: Vec::new(), deadlines: Deadlines::default(), in_flight: 16 }
    }

    /// One more map to negotiate.
    #[must_use]
    pub fn context(mut self, context: MetaContext) -> Self {
        if !self.contexts.contains(&context) {
            self.contexts.push(context);
        }
        self
    }

    /// Other deadlines.
    #[must_use]
    pub fn deadlines(mut self, deadlines: Deadlines) -> Self {
        self.deadlines = deadlines;
        self
    }

    /// Another number of unanswered requests.
    #[must_use]
    pub fn in_flight(mut self, most: usize) -> Self {
        self.in_flight = most;
        self
    }
}
