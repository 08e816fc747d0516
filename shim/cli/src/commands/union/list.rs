//! `vmctr union ls` and `vmctr union inspect`.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use serde::Serialize;
use vmctr_vmm::config::Config;
use vmctr_vmm::run_dir::Role;

use super::check::Plan;
use super::order::Order;
use super::record::{self, Mount, Relay, State};
use crate::commands::Context;
use crate::failure::{Failure, Outcome, Verdict};
use crate::output;

/// A mount as it is printed.
#[derive(Default, Serialize)]
struct View {
    mountpoint: PathBuf,
    kind: &'static str,
    state: &'static str,
    pid: Option<u32>,
    qemu_pid: Option<u32>,
    fsd_pid: Option<u32>,
    lowers: Vec<PathBuf>,
    upper: Option<PathBuf>,
    work: Option<PathBuf>,
    options: Vec<String>,
    namespace: Option<String>,
    container: Option<String>,
    /// What went wrong.
    lost: Option<String>,
    relay: Relay,
    log: PathBuf,
    /// The command that removes what is left of it.
    clean_up: Option<String>,
}

impl View {
    fn of(mount: Mount) -> Self {
        let (kind, state) = (mount.kind(), mount.state());
        let verb = if kind == "union" { "union umount" } else { "umount" };
        let clean_up = format!("vmctr {verb} {}", output::shell_word(&mount.mountpoint));
        let process = |role| mount.process(role);
        let view = Self {
            kind,
            state: state.as_str(),
            pid: process(Role::Shim),
            qemu_pid: process(Role::Qemu),
            fsd_pid: process(Role::Fsd),
            relay: mount.relay(),
            log: record::log(&mount.entry.path),
            clean_up: matches!(state, State::Lost | State::Dead).then_some(clean_up),
            lost: mount.lost,
            mountpoint: mount.mountpoint,
            ..Self::default()
        };
        view.with(mount.order)
    }

    fn with(self, order: Option<Order>) -> Self {
        match order {
            Some(Order::Union(Plan { lowers, top, options, .. })) => {
                let (upper, work) = top.map(|top| (top.upper, top.work)).unzip();
                Self { lowers, upper, work, options, ..self }
            }
            Some(Order::Container(target)) => Self {
                namespace: Some(target.namespace),
                container: Some(target.container),
                options: vec![if target.read_only { "ro" } else { "rw" }.to_owned()],
                ..self
            },
            None => self,
        }
    }

    fn row(&self) -> Vec<String> {
        vec![
            self.mountpoint.display().to_string(),
            self.kind.to_owned(),
            self.state.to_owned(),
            or_dash(self.pid),
            or_dash(self.qemu_pid),
            self.source(),
        ]
    }

    /// Whose files it shows.
    fn source(&self) -> String {
        match (&self.container, &self.upper, self.lowers.len()) {
            (Some(container), _, _) => container.clone(),
            (None, Some(upper), lowers) => format!("{} over {lowers}", upper.display()),
            (None, None, 0) => "-".to_owned(),
            (None, None, lowers) => format!("{lowers}, read-only"),
        }
    }
}

/// Prints all mounts, what went wrong, and how to remove what is left of those that ended badly.
pub fn list(context: &Context, config: &Config) -> Outcome {
    let views: Vec<_> = record::list(&config.run_dir)?.into_iter().map(View::of).collect();
    if context.json {
        output::json(&views)?;
    } else {
        let header = ["MOUNTPOINT", "KIND", "STATE", "PID", "QEMU PID", "SOURCE"];
        output::print_line(&output::table(&header, views.iter().map(View::row)))?;
        for (view, why) in views.iter().filter_map(|view| Some((view, view.lost.as_ref()?))) {
            eprintln!("{}: {why}", view.mountpoint.display());
        }
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
    let mount = record::find(&config.run_dir, &place)?
        .ok_or_else(|| Failure::not_found(anyhow!("No union or container is mounted on {shown}")))?;
    let view = View::of(mount);
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
        ("kind", view.kind.to_owned()),
        ("state", view.state.to_owned()),
        ("namespace", or_dash(view.namespace.as_ref())),
        ("container", or_dash(view.container.as_ref())),
        ("lower folders", paths(&view.lowers)),
        ("upper folder", or_dash(view.upper.as_ref().map(|path| path.display()))),
        ("work folder", or_dash(view.work.as_ref().map(|path| path.display()))),
        ("options", view.options.join(",")),
        ("process", or_dash(view.pid)),
        ("qemu", or_dash(view.qemu_pid)),
        ("fsd", or_dash(view.fsd_pid)),
        ("lost", or_dash(view.lost.as_ref())),
        ("asked the VM", view.relay.turns.to_string()),
        ("read on the host", view.relay.host_reads.to_string()),
        ("written on the host", view.relay.host_writes.to_string()),
        ("log", view.log.display().to_string()),
        ("clean-up", or_dash(view.clean_up.as_ref())),
    ])
}

fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}
