//! `vmctr union ls` and `vmctr union inspect`.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use serde::Serialize;
use vmctr_vmm::config::Config;
use vmctr_vmm::run_dir::Role;

use super::check::Plan;
use super::record::{self, Relay, State, Union};
use crate::commands::Context;
use crate::failure::{Failure, Outcome, Verdict};
use crate::output;

/// A union as it is printed.
#[derive(Serialize)]
struct View {
    mountpoint: PathBuf,
    state: &'static str,
    pid: Option<u32>,
    qemu_pid: Option<u32>,
    fsd_pid: Option<u32>,
    lowers: Vec<PathBuf>,
    upper: Option<PathBuf>,
    work: Option<PathBuf>,
    options: Vec<String>,
    relay: Relay,
    log: PathBuf,
    /// The command that removes what is left of it.
    clean_up: Option<String>,
}

impl View {
    fn of(union: Union) -> Self {
        let state = union.state();
        let clean_up = format!("vmctr union umount {}", union.mountpoint.display());
        let process = |role| union.process(role);
        let relay = union.relay();
        let (pid, qemu_pid, fsd_pid) = (process(Role::Shim), process(Role::Qemu), process(Role::Fsd));
        let (lowers, top, options) = match union.plan {
            Some(Plan { lowers, top, options, .. }) => (lowers, top, options),
            None => Default::default(),
        };
        let (upper, work) = top.map(|top| (top.upper, top.work)).unzip();
        Self {
            relay,
            log: record::log(&union.entry.path),
            mountpoint: union.mountpoint,
            state: state.as_str(),
            pid,
            qemu_pid,
            fsd_pid,
            lowers,
            upper,
            work,
            options,
            clean_up: matches!(state, State::Lost | State::Dead).then_some(clean_up),
        }
    }

    fn row(&self) -> Vec<String> {
        vec![
            self.mountpoint.display().to_string(),
            self.state.to_owned(),
            or_dash(self.pid),
            or_dash(self.qemu_pid),
            self.lowers.len().to_string(),
            or_dash(self.upper.as_ref().map(|upper| upper.display())),
        ]
    }
}

/// Prints all unions, and how to remove what is left of those that ended badly.
pub fn list(context: &Context, config: &Config) -> Outcome {
    let views: Vec<_> = record::list(&config.run_dir)?.into_iter().map(View::of).collect();
    if context.json {
        output::json(&views)?;
    } else {
        let header = ["MOUNTPOINT", "STATE", "PID", "QEMU PID", "LOWERS", "UPPER"];
        output::print_line(&output::table(&header, views.iter().map(View::row)))?;
        for command in views.iter().filter_map(|view| view.clean_up.as_ref()) {
            eprintln!("hint: `{command}` removes what is left");
        }
    }
    Ok(Verdict::Good)
}

/// Prints all that is known of one.
pub fn inspect(context: &Context, config: &Config, mountpoint: &Path) -> Outcome {
    let shown = mountpoint.display();
    let place = record::resolve(mountpoint).with_context(|| format!("Cannot use {shown}"))?;
    let union = record::find(&config.run_dir, &place)?
        .ok_or_else(|| Failure::not_found(anyhow!("No union is mounted on {shown}")))?;
    let view = View::of(union);
    if context.json {
        output::json(&view)?;
    } else {
        output::print_line(&text(&view))?;
    }
    Ok(Verdict::Good)
}

fn text(view: &View) -> String {
    let paths = |paths: &[PathBuf]| {
        paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join("\n")
    };
    output::pairs([
        ("mountpoint", view.mountpoint.display().to_string()),
        ("state", view.state.to_owned()),
        ("lower folders", paths(&view.lowers)),
        ("upper folder", or_dash(view.upper.as_ref().map(|path| path.display()))),
        ("work folder", or_dash(view.work.as_ref().map(|path| path.display()))),
        ("options", view.options.join(",")),
        ("process", or_dash(view.pid)),
        ("qemu", or_dash(view.qemu_pid)),
        ("fsd", or_dash(view.fsd_pid)),
        ("asked the VM", view.relay.turns.to_string()),
        ("read on the host", view.relay.host_reads.to_string()),
        ("log", view.log.display().to_string()),
        ("clean-up", or_dash(view.clean_up.as_ref())),
    ])
}

fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}
