//! Which devices a container may use: a BPF program on its group, made from the spec's rules.
//!
//! Of all rules that match a device, the last one to name an access (mknod, read, write) decides it. The
//! program asks them last first and strikes out what a rule allows:
//!
//! ```text
//!   r2 = type, r3 = accesses still to decide, r4 = major, r5 = minor
//!   for each rule, last first:   if type, major, minor fit:
//!                                  allow:  r3 &= !accesses; if r3 == 0 return 1
//!                                  deny:   if r3 & accesses return 0
//!   return 0
//! ```
//!
//! The kernel takes long to check and compile a program, above all on an emulated CPU, and containers rarely differ
//! in their rules: the last program stays loaded, in a template's memory too.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use libcontainer::oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};

use crate::sys::{BpfInstruction as Instruction, load_device_program};

// Access and type bits of struct bpf_cgroup_dev_ctx (linux/bpf.h).
const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const BLOCK: u32 = 1;
const CHARACTER: u32 = 2;

// Instruction codes (linux/bpf.h, bpf_common.h): class | source or size | operation or mode.
const LOAD_WORD: u8 = 0x61; // LDX | W | MEM
const MOVE_REGISTER: u8 = 0xbc; // ALU | X | MOV
const MOVE: u8 = 0xb7; // ALU64 | K | MOV
const AND: u8 = 0x54; // ALU | K | AND
const SHIFT_RIGHT: u8 = 0x74; // ALU | K | RSH
const JUMP_EQUAL: u8 = 0x15; // JMP | K | JEQ
const JUMP_NOT_EQUAL: u8 = 0x55; // JMP | K | JNE
const EXIT: u8 = 0x95; // JMP | EXIT

// Registers; R1 holds the context at the start, R0 the answer.
const R0: u8 = 0;
const R1: u8 = 1;
const TYPE: u8 = 2;
const LEFT: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

/// Rules of one container; more would be no container's.
const MAX_RULES: usize = 512;

/// A rule; `None` fits any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

/// The rules cannot be turned into a program.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RuleError {
    #[error("{0} device rules; at most {MAX_RULES} are possible")]
    TooMany(usize),
    #[error("a device rule names access {0:?}; r, w and m are possible")]
    Access(String),
    #[error("a device rule names number {0}")]
    Number(i64),
}

/// What every container may use, as with other runtimes: creating nodes, and the devices in its /dev.
const DEFAULTS: [Rule; 10] = [
    Rule { allow: true, kind: None, major: None, minor: None, access: MKNOD },
    default_device(1, Some(3)), // null
    default_device(1, Some(5)), // zero
    default_device(1, Some(7)), // full
    default_device(1, Some(8)), // random
    default_device(1, Some(9)), // urandom
    default_device(5, Some(0)), // tty
    default_device(5, Some(1)), // console
    default_device(5, Some(2)), // ptmx
    default_device(136, None),  // pts/*
];

const fn default_device(major: u32, minor: Option<u32>) -> Rule {
    Rule { allow: true, kind: Some(CHARACTER), major: Some(major), minor, access: MKNOD | READ | WRITE }
}

/// The program for a container's rules and device nodes; denies what nothing allows.
pub fn program(rules: &[LinuxDeviceCgroup], nodes: &[LinuxDevice]) -> Result<Vec<Instruction>, RuleError> {
    let count = rules.len() + nodes.len();
    if count > MAX_RULES {
        return Err(RuleError::TooMany(count));
    }
    let mut all = rules.iter().map(Rule::parse).collect::<Result<Vec<_>, _>>()?;
    all.extend(DEFAULTS);
    for node in nodes {
        all.push(Rule::node(node)?);
    }
    let mut program = prologue();
    all.iter().rev().for_each(|rule| rule.emit(&mut program));
    program.extend([instruction(MOVE, R0, 0, 0, 0), instruction(EXIT, 0, 0, 0, 0)]);
    Ok(program)
}

/// A program that the kernel has checked and compiled.
#[derive(Debug)]
pub struct Loaded {
    program: Vec<Instruction>,
    file: OwnedFd,
}

impl Loaded {
    /// The `last` one if that is the same program, else a new one.
    pub fn of(program: Vec<Instruction>, last: Option<Arc<Self>>) -> io::Result<Arc<Self>> {
        match last.filter(|last| last.program == program) {
            Some(last) => Ok(last),
            None => Ok(Arc::new(Self { file: load_device_program(&program)?, program })),
        }
    }
}

impl AsFd for Loaded {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

const fn instruction(code: u8, target: u8, source: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: source << 4 | target, offset, immediate }
}

fn prologue() -> Vec<Instruction> {
    vec![
        instruction(LOAD_WORD, TYPE, R1, 0, 0),
        instruction(MOVE_REGISTER, LEFT, TYPE, 0, 0),
        instruction(AND, TYPE, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT, LEFT, 0, 0, 16),
        instruction(LOAD_WORD, MAJOR, R1, 4, 0),
        instruction(LOAD_WORD, MINOR, R1, 8, 0),
    ]
}

impl Rule {
    fn parse(rule: &LinuxDeviceCgroup) -> Result<Self, RuleError> {
        Ok(Self {
            allow: rule.allow(),
            kind: rule.typ().and_then(kind),
            major: number(rule.major())?,
            minor: number(rule.minor())?,
            access: access(rule.access().as_deref())?,
        })
    }

    fn node(node: &LinuxDevice) -> Result<Self, RuleError> {
        Ok(Self {
            allow: true,
            kind: kind(node.typ()),
            major: number(Some(node.major()))?,
            minor: number(Some(node.minor()))?,
            access: MKNOD | READ | WRITE,
        })
    }

    fn emit(&self, program: &mut Vec<Instruction>) {
        let mut body = self.verdict();
        // Each mismatch jumps over the rest of the rule.
        for (register, wanted) in [(MINOR, self.minor), (MAJOR, self.major), (TYPE, self.kind)] {
            if let Some(wanted) = wanted {
                // A rule has at most nine instructions.
                let rest = body.len() as i16;
                body.insert(0, instruction(JUMP_NOT_EQUAL, register, 0, rest, wanted.cast_signed()));
            }
        }
        program.extend(body);
    }

    fn verdict(&self) -> Vec<Instruction> {
        let access = self.access.cast_signed();
        let answer = |allow| [instruction(MOVE, R0, 0, 0, allow), instruction(EXIT, 0, 0, 0, 0)];
        let mut verdict = if self.allow {
            vec![instruction(AND, LEFT, 0, 0, !access), instruction(JUMP_NOT_EQUAL, LEFT, 0, 2, 0)]
        } else {
            vec![
                instruction(MOVE_REGISTER, SCRATCH, LEFT, 0, 0),
                instruction(AND, SCRATCH, 0, 0, access),
                instruction(JUMP_EQUAL, SCRATCH, 0, 2, 0),
            ]
        };
        verdict.extend(answer(i32::from(self.allow)));
        verdict
    }
}

/// `None` for any type.
fn kind(kind: LinuxDeviceType) -> Option<u32> {
    match kind {
        LinuxDeviceType::B => Some(BLOCK),
        LinuxDeviceType::C | LinuxDeviceType::U => Some(CHARACTER),
        LinuxDeviceType::P | LinuxDeviceType::A => None,
    }
}

/// `None`, and negative as the spec writes it, for any number.
fn number(number: Option<i64>) -> Result<Option<u32>, RuleError> {
    match number {
        None => Ok(None),
        Some(number) if number < 0 => Ok(None),
        // The comparison sign-extends its operand: larger numbers do not exist anyway.
        Some(number) => {
            i32::try_from(number).map(|n| Some(n.cast_unsigned())).map_err(|_| RuleError::Number(number))
        }
    }
}

fn access(access: Option<&str>) -> Result<u32, RuleError> {
    let Some(letters) = access.filter(|letters| !letters.is_empty()) else {
        return Ok(MKNOD | READ | WRITE);
    };
    letters.chars().try_fold(0, |bits, letter| match letter {
        'm' => Ok(bits | MKNOD),
        'r' => Ok(bits | READ),
        'w' => Ok(bits | WRITE),
        _ => Err(RuleError::Access(letters.to_owned())),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use libcontainer::oci_spec::runtime::LinuxDeviceBuilder;
    use proptest::prelude::*;

    /// Just enough of BPF to run what [`program`] makes.
    fn run(program: &[Instruction], context: [u32; 3]) -> bool {
        let (mut registers, mut at) = ([0_u64; 11], 0_usize);
        loop {
            let step = program[at];
            let (target, source) = (usize::from(step.registers & 15), usize::from(step.registers >> 4));
            let immediate = step.immediate.cast_unsigned();
            at += 1;
            match step.code {
                LOAD_WORD => registers[target] = context[step.offset as usize / 4].into(),
                MOVE_REGISTER => registers[target] = registers[source] & 0xffff_ffff,
                MOVE => registers[target] = immediate.into(),
                AND => registers[target] = u64::from(registers[target] as u32 & immediate),
                SHIFT_RIGHT => registers[target] = u64::from(registers[target] as u32 >> immediate),
                JUMP_EQUAL if registers[target] == u64::from(immediate) => at += step.offset as usize,
                JUMP_NOT_EQUAL if registers[target] != u64::from(immediate) => at += step.offset as usize,
                JUMP_EQUAL | JUMP_NOT_EQUAL => {}
                EXIT => return registers[0] == 1,
                other => panic!("unknown code {other:#x}"),
            }
        }
    }

    fn rule(allow: bool, typ: &str, major: i64, minor: i64, access: &str) -> LinuxDeviceCgroup {
        serde_json::from_value(serde_json::json!({
            "allow": allow, "type": typ, "major": major, "minor": minor, "access": access
        }))
        .unwrap()
    }

    fn allowed(rules: &[LinuxDeviceCgroup], kind: u32, major: u32, minor: u32, access: u32) -> bool {
        run(&program(rules, &[]).unwrap(), [access << 16 | kind, major, minor])
    }

    #[test]
    fn without_rules_only_the_defaults_are_open() {
        assert!(allowed(&[], CHARACTER, 1, 3, READ | WRITE));
        assert!(allowed(&[], CHARACTER, 136, 77, READ | WRITE));
        assert!(allowed(&[], BLOCK, 254, 0, MKNOD));
        assert!(!allowed(&[], BLOCK, 254, 0, READ));
        assert!(!allowed(&[], CHARACTER, 1, 11, READ));
        assert!(!allowed(&[], CHARACTER, 1, 1, MKNOD | WRITE));
    }

    #[test]
    fn a_later_rule_wins_access_by_access() {
        let rules = [rule(false, "a", -1, -1, "rwm"), rule(true, "c", 1, 11, "r")];
        assert!(allowed(&rules, CHARACTER, 1, 11, READ));
        assert!(!allowed(&rules, CHARACTER, 1, 11, READ | WRITE));
        let privileged = [rule(false, "a", -1, -1, "rwm"), rule(true, "a", -1, -1, "rwm")];
        assert!(allowed(&privileged, BLOCK, 254, 0, READ | WRITE | MKNOD));
        let but = [rule(true, "a", -1, -1, "rwm"), rule(false, "b", 254, -1, "w")];
        assert!(allowed(&but, BLOCK, 254, 1, READ));
        assert!(!allowed(&but, BLOCK, 254, 1, WRITE));
    }

    #[test]
    fn a_device_node_can_be_used() {
        let fuse =
            LinuxDeviceBuilder::default().path("/dev/fuse").typ(LinuxDeviceType::C).major(10).minor(229);
        let deny = [rule(false, "a", -1, -1, "rwm")];
        let program = program(&deny, &[fuse.build().unwrap()]).unwrap();
        assert!(run(&program, [(READ | WRITE) << 16 | CHARACTER, 10, 229]));
        assert!(!run(&program, [READ << 16 | CHARACTER, 10, 200]));
    }

    #[test]
    fn nonsense_is_refused() {
        assert_eq!(program(&[rule(true, "c", 1, 3, "x")], &[]), Err(RuleError::Access("x".to_owned())));
        assert_eq!(program(&[rule(true, "c", 1 << 40, 3, "r")], &[]), Err(RuleError::Number(1 << 40)));
        let many = vec![rule(true, "c", 1, 3, "r"); MAX_RULES + 1];
        assert_eq!(program(&many, &[]), Err(RuleError::TooMany(MAX_RULES + 1)));
    }

    fn any_rule() -> impl Strategy<Value = Rule> {
        let number = || prop::option::of(0..3_u32);
        (any::<bool>(), prop::option::of(1..3_u32), number(), number(), 1..8_u32)
            .prop_map(|(allow, kind, major, minor, access)| Rule { allow, kind, major, minor, access })
    }

    fn decide(rules: &[Rule], kind: u32, major: u32, minor: u32, access: u32) -> bool {
        let fits = |rule: &&Rule| {
            rule.kind.is_none_or(|it| it == kind)
                && rule.major.is_none_or(|it| it == major)
                && rule.minor.is_none_or(|it| it == minor)
        };
        [MKNOD, READ, WRITE].into_iter().filter(|bit| access & bit != 0).all(|bit| {
            rules.iter().rev().filter(fits).find(|rule| rule.access & bit != 0).is_some_and(|rule| rule.allow)
        })
    }

    proptest! {
        #[test]
        fn the_program_decides_as_the_rules_say(
            rules in prop::collection::vec(any_rule(), 0..8),
            kind in 1..3_u32, major in 0..3_u32, minor in 0..3_u32, access in 1..8_u32,
        ) {
            let mut program = prologue();
            rules.iter().rev().for_each(|rule| rule.emit(&mut program));
            program.extend([instruction(MOVE, R0, 0, 0, 0), instruction(EXIT, 0, 0, 0, 0)]);
            prop_assert_eq!(
                run(&program, [access << 16 | kind, major, minor]),
                decide(&rules, kind, major, minor, access)
            );
        }
    }
}
