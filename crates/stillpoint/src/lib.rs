//! The job (backup, restore, verify) and the command line.
//!
//! It brings together a VM ([`stillpoint_snapshot_access`]) and a target ([`stillpoint_provider::Provider`]), and is
//! the only place that knows both. What a person reads is made here and nowhere else.
//!
//! ```text
//!   cli, config ----> commands: backup  points  restore  verify  doctor  recover  target
//!                        |
//!              vm, interrupt, progress               summary, failure ----> terminal or JSON
//! ```

mod backup;
mod bitmaps;
mod cli;
mod commands;
mod config;
mod config_files;
mod doctor;
mod failure;
mod interrupt;
mod places;
mod progress;
mod provider_check;
mod provider_failure;
mod reach;
mod repository;
mod restore;
mod runtime;
mod selection;
mod summary;
mod target;
mod text;
mod verify;
mod vm;

pub use cli::Cli;
pub use commands::run;
pub use failure::{Exit, Failure};
pub use stillpoint_snapshot_access::{run_guard, run_watcher, run_with_parent};

/// The first argument of the process that guards a guest: see [`run_guard`].
pub const GUARD: &str = "--guard-the-guest";

/// The first argument of the process that watches over the host's space: see [`run_watcher`].
pub const WATCHER: &str = "--watch-the-space";

/// The first argument of a program of ours that is to end with us: see [`run_with_parent`].
pub const WITH_PARENT: &str = "--end-with-parent";
