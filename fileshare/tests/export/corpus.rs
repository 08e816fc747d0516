//! The fuzz target's corpus, and random neighbours of it, as an ordinary test.

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;

#[path = "../../fuzz/reply.rs"]
mod reply;

fn corpus() -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/reply");
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    paths.map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

#[test]
fn the_corpus_runs() {
    let corpus = corpus();
    assert!(corpus.len() >= 10, "the corpus is missing");
    corpus.iter().for_each(|(_, input)| reply::run(input));
}

/// The inputs named so are answers that pass: else the fuzzer would start from what is refused at once.
#[test]
fn honest_answers_of_the_corpus_pass() {
    let honest = ["lookup", "lookup-whole", "opendir-read", "opendir-read-layers", "find", "readdirplus"];
    for (path, input) in corpus() {
        let name = path.file_name().unwrap().to_str().unwrap();
        if honest.contains(&name) {
            assert!(reply::passes(&input), "{name}");
        }
        if ["lookup-own", "lookup-whole-file", "lookup-whole-nowhere", "find-few", "find-none"]
            .contains(&name)
        {
            assert!(!reply::passes(&input), "{name}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn any_bytes_run(input in prop::collection::vec(any::<u8>(), 0..600), opcode in 0u32..60, size in 0u64..600) {
        let mut framed = Vec::new();
        framed.extend_from_slice(&opcode.to_le_bytes());
        framed.extend_from_slice(&[0; 4]);
        framed.extend_from_slice(&size.to_le_bytes());
        framed.extend_from_slice(&(input.len() as u32 + 16).to_le_bytes());
        framed.extend_from_slice(&[0; 4]);
        framed.extend_from_slice(&2u64.to_le_bytes());
        framed.extend_from_slice(&input);
        reply::run(&framed);
    }

    #[test]
    fn neighbours_of_the_corpus_run(pick: prop::sample::Index, at: prop::sample::Index, byte: u8) {
        let corpus = corpus();
        let mut input = pick.get(&corpus).1.clone();
        if !input.is_empty() {
            let at = at.index(input.len());
            input[at] = byte;
        }
        reply::run(&input);
    }
}
