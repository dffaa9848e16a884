//! `provider check` and `provider schema`: for those who write providers.

mod real_qemu;

use crate::{
    cli,
    failure::{Exit, Failure},
    runtime,
    text::print,
};
use serde_json::json;
use std::time::Instant;
use stillpoint_provider_program::{
    Deadlines, Settings,
    check::{self, Verdict},
    protocol,
};

/// `provider`.
///
/// # Errors
/// Exit status 1 if a check fails, 2 if the program cannot be told what it is to be told.
pub(crate) async fn run(command: &cli::Provider) -> Result<Exit, Failure> {
    match command {
        cli::Provider::Schema => {
            print(serde_json::to_string_pretty(&protocol::schema()).unwrap_or_default());
            Ok(Exit::Done)
        }
        cli::Provider::Check(arguments) => check(arguments).await,
    }
}

async fn check(arguments: &cli::ProviderCheck) -> Result<Exit, Failure> {
    let settings = settings(arguments)?;
    let started = Instant::now();
    let tell = |outcome: &check::Outcome| {
        if !arguments.json {
            print(match &outcome.verdict {
                Verdict::Passed => format!("  passed       {}", outcome.what),
                Verdict::NotClaimed => format!("  not claimed  {}", outcome.what),
                Verdict::Failed(why) => format!("  FAILED       {}\n               {why}", outcome.what),
            });
        }
    };
    let mut outcomes = check::check(&settings, tell).await;
    if outcomes.len() > 1 {
        if real_qemu::is_there() {
            let verdict =
                real_qemu::check(&settings).await.map_or_else(Verdict::Failed, |()| Verdict::Passed);
            let outcome = check::Outcome {
                what: "keeps two points of a real QEMU's disks, and gives them back",
                verdict,
            };
            tell(&outcome);
            outcomes.push(outcome);
        } else {
            crate::text::note(
                "not checked with a real QEMU: there is no qemu-system-x86_64 with its tools here",
            );
        }
    }
    let count = |of: fn(&Verdict) -> bool| outcomes.iter().filter(|outcome| of(&outcome.verdict)).count();
    let failed = count(|verdict| matches!(verdict, Verdict::Failed(_)));
    let (passed, unclaimed) = (count(|v| *v == Verdict::Passed), count(|v| *v == Verdict::NotClaimed));
    if arguments.json {
        let check = |outcome: &check::Outcome| {
            let (result, why) = match &outcome.verdict {
                Verdict::Passed => ("passed", None),
                Verdict::NotClaimed => ("not-claimed", None),
                Verdict::Failed(why) => ("failed", Some(why)),
            };
            json!({"check": outcome.what, "result": result, "why": why})
        };
        let checks: Vec<_> = outcomes.iter().map(check).collect();
        print(json!({"checks": checks, "passed": passed, "failed": failed, "not_claimed": unclaimed}));
    } else {
        let took = crate::text::duration(started.elapsed());
        print(format!("{passed} passed, {failed} failed, {unclaimed} not claimed, in {took}"));
    }
    if failed == 0 {
        return Ok(Exit::Done);
    }
    Err(Failure::new(Exit::Failed, format!("{failed} checks failed"))
        .next("see docs/provider-protocol.md for what each request asks"))
}

fn settings(arguments: &cli::ProviderCheck) -> Result<Settings, Failure> {
    let (program, rest) = arguments.program.split_first().ok_or_else(|| Failure::usage("name a program"))?;
    // A name alone is looked for as a shell would.
    let program = if program.to_string_lossy().contains('/') {
        std::path::absolute(program)
            .map_err(|error| Failure::because(Exit::Usage, "the program's path", &error))?
    } else {
        program.into()
    };
    let options = serde_json::from_str(&arguments.options)
        .map_err(|error| Failure::because(Exit::Usage, "--options is no JSON object", &error))?;
    let mechanism = arguments.mechanism.as_deref().map(|name| {
        check::mechanism(name).ok_or_else(|| {
            Failure::usage(format!(
                "there is no mechanism {name:?}; there are nbd, file-handle and block-device"
            ))
        })
    });
    let pair = |text: &String| {
        let pair = text.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
        pair.ok_or_else(|| Failure::usage(format!("--env {text:?} is no NAME=VALUE")))
    };
    let runtime_directory = runtime::directory();
    stillpoint_snapshot_access::private_directory(&runtime_directory)
        .map_err(|error| Failure::because(Exit::Failed, "no place for the provider's sockets", &error))?;
    Ok(Settings {
        program,
        arguments: rest.to_vec(),
        environment: arguments.env.iter().map(pair).collect::<Result<_, _>>()?,
        options,
        bandwidth_limit: None,
        deadlines: Deadlines { quiet: std::time::Duration::from_secs(30), ..Deadlines::default() },
        runtime_directory,
        mechanism: mechanism.transpose()?,
    })
}
