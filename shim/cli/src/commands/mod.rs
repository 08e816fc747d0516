//! One module per verb.

mod commit;
mod diff;
mod doctor;
mod guest;
mod inspect;
mod layer;
mod pool;
mod ps;
mod template;
mod union;
mod version;

use std::path::PathBuf;

use vmctr_vmm::config::Config;

use crate::cli::{Cli, PoolVerb, Verb};
use crate::containerd::socket_path;
use crate::failure::Outcome;

pub use union::mount_helper;

/// What every verb may need.
pub struct Context {
    /// containerd's socket.
    pub address: PathBuf,
    /// containerd's namespace.
    pub namespace: String,
    /// Whether the answer is to be JSON.
    pub json: bool,
}

/// Does what the command line says.
pub async fn run(cli: Cli) -> Outcome {
    let globals = cli.globals;
    let context =
        Context { address: socket_path(&globals.address), namespace: globals.namespace, json: globals.json };
    match cli.verb {
        Verb::Doctor => doctor::run(&context).await,
        Verb::Ps => ps::run(&context).await,
        Verb::Inspect { id } => inspect::run(&context, &id).await,
        Verb::Commit(args) => commit::run(&context, *args).await,
        Verb::Diff { container } => diff::run(&context, &container).await,
        Verb::Layer(verb) => layer::run(&context, verb).await,
        Verb::Version => version::run(&context).await,
        Verb::Guest(verb) => guest::run(&context, verb),
        Verb::Pool(PoolVerb::Run) => pool::run(&config()?),
        Verb::Pool(PoolVerb::Ls) => pool::list(&context, &config()?),
        Verb::Mount(args) => union::mount_container(&context, &config()?, &args).await,
        Verb::Umount(args) => union::umount(&config()?, &args),
        Verb::Union(verb) => union::run(&context, verb).await,
        Verb::Template(verb) => template::run(&context, verb).await,
    }
}

/// The configuration file, or the defaults.
fn config() -> Result<Config, crate::failure::Failure> {
    Ok(Config::load()?)
}
