//! Boots one VM by hand and prints how long each phase took: `boot RUN_DIR [pause]`.
use std::collections::HashMap;

use vmctr_vmm::accel;
use vmctr_vmm::assets::GuestAssets;
use vmctr_vmm::config::Config;
use vmctr_vmm::qemu::Qemu;
use vmctr_vmm::run_dir::{Owner, RunDir};
use vmctr_vmm::spec::{Host, Limits, VmSpec};
use vmctr_vmm::vm::{Vm, VmStart};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let mut args = std::env::args().skip(1);
    let config = Config { run_dir: args.next().ok_or("no run directory")?.into(), ..Config::load()? };
    let hold = args.next();
    let assets = GuestAssets::find(&config)?;
    let qemu = Qemu::find(&config)?;
    let resolution = accel::resolve(&config, &assets, &qemu).await?;
    println!("{resolution:?}");
    let spec =
        VmSpec::resolve(&config.vm, &Limits::default(), &HashMap::<String, String>::new(), &Host::detect())?;
    let owner = Owner {
        namespace: "boot".into(),
        container_id: "boot".into(),
        bundle: config.run_dir.join("bundle"),
    };
    let run_dir = RunDir::create(&config.run_dir, owner)?;
    let start = VmStart {
        spec,
        assets,
        qemu,
        accelerator: resolution.accelerator,
        run_dir: run_dir.clone(),
        jail: config.jail,
        share: None,
        boot_timeout: config.vm.boot_timeout_seconds.duration(),
    };
    let vm = match Vm::start(start).await {
        Ok(vm) => vm,
        Err(error) => {
            run_dir.remove()?;
            println!("{}", vmctr_vmm::error_chain(&error));
            std::process::exit(1)
        }
    };
    println!("{:?} {:?}", vm.phases(), vm.hello());
    if let Some(hold) = hold {
        println!("qemu {}", vm.qemu_pid());
        vm.pause().await?;
        println!("{}", *vm.state().borrow());
        vm.resume().await?;
        println!("{}", *vm.state().borrow());
        tokio::select! { ended = vm.ended() => println!("{ended:?}"), _ = tokio::time::sleep(std::time::Duration::from_secs(hold.parse()?)) => {} }
    }
    let t = std::time::Instant::now();
    vm.stop().await?;
    println!("stop {:?} {:?}", t.elapsed(), *vm.state().borrow());
    run_dir.remove()?;
    Ok(())
}
