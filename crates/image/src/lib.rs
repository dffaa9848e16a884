//! Image files.
