//! What can be said of the code without running it.

use crate::{cargo, deny, step};
use anyhow::Result;

/// Format, lints, documentation, dependencies.
pub(crate) fn run() -> Result<()> {
    step("format", &mut cargo(&["fmt", "--all", "--check"]))?;
    let lints = ["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"];
    step("lints", &mut cargo(&lints))?;
    let mut documentation = cargo(&["doc", "--workspace", "--no-deps", "--locked"]);
    step("documentation", documentation.env("RUSTDOCFLAGS", "-D warnings"))?;
    deny::run()
}
