//! QEMU's command line: a pure function of the machine and of the numbers that the passed file descriptors
//! have in QEMU.
//!
//! What is there is what the guest needs: RAM that vhost-user daemons can map, a serial console, a balloon that
//! gives free memory back, vsock, and the share. No network, no disk, no display, no USB, no firmware settings from files. Entropy comes from
//! the CPU (RDRAND, which TCG provides too), so there is no device for it.
//!
//! A VM that becomes a template and one that is restored from it have the same machine, but for the vhost-user
//! devices, which the template does not have. QEMU cannot save the vsock device, and refuses to restore a state
//! into a machine with such a device; so both are plugged in afterwards ([`late_vsock`], [`late_share`]), on a PCI
//! Express machine into ports that the template has for them.
//!
//! Such a machine also has ports for the shares of unions, which come and go while it runs. What the guest does with
//! ports, its agent does through their registers; QEMU's way through ACPI would take a guest that reads ACPI's tables.

use serde_json::{Value, json};
use vmctr_proto::guest_paths::{SHARE_TAG, union_tag};
use vmctr_proto::union_ports::{self, LATE, Place};

use crate::jail::GuestFile;
use crate::spec::{Machine, Vcpus, VmSpec};

/// Where QEMU finds the file descriptor of a template's state.
pub const STATE_URI: &str = "file:/dev/fdset/2";

const VSOCK: &str = "vsock";
const VSOCK_DRIVER: &str = "vhost-user-vsock-pci";
const SHARE: &str = "share";
const SHARE_DRIVER: &str = "vhost-user-fs-pci";

/// Where the devices of a restored VM go.
const VSOCK_PORT: &str = "late-vsock";
const SHARE_PORT: &str = "late-share";

/// Numbers of the file descriptors that QEMU inherits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QemuFds {
    /// Stream socket of the QMP monitor.
    pub qmp: i32,
    /// Stream socket that the guest's console is written to.
    pub console: i32,
    /// vhost-user socket of the vsock device.
    pub vsock: Option<i32>,
    /// vhost-user socket of the share.
    pub share: Option<i32>,
}

/// What the machine is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Boots and is used.
    Boot,
    /// Boots and is saved: its RAM is a file, `state` the number of the descriptor for the rest.
    Template {
        /// Open for writing.
        state: i32,
    },
    /// Goes on where a template was saved.
    Restore {
        /// Open for reading.
        state: i32,
    },
}

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// The host's kernel.
    Kvm {
        /// Number of the file descriptor of `/dev/kvm`.
        device: i32,
    },
    /// QEMU's translator.
    Tcg {
        /// Rate of the host's time-stamp counter, which the guest sees.
        tsc_khz: u64,
    },
}

/// Arguments after the program's name.
#[must_use]
pub fn arguments(spec: &VmSpec, engine: Engine, purpose: Purpose, fds: QemuFds) -> Vec<String> {
    let mut args = vec![];
    isolate(&mut args);
    machine(&mut args, spec, purpose);
    cpu(&mut args, spec.vcpus(), engine);
    guest(&mut args, spec.vcpus(), engine, purpose);
    devices(&mut args, spec.machine(), purpose, fds);
    args
}

fn add(args: &mut Vec<String>, option: &str, value: impl Into<String>) {
    args.push(option.to_owned());
    args.push(value.into());
}

fn isolate(args: &mut Vec<String>) {
    args.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(str::to_owned));
    add(args, "-display", "none");
    add(args, "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
}

fn machine(args: &mut Vec<String>, spec: &VmSpec, purpose: Purpose) {
    let trimmed = match spec.machine() {
        Machine::Q35 => "q35,sata=off,smbus=off,i8042=off,usb=off,vmport=off,hpet=off,smm=off",
        Machine::Pc => "pc,smbus=off,i8042=off,usb=off,vmport=off,hpet=off,smm=off",
    };
    add(args, "-machine", format!("{trimmed},memory-backend=ram"));
    if spec.machine() == Machine::Q35 {
        add(args, "-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off");
    }
    let size = spec.memory().mib();
    let backend = match purpose {
        Purpose::Boot => "memory-backend-memfd".to_owned(),
        Purpose::Template { .. } | Purpose::Restore { .. } => {
            format!("memory-backend-file,mem-path={}", GuestFile::Ram.path())
        }
    };
    add(args, "-object", format!("{backend},id=ram,size={size}M,share=on"));
    add(args, "-m", format!("{size}M"));
}

fn cpu(args: &mut Vec<String>, vcpus: Vcpus, engine: Engine) {
    /// MiB of translated code that QEMU keeps for each CPU; all is thrown away when they are full. They stay in
    /// memory once used. A restored VM's first container needs more than 32 and after a rehearsal nearly 50: with
    /// 32 that container takes a third longer to start, and the rehearsal is for nothing.
    const TRANSLATED_CODE: u32 = 64;
    /// Without the flags that make string instructions on single bytes look fast: QEMU carries those out byte for
    /// byte, and a kernel that sees no such flag copies and clears eight bytes at a time.
    const EMULATED_CPU: &str = "max,-erms,-fsrm,-fzrm,-fsrs";
    add(args, "-smp", vcpus.to_string());
    match engine {
        Engine::Kvm { device } => {
            add(args, "-add-fd", format!("fd={device},set=1"));
            add(args, "-accel", "kvm,device=/dev/fdset/1");
            add(args, "-cpu", "host");
        }
        Engine::Tcg { .. } => {
            let size = TRANSLATED_CODE * vcpus.get();
            add(args, "-accel", format!("tcg,thread=multi,tb-size={size}"));
            add(args, "-cpu", EMULATED_CPU);
        }
    }
}

fn guest(args: &mut Vec<String>, vcpus: Vcpus, engine: Engine, purpose: Purpose) {
    match purpose {
        Purpose::Boot => kernel(args, vcpus, engine),
        Purpose::Template { state } => {
            kernel(args, vcpus, engine);
            saved_state(args, state);
        }
        Purpose::Restore { state } => {
            add(args, "-incoming", "defer");
            saved_state(args, state);
        }
    }
}

fn kernel(args: &mut Vec<String>, vcpus: Vcpus, engine: Engine) {
    add(args, "-kernel", GuestFile::Kernel.path());
    add(args, "-initrd", GuestFile::Initramfs.path());
    add(args, "-append", kernel_arguments(vcpus, engine));
}

fn saved_state(args: &mut Vec<String>, state: i32) {
    add(args, "-add-fd", format!("fd={state},set=2"));
}

/// A panic ends the VM at once (`panic=-1` with QEMU's `-no-reboot`). Without KVM the guest shares no
/// CPU state with the host that mitigations could protect, and they cost most there; for the counter's
/// rate see [`crate::tsc`]. With KVM the guest learns the rate from the host's kernel.
///
/// Security modules have no policy in the guest, so only Landlock stays, which processes use by themselves. What
/// ACPI tells, the kernel of an emulated machine finds in less time by itself, all but a second CPU; interpreting
/// its tables would be a sixth of what the guest does between a restore and its first call.
fn kernel_arguments(vcpus: Vcpus, engine: Engine) -> String {
    let common = "console=ttyS0 quiet panic=-1 reboot=t no_timer_check random.trust_cpu=on cryptomgr.notests lsm=landlock pcie_ports=compat";
    match engine {
        Engine::Kvm { .. } => common.to_owned(),
        Engine::Tcg { tsc_khz } => {
            let acpi = if vcpus == Vcpus::ONE { " acpi=off" } else { "" };
            format!("{common} mitigations=off tsc=reliable tsc_early_khz={tsc_khz}{acpi}")
        }
    }
}

fn devices(args: &mut Vec<String>, machine: Machine, purpose: Purpose, fds: QemuFds) {
    add(args, "-chardev", format!("socket,id=qmp,fd={}", fds.qmp));
    add(args, "-mon", "chardev=qmp,mode=control");
    add(args, "-chardev", format!("socket,id=console,fd={}", fds.console));
    add(args, "-serial", "chardev:console");
    // What a template has comes first, so that it has the same places on the bus with and without the others.
    add(args, "-device", "virtio-balloon-pci,free-page-reporting=on");
    if machine == Machine::Q35 {
        ports(args, purpose);
    }
    if let Some(vsock) = fds.vsock {
        add(args, "-chardev", format!("socket,id={VSOCK},fd={vsock}"));
    }
    if let Some(share) = fds.share {
        add(args, "-chardev", format!("socket,id={SHARE},fd={share}"));
    }
    if purpose == Purpose::Boot && fds.vsock.is_some() {
        add(args, "-device", format!("{VSOCK_DRIVER},chardev={VSOCK}"));
    }
    if purpose == Purpose::Boot && fds.share.is_some() {
        add(args, "-device", format!("{SHARE_DRIVER},chardev={SHARE},tag={SHARE_TAG}"));
    }
}

fn ports(args: &mut Vec<String>, purpose: Purpose) {
    let mut add_port = |name: &str, slot: u32, Place { device, function }: Place| {
        let many = if function == 0 && device != UNIONS { "" } else { ",multifunction=on" };
        let place = format!("addr={device}.{function}{many}");
        add(args, "-device", format!("pcie-root-port,id={name},chassis={slot},slot={slot},{place}"));
    };
    if purpose != Purpose::Boot {
        for (slot, (name, place)) in (1..).zip([VSOCK_PORT, SHARE_PORT].into_iter().zip(LATE)) {
            add_port(name, slot, place);
        }
    }
    for port in 0..union_ports::COUNT {
        add_port(&union_port(port), FIRST_UNION_SLOT + port, Place::of_union(port));
    }
}

/// The device whose functions are the ports for unions.
const UNIONS: u32 = Place::of_union(0).device;
/// Slots have numbers of their own, after those of the ports for a restored VM's devices.
const FIRST_UNION_SLOT: u32 = 3;

/// A request takes at most as many pages as its queue has places, less a few. With QEMU's default of 128 that is half
/// of what FUSE can send at once, 1 MiB, which is also what overlay copies up at once.
const UNION_QUEUE: u32 = 512;

fn union_port(port: u32) -> String {
    format!("union-port-{port}")
}

/// How many unions a machine can have.
#[must_use]
pub fn union_ports(machine: Machine) -> u32 {
    match machine {
        Machine::Q35 => union_ports::COUNT,
        // It can be plugged in, but not be taken out again.
        Machine::Pc => 1,
    }
}

/// QEMU's name for the device in a union's port, and for its connection.
#[must_use]
pub fn union_device(port: u32) -> String {
    format!("union-{port}")
}

/// Arguments of `device_add` for the share of a union.
#[must_use]
pub fn union_share(machine: Machine, port: u32) -> Value {
    let name = union_device(port);
    let bus = match machine {
        Machine::Q35 => union_port(port),
        Machine::Pc => "pci.0".to_owned(),
    };
    let tag = union_tag(port);
    json!({ "driver": SHARE_DRIVER, "id": name, "chardev": name, "tag": tag, "bus": bus, "queue-size": UNION_QUEUE })
}

/// Arguments of the monitor's `device_add` for the vsock device of a restored VM.
#[must_use]
pub fn late_vsock(machine: Machine) -> Value {
    json!({ "driver": VSOCK_DRIVER, "chardev": VSOCK, "bus": late_bus(machine, VSOCK_PORT) })
}

/// The same for its share.
#[must_use]
pub fn late_share(machine: Machine) -> Value {
    json!({ "driver": SHARE_DRIVER, "chardev": SHARE, "tag": SHARE_TAG, "bus": late_bus(machine, SHARE_PORT) })
}

fn late_bus(machine: Machine, port: &'static str) -> &'static str {
    match machine {
        Machine::Q35 => port,
        Machine::Pc => "pci.0",
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::config::VmDefaults;
    use crate::memory::MemoryMib;
    use crate::spec::{Host, Limits};

    const FDS: QemuFds = QemuFds { qmp: 3, console: 4, vsock: Some(5), share: Some(6) };
    const TCG: Engine = Engine::Tcg { tsc_khz: 2_600_000 };

    fn spec(machine: Machine) -> VmSpec {
        let defaults = VmDefaults { machine, ..VmDefaults::default() };
        let host = Host { cpus: Vcpus::ONE, memory: MemoryMib::new(4096) };
        VmSpec::resolve(&defaults, &Limits::default(), &HashMap::<String, String>::new(), &host).unwrap()
    }

    fn lines(args: &[String]) -> String {
        args.iter()
            .fold(String::new(), |text, arg| text + if arg.starts_with('-') { "\n" } else { " " } + arg)
    }

    #[test]
    fn the_whole_command_line_under_tcg() {
        let want = "
-nodefaults
-no-user-config
-no-reboot
-display none
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-machine q35,sata=off,smbus=off,i8042=off,usb=off,vmport=off,hpet=off,smm=off,memory-backend=ram
-global ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off
-object memory-backend-memfd,id=ram,size=512M,share=on
-m 512M
-smp 1
-accel tcg,thread=multi,tb-size=64
-cpu max,-erms,-fsrm,-fzrm,-fsrs
-kernel /guest/kernel
-initrd /guest/initramfs
-append console=ttyS0 quiet panic=-1 reboot=t no_timer_check random.trust_cpu=on cryptomgr.notests lsm=landlock pcie_ports=compat mitigations=off tsc=reliable tsc_early_khz=2600000 acpi=off
-chardev socket,id=qmp,fd=3
-mon chardev=qmp,mode=control
-chardev socket,id=console,fd=4
-serial chardev:console
-device virtio-balloon-pci,free-page-reporting=on
-device pcie-root-port,id=union-port-0,chassis=3,slot=3,addr=6.0,multifunction=on
-device pcie-root-port,id=union-port-1,chassis=4,slot=4,addr=6.1,multifunction=on
-device pcie-root-port,id=union-port-2,chassis=5,slot=5,addr=6.2,multifunction=on
-device pcie-root-port,id=union-port-3,chassis=6,slot=6,addr=6.3,multifunction=on
-device pcie-root-port,id=union-port-4,chassis=7,slot=7,addr=6.4,multifunction=on
-device pcie-root-port,id=union-port-5,chassis=8,slot=8,addr=6.5,multifunction=on
-device pcie-root-port,id=union-port-6,chassis=9,slot=9,addr=6.6,multifunction=on
-device pcie-root-port,id=union-port-7,chassis=10,slot=10,addr=6.7,multifunction=on
-chardev socket,id=vsock,fd=5
-chardev socket,id=share,fd=6
-device vhost-user-vsock-pci,chardev=vsock
-device vhost-user-fs-pci,chardev=share,tag=vmctr";
        assert_eq!(lines(&arguments(&spec(Machine::Q35), TCG, Purpose::Boot, FDS)), want);
    }

    #[test]
    fn kvm_comes_by_descriptor_and_keeps_mitigations() {
        let text = lines(&arguments(&spec(Machine::Q35), Engine::Kvm { device: 7 }, Purpose::Boot, FDS));
        assert!(text.contains("\n-add-fd fd=7,set=1\n-accel kvm,device=/dev/fdset/1\n-cpu host\n"), "{text}");
        assert!(!text.contains("mitigations"), "{text}");
    }

    #[test]
    fn without_a_share_there_is_no_virtiofs_device() {
        let fds = QemuFds { share: None, ..FDS };
        let text = lines(&arguments(&spec(Machine::Pc), TCG, Purpose::Boot, fds));
        assert!(!text.contains("vhost-user-fs"), "{text}");
        assert!(text.contains("\n-machine pc,"), "{text}");
    }

    /// QEMU takes a state only into the machine that it was saved from.
    #[test]
    fn a_restored_machine_differs_from_its_template_in_its_start_and_the_added_devices() {
        let bare = QemuFds { vsock: None, share: None, ..FDS };
        let template = arguments(&spec(Machine::Q35), TCG, Purpose::Template { state: 9 }, bare);
        let restored = arguments(&spec(Machine::Q35), TCG, Purpose::Restore { state: 9 }, FDS);
        let only_in = |one: &[String], other: &[String]| {
            let (one, other) = (lines(one), lines(other));
            let differs = |line: &&str| !other.lines().any(|other| other == *line);
            one.lines()
                .filter(differs)
                .filter_map(|line| line.split(' ').next())
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(only_in(&template, &restored), "-kernel -initrd -append");
        assert_eq!(only_in(&restored, &template), "-incoming -chardev -chardev");
        assert!(lines(&template).contains("\n-device pcie-root-port,id=late-vsock,"));
        assert_eq!(late_vsock(Machine::Q35)["bus"], "late-vsock");
        assert_eq!(late_share(Machine::Q35)["bus"], "late-share");
        assert_eq!(late_vsock(Machine::Pc)["bus"], "pci.0");
        assert!(lines(&restored).contains(
            "\n-device pcie-root-port,id=union-port-7,chassis=10,slot=10,addr=6.7,multifunction=on\n"
        ));
        assert_eq!(union_share(Machine::Q35, 7)["bus"], "union-port-7");
        assert_eq!(union_share(Machine::Pc, 0)["bus"], "pci.0");
        assert!(
            lines(&template)
                .contains("\n-object memory-backend-file,mem-path=/guest/ram,id=ram,size=512M,share=on\n")
        );
    }
}
