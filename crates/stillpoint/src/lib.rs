//! The job (backup, restore, verify) and the command line.
//!
//! It brings together a VM ([`stillpoint_snapshot_access`]) and a target ([`stillpoint_provider::Provider`]), and is
//! the only place that knows both. What a person reads is made here and nowhere else.
//!
//! ```text
//!   cli, config ----> commands: backup  points  restore  verify  doctor  recover  target
//!                        |
//!              vm, lock, interrupt, progress         summary, failure ----> terminal or JSON
//! ```

mod backup;
mod cli;
mod commands;
mod config;
mod doctor;
mod failure;
mod interrupt;
mod lock;
mod progress;
mod restore;
mod runtime;
mod summary;
mod text;
mod vm;

pub use cli::Cli;
pub use commands::run;
pub use failure::{Exit, Failure};
