//! Asynchronous client for the NBD protocol
