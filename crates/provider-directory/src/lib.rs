//! Provider that keeps points as plain images in a directory
