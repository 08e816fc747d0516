//! What flows into and out of a container: pipes, long streams, terminals.

use std::process::Stdio;
use std::thread;
use std::time::Duration;

use vmctr_tests::rig::command::Running;
use vmctr_tests::rig::terminal::Terminal;
use vmctr_tests::rig::{Rig, proc, stream};
use vmctr_tests::under_both_runtimes;

const MIB: u64 = 1 << 20;

under_both_runtimes! {
    piped_input_arrives_and_ends,
    a_gibibyte_through_cat_arrives_intact,
    both_outputs_are_kept_apart_however_much_is_written,
    a_container_without_stdio_is_not_held_by_its_output,
    a_terminal_has_its_size_and_can_be_resized,
    keys_that_mean_signals_work_on_a_terminal,
    a_further_process_can_have_a_terminal,
}

fn piped_input_arrives_and_ends(rig: &mut Rig) {
    let output = rig.container("cat").sh("cat; echo end").output_with_input("one\ntwo\n");
    output.ok().prints("one\ntwo\nend");
}

fn a_gibibyte_through_cat_arrives_intact(rig: &mut Rig) {
    let run = rig.container("cat").args(["/bin/cat"]);
    let mut ctr = Running::start_with(run.command().stdin(Stdio::piped()).stdout(Stdio::piped()));
    let (mut stdin, mut stdout) = (ctr.stdin(), ctr.stdout());
    let sender = thread::spawn(move || stream::send(&mut stdin, 1024 * MIB, 1).expect("the container reads"));
    let received = stream::receive(&mut stdout).expect("the container writes");
    assert_eq!(received, sender.join().expect("the sender does not panic"));
    ctr.finish().ok();
}

fn both_outputs_are_kept_apart_however_much_is_written(rig: &mut Rig) {
    let script = "yes out | head -c 8388608 & yes err | head -c 8388608 >&2; wait";
    let output = rig.container("two").sh(script).output().ok();
    let only = |bytes: &[u8], line: &[u8]| {
        bytes.len() == 8 << 20 && bytes.chunks_exact(4).all(|chunk| chunk == line)
    };
    assert!(only(&output.stdout, b"out\n"), "stdout is not what was written");
    assert!(only(&output.stderr, b"err\n"), "stderr is not what was written");
}

fn a_container_without_stdio_is_not_held_by_its_output(rig: &mut Rig) {
    let container =
        rig.container("yes").sh("read line; yes | head -c 1048576 && echo x >&2 && exit 5").detached();
    container.wait_for("STOPPED");
    assert_eq!(container.delete(), 5);
}

fn a_terminal_has_its_size_and_can_be_resized(rig: &mut Rig) {
    // ctr itself sets the size once at the start: that may be seen as a change, too.
    let script = "trap 'stty size; test \"$(stty size)\" = \"25 81\" || exit 4' WINCH; \
                  stty size; echo ready; while :; do sleep 0.1; done";
    let run = rig.container("tty").switch("--tty").sh(script);
    let mut terminal = Terminal::run(&mut run.command(), (81, 25));
    terminal.expect("25 81");
    terminal.expect("ready");
    terminal.resize((132, 43));
    terminal.expect("43 132");
    assert_eq!(terminal.finish(), 4);
}

fn keys_that_mean_signals_work_on_a_terminal(rig: &mut Rig) {
    let script = "trap 'echo got INT; exit 6' INT; read line; echo \"read <$line>\"; \
                  while :; do sleep 0.1; done";
    let run = rig.container("keys").switch("--tty").sh(script);
    let mut terminal = Terminal::run(&mut run.command(), (80, 24));
    terminal.type_in("hello\n");
    terminal.expect("read <hello>");
    terminal.type_in("\u{3}");
    terminal.expect("got INT");
    assert_eq!(terminal.finish(), 6);
}

fn a_further_process_can_have_a_terminal(rig: &mut Rig) {
    let container = rig.container("base").args(["/bin/sleep", "600"]).detached();
    // ctr sets the size after the start, and forwards a new one some time after its own terminal has it.
    let script = "tty; until stty size 2>&1 | grep '30 90'; do sleep 0.1; done; \
                  until stty size | grep '50 100'; do sleep 0.1; done; exit 3";
    let mut exec = container.exec_command("tty", &["--tty"], &["/bin/sh", "-c", script]);
    let mut terminal = Terminal::run(&mut exec, (90, 30));
    terminal.expect("/dev/pts/");
    terminal.expect("30 90");
    terminal.resize((100, 50));
    terminal.expect("50 100");
    assert_eq!(terminal.finish(), 3);
    container.remove();
}

#[test]
fn a_slow_reader_slows_the_container_and_not_fills_the_shim() {
    let rig = Rig::vmctr();
    let run = rig.container("yes").args(["/bin/dd", "if=/dev/zero", "bs=1M", "count=512"]);
    let id = run.id().to_owned();
    let mut ctr = Running::start_with(run.command().stdin(Stdio::null()).stdout(Stdio::piped()));
    let mut stdout = ctr.stdout();
    // Long enough for a shim that buffers without bound to take hundreds of MiB.
    thread::sleep(Duration::from_secs(15));
    let processes = rig.inspect(&id)["processes"].as_array().expect("a list").clone();
    let shim = processes.iter().find(|process| process["role"] == "shim").expect("a shim");
    let pid = u32::try_from(shim["pid"].as_u64().expect("a number")).expect("a process ID");
    let private = proc::rollup(pid, "Private_Dirty:").expect("the shim runs");
    assert!(private < 64 * MIB, "the shim holds {} MiB", private / MIB);
    assert_eq!(stream::receive(&mut stdout).expect("readable").bytes, 512 * MIB);
    ctr.finish().ok();
}
