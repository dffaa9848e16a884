//! The job and the command line.
